"""Tells where a figure comes from: the commit, versions and kernels it was measured with."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "bld_ext", "python_api", "benchmarks", "setup.py", "pyproject.toml")
KINDS = (".py", ".cpp", ".h", ".cu", ".cuh", ".sh", ".toml")


@cache
def commit() -> str:
    """Return git's commit, with "+" and a digest of the sources if they differ from it.

    A copy without git's folder returns the variable BLD_COMMIT or, without that, the digest alone.
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BLD_COMMIT") or f"sources-{_digest()}"
    return f"{head}+{_digest()}" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _digest() -> str:
    found = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            # earlier results have no influence on new ones
            if file.suffix in KINDS and "results" not in file.relative_to(ROOT).parts:
                found.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return found.hexdigest()[:12]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("bld_ext", "torch", "torchvision", "triton", "numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def kernels(device: str) -> dict[str, str]:
    """Return which backend runs each op on a kind of device, "cpu" or "cuda"."""
    import bld_ext  # here, because `commit` is needed before the package is built

    return {op: bld_ext.backend(op, device) for op in bld_ext.SCHEMAS}
