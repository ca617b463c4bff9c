"""Several runs at a time, with one progress bar."""

import multiprocessing
import queue
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch
from tqdm import tqdm

from benchmarks.paper.experiment import run
from benchmarks.paper.methods import METHODS, Settings
from benchmarks.paper.networks import make_model
from benchmarks.paper.streams import load_dataset, make_stream

_worker: dict = {}  # what a worker process keeps from run to run


def _start_worker(dataset: str, root: str, device: str, threads: int, ticks) -> None:
    torch.set_num_threads(threads)
    _worker.update(dataset=load_dataset(dataset, root), device=device, ticks=ticks)


@contextmanager
def _deaf_to_ctrl_c():
    """Processes started inside never see Ctrl-C: it is for this one, which then ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_in_worker(method: str, settings: Settings, seed: int) -> dict:
    tick = _worker["ticks"].put
    return run(_worker["dataset"], method, settings, seed, _worker["device"], lambda: tick(1))


def preflight(
    dataset: str, root: str, methods: list[str], settings: Settings, seeds: list[int], device: str
) -> int:
    """Raise what a run would raise, before any work starts; returns the batches of all runs."""
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu or cuda")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: {device!r} is not there ({str(error).splitlines()[0]})"
        ) from None
    loaded = load_dataset(dataset, root)
    for method in methods:
        METHODS[method](make_model(settings.network, settings.momentum), settings, seeds[0])
    streams = (make_stream(loaded, settings.tasks, seed, settings.limit) for seed in seeds)
    batches = [t.batch_count(settings.batch_size) for stream in streams for t in stream]
    if not all(batches):
        raise ValueError("a task has fewer than 2 training images; give more, or fewer --tasks")
    return sum(batches) * len(methods)


def run_all(
    dataset: str,
    root: str,
    methods: list[str],
    settings: Settings,
    seeds: list[int],
    batches: int,
    device: str = "cpu",
    jobs: int = 1,
    threads: int = 1,
) -> list[dict]:
    """Every method on every seed, in `jobs` processes of `threads` threads each."""
    context = multiprocessing.get_context("spawn")
    with _deaf_to_ctrl_c():
        ticks = context.Manager().Queue()
    order = [(method, seed) for seed in seeds for method in methods]
    records = {}
    with (
        tqdm(total=batches, unit="batch", smoothing=0.05) as bar,
        ProcessPoolExecutor(
            min(jobs, len(order)), context, _start_worker, (dataset, root, device, threads, ticks)
        ) as pool,
    ):
        try:
            with _deaf_to_ctrl_c():
                futures = {pool.submit(_run_in_worker, m, settings, s): (m, s) for m, s in order}
            while len(records) < len(order):
                try:
                    bar.update(ticks.get(timeout=0.2))
                except queue.Empty:
                    done = [f for f in futures if f.done()]
                    records |= {futures[f]: f.result() for f in done}
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return [records[key] for key in order]
