"""The CUDA sources under nvcc, for every architecture that is promised; no GPU is needed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 120)
# What fits on a multiprocessor decides how many loads are in flight: see benchmarks/README.md.
REGISTERS = {"measure_kernel": 64, "rescale_kernel": 48, "balance_kernel": 64, "update_kernel": 80}


def find_nvcc():
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    path = shutil.which("nvcc") or folder / "bin/nvcc"
    if not Path(path).exists():
        pytest.skip("no nvcc")
    return path


def test_layers(tmp_path):
    """No warning, no spill, no more registers than the occupancy in the documents needs."""
    command = [find_nvcc(), "-std=c++20", "-O3", "--threads", "2", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    for folder in cpp_extension.include_paths():
        command += ["-isystem", folder]
    command += ["-c", str(ROOT / "csrc/cuda/layers.cu"), "-o", str(tmp_path / "layers.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    kernels = re.findall(
        r"entry function '_ZN7bld_ext\d+(\w+?_kernel)\w*' for 'sm_(\d+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert {(name, int(arch)) for name, arch, *_ in kernels} == {
        (name, arch) for name in REGISTERS for arch in ARCHITECTURES
    }
    for name, _, stores, loads, registers in kernels:
        assert stores == loads == "0"
        assert int(registers) <= REGISTERS[name]
