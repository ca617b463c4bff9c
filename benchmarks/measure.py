"""Measures calls for the benchmarks: their time, bytes a second, and the memory they add.

On a CPU pytest-benchmark times plain calls. On a GPU a round is one replay of a CUDA graph of many
calls. Launches then cost as much as in a captured step. The inputs rotate through more memory than
the second-level cache holds, so every byte comes from memory.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CACHE_BYTES = 200e6  # larger than any second-level cache
BUSY_SECONDS = 0.4  # time of work after which an idle GPU has reached its full clock
SMALLEST = False  # set by pytest's --smallest, before the benchmarks are imported


def cases(every: dict) -> dict:
    """Return all cases or, with `--smallest`, the first, which is the smallest everywhere."""
    return dict([next(iter(every.items()))]) if SMALLEST else every


def calls_in_a_graph(nbytes: int, seconds: float = 0) -> int:
    """Return how many calls to record: enough to hide the start of a replay, but not slow to run.

    `seconds` is what the CPU needs to issue a call: a graph of many small kernels records slowly.
    """
    most = min(200, int(20e9 // max(1, nbytes)), int(0.2 / max(1e-6, seconds)))
    return max(5, most)


def copies(nbytes: int) -> int:
    """Return how many sets of inputs it takes for consecutive calls to miss the cache."""
    if DEVICE.type == "cpu":
        return 1
    return min(calls_in_a_graph(nbytes), 1 + int(3 * CACHE_BYTES // max(1, nbytes)))


def time_calls(
    benchmark, calls: Sequence[Callable[[], object]], nbytes: int, rounds: int | None = None
) -> float | None:
    """Return the median seconds of a call, or None if benchmarks are disabled and it runs once.

    Give `rounds` for calls that take seconds, or that wait for the device and cannot be recorded.
    """
    if rounds is not None:

        def finished():
            calls[0]()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        if DEVICE.type == "cuda" and benchmark.enabled:
            keep_busy(finished)
        benchmark.pedantic(finished, rounds=rounds, warmup_rounds=1)
        per_round = 1
    elif DEVICE.type == "cpu":
        benchmark(calls[0])
        per_round = 1
    else:
        count = calls_in_a_graph(nbytes, host_seconds(calls[0]))
        graph, per_round = capture(calls[:count], count)

        def replay():
            graph.replay()
            torch.cuda.synchronize()

        keep_busy(replay)
        benchmark.pedantic(replay, rounds=20)
    if benchmark.stats is None:
        return None
    return benchmark.stats.stats.median / per_round


def keep_busy(call: Callable[[], object]) -> None:
    """Repeat a call until the GPU, idle while Python prepared a row, is back at its full clock."""
    start = time.perf_counter()
    while time.perf_counter() - start < BUSY_SECONDS:
        call()


def capture(calls: Sequence[Callable[[], object]], count: int):
    """Return a CUDA graph of at least `count` calls in turn, and how many it holds."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, rounds = torch.cuda.CUDAGraph(), -(-count // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph, rounds * len(calls)


def launches(call: Callable[[], object]) -> int | None:
    """Return the number of kernels, copies and fills that one call launches on the GPU."""
    if DEVICE.type == "cpu":
        return None
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Return the peak bytes allocated during a call, beyond what was allocated before it."""
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
        del result
    events = profile.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, nbytes in sorted(sizes, key=lambda event: event[0]):
        now += nbytes
        peak = max(peak, now)
    return peak


class Dispatched(TorchDispatchMode):
    """Counts the operators that a call runs, those that wait for a GPU, and the bytes in and out.

    Operators that only make a view of a tensor cost nothing and are not counted.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.ops = self.waits = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            name = func.overloadpacket.__name__
            self.ops += 1
            self.waits += name in self.WAITS
            tensors = tree_flatten((args, kwargs, result))[0]
            self.bytes += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return result


@functools.cache
def copy_bandwidth(n: int | None = None) -> float:
    """Return the bytes that a copy reads and writes in a second, the upper bound of any kernel.

    On a CPU it copies n floats, which may stay in a cache between calls, as those of a kernel do.
    On a GPU, or without n, it copies far more than any cache holds.
    """
    if n is None or DEVICE.type == "cuda":
        n = 2**28 if DEVICE.type == "cuda" else 2**26
    source = torch.ones(n, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    for _ in range(12):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        times.append(time.perf_counter() - start)
    return 8 * n / statistics.median(times[2:])


def host_seconds(call: Callable[[], object]) -> float | None:
    """Return the seconds the CPU needs to issue one call to the GPU, after one that may compile."""
    if DEVICE.type == "cpu":
        return None
    call()
    times: list[float] = []
    while len(times) < 3 or (len(times) < 50 and sum(times) < 0.5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def record(
    benchmark,
    seconds: float | None,
    nbytes: int,
    call: Callable[[], object],
    copied: int | None = None,
) -> None:
    """Write everything that the table shows of a row into pytest-benchmark's JSON.

    `copied` is the number of floats in the copy it is compared with; see `copy_bandwidth`.
    """
    if seconds is None:
        return
    info = dict(us=seconds * 1e6, bytes=nbytes, gb_per_s=nbytes / seconds / 1e9)
    info["copy_gb_per_s"] = copy_bandwidth(copied) / 1e9
    info["host_us"] = None if (host := host_seconds(call)) is None else host * 1e6
    info["peak_extra_bytes"] = peak_extra_bytes(call)
    info["launches"] = launches(call)
    benchmark.extra_info.update(machine() | info)


def machine() -> dict[str, object]:
    """Return the device, the threads and the torch version of a measurement."""
    facts = dict(threads=torch.get_num_threads(), torch=torch.__version__)
    if DEVICE.type == "cpu":
        return facts | dict(device="cpu")
    try:
        facts["mhz"] = torch.cuda.clock_rate()
    except Exception:  # it needs pynvml, which raises errors of its own classes
        pass
    return facts | dict(device=torch.cuda.get_device_name())
