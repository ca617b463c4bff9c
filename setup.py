"""Builds bld_ext._C: the CPU kernels always, the CUDA kernels when nvcc and a CUDA torch are there.

BLD_EXT_CUDA          0 leaves the CUDA kernels out, 1 fails where they cannot be built; unset: as
the machine allows TORCH_CUDA_ARCH_LIST  GPU architectures to compile for (default: 8.0, 9.0 and PTX
for later ones)
"""

import os
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

TORCH_TARGET = "2.11"
# All symbols are in the LibTorch stable ABI of this version, so one build runs on all later ones.
TORCH_TARGET_VERSION = "0x020b000000000000"


def cuda_toolkit():
    """The toolkit folder of the nvcc on PATH or in CUDA_HOME, or None."""
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        candidates.insert(1, Path(nvcc).resolve().parents[1])
    # nvcc on PATH may be a wrapper script far from its toolkit: look for a complete folder.
    complete = (c for c in candidates if c and (Path(c) / "include/cuda_runtime.h").exists())
    return next((str(c) for c in complete if (Path(c) / "bin/nvcc").exists()), None)


def cuda_sources():
    """The .cu files to build, none where this machine or BLD_EXT_CUDA says so."""
    wanted = os.environ.get("BLD_EXT_CUDA", "")
    if wanted == "0":
        return []
    missing = ""
    if not torch.version.cuda:
        missing = "torch is a CPU build"
    elif not cuda_toolkit():
        missing = "there is no CUDA toolkit with nvcc"
    if missing and wanted == "1":
        sys.exit(f"BLD_EXT_CUDA=1, but {missing}. Install both for CUDA, or unset BLD_EXT_CUDA.")
    return [] if missing else sorted(glob("csrc/cuda/*.cu"))


def extension():
    gpu = cuda_sources()
    flags = ["-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    arch = ""
    if gpu:
        import torch.utils.cpp_extension as cpp_extension

        cpp_extension.CUDA_HOME = cuda_toolkit()
        arch = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        flags.append("-DUSE_CUDA")
    facts = {"TORCH_TARGET": TORCH_TARGET, "TORCH_BUILT_WITH": torch.__version__}
    facts |= {"CUDA": torch.version.cuda if gpu else "", "ARCHITECTURES": arch}
    return (CUDAExtension if gpu else CppExtension)(
        "bld_ext._C",
        ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp")), *gpu],
        include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
        define_macros=[(f"BLD_EXT_{name}", f'"{value}"') for name, value in facts.items()],
        extra_compile_args={"cxx": flags, "nvcc": flags} if gpu else flags,
    )


def compiler():
    """The C++ compiler torch's build would call, or None."""
    return shutil.which(os.environ.get("CXX", "").split(" ")[0] or "c++") or shutil.which(
        (sysconfig.get_config_var("CXX") or "g++").split(" ")[0]
    )


if compiler():
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
else:
    print("bld_ext: no C++ compiler found, installing without compiled kernels", file=sys.stderr)
    setup()
