"""Measured rows in a file, one JSON object a line, each written as soon as it is measured."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def append(path: Path, entry: dict) -> None:
    """Add a line; it is on the disk when this returns, and no part of it where it raises."""
    with open(path, "ab") as file:
        before = file.seek(0, os.SEEK_END)
        try:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, before)
            raise


def read(path: Path) -> list[dict]:
    """The rows of a file of lines, or of one that pytest-benchmark wrote.

    A last line that was cut while it was written is left out.
    """
    if Path(path).suffix != ".jsonl":
        return json.loads(Path(path).read_text())["benchmarks"]
    lines = Path(path).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def so_far(path: Path) -> list[dict]:
    """The rows of a file that may not be there yet."""
    return read(path) if path.exists() else []


def mend(path: Path) -> None:
    """Remove a last line that was cut while it was written, so that the next one is whole."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def newest(rows: Iterable[dict]) -> list[dict]:
    """Of each test the row that was measured last."""
    return list({(row["group"], str(sorted(row["params"].items()))): row for row in rows}.values())
