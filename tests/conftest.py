"""Small networks and streams that the tests share."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when Triton is imported; its kernels run on the CPU

from bld_ext import MultiHead  # noqa: E402
from bld_ext.api import in_backward  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:  # the others compute on the other cores
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Of `pytest -n auto`: a GPU's memory is not shared among several."""
    return 0 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def triton_counts():
    """Skips where Triton's interpreter cannot count: Triton 3.6 with NumPy 2.4."""
    triton = pytest.importorskip("triton")

    @triton.jit
    def loop_over_programs():
        for _ in range(triton.language.program_id(0), triton.language.num_programs(0)):
            pass

    try:
        loop_over_programs[(1,)]()
    except triton.runtime.errors.InterpreterError as error:
        pytest.skip(f"Triton's interpreter cannot count: {error}")


class Bounds:
    """Stands between Triton's interpreter and memory: every access lies in an argument."""

    def __init__(self, memory):
        self.memory, self.extents = memory, []

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def add(self, tensor):
        if tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            first = tensor.data_ptr()
            self.extents.append((first, first + (last + 1) * tensor.element_size()))

    def check(self, pointers, mask, nbytes):
        at = pointers[mask].astype(np.int64)
        inside = np.zeros(at.shape, bool)
        for first, end in self.extents:
            inside |= (at >= first) & (at + nbytes <= end)
        assert inside.all(), f"{(~inside).sum()} accesses outside of all arguments"

    def load(self, pointers, mask, other, dtype):
        self.check(pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self.check(pointers, mask, values.dtype.itemsize)
        return self.memory.store(pointers, values, mask)

    def atomic_rmw(self, op, pointers, values, mask, order):
        self.check(pointers, mask, values.dtype.itemsize)
        return self.memory.atomic_rmw(op, pointers, values, mask, order)


@pytest.fixture
def bounds(monkeypatch):
    """Kernels under Triton's interpreter touch nothing but their arguments."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    watch = Bounds(interpreter._interpreter)
    convert, run = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def converted(argument):
        if isinstance(argument, torch.Tensor):
            watch.add(argument)
        return convert(argument)

    def launched(self, *args, **kwargs):
        watch.extents.clear()
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_interpreter", watch)
    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    yield


EVERYTHING = dict(
    crop_padding=3, flip=0.5, rotation=20, scale=(0.8, 1.25), jitter=0.4,
    translate=(0.1, 0.2), shear=(10, 15), resized_crop=(0.3, 1), erase=0.5,
)  # fmt: skip
NORMALISED = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
AUGMENTS = {
    "nothing": {},
    "crop-flip": dict(crop_padding=3, flip=0.5),
    "crop-beyond": dict(crop_padding=40, flip=0.5),
    "crop-edge": dict(crop_padding=3, flip=0.5, padding_mode="edge"),
    "crop-reflect": dict(crop_padding=40, flip=0.5, padding_mode="reflect"),
    "scale": dict(crop_padding=2, flip=0.5, scale=(0.3, 3)),
    "far-away": dict(crop_padding=2**20, scale=(1e-3, 1e3)),
    "affine": dict(rotation=180, scale=(0.5, 2), translate=(0.3, 0.5), shear=(40, 70)),
    "resized": dict(resized_crop=(0.05, 1), flip=0.5),
    "nearest": dict(rotation=30, scale=(0.5, 2), interpolation="nearest"),
    "reflected": dict(rotation=30, scale=(0.1, 1), padding_mode="reflect"),
    "color": dict(jitter=1.0, hue=0.5),
    "contrast": dict(contrast=0.7),
    "normalised": dict(crop_padding=1, jitter=0.4, **NORMALISED),
    "erased": dict(erase=0.7, **NORMALISED),
    "everything": EVERYTHING | NORMALISED,
    "everything-nearest": EVERYTHING | dict(interpolation="nearest", padding_mode="reflect"),
    "everything-edge": EVERYTHING | dict(padding_mode="edge"),
}


@pytest.fixture(params=AUGMENTS.values(), ids=AUGMENTS)
def settings(request):
    """Of a SeededAugment, each of many."""
    return request.param


@pytest.fixture
def poison():
    """torch.empty, and the new_empty of the C++ kernel, are full of nan."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def outputs_by_registers():
    """outputs_by_registers(code): what the Python code prints with SSE2, AVX2 and AVX-512.

    As far as the processor has them: told "avx512", torch runs it on any.
    """
    widths = ["default", "avx2", "avx512"]
    widest = torch.backends.cpu.get_cpu_capability().lower()
    if widest not in widths[1:]:
        pytest.skip(f"this processor has one kind of vector registers ({widest})")

    def run(code):
        printed = []
        for capability in widths[: widths.index(widest) + 1]:
            env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            printed.append(done.stdout)
        return printed

    return run


@pytest.fixture(scope="module")
def one_thread():
    """As a run of the job has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def surroundings(monkeypatch):
    """In backward an update for every layer; around a step TF32 and the like."""
    monkeypatch.setattr(in_backward, "BUCKET_BYTES", 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def with_threads():
    """with_threads(function): its results with 1, 2 and 3 threads."""
    threads = torch.get_num_threads()

    def run(function):
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(threads)


def small_backbone(dropout: float = 0.0) -> nn.Module:
    """Two convolutions with BatchNorm, 3 channels in, 6 features out."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@pytest.fixture
def make_model():
    """make_model(heads=(2, 3), dropout=0.0, dtype=torch.float32, seed=1): weights by seed."""

    def make(heads=(), dropout=0.0, dtype=torch.float32, seed=1) -> MultiHead:
        torch.manual_seed(seed)
        model = MultiHead(small_backbone(dropout), 6).to(dtype)
        for size in heads:
            model.add_head(size)
        return model

    return make


@pytest.fixture
def make_batch():
    """make_batch(classes, number=0, size=5, dtype=torch.float32): images in [0, 1] and labels."""

    def make(classes, number=0, size=5, dtype=torch.float32):
        generator = torch.Generator().manual_seed(100 + number)
        images = torch.rand(size, 3, 8, 8, generator=generator, dtype=dtype)
        return images, torch.randint(classes, (size,), generator=generator)

    return make
