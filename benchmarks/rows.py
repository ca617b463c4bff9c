"""Keeps measured rows in a file, one JSON object a line, each written as soon as it is measured."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def append(path: Path, entry: dict) -> None:
    """Add a line. It is on the disk when this returns; if this raises, no part of it is."""
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
    """Return the rows of a .jsonl file, or of a JSON file that pytest-benchmark wrote.

    A last line that is incomplete, because its writing was interrupted, is left out.
    """
    if Path(path).suffix != ".jsonl":
        return json.loads(Path(path).read_text())["benchmarks"]
    lines = Path(path).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def so_far(path: Path) -> list[dict]:
    """Return the rows of a file, or none if it does not exist yet."""
    return read(path) if path.exists() else []


def mend(path: Path) -> None:
    """Remove an incomplete last line, so that the next line begins on its own."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def newest(rows: Iterable[dict]) -> list[dict]:
    """Return the last row measured of each test."""
    return list({(row["group"], str(sorted(row["params"].items()))): row for row in rows}.values())
