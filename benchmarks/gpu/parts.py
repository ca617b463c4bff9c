"""The parts of a session on a GPU: the commands of each, and their rehearsal on a CPU."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.provenance import ROOT

PYTHON = sys.executable
OPS = {  # each op, and the file that times it
    "head_softmax": "test_distillation",
    "distillation": "test_distillation",
    "warm_up": "test_distillation",
    "joint": "test_distillation",
    "balance": "test_layers",
    "update": "test_layers",
    "augment": "test_augment",
    "norm": "test_batch_norm",
}
GPU_TESTS = ("test_gpu_step", "test_gpu", "test_gpu_layers", "test_triton",
             "test_triton_batch_norm", "test_triton_augment")  # fmt: skip
# What the sanitizer watches: tests of single ops, a case or two of each, no graphs or large inputs.
WATCHED = ("test_gpu_layers", "test_triton", "test_triton_batch_norm", "test_triton_augment")
WATCHED_CASES = (
    "inside or outside or no_class or rows or any_size or any_length or agree or views "
    "or everything or (parity and float32)"
)
MNIST = [
    f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
]
SHEETS = [*(f"train_{i:02d}.webp" for i in range(50)), "labels.npz", "test_jpeg_q75.tar.xz",
          "test_lossless_first1000.webp", "unpack.py"]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The folders of a session, and whether it is a rehearsal."""

    out: Path  # results
    scratch: Path  # runs and checkpoints of the tables, while they are in progress
    data: Path  # datasets
    rehearsal: bool  # on a CPU, at the smallest size


@dataclass(frozen=True)
class Command:
    """A command of a part, and the command `instead` that runs if it fails.

    A `needed` command prepares those after it. It runs in every call, and its failure ends the
    part.
    """

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    instead: "Command | None" = None
    needed: bool = False


@dataclass(frozen=True)
class Part:
    """A part of a session: its commands, the question it `answers`, and its limit in minutes.

    `missing` returns what the part needs and cannot find, or None. If a `vital` part fails, the
    session ends, because nothing after it is worth measuring.
    """

    name: str
    answers: str
    minutes: float
    commands: Callable[[Place], list[Command]]
    missing: Callable[[Place], str | None] = lambda place: None
    vital: bool = False


def _build(place: Place) -> list[Command]:
    pip = (PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps")
    if place.rehearsal:  # only an install compiles the sources
        return [Command("build", (*pip, "--dry-run", "-e", "."))]
    argv = (*pip, "-e", ".")
    without = Command("build without CUDA kernels", argv, {"BLD_EXT_CUDA": "0"})
    return [Command("build", argv, {"BLD_EXT_CUDA": "1"}, instead=without)]


def _pytest(file: str, *options: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, *options)


def _measure(op: str, file: str) -> Callable[[Place], list[Command]]:
    def commands(place: Place) -> list[Command]:
        chosen = f"[{op}-" + (" and not compile and not image" if place.rehearsal else "")
        options = ["-k", chosen, "--benchmark-enable", "--benchmark-disable-gc"]
        if place.rehearsal:
            options += ["--smallest", "--benchmark-min-rounds", "1", "--benchmark-max-time", "0.01"]
        rows = ("--rows", str(place.out / "rows.jsonl"))
        return [Command(op, _pytest(f"benchmarks/{file}.py", *options, *rows))]

    return commands


def _table(name: str) -> Callable[[Place], list[Command]]:
    def commands(place: Place) -> list[Command]:
        argv = (PYTHON, "-m", "benchmarks.paper", name, "--methods", "finetune,bld", "--resume")
        to = ("--out", str(place.scratch / name))
        if place.rehearsal:
            data = str(place.scratch / "data")
            small = "--preset cpu --seeds 0,1 --limit 60 --views 2 --jobs 1".split()
            argv += (*small, "--checkpoint-seconds", "0", "--data", data)
            return [_datasets("stand-in", data), Command(name, (*argv, *to))]
        argv += ("--device", "cuda", "--checkpoint-seconds", "20", "--data", str(place.data))
        apart = ("--out", str(place.scratch / f"{name}-without-graphs"), "--no-capture")
        eager = Command(f"{name} without graphs", (*argv, *apart))
        prepare = []
        unpacked = place.data / "cifar10.npz"
        if name == "table3" and (script := _sheets(place)) and not unpacked.exists():
            prepare = [_datasets("unpack", str(script), str(unpacked))]
        return [*prepare, Command(name, (*argv, *to), instead=eager)]

    return commands


def _datasets(*arguments: str) -> Command:
    return Command("data", (PYTHON, "-m", "benchmarks.gpu.datasets", *arguments), needed=True)


def _sheets(place: Place) -> Path | None:
    """Return the script that unpacks CIFAR-10 from sheets of images, if all its files are there."""
    folder = place.data / "cifar10"
    return folder / "unpack.py" if all((folder / name).exists() for name in SHEETS) else None


def _no_mnist(place: Place) -> str | None:
    raw = place.data / "MNIST" / "raw"
    there = all(list(raw.glob(f"{name}*")) for name in MNIST)
    if place.rehearsal or there or (place.data / "mnist.npz").exists():
        return None
    return f"MNIST: put its four files into {raw}, or a mnist.npz into {place.data}"


def _no_cifar10(place: Place) -> str | None:
    names = ("cifar10.npz", "cifar-10-python.tar.gz", "cifar-10-batches-py")
    there = any((place.data / name).exists() for name in names)
    if place.rehearsal or there or _sheets(place):
        return None
    return (
        f"CIFAR-10: put cifar10.npz, cifar-10-python.tar.gz, or a folder cifar10 with the sheets "
        f"and their unpack.py into {place.data}"
    )


def _tests(place: Place) -> list[Command]:
    commands = [Command(name, _pytest(f"tests/{name}.py")) for name in GPU_TESTS]
    if place.rehearsal:  # tests that need a GPU are collected and skipped
        few = _pytest("tests/test_triton.py", "-k", "inside or no_class")
        return [*commands[:3], Command("test_triton", few)]
    return commands


def _sanitize(tool: str) -> Callable[[Place], list[Command]]:
    def commands(place: Place) -> list[Command]:
        if place.rehearsal:  # a few of the tests without the tool, which needs a GPU
            few = ("-k", "inside")
            return [Command("test_triton", _pytest("tests/test_triton.py", *few))]
        prefix = ("compute-sanitizer", "--tool", tool, "--target-processes", "all",
                  "--error-exitcode", "9", "--print-limit", "20")  # fmt: skip
        # without torch's cache every tensor is an allocation of its own, whose bounds are checked
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [
            Command(name, (*prefix, *_pytest(f"tests/{name}.py", "-k", WATCHED_CASES)), env)
            for name in WATCHED
        ]

    return commands


def _no_sanitizer(place: Place) -> str | None:
    if place.rehearsal or shutil.which("compute-sanitizer"):
        return None
    return "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"


def _profile(place: Place) -> list[Command]:
    trace = ("--trace", str(place.out / "trace.json.gz"))
    return [Command("profile", (PYTHON, "-m", "benchmarks.profile_step", *trace))]


def _precision(place: Place) -> list[Command]:
    argv = (PYTHON, "-m", "benchmarks.precision")
    if place.rehearsal:
        return [Command("precision", (*argv, "--network", "slim", "--lr", "3e-3", "--views", "1"))]
    return [Command("precision", (*argv, "--device", "cuda"))]


def _processes(place: Place) -> list[Command]:
    count = 2 if place.rehearsal else _cards()
    argv = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    argv += ("-m", "benchmarks.scale", "--rows", str(place.out / "rows.jsonl"))
    return [Command("processes", argv + (("--smallest",) if place.rehearsal else ()))]


def _no_cards(place: Place) -> str | None:
    return None if place.rehearsal or _cards() > 1 else f"several GPUs, got {_cards()}"


def _cards() -> int:
    import torch

    return torch.cuda.device_count()


def _index(place: Place) -> list[Command]:
    return [Command("index", (PYTHON, "-m", "benchmarks.gpu.index", str(place.out)))]


PARTS = {
    part.name: part
    for part in (
        Part("build", "does it compile for this card", 5, _build, vital=True),
        Part("step", "how fast is a whole step, and how near to its bare passes", 6,
             _measure("step", "test_step")),
        Part("table2", "BLD and finetuning on MNIST in five tasks, in the paper's setting", 8,
             _table("table2"), _no_mnist),
        Part("table3", "the same on CIFAR-10", 8, _table("table3"), _no_cifar10),
        Part("tests", "is it right: parity, a captured step's bits, streams, large inputs", 6,
             _tests),
        Part("memcheck", "does an op touch memory that is not its own", 5,
             _sanitize("memcheck"), _no_sanitizer),
        Part("racecheck", "do threads of an op race", 5, _sanitize("racecheck"), _no_sanitizer),
        *(
            Part(op, f"how fast is {op} beside what one writes without it", 2, _measure(op, file))
            for op, file in OPS.items()
        ),
        Part("profile", "where the time of a step goes, kernel by kernel", 1, _profile),
        Part("precision", "what tensor cores leave of the distillation gradient", 3, _precision),
        Part("processes", "how fast is a step on all GPUs of the machine, and what are reductions",
             3, _processes, _no_cards),
        Part("index", "every figure beside what was predicted, in index.md", 0.5, _index),
    )
}  # fmt: skip


def environment(place: Place, command: Command) -> dict[str, str]:
    # drop pytest's variables: under pytest-xdist, pytest-benchmark would measure nothing
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    if place.rehearsal:
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return env | command.env
