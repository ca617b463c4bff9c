"""Train a stream of tasks with BLD and its baselines over several seeds, and compare them."""

import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

import bld_ext
from benchmarks.paper import report
from benchmarks.paper.job import preflight, run_all
from benchmarks.paper.methods import METHODS, PAPER_VIEWS, PRESETS
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.streams import LOADERS, DatasetError

EXAMPLES = """\
examples:
  python -m benchmarks.paper
      the digits stream: five tasks, ten seeds, two minutes on two cores
  python -m benchmarks.paper --dataset mnist --network slim --views 8 --limit 300 --seeds 0-4
      MNIST with the slim network and 300 images a task
  python -m benchmarks.paper --dataset cifar10 --tasks 2 --device cuda --seeds 0
      the paper's setting for CIFAR10 in two tasks
  python -m benchmarks.paper --dataset mine.npz --tasks 3 --network resnet18-cifar
      your own images: x_train, y_train, x_test, y_test
"""


def parse_seeds(text: str) -> list[int]:
    """ "5-14" or "0,3,7" or both: "0-4,9"."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not span:
                raise ValueError
            seeds += span
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected seeds such as 5-14 or 0,3,7, got {text!r}"
        ) from None
    return list(dict.fromkeys(seeds))


def parse_methods(text: str) -> list[str]:
    methods = text.split(",")
    if unknown := [m for m in methods if m not in METHODS]:
        raise argparse.ArgumentTypeError(
            f"unknown method {', '.join(unknown)}; expected some of {', '.join(METHODS)}"
        )
    return list(dict.fromkeys(methods))


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.paper",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    datasets = f"{', '.join(LOADERS)}, or the path of an .npz"
    add("--dataset", default="digits", help=f"{datasets} (default: digits)")
    add("--tasks", type=positive, help="tasks the classes are split into (default: 5)")
    add("--methods", type=parse_methods, default=["finetune", "bld"], help=", ".join(METHODS))
    add("--seeds", type=parse_seeds, help="such as 5-14 (default) or 0,3,7")
    add("--views", type=positive, help="random views of each image")
    add("--network", choices=NETWORKS, help="backbone")
    add("--lr", type=float, help="learning rate of the joint updates; the warm-up takes 1 %% of it")
    add("--limit", type=positive, help="training images a task (default: all)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--out", type=Path, help="folder for results.json and accuracy.png (default: runs/DATASET)")
    add("--data", default="data", help="folder of downloaded datasets (default: data)")
    add("--balance", type=float, help="λ, weight of the distillation gradient")
    add("--temperature", type=float, help="τ of the softened predictions")
    add("--statistics", choices=["once", "every_pass"], help="when running statistics move")
    add("--momentum", type=fraction, help="BatchNorm's momentum")
    add(
        "--schedule",
        choices=["two_forward", "shared_forward", "in_backward"],
        help="see BLDOptimizer",
    )
    add("--views-per-pass", type=positive, help="views that go through the network at once")
    add("--jobs", type=positive, help="runs at a time (default: one a core, or one on a GPU)")
    add("--threads", type=positive, default=1, help="CPU threads of each run (default: 1)")
    return parser


def make_settings(args: argparse.Namespace):
    """The dataset's preset with what the command line changes in it."""
    names = ("tasks", "views", "network", "lr", "limit", "balance", "temperature", "statistics",
             "momentum", "schedule", "views_per_pass")  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    preset = PRESETS.get(args.dataset)
    if preset is None:
        preset = replace(PRESETS["digits"], augment=PAPER_VIEWS)
    return replace(preset, **given)


def facts(device: str) -> dict:
    packages = ("torch", "torchvision", "numpy", "scikit-learn")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {
        "bld_ext": version("bld_ext"),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "device": name,
        "kernels": {op: bld_ext.backend(op, device.partition(":")[0]) for op in bld_ext.SCHEMAS},
    }


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    settings = make_settings(args)
    seeds = args.seeds or list(range(5, 15))
    jobs = args.jobs or (
        1 if args.device != "cpu" else max(1, (os.cpu_count() or 1) // args.threads)
    )
    out = args.out or Path("runs") / Path(args.dataset).stem
    title = (
        f"{Path(args.dataset).stem}, {settings.tasks} tasks, {settings.network}, "
        f"{settings.views} views, lr {settings.lr:g}, {len(seeds)} seeds"
    )
    print(title)
    start = time.perf_counter()
    files = out / "results.json", out / "accuracy.png"
    try:
        what = (args.dataset, args.data, args.methods, settings, seeds)
        batches = preflight(*what, args.device)
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.open("ab").close()  # an error here is better than one after hours of training
        records = run_all(*what, batches, args.device, jobs, args.threads)
    except (DatasetError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("error: a run was killed, perhaps for memory; try --jobs 1", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130

    result = {
        "command": ["python", "-m", "benchmarks.paper", *(sys.argv[1:] if argv is None else argv)],
        "dataset": args.dataset,
        "settings": asdict(settings),
        "seeds": seeds,
        "versions": facts(args.device),
        "seconds": round(time.perf_counter() - start, 1),
        "summary": report.summarise(records),
        "bld_minus": {
            baseline: report.paired(records, "bld", baseline)
            for baseline in args.methods
            if baseline != "bld" and "bld" in args.methods
        },
        "runs": records,
    }
    print(report.table(result["summary"]))
    for baseline, difference in result["bld_minus"].items():
        print(report.difference_line(difference, "bld", baseline))
    files[0].write_text(json.dumps(result, indent=1) + "\n")
    report.figure(records, title, files[1])
    print(f"{result['seconds']:.0f} s; wrote {files[0]} and {files[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
