"""Runs a command with a time limit; its output goes to a log and to a terminal, if any."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.provenance import ROOT

GRACE = 10  # seconds between asking a command to end and killing it
PACKING = 2  # seconds between two calls of `while_running`
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class Ended:
    status: str  # "done", "failed", "cut"
    code: int
    seconds: float
    output: bytes  # the last 4,000 bytes


def run(
    argv: tuple[str, ...],
    env: dict[str, str],
    limit: float,
    log,
    while_running: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a command until it ends or reaches its limit in seconds, or this process ends."""
    start = time.monotonic()
    child = subprocess.Popen(
        argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, process_group=0, preexec_fn=_end_with_parent,
    )  # fmt: skip
    seen = bytearray()
    reader = threading.Thread(target=_copy, args=(child.stdout, log, seen), daemon=True)
    reader.start()
    cut = False
    try:
        while child.poll() is None:
            if time.monotonic() - start > limit:
                cut = True
                _end(child)
                break
            try:
                child.wait(min(PACKING, max(0.05, limit - (time.monotonic() - start))))
            except subprocess.TimeoutExpired:
                while_running()
    except BaseException:
        _end(child)
        raise
    finally:
        reader.join(timeout=5)
        while_running()
    status = "cut" if cut else "failed" if child.returncode else "done"
    return Ended(status, child.returncode, time.monotonic() - start, bytes(seen))


def _end_with_parent() -> None:
    """Have Linux kill the process that was just started when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)


def _end(child: subprocess.Popen) -> None:
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            child.wait()
            return


def _copy(source, log, seen: bytearray) -> None:
    """Copy output to the log line by line, and of a progress bar only its last state."""
    look, line = sys.stdout.isatty(), b""
    while piece := source.read1(1 << 16):
        if look:
            sys.stdout.buffer.write(piece)
            sys.stdout.flush()
        *lines, line = (line + piece).split(b"\n")
        for text in lines:
            _note(text, log, seen)
    if line:
        _note(line, log, seen)


def _note(line: bytes, log, seen: bytearray) -> None:
    text = line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n"
    with suppress(OSError):  # a full disk does not stop the command
        log.write(text)
        log.flush()
    seen += text
    del seen[:-4000]
