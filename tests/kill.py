"""Kill a run at random moments, go on, and compare with a run that nobody killed.

python -m tests.kill --kills 50            # anywhere in a run
python -m tests.kill --kills 50 --slow     # most of them while a file is being written
python -m tests.kill --kills 10 --command  # the whole command, by several signals
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from benchmarks.paper import job
from benchmarks.paper.experiment import TIMES
from benchmarks.paper.methods import METHODS, Settings
from benchmarks.paper.streams import load_dataset

ROOT = Path(__file__).parents[1]
SETTINGS = Settings(
    "slim", 3e-3, 2, {"crop_padding": 1}, tasks=4, limit=60, offline_epochs=3, offline_batch=20
)
COMMAND = "--tasks 5 --views 2 --seeds 0 --jobs 1 --checkpoint-seconds 0".split()
HOW = ("kill", "kill-worker", "term", "int")  # ways of ending the command

# a server that has imported everything once starts a run within milliseconds
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["benchmarks.paper.job", "sklearn.datasets", "torchvision"])


def without_time(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in TIMES}


class Slow:
    """A file that takes its time, so that a kill finds a part of what is written."""

    def __init__(self, file):
        self.file = file

    def write(self, data: bytes) -> None:
        piece = len(data) // 8 + 1
        for start in range(0, len(data), piece):
            self.file.write(data[start : start + piece])
            self.file.flush()
            time.sleep(0.005)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def go_on(folder: Path, method: str, seed: int, slow: bool) -> None:
    """In a process of its own: as a worker of the job, from where the last one was killed."""
    torch.set_num_threads(1)
    if slow:
        plain = Path.open

        def slow_open(path, *mode, **options):
            file = plain(path, *mode, **options)
            return Slow(file) if path.suffix == ".new" else file

        Path.open = slow_open
    ticks = SimpleNamespace(put=lambda count: None)
    job._worker.update(dataset=load_dataset("digits"), device="cpu", ticks=ticks)
    job._run_in_worker(method, SETTINGS, seed, folder, True, 0.0)


def start(*arguments):
    process = SERVER.Process(target=go_on, args=arguments)
    process.start()
    return process


def kill_run(
    folder: Path, method: str, moments, seed: int = 0, slow: bool = False, tick=lambda: None
) -> tuple[dict, int, int]:
    """A run killed so many seconds after it last went on; its record, the kills that met it alive,
    and those of them that met it writing a file.
    """
    folder.mkdir(exist_ok=True)
    kills = amid = 0
    for seconds in moments:
        began = time.time()
        process = start(folder, method, seed, slow)
        process.join(seconds)
        if process.exitcode == 0:
            break
        assert process.exitcode is None, f"it did not go on after {kills} kills"
        process.kill()
        process.join()
        kills += 1
        amid += any(file.stat().st_mtime >= began for file in folder.glob("*.new"))
        tick()
    process = start(folder, method, seed, False)
    process.join()
    assert process.exitcode == 0, f"it did not go on after {kills} kills"
    left = [file.name for file in folder.iterdir()]
    assert left == [f"{method}-{seed}.json"], left
    record = json.loads((folder / left[0]).read_text())["record"]
    return without_time(record), kills, amid


def workers(pid: int) -> list[int]:
    """Processes that a job has started to run in."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return own


def kill_command(out: Path, ways, rng: random.Random, tick=lambda: None) -> list[dict]:
    """The whole command, ended in these ways one after the other, and then left alone."""
    command = [sys.executable, "-m", "benchmarks.paper", *COMMAND, "--methods", "bld"]
    command += ["--resume", "--out", str(out)]
    checkpoint = out / "runs" / "bld-0.pt"
    for how in ways:
        written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            # a shell that starts this in the background has its jobs ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == written:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.25))
        number = dict(term=signal.SIGTERM, int=signal.SIGINT).get(how, signal.SIGKILL)
        for pid in workers(process.pid) if how == "kill-worker" else [process.pid]:
            os.kill(pid, number)
        shown = process.communicate(timeout=30)[1].decode()
        expected = {"kill": -9, "kill-worker": 1}.get(how, 130)
        assert process.returncode == expected, (how, process.returncode, shown)
        assert "Traceback" not in shown, shown
        assert how == "kill" or "--resume" in shown, shown
        tick()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert [file.name for file in (out / "runs").iterdir()] == ["bld-0.json"]
    return [without_time(r) for r in json.loads((out / "results.json").read_text())["runs"]]


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.kill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--methods", default=",".join(METHODS), help="in turn, run by run")
    parser.add_argument("--seed", type=int, default=None, help="of the moments")
    parser.add_argument("--slow", action="store_true", help="files are written slowly")
    parser.add_argument("--command", action="store_true", help="kill the whole command")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed = args.seed if args.seed is not None else random.randrange(10**6)
    rng, methods = random.Random(seed), args.methods.split(",")
    kills = amid = runs = lost = 0
    known: dict[str, tuple] = {}  # the run that nobody kills, and its seconds
    with tqdm(total=args.kills, unit="kill") as bar, tempfile.TemporaryDirectory() as folder:
        while kills < args.kills:
            out, left = Path(folder) / str(runs), args.kills - kills
            if args.command:
                ways = [rng.choice(HOW) for _ in range(min(left, 3))]
                found, done = kill_command(out, ways, rng, bar.update), len(ways)
                if not known:
                    known["bld"] = (kill_command(Path(folder) / "whole", [], rng),)
                same = found == known["bld"][0]
            else:
                method = methods[runs % len(methods)]
                if method not in known:
                    start(Path(folder), method, 0, False).join()  # the server is there from now on
                    began = time.monotonic()
                    record = kill_run(Path(folder) / f"whole-{method}", method, [])[0]
                    known[method] = record, time.monotonic() - began
                longest = (1.5 if args.slow else 0.8) * known[method][1]
                moments = [rng.uniform(0, longest) for _ in range(left)]
                found, done, writing = kill_run(
                    out, method, moments, slow=args.slow, tick=bar.update
                )
                same, amid = found == known[method][0], amid + writing
            kills, runs, lost = kills + done, runs + 1, lost + (not same)
    print(
        f"{kills} kills in {runs} runs, {amid} amid a write: {lost} runs ended otherwise than one "
        f"that nobody killed (--seed {seed})"
    )
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
