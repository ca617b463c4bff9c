"""The state of a run in a file: whole or not there, and never executed."""

import os
import time
from pathlib import Path

import torch

MARK = "bld_ext run"


class CheckpointError(Exception):
    """A file that a run cannot go on from; the message says what to do."""


class Checkpoint:
    """Written aside, flushed to the disk and renamed, so that a kill or a full disk leaves the one
    before. `what` is everything the run depends on; a file of another run is refused.
    """

    def __init__(self, path: Path, what: dict, every: float):
        self.path, self.what, self.every = Path(path), what, every
        self.written = time.monotonic()

    def exists(self) -> bool:
        return self.path.exists()

    def due(self) -> bool:
        return time.monotonic() - self.written >= self.every

    def save(self, state: dict) -> None:
        aside = self.path.with_name(f"{self.path.name}.new")
        try:
            with aside.open("wb") as file:
                torch.save({"mark": MARK, "what": self.what, "state": state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        except (OSError, RuntimeError) as error:  # torch's own, where its writer finds no space
            aside.unlink(missing_ok=True)
            kept = "the one before is whole" if self.path.exists() else "there is none before it"
            raise CheckpointError(
                f"checkpoint {self.path}: could not be written, perhaps for want of space "
                f"({one_line(error)}); {kept}. Free some, and go on with --resume"
            ) from error
        self.written = time.monotonic()

    def load(self, device: str) -> dict:
        remedy = "Remove it, or start without --resume"
        try:
            found = torch.load(self.path, map_location=device, weights_only=True)
        except Exception as error:  # torch raises many kinds for what is no file of its own
            raise CheckpointError(f"checkpoint {self.path}: not readable. {remedy}") from error
        whole = isinstance(found, dict) and found.get("mark") == MARK
        if not whole or not all(isinstance(found.get(k), dict) for k in ("what", "state")):
            raise CheckpointError(f"checkpoint {self.path}: not that of a run of this. {remedy}")
        if changed := differences(found["what"], self.what):
            raise CheckpointError(
                f"checkpoint {self.path}: the configuration has changed: {changed}. Give it again "
                "as it was, or start without --resume"
            )
        return found["state"]


def write_whole(file: Path, text: str) -> None:
    aside = file.with_name(f"{file.name}.new")
    aside.write_text(text)
    aside.replace(file)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def differences(before: dict, now: dict) -> str:
    """What differs, as "lr: 0.001 before, 0.002 now"; empty where nothing does."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{n}: {before.get(n)!r} before, {now.get(n)!r} now" for n in names)
