"""Builds bld_ext._C: the CPU kernels always, the CUDA kernels when nvcc and a CUDA torch are there.

Environment:
    BLD_EXT_CUDA: 0 leaves the CUDA kernels out, 1 fails where they cannot be built.
    TORCH_CUDA_ARCH_LIST: GPU architectures (default: 8.0, 9.0 and PTX for later ones).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils import cpp_extension

TORCH_TARGET = "2.11"
# All symbols are in the LibTorch stable ABI of this version, so one build runs on all later ones.
TORCH_TARGET_VERSION = "0x020b000000000000"
WANTED = os.environ.get("BLD_EXT_CUDA", "")


def compiler():
    """The C++ compiler torch's build would call, or None."""
    named = os.environ.get("CXX", "").split(" ")[0] or "c++"
    configured = (sysconfig.get_config_var("CXX") or "g++").split(" ")[0]
    return shutil.which(named) or shutil.which(configured)


def cuda_toolkit():
    """(folder, version) of the toolkit in CUDA_HOME, on PATH or in /usr/local/cuda, or None."""
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        candidates.insert(1, Path(nvcc).resolve().parents[1])
    for folder in filter(None, candidates):
        nvcc = Path(folder) / "bin/nvcc"
        # nvcc on PATH may be a wrapper script far from its toolkit: take a complete folder
        if nvcc.exists() and (Path(folder) / "include/cuda_runtime.h").exists():
            text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            return str(folder), re.search(r"release ([\d.]+)", text)[1]
    return None


def cuda_sources():
    """(the .cu files to build, toolkit), empty where this machine or BLD_EXT_CUDA says so."""
    sources, toolkit, built_for = sorted(glob("csrc/cuda/*.cu")), cuda_toolkit(), torch.version.cuda
    missing = ""
    if not compiler():
        missing = "there is no C++ compiler"
    elif not built_for:
        missing = "torch is a CPU build"
    elif not toolkit:
        missing = "there is no CUDA toolkit with nvcc"
    if missing and WANTED == "1":
        sys.exit(f"BLD_EXT_CUDA=1, but {missing}. Install what is missing, or unset it.")
    if missing or WANTED == "0" or not sources:
        return [], None
    if toolkit[1].split(".")[0] != built_for.split(".")[0]:
        sys.exit(
            f"torch is built for CUDA {built_for}, but {toolkit[0]} has {toolkit[1]}. "
            "Point CUDA_HOME at a toolkit of the same major version, or set BLD_EXT_CUDA=0."
        )
    return sources, toolkit


def extension():
    gpu, toolkit = cuda_sources()
    flags = ["-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    arch = ""
    if gpu:
        cpp_extension.CUDA_HOME = toolkit[0]
        arch = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        flags.append("-DUSE_CUDA")
    # Each operation rounded by itself: equal inputs give equal bits in all ops and all registers.
    # That nobody reads floating-point flags changes no bit, and lets choices become vector code.
    cxx = [*flags, "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-Wno-psabi"]
    facts = {"TORCH_TARGET": TORCH_TARGET, "TORCH_BUILT_WITH": torch.__version__}
    facts |= {"CUDA": toolkit[1] if gpu else "", "ARCHITECTURES": arch}
    make = cpp_extension.CUDAExtension if gpu else cpp_extension.CppExtension
    return make(
        "bld_ext._C",
        ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp")), *gpu],
        include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
        define_macros=[(f"BLD_EXT_{name}", f'"{value}"') for name, value in facts.items()],
        extra_compile_args={"cxx": cxx, "nvcc": flags} if gpu else cxx,
    )


if WANTED not in ("", "0", "1"):
    sys.exit(f"BLD_EXT_CUDA: expected 0, 1 or nothing, got {WANTED!r}")
if compiler():
    setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
else:
    cuda_sources()
    print("bld_ext: no C++ compiler found, installing without compiled kernels", file=sys.stderr)
    setup()
