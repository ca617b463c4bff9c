"""Predicts how a step scales with the number of GPUs, and compares a prediction with a measurement.

    python -m benchmarks.scale                                  step times on 1 to 50 H100s
    torchrun --nproc-per-node 2 -m benchmarks.scale             what the processes measure here

The prediction adds the time of one GPU's share of the views to that of the reductions. Operations
and bytes are counted; the speeds in `H100` and `LINKS` are assumed. Under torchrun both are
measured: a process alone with its share of the views, and reductions of the same sizes. The step of
all processes is then timed beside their sum.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, provenance, rows
from benchmarks.terminal import lenient

GPUS = (1, 2, 4, 8, 16, 32, 50)
VIEWS, IMAGES = 50, 20
FORWARD, BACKWARD = 3, 5  # passes of a step with schedule="shared_forward"
REDUCED = (1, 2, 2)  # gradients in the reduction of each stage: G_w, then twice G_d and dL_t
PAYS = 1.2  # what doubling the GPUs should gain
# what torchrun's processes time
ALONE, SHARE = "a process alone, all views", "a process alone, its share"
REDUCTIONS, TOGETHER = "the reductions of a step", "all processes together"


@dataclass(frozen=True)
class Speed:
    """Of a GPU: the operations a second that convolutions and products reach, and a launch."""

    flops: float
    launch: float  # seconds that an operator keeps the host busy


@dataclass(frozen=True)
class Link:
    """Between GPUs: the bytes a second of an all_reduce, and the seconds of each of its rounds."""

    bandwidth: float
    latency: float

    def seconds(self, nbytes: int, gpus: int) -> float:
        """Return the time of an all_reduce, in which each GPU sends 2 (R - 1) / R of its bytes."""
        rounds = 2 * (gpus - 1).bit_length()
        return self.latency * rounds + 2 * (gpus - 1) / gpus * nbytes / self.bandwidth


H100 = Speed(flops=30e12, launch=6e-6)  # float32 without TF32
LINKS = {
    "NVLink": Link(bandwidth=300e9, latency=5e-6),
    "100 Gb/s Ethernet": Link(bandwidth=11e9, latency=30e-6),
}


@dataclass(frozen=True)
class Load:
    """What a step asks for."""

    flops: float  # of a forward pass of one image
    operators: tuple[int, int]  # of a forward and of a backward pass, whatever its size
    gradient: int  # bytes
    statistics: int  # bytes of BatchNorm's sums

    def seconds(self, gpu: Speed, views: int) -> float:
        """Return the time of the passes over `views` views, one pass in each stage."""
        forward, backward = self.operators
        host = gpu.launch * (FORWARD * forward + BACKWARD * backward)
        work = (FORWARD + 2 * BACKWARD) * self.flops * views * IMAGES / gpu.flops
        return max(host, work)

    def reductions(self) -> list[int]:
        """Return the bytes of each reduction of a step."""
        sizes = [count * self.gradient for count in REDUCED]
        return sizes + [self.statistics] * (self.statistics > 0)


class Operators(TorchDispatchMode):
    """Counts the operators that compute or copy something, each a kernel on a GPU."""

    # they compute nothing, or look at values that are on the CPU
    FREE = ("view", "t.", "transpose", "permute", "expand", "detach", "unsqueeze", "alias", "slice",
            "select", "split", "_unsafe_view", "squeeze", "unbind", "empty", "new_empty",
            "as_strided", "profiler", "_local_scalar", "aminmax", "min.", "max.", "is_pinned",
            "lift")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def load_of(make: Callable[[], nn.Module], size: int) -> Load:
    """Count on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model, images = make(), torch.empty(2, 3, size, size)
    with FlopCounterMode(display=False) as flops:
        model(images)
    with Operators() as forward:
        loss = model(images).sum()
    with Operators() as backward:
        loss.backward()
    gradient = sum(p.numel() * p.element_size() for p in model.parameters())
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    statistics = sum(8 * (2 * m.num_features + 1) for m in norms)
    counted = (forward.calls.total(), backward.calls.total())
    return Load(flops.get_total_flops() / len(images), counted, gradient, statistics)


def resnet18() -> nn.Module:
    from benchmarks.paper.networks import resnet18

    return resnet18()[0]


def vit_large() -> nn.Module:
    from torchvision.models import vit_l_16

    made = vit_l_16()
    made.heads = nn.Identity()
    return made


NETWORKS = {"ResNet18 at 32×32": (resnet18, 32), "ViT-L/16 at 224×224": (vit_large, 224)}


# ---- the table ----


def predictions(load: Load) -> dict[str, dict[int, float]]:
    """Return the seconds of a step by link and number of GPUs."""
    return {
        name: {
            gpus: load.seconds(H100, -(-VIEWS // gpus))
            + (gpus > 1) * sum(link.seconds(nbytes, gpus) for nbytes in load.reductions())
            for gpus in GPUS
        }
        for name, link in LINKS.items()
    }


def last_that_pays(seconds: dict[int, float]) -> int:
    """Return the number of GPUs up to which each doubling gains a factor of `PAYS`."""
    best = GPUS[0]
    for fewer, more in zip(GPUS, GPUS[1:], strict=False):
        if seconds[fewer] / seconds[more] < PAYS:
            break
        best = more
    return best


def report() -> Iterator[str]:
    yield (
        f"Predicted, in ms a step (and times as fast as one GPU): H100s, {VIEWS} views of {IMAGES} "
        "images, float32,"
    )
    yield 'shared_forward, shard="views", no CUDA graph. With 64 GPUs some would have no view.'
    for network, (make, size) in NETWORKS.items():
        load = load_of(make, size)
        found = predictions(load)
        yield ""
        yield (
            f"**{network}**: {load.flops / 1e9:.3g} GFLOP a forward pass of an image, "
            f"{load.operators[0]} operators forward and {load.operators[1]} backward, "
            f"{sum(load.reductions()) / 1e6:,.0f} MB reduced a step"
        )
        yield ""
        yield "| GPUs | " + " | ".join(found) + " |"
        yield "| ---: |" + " ---: |" * len(found)
        for gpus in GPUS:
            cells = [f"{s[gpus] * 1e3:,.1f} ({s[1] / s[gpus]:.1f} ×)" for s in found.values()]
            yield f"| {gpus} | " + " | ".join(cells) + " |"
        yield ""
        pays = ", ".join(f"{last_that_pays(s)} by {name}" for name, s in found.items())
        yield f"Doubling them gains {PAYS} × or more up to {pays}."


# ---- what torchrun's processes measure ----


@contextmanager
def recorded_reductions(found: list[tuple[int, torch.dtype]]) -> Iterator[None]:
    """Record elements and type of each all_reduce."""
    plain = distributed.all_reduce

    def noted(tensor: Tensor, *args, **options):
        found.append((tensor.numel(), tensor.dtype))
        return plain(tensor, *args, **options)

    with patch.object(distributed, "all_reduce", noted):
        yield


def best_seconds(call: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """Return the shortest time of a call that all processes make at once; the slowest decides."""
    found = []
    for _ in range(times):
        distributed.barrier()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=device)
        distributed.all_reduce(took, distributed.ReduceOp.MAX)
        found.append(took.item())
    return min(found)


def measured() -> tuple[dict[str, float], int]:
    """Time a step of all processes, and what it is predicted to consist of.

    Returns the seconds by name, and the bytes of all reductions.
    """
    from benchmarks import test_step as setting
    from bld_ext import BLDOptimizer

    device = measure.DEVICE
    share = -(-setting.VIEWS // distributed.get_world_size())
    images, labels = setting.batch()

    def stepping(views: int, per_pass: int, group: object) -> Callable[[], Tensor]:
        optimizer = BLDOptimizer(
            setting.model(), setting.LR, views=views, views_per_pass=per_pass,
            augment=setting.AUGMENT, schedule="shared_forward", process_group=group,
        )  # fmt: skip
        for _ in range(3):  # the first two batches are compared
            optimizer.step(images, labels)
        return lambda: optimizer.step(images, labels)

    together = stepping(setting.VIEWS, share, distributed.group.WORLD)
    sent: list[tuple[int, torch.dtype]] = []
    with recorded_reductions(sent):
        together()
    tensors = [torch.zeros(count, dtype=dtype, device=device) for count, dtype in sent]
    seconds = {
        ALONE: best_seconds(stepping(setting.VIEWS, setting.VIEWS, False), device),
        SHARE: best_seconds(stepping(share, share, False), device),
        REDUCTIONS: best_seconds(lambda: [distributed.all_reduce(t) for t in tensors], device),
        TOGETHER: best_seconds(together, device),
    }
    return seconds, sum(t.numel() * t.element_size() for t in tensors)


def describe(seconds: dict[str, float], nbytes: int) -> Iterator[str]:
    """The lines that rank 0 prints."""
    count, backend = distributed.get_world_size(), distributed.get_backend()
    yield f"{count} processes, {backend}, {measure.DEVICE}, {torch.get_num_threads()} threads each"
    for name, found in seconds.items():
        yield f"{name:<32} {1e3 * found:9.2f} ms"
    yield f"{'bytes of the reductions':<32} {nbytes / 1e6:9.2f} MB"
    predicted = seconds[SHARE] + seconds[REDUCTIONS]
    yield f"{'measured / predicted':<32} {seconds[TOGETHER] / predicted:9.2f}"
    yield f"{'times as fast as alone':<32} {seconds[ALONE] / seconds[TOGETHER]:9.2f}"


def keep(file: Path, seconds: dict[str, float], nbytes: int) -> None:
    """Add a row for each time, as `pytest --rows` does."""
    from benchmarks import test_step as setting

    group = f"{distributed.get_world_size()} processes, step, {setting.NETWORK}"
    for name, found in seconds.items():
        info = {"us": found * 1e6, "bytes": nbytes, "backend": distributed.get_backend()}
        row = {"test": None, "group": group, "params": {"op": "processes", "name": name}}
        row |= {"extra_info": measure.machine() | info, "commit": provenance.commit()}
        row |= {"versions": provenance.versions(), "date": time.strftime("%Y-%m-%d %H:%M:%S")}
        rows.append(file, row)


@lenient
def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, help="also add what is measured to this file")
    parser.add_argument("--smallest", action="store_true", help="two views, to try it out")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        print("\n".join(report()))
        return 0
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    measure.SMALLEST = args.smallest
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        seconds, nbytes = measured()
        if distributed.get_rank() == 0:
            print("\n".join(describe(seconds, nbytes)))
            if args.rows:
                keep(args.rows, seconds, nbytes)
    finally:
        distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
