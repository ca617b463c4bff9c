"""Train streams of tasks with BLD and its baselines over several seeds, and compare them."""

import argparse
import json
import os
import platform
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

import bld_ext
from benchmarks.paper import report, tables
from benchmarks.paper.checkpoint import CheckpointError, one_line, write_whole
from benchmarks.paper.job import estimate, locked, preflight, run_all
from benchmarks.paper.methods import CPU, CPU_IMAGES, METHODS, PAPER_VIEWS, PRESETS, Settings
from benchmarks.paper.networks import NETWORKS
from benchmarks.paper.streams import LOADERS, DatasetError
from benchmarks.paper.tables import TABLES

EXAMPLES = """\
examples:
  python -m benchmarks.paper
      the digits stream: five tasks, ten seeds, two minutes on two cores
  python -m benchmarks.paper table2 --preset cpu
      table 2 of the paper with a slim network and few images, beside the printed figures
  python -m benchmarks.paper table3 --device cuda --resume
      table 3 in the paper's setting; goes on where an earlier job was stopped
  python -m benchmarks.paper ablation --methods bld --vary temperature=1,2,4 balance=0.5,1,2,4
      one setting at a time, on digits
  python -m benchmarks.paper --dataset mnist --network slim --views 8 --limit 300 --seeds 0-4
      MNIST with the slim network and 300 images a task
  python -m benchmarks.paper --dataset mine.npz --tasks 3 --network resnet18-cifar
      your own images: x_train, y_train, x_test, y_test
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
    "precision": ["fp32", "bf16"],
}  # what the ablation changes, one at a time


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


def parse_variation(text: str) -> tuple[str, list]:
    """ "temperature=1,2,4"."""
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
    add("--dataset", default="digits", help=f"{datasets} (default: digits)")
    add("--tasks", type=positive, help="tasks the classes are split into (default: 5)")
    add("--preset", choices=["paper", "cpu"], default="paper",
        help="the paper's setting, or a small one for a CPU; digits has its own")  # fmt: skip
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
    add("--capture", action="store_const", const=True,
        help="replay the step of BLD and finetune as a CUDA graph")  # fmt: skip
    add("--jobs", type=positive, help="runs at a time (default: one a core, or one on a GPU)")
    add("--threads", type=positive, default=1, help="CPU threads of each run (default: 1)")
    return parser


def make_settings(args: argparse.Namespace, dataset: str, tasks: int | None = None):
    """The dataset's preset with what the command line changes in it."""
    names = ("tasks", "views", "network", "lr", "limit", "balance", "temperature", "statistics",
             "momentum", "schedule", "views_per_pass", "capture")  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if tasks is not None:
        given["tasks"] = tasks
    preset = PRESETS.get(dataset)
    if preset is None:
        preset = replace(PRESETS["digits"], augment=PAPER_VIEWS)
    if args.preset == "cpu" and dataset != "digits":
        preset = replace(preset, **CPU, limit=CPU_IMAGES // given.get("tasks", preset.tasks))
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


def describe(dataset: str, settings: Settings, seeds: list[int]) -> str:
    limit = f", {settings.limit:,} images a task" if settings.limit else ""
    return (
        f"{Path(dataset).stem}, {settings.tasks} tasks{limit}, {settings.network}, "
        f"{settings.views} views, lr {settings.lr:g}, {len(seeds)} seeds"
    )


def train(args, dataset: str, settings: Settings, methods: list[str], seeds: list[int], out: Path):
    """All runs of one stream, from where they were left; None where it was a dry run."""
    what = (dataset, args.data, methods, settings, seeds)
    batches = preflight(*what, args.device)
    if args.tensorboard:
        report.summary_writer()
    print(describe(dataset, settings, seeds))
    cores = max(1, (os.cpu_count() or 1) // args.threads)
    jobs = args.jobs or (1 if args.device != "cpu" else cores)
    if args.dry_run:
        at_once = min(jobs, len(seeds) * len(methods))
        print(report.estimate_table(estimate(*what, args.device), at_once))
        return None
    records = run_all(
        *what, batches, out / "runs", args.device, jobs, args.threads, args.resume,
        args.checkpoint_seconds,
    )  # fmt: skip
    if args.tensorboard:
        report.tensorboard(records, out / "tensorboard")
    return records


def result(args, argv, dataset, settings, seeds, records, start) -> dict:
    methods = list(dict.fromkeys(r["method"] for r in records))
    return {
        "command": ["python", "-m", "benchmarks.paper", *(sys.argv[1:] if argv is None else argv)],
        "dataset": dataset,
        "settings": settings.as_dict(),
        "seeds": seeds,
        "versions": facts(args.device),
        "seconds": round(time.perf_counter() - start, 1),
        "summary": report.summarise(records),
        "bld_minus": {
            baseline: report.paired(records, "bld", baseline)
            for baseline in methods
            if baseline != "bld" and "bld" in methods
        },
        "runs": records,
    }


def as_json(found: dict) -> bytes:
    return f"{json.dumps(found, indent=1)}\n".encode()


def one_stream(args, argv, out: Path, start: float) -> None:
    settings, seeds = make_settings(args, args.dataset), args.seeds or list(range(5, 15))
    records = train(args, args.dataset, settings, args.methods or ["finetune", "bld"], seeds, out)
    if records is None:
        return
    found = result(args, argv, args.dataset, settings, seeds, records, start)
    print(report.table(found["summary"]))
    for baseline, difference in found["bld_minus"].items():
        print(report.difference_line(difference, "bld", baseline))
    write_whole(out / "results.json", as_json(found))
    report.figure(records, describe(args.dataset, settings, seeds), out / "accuracy.png")
    report.figures(records, out)
    print(f"{found['seconds']:.0f} s; wrote {out / 'results.json'} and {out / 'accuracy.png'}")


def paper_table(args, argv, out: Path, start: float) -> None:
    wanted, seeds = TABLES[args.what], args.seeds or list(range(5))
    parts, missing = [], []
    for dataset, tasks in wanted.streams:
        settings = make_settings(args, dataset, tasks)
        here = out / f"{dataset}-{tasks}"
        try:
            records = train(
                args, dataset, settings, args.methods or list(wanted.methods), seeds, here
            )
        except DatasetError as error:
            missing.append(error)
            if len(missing) == len(wanted.streams):
                raise
            print(f"left out: {one_line(error)}", file=sys.stderr)
            continue
        if records is None:
            continue
        found = result(args, argv, dataset, settings, seeds, records, start)
        write_whole(here / "results.json", as_json(found))
        title = describe(dataset, settings, seeds)
        report.figure(records, title, here / "accuracy.png")
        report.figures(records, here)
        text = f"{tables.table(records, dataset, tasks)}\n\n{tables.differences(records)}\n"
        print(text)
        parts.append(f"{title}; in brackets the paper's\n\n{text}")
    if parts:
        text = "\n".join([f"{args.what}: {wanted.caption}\n", *parts])
        write_whole(out / "table.md", text.encode())
        print(f"{time.perf_counter() - start:.0f} s; wrote {out / 'table.md'}")


def ablation(args, argv, out: Path, start: float) -> None:
    """One setting at a time around the preset; `methods` is bld unless given."""
    base, seeds = make_settings(args, args.dataset), args.seeds or list(range(5))
    methods, rows, changed = args.methods or ["bld"], [], []
    for name, values in args.vary or VARIED.items():
        for value in values:
            settings = replace(base, **{name: value})
            if name == "views":
                settings = replace(settings, views_per_pass=min(base.views_per_pass, int(value)))
            preflight(args.dataset, args.data, methods, settings, seeds, args.device)
            changed.append((name, value, settings))
    for name, value, settings in changed:
        records = train(args, args.dataset, settings, methods, seeds, out / f"{name}-{value}")
        if records is not None:
            rows += [(name, value, m, e) for m, e in report.summarise(records).items()]
    if rows:
        text = report.ablation_table(rows)
        print(text)
        write_whole(out / "ablation.md", f"{text}\n".encode())
        report.ablation_figure(rows, describe(args.dataset, base, seeds), out / "ablation.png")
        print(f"{time.perf_counter() - start:.0f} s; wrote {out / 'ablation.md'} and ablation.png")


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    name = Path(args.dataset).stem if args.what == "run" else args.what
    out, start = args.out or Path("runs") / name, time.perf_counter()
    work = {"run": one_stream, "ablation": ablation}.get(args.what, paper_table)
    made = not os.path.exists(out)  # that of a Path raises on a name that is too long
    try:
        with locked(out):
            for file in (out / "results.json", out / "accuracy.png"):
                if file.is_dir():  # an error here is better than one after hours of training
                    raise IsADirectoryError(f"{file} is a folder; give another --out")
            work(args, argv, out, start)
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
    """The folder of a job that never began."""
    with suppress(OSError):
        (out / ".lock").unlink(missing_ok=True)
        out.rmdir()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())
