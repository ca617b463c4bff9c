"""Runs several methods and seeds at a time in processes, with one progress bar."""

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.paper.checkpoint import load_record, one_line, save_record
from benchmarks.paper.experiment import conditions, run
from benchmarks.paper.methods import Method, Settings, make_learner
from benchmarks.paper.streams import Dataset, Task, load_dataset, make_stream

_worker: dict = {}  # what a worker process keeps between runs


def _end_with_parent() -> None:
    """End this worker if its job is killed; it would go on writing where the next job writes."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _start_worker(dataset: str, root: str, devices, threads: int, ticks) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    device = devices.get()
    use_device(device)
    _worker.update(dataset=load_dataset(dataset, root), device=device, ticks=ticks)


def use_device(device: str) -> None:
    """Initialise the device and make it current, as graphs and memory counters require."""
    if device.startswith("cuda"):
        torch.cuda.init()
        torch.cuda.set_device(device)


def devices_of(device: str) -> list[str]:
    """Return the devices of the runs: every GPU for "cuda", else the device itself."""
    if device != "cuda":
        return [device]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


@contextmanager
def _deaf_to_ctrl_c():
    """Start processes that ignore Ctrl-C; this process receives it and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_or_read(
    dataset: Dataset,
    method: str,
    settings: Settings,
    seed: int,
    device: str,
    tick: Callable[[int], object],
    folder: Path,
    resume: bool,
    every: float,
    begins: Callable[[], object] = lambda: None,
    process_group: object = False,
) -> dict:
    """Run, or read the record if an earlier job finished it; leave a JSON file in `folder`.

    `begins` is called before a run.
    """
    file, checkpoint = (folder / f"{method}-{seed}.{ending}" for ending in ("json", "pt"))
    what = conditions(dataset, method, settings, seed, device)
    if resume and file.exists():
        record = load_record(file, what)
        tick(record["batches"])
    else:
        begins()
        record = run(
            dataset, method, settings, seed, device, tick, checkpoint, resume, every, process_group
        )
        save_record(file, what, record)
    checkpoint.unlink(missing_ok=True)
    return record


def _run_in_worker(
    method: str, settings: Settings, seed: int, folder: Path, resume: bool, every: float
) -> dict:
    what, tick = (method, settings, seed, _worker["device"]), _worker["ticks"].put
    return run_or_read(_worker["dataset"], *what, tick, folder, resume, every)


@contextmanager
def locked(folder: Path):
    """Lock a folder, so that no other job writes to it meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("w")
    except OSError as error:
        raise ValueError(
            f"out: {folder} is no folder to write to ({one_line(error)}); give another --out"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out: another job is writing to {folder}; wait for it, or give another --out"
            ) from None
        yield


def count_batches(learner: Method, stream: list[Task]) -> int:
    counts = [learner.batch_count(task) for task in stream]
    return sum(counts) if all(counts) else 0


def preflight(
    dataset: str, root: str, methods: list[str], settings: Settings, seeds: list[int], device: str
) -> tuple[int, tuple[str, ...]]:
    """Raise the errors of a run before any work starts.

    Returns:
        The number of batches of all runs, and what the user should know of the dataset.
    """
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu or cuda")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: {device!r} is not there ({str(error).splitlines()[0]})"
        ) from None
    loaded = load_dataset(dataset, root)
    learners = [make_learner(method, settings, seeds[0]) for method in methods]
    streams = [make_stream(loaded, settings.tasks, seed, settings.limit) for seed in seeds]
    batches = [count_batches(learner, stream) for stream in streams for learner in learners]
    if not all(batches):
        raise ValueError("a task has fewer than 2 training images; give more, or fewer --tasks")
    notes = loaded.notes
    if loaded.classes < 2 * settings.tasks:
        notes += (
            f"tasks: {settings.tasks} tasks of {loaded.classes} classes leave some tasks a single "
            "class, whose accuracy is 100 % and which teaches nothing; give fewer --tasks",
        )
    return sum(batches), notes


def run_all(
    dataset: str,
    root: str,
    methods: list[str],
    settings: Settings,
    seeds: list[int],
    batches: int,
    folder: Path,
    devices: Sequence[str] = ("cpu",),
    jobs: int = 1,
    threads: int = 1,
    resume: bool = False,
    every: float = 120.0,
    arrived: Callable[[dict, list[dict]], None] = lambda record, records: None,
) -> list[dict]:
    """Run every method on every seed, in `jobs` processes of `threads` threads each.

    The processes take the `devices` in turn, one each. Runs go seed by seed, so that methods can be
    compared early. After each run `arrived` gets its record, and all records so far in that order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    ticks, places = context.Queue(), context.Queue()
    order = [(method, seed) for seed in seeds for method in methods]
    jobs = min(jobs, len(order))
    for device in islice(cycle(devices), jobs):
        places.put(device)
    records: dict[tuple[str, int], dict] = {}
    worker = (dataset, root, places, threads, ticks)
    with (
        tqdm(total=batches, unit="batch", smoothing=0.05) as bar,
        ProcessPoolExecutor(jobs, context, _start_worker, worker) as pool,
    ):
        try:
            with _deaf_to_ctrl_c():
                futures = {
                    pool.submit(_run_in_worker, m, settings, s, folder, resume, every): (m, s)
                    for m, s in order
                }
            while futures or not ticks.empty():
                with suppress(queue.Empty):
                    bar.update(ticks.get(timeout=0.2))
                for future in [f for f in futures if f.done()]:
                    key = futures.pop(future)
                    records[key] = future.result()
                    with bar.external_write_mode():
                        arrived(records[key], [records[k] for k in order if k in records])
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return [records[key] for key in order]
