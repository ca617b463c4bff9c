"""Files with the state and the record of a run: written completely or not, and never executed."""

import hashlib
import io
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import torch

MARK = b"bld_ext run\n"
HEAD = len(MARK) + hashlib.sha256().digest_size  # the mark, then a digest of the rest of the file


class CheckpointError(Exception):
    """A file of a run could not be read or written; the message says what to do."""


class Checkpoint:
    """The file with the state of a run, saved every `every` seconds.

    `what` is everything the run depends on. The file of another run is refused, and so is a damaged
    one.
    """

    def __init__(self, path: Path, what: dict, every: float):
        self.path, self.what, self.every = Path(path), what, every
        self.written = time.monotonic()

    def exists(self) -> bool:
        return self.path.exists()

    def due(self) -> bool:
        return time.monotonic() - self.written >= self.every

    def save(self, state: dict) -> None:
        buffer = io.BytesIO()
        torch.save({"what": self.what, "state": state}, buffer)
        body = buffer.getvalue()
        write_whole(self.path, MARK + hashlib.sha256(body).digest() + body)
        self.written = time.monotonic()

    def load(self, device: str) -> dict:
        try:
            data = self.path.read_bytes()
            if not data.startswith(MARK):
                raise ValueError("not that of a run of this package")
            body = data[HEAD:]
            if data[len(MARK) : HEAD] != hashlib.sha256(body).digest():
                raise ValueError("damaged, or cut short")
            found = torch.load(io.BytesIO(body), map_location=device, weights_only=True)
            if not isinstance(found, dict):
                raise ValueError("not that of a run of this package")
            before, state = dict(found["what"]), dict(found["state"])
        except Exception as error:  # torch raises many classes of errors for other files
            raise CheckpointError(
                f"checkpoint {self.path}: not readable ({one_line(error)}). Remove it, or start "
                "without --resume"
            ) from error
        same_run(f"checkpoint {self.path}", before, self.what)
        return state


def save_record(file: Path, what: dict, record: dict) -> None:
    found = {"what": what, "record": record, "digest": _digest(what, record)}
    write_whole(file, json.dumps(found).encode() + b"\n")


def load_record(file: Path, what: dict) -> dict:
    """Return the record of a finished run."""
    try:
        found = json.loads(file.read_bytes())
        before, record = dict(found["what"]), dict(found["record"])
        if found["digest"] != _digest(before, record):
            raise ValueError("damaged")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not the record of a run, or damaged ({one_line(error)}); remove it"
        ) from error
    same_run(str(file), before, what)
    return record


def _digest(*parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def same_run(file: str, before: dict, now: dict) -> None:
    if changed := differences(before, now):
        raise CheckpointError(
            f"{file}: the configuration has changed: {changed}. Give it again as it was, or start "
            "without --resume"
        )


def write_whole(file: Path, data: bytes) -> None:
    """Write a file completely; after an interruption or on a full disk, the earlier one remains.

    The data go to another file, which is flushed to the disk and then renamed.
    """
    aside = file.with_name(f"{file.name}.new")
    try:
        with aside.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise unwritten(file, error) from error


def unwritten(file: Path, error: OSError) -> CheckpointError:
    kept = "the one before is whole" if file.exists() else "there is none before it"
    return CheckpointError(
        f"{file}: could not be written, perhaps for want of space ({one_line(error)}); {kept}. "
        "Free some, and go on with --resume"
    )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def differences(before: dict, now: dict) -> str:
    """Format what differs as "lr: 0.001 before, 0.002 now"; empty if nothing does."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{n}: {before.get(n)!r} before, {now.get(n)!r} now" for n in names)
