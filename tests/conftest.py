"""Small networks and streams that the tests share."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported; its kernels run on the CPU

from bld_ext import MultiHead  # noqa: E402


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """torch.empty, and the new_empty of the C++ kernel, are full of nan."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def outputs_by_registers():
    """outputs_by_registers(code): what the Python code prints with SSE2, AVX2 and AVX-512."""

    def run(code):
        printed = []
        for capability in ("default", "avx2", "avx512"):
            env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            printed.append(done.stdout)
        return printed

    return run


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
    """make_model(heads=(2, 3), dropout=0.0, dtype=torch.float32): always the same weights."""

    def make(heads=(), dropout=0.0, dtype=torch.float32) -> MultiHead:
        torch.manual_seed(1)
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
