"""What each schedule holds and takes: `python -m benchmarks.schedules`.

ResNet18 of torchvision at 32×32, 20 images, every view in one pass. Memory is the most that is
allocated at any moment of a stage beyond what was there before it, so activations count and the
network does not. The first task has nothing to distil.
"""

import argparse
import statistics
import time

import torch
import torchvision
from torch import nn

from benchmarks import measure
from bld_ext import BLDOptimizer, MultiHead

WAYS = {
    "two_forward": {},
    "two_forward, balance_in_backward": {"balance_in_backward": True},
    "two_forward, keep_gradients": {"keep_gradients": True},
    "shared_forward": {"schedule": "shared_forward"},
    "in_backward": {"schedule": "in_backward"},
}


def make_optimizer(tasks: int, views: int, options: dict) -> BLDOptimizer:
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    model = MultiHead(backbone, 512).to(measure.DEVICE)
    for _ in range(tasks):
        model.add_head(2)
    return BLDOptimizer(model, 1e-4, views=views, views_per_pass=views, **options)


def row(tasks: int, views: int, options: dict, repeat: int) -> tuple[int, int, int, float]:
    """Peak bytes of the warm-up and of a joint repetition, bytes held between steps, seconds."""
    optimizer = make_optimizer(tasks, views, options)
    images = torch.rand(20, 3, 32, 32, device=measure.DEVICE)
    labels = torch.randint(2, (20,), device=measure.DEVICE)
    wait = torch.cuda.synchronize if measure.DEVICE.type == "cuda" else lambda: None

    def warm_up():
        optimizer.warm_up(images, labels)

    def joint():
        optimizer.joint(images, labels)

    peaks = measure.peak_extra_bytes(warm_up), measure.peak_extra_bytes(joint)
    optimizer.release()
    times = []
    for _ in range(repeat + 1):
        wait()
        start = time.perf_counter()
        optimizer.step(images, labels)
        wait()
        times.append(time.perf_counter() - start)
    kept = optimizer.last.memory.get("kept_gradients", 0)
    return *peaks, kept, statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="steps that are timed")
    arguments = parser.parse_args()
    print(f"{measure.DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| task | schedule | warm-up | joint | held between steps | step |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for tasks in (1, 2):
        for name, options in WAYS.items():
            *peaks, seconds = row(tasks, arguments.views, options, arguments.repeat)
            megabytes = " | ".join(f"{nbytes / 1e6:.1f} MB" for nbytes in peaks)
            print(f"| {tasks} | {name} | {megabytes} | {1e3 * seconds:.0f} ms |", flush=True)


if __name__ == "__main__":
    main()
