"""Train streams of tasks with BLD and its baselines over several seeds, and compare them."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import terminal
from benchmarks.paper import shared
from benchmarks.paper.checkpoint import CheckpointError, one_line
from benchmarks.paper.job import locked
from benchmarks.paper.methods import (
    CPU,
    CPU_IMAGES,
    METHODS,
    OWN,
    PRECISIONS,
    PRESETS,
    SMALL,
)
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.streams import LOADERS, DatasetError
from benchmarks.paper.tables import TABLES
from benchmarks.paper.work import (
    Stream,
    Work,
    ablation,
    describe,
    dry_run,
    one_stream,
    paper_table,
)

EXAMPLES = """\
examples:
  python -m benchmarks.paper
      the digits stream: five tasks, ten seeds, one or two minutes on two cores
  python -m benchmarks.paper table2 --preset cpu
      table 2 of the paper with a slim network and few images, beside the printed figures
  python -m benchmarks.paper table3 --device cuda --resume
      table 3 in the paper's setting on every GPU there is; goes on where an earlier job was stopped
  python -m benchmarks.paper table3 --dry-run
      what that would take on this processor, within a minute
  python -m benchmarks.paper ablation --methods bld --vary temperature=1,2,4 balance=0.5,1,2,4
      one setting at a time, on digits
  python -m benchmarks.paper --dataset mnist --network slim --views 8 --limit 300 --seeds 0-4
      MNIST with the slim network and 300 images a task
  python -m benchmarks.paper --dataset mine.npz --tasks 3 --network resnet18-cifar --lr 3e-4
      your own images: x_train, y_train, x_test, y_test; tune --lr for them
"""
NO_MEMORY = (torch.OutOfMemoryError, MemoryError)
VARIED = {
    "temperature": [1, 2, 4],
    "balance": [0.5, 1, 2, 4],
    "warmup_ratio": [0.01, 0.1, 1],
    "views": [4, 12, 24],
    "joint_steps": [1, 2, 4],
    "layer": ["module", "tensor", "network"],
    "statistics": ["once", "every_pass"],
    "momentum": [0.03, 0.1, 0.3],
    "lr_decay": [1.0, 0.7, 0.5],
    "dropout": [0.0, 0.1, 0.25],
    "network": ["slim", "slim-wide", "slim-2x2"],
    "precision": ["fp32", "mixed", "bf16"],
}  # the values that the ablation tries, one setting at a time


def parse_seeds(text: str) -> list[int]:
    """Parse "5-14" or "0,3,7" or both: "0-4,9"."""
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


def parse_variation(text: str) -> tuple[str, list]:
    """Parse a setting and its values, such as "temperature=1,2,4"."""
    name, _, values = text.partition("=")
    if name not in VARIED or not values:
        raise argparse.ArgumentTypeError(
            f"expected NAME=VALUE,VALUE,... with NAME of {', '.join(VARIED)}, got {text!r}"
        )
    kind = type(VARIED[name][-1])
    try:
        if kind is str:
            return name, values.split(",")
        return name, [
            int(v) if kind is int and v.isdigit() else float(v) for v in values.split(",")
        ]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{name}: expected numbers, got {values!r}") from None


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def positive_or_auto(text: str) -> int | str:
    return text if text == "auto" else positive(text)


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
    what = "one dataset (run, the default), a table of the paper, or one setting at a time"
    add("what", nargs="?", default="run", choices=["run", *TABLES, "ablation"], help=what)
    datasets = f"{', '.join(LOADERS)}, or the path of an .npz"
    add("--dataset", help=f"{datasets} (default: digits)")
    add("--tasks", type=positive, help="tasks the classes are split into (default: 5)")
    add("--preset", choices=["paper", "cpu", "full-cpu"], default="paper",
        help="the paper's setting; full-cpu: its rates and all images with a slim network and 4 "
        "views; cpu: also fewer images at a higher rate; digits has its own")  # fmt: skip
    add("--methods", type=parse_methods, help=", ".join(METHODS))
    add("--seeds", type=parse_seeds, help="such as 5-14 (default; of tables 0-4) or 0,3,7")
    add("--resume", action="store_true", help="go on where an earlier job in --out was stopped")
    add("--checkpoint-seconds", type=float, default=120, help="between checkpoints (default: 120)")
    add("--dry-run", action="store_true", help="only measure what it would take, time and memory")
    add("--tensorboard", action="store_true", help="also write events for TensorBoard to --out")
    add("--vary", type=parse_variation, nargs="+", metavar="NAME=VALUES", help="ablation: what")
    add("--views", type=positive, help="random views of each image")
    add("--network", choices=NETWORKS, help="backbone")
    add("--lr", type=float, help="learning rate of the joint updates; the warm-up takes 1 %% of it")
    add("--lr-decay", type=fraction, metavar="FACTOR", help="of the rates from task to task")
    add("--limit", type=positive, help="training images a task (default: all)")
    add("--device", default="cpu", help="cpu, cuda (every GPU there is, a run each), cuda:1, ...")
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
    add("--views-per-pass", type=positive_or_auto, metavar="N",
        help="views that go through the network at once, or auto: as many as fit")  # fmt: skip
    add("--precision", choices=PRECISIONS, help="mixed is BLDOptimizer's, bf16 plain autocast")
    add("--capture", action=argparse.BooleanOptionalAction,
        help="replay the step of BLD and finetune as a CUDA graph (default: on a GPU, in the "
        "paper's setting)")  # fmt: skip
    add("--jobs", type=positive, help="runs at a time (default: one a core, or one on a GPU)")
    add("--threads", type=positive, default=1, help="CPU threads of each run (default: 1)")
    return parser


def make_settings(args: argparse.Namespace, dataset: str, tasks: int | None = None):
    """Return the dataset's preset with the changes from the command line."""
    names = ("tasks", "views", "network", "lr", "lr_decay", "limit", "balance", "temperature",
             "statistics", "momentum", "schedule", "views_per_pass", "precision",
             "capture")  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if tasks is not None:
        given["tasks"] = tasks
    preset = PRESETS.get(dataset, OWN)
    if args.preset == "cpu" and dataset != "digits":
        preset = replace(preset, **CPU, limit=CPU_IMAGES // given.get("tasks", preset.tasks))
    elif args.preset == "full-cpu" and dataset != "digits":
        preset = replace(preset, **SMALL)
    elif dataset in PRESETS and args.device.startswith("cuda"):
        preset = replace(preset, capture=given.get("schedule") != "in_backward")
    return replace(preset, **given)


def misplaced(args: argparse.Namespace) -> str | None:
    """Return what is wrong with an option that the command would pass over."""
    if args.vary is not None and args.what != "ablation":
        return (
            f"vary: only `ablation` varies settings, got it with `{args.what}`; give `ablation "
            "--vary ...`, or leave --vary out"
        )
    for name in ("dataset", "tasks"):
        if args.what in TABLES and (value := getattr(args, name)) is not None:
            return (
                f"{name}: {args.what} has datasets and tasks of its own, got {value!r}; leave "
                f"--{name} out, or give `run` instead of `{args.what}`"
            )
    return None


def plan(args: argparse.Namespace, out: Path) -> tuple[Callable[[Work], None], Work]:
    """Return the command and its work."""

    def work(methods, seeds, streams):
        streams = [Stream(dataset, settings, here) for dataset, settings, here in streams]
        methods, seeds, start = args.methods or methods, args.seeds or seeds, time.perf_counter()
        title = describe(args.dataset, make_settings(args, args.dataset), seeds)
        return Work(args, methods, seeds, streams, out, start, title)

    if args.what in TABLES:
        wanted = TABLES[args.what]
        streams = [(d, make_settings(args, d, n), out / f"{d}-{n}") for d, n in wanted.streams]
        return paper_table, work(list(wanted.methods), list(range(5)), streams)
    base = make_settings(args, args.dataset)
    if args.what == "run":
        methods, seeds = ["finetune", "bld"], list(range(5, 15))
        return one_stream, work(methods, seeds, [(args.dataset, base, out)])
    streams = [
        (args.dataset, replace(base, **{name: value}), out / f"{name}-{value}")
        for name, values in args.vary or VARIED.items()
        for value in values
    ]
    return ablation, work(["bld"], list(range(5)), streams)


@terminal.lenient
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if not shared.is_shared():
        return lead(args)
    device = shared.start(args.device, args.threads)
    args.resume = args.resume or shared.is_restarted()
    if not shared.leads():
        return shared.follow(device)
    code = lead(args)
    if code == 0:  # else torchrun ends the others
        shared.dismiss()
    return code


def lead(args: argparse.Namespace) -> int:
    """Do what the command says; return its exit code."""
    if wrong := misplaced(args):
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    args.dataset = "digits" if args.dataset is None else args.dataset
    name = Path(args.dataset).stem if args.what == "run" else args.what
    out = args.out or Path("runs") / name
    made = not os.path.exists(out)  # Path.exists() raises if a name is too long
    try:
        command, work = plan(args, out)
        with locked(out):
            for file in (out / "results.json", out / "accuracy.png"):
                if file.is_dir():  # an error here is better than one after hours of training
                    raise IsADirectoryError(f"{file} is a folder; give another --out")
            if (out / "results.json").exists() and not (args.resume or args.dry_run):
                print(
                    f"replacing {out / 'results.json'}; --resume goes on with it", file=sys.stderr
                )
            (dry_run if args.dry_run else command)(work)
    except (DatasetError, CheckpointError, ValueError, OSError, *NO_MEMORY) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        if made:
            remove_empty(out)
        return 2
    except BrokenProcessPool:
        print(
            "error: a run was killed, perhaps for memory; try --jobs 1, and --resume",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0


def remove_empty(out: Path) -> None:
    """Remove the folder of a job that never began."""
    with suppress(OSError):
        (out / ".lock").unlink(missing_ok=True)
        out.rmdir()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())
