"""Formatting and lint, by the pinned tools."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tool(name):
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: pip install -e '.[test]'")
    return found


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_python(command):
    done = subprocess.run([tool("ruff"), *command, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cpp():
    files = [f for pattern in ("*.cpp", "*.h", "*.cu") for f in (ROOT / "csrc").rglob(pattern)]
    assert files
    command = [tool("clang-format"), "--dry-run", "-Werror", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
