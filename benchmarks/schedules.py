"""Measures the memory and time of each schedule: `python -m benchmarks.schedules`.

The network is torchvision's ResNet18 at 32×32, with 20 images. Memory is the peak of a stage beyond
what was allocated before it, so it includes activations but not the network. The joint stage is one
repetition. In the first task there is nothing to distil. Schedules take turns, step by step, and
the time of each is its minimum.
"""

import argparse
import sys
import time

import torch
import torchvision
from torch import nn

from benchmarks import measure
from benchmarks.terminal import lenient
from bld_ext import BLDOptimizer, MultiHead

WAYS = {
    "two_forward": {},
    "shared_forward": {"schedule": "shared_forward"},
    "in_backward": {"schedule": "in_backward"},
}
VIEWS_A_PASS = {"one": 1, "all": None}


def make_optimizer(tasks: int, views: int, per_pass: int | None, options: dict) -> BLDOptimizer:
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    model = MultiHead(backbone, 512).to(measure.DEVICE)
    for _ in range(tasks):
        model.add_head(2)
    return BLDOptimizer(model, 1e-4, views=views, views_per_pass=per_pass or views, **options)


class Row:
    """A schedule that learns one batch over and over."""

    def __init__(self, tasks: int, views: int, per_pass: int | None, options: dict):
        self.optimizer = make_optimizer(tasks, views, per_pass, options)
        device = measure.DEVICE
        self.batch = (
            torch.rand(20, 3, 32, 32, device=device),
            torch.randint(2, (20,), device=device),
        )
        self.seconds = float("inf")

    def peaks(self) -> tuple[int, int]:
        """Return the peak bytes of the warm-up and of a joint repetition."""
        found = [
            measure.peak_extra_bytes(lambda stage=stage: stage(*self.batch))
            for stage in (self.optimizer.warm_up, self.optimizer.joint)
        ]
        self.optimizer.release()
        return tuple(found)

    def step(self) -> None:
        wait = torch.cuda.synchronize if measure.DEVICE.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        self.optimizer.step(*self.batch)
        wait()
        self.seconds = min(self.seconds, time.perf_counter() - start)


@lenient
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5, help="steps that are timed")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2], help="heads there are")
    arguments = parser.parse_args()
    print(
        f"{measure.DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end=""
    )
    print(f"{arguments.views} views\n")
    print("| task | schedule | views a pass | warm-up | joint | step |")
    print("| ---: | --- | --- | ---: | ---: | ---: |")
    for tasks in arguments.tasks:
        rows = {
            (name, count): Row(tasks, arguments.views, per_pass, options)
            for name, options in WAYS.items()
            for count, per_pass in VIEWS_A_PASS.items()
        }
        peaks = {key: row.peaks() for key, row in rows.items()}
        for _ in range(arguments.repeat):
            for row in rows.values():
                row.step()
        for key, row in rows.items():
            megabytes = " | ".join(f"{nbytes / 1e6:.1f} MB" for nbytes in peaks[key])
            print(f"| {tasks} | {' | '.join(key)} | {megabytes} | {1e3 * row.seconds:.0f} ms |")


if __name__ == "__main__":
    sys.exit(main())
