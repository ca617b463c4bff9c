"""Shows where the time of one step goes: `python -m benchmarks.profile_step --trace step.json`.

It prints the operators that take longest, and the total time of BLD's own kernels. The trace opens
in chrome://tracing or ui.perfetto.dev.
"""

import argparse
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks import test_step as setting
from benchmarks.terminal import lenient
from bld_ext import BLDOptimizer

OWN = ("bld_ext::", "heads_kernel", "views_kernel", "bld_ext::cuda")
NORM = ("view_batch_norm", "forward_kernel", "backward_kernel")


def own_time(name: str) -> str | None:
    """Return "bld" for the method's own kernels and "norm" for BatchNorm, which any network has."""
    if any(part in name for part in NORM):
        return "norm"
    return "bld" if any(part in name for part in OWN) else None


@lenient
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ours = [name for name, options in setting.SETTINGS.items() if options is not None]
    parser.add_argument("--setting", choices=ours, default="ours")
    parser.add_argument("--capture", action="store_true", help="as a CUDA graph")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--trace", help="write a chrome trace here")
    arguments = parser.parse_args()
    images, labels = setting.batch()
    optimizer = BLDOptimizer(
        setting.model(), setting.LR, views=setting.VIEWS, augment=setting.AUGMENT,
        **setting.SETTINGS[arguments.setting] | ({"capture": True} if arguments.capture else {}),
    )  # fmt: skip
    for _ in range(4):
        optimizer.step(images, labels)
    on_gpu = measure.DEVICE.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as trace:
        optimizer.step(images, labels)
        if on_gpu:
            torch.cuda.synchronize()
    averages = trace.key_averages()
    column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(averages.table(sort_by=column, row_limit=arguments.rows, max_name_column_width=60))
    total = sum(getattr(event, column) for event in averages)
    for kind, label in (("bld", "BLD's own kernels"), ("norm", "BatchNorm by view")):
        mine = sum(getattr(e, column) for e in averages if own_time(e.key) == kind)
        print(f"{label}: {mine / 1e3:.2f} ms, {100 * mine / total:.1f} % of the step")
    if arguments.trace:
        trace.export_chrome_trace(arguments.trace)
        print(f"wrote {arguments.trace}")


if __name__ == "__main__":
    sys.exit(main())
