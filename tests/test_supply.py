"""The source distribution: all that its build needs is in it, and what it needs to run is named."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {".h", ".cpp", ".cu", ".cuh"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution of a copy of the project."""
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "api", "emulator")
    for name in ("bld_ext", "csrc", "python_api", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", build, str(folder)]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def files_of(folder, *suffixes):
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in suffixes
    }


def test_it_holds_every_source_and_nothing_of_tests_and_benchmarks(sdist):
    assert files_of(sdist / "csrc", *SOURCES) == files_of(ROOT / "csrc", *SOURCES)
    assert files_of(sdist / "python_api", ".py") == files_of(ROOT / "python_api", ".py")
    modules = {name for name in files_of(ROOT / "bld_ext", ".py") if not name.startswith("api/")}
    assert files_of(sdist / "bld_ext", ".py") == modules
    assert (sdist / "LICENSE").exists() and (sdist / "README.md").exists()
    rooms = {path.name for path in sdist.iterdir() if path.is_dir()}
    assert rooms == {"bld_ext", "bld_ext.egg-info", "csrc", "python_api"}


def test_every_include_is_there(sdist):
    paths = [path for path in (sdist / "csrc").rglob("*") if path.suffix in SOURCES]
    assert paths
    for path in paths:
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            # beside the file, or in csrc, which setup.py puts on the search path
            assert (path.parent / name).exists() or (sdist / "csrc" / name).exists(), (path, name)


def test_it_installs_and_runs_from_there(sdist, tmp_path):
    """Without a compiler, which test_packaging has; it imports nothing of the checkout."""
    (tools := tmp_path / "bin").mkdir()
    env = os.environ | {"PATH": str(tools), "CXX": "no-such-compiler"}
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--target", tmp_path / "site"]
    command = [sys.executable, "-m", "pip", "install", *map(str, options), str(sdist)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    script = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import bld_ext, torch
from bld_ext import BLDOptimizer, MultiHead, SeededAugment, ops
assert torch.equal(ops.head_softmax(torch.ones(1, 2), [2]), torch.full((1, 2), 0.5))
print(bld_ext.__file__, bld_ext.build_info())
"""
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, info = done.stdout.split(maxsplit=1)
    assert Path(file).is_relative_to(tmp_path / "site") and info.strip() == "None"


@pytest.mark.parametrize(
    "folders, extra",
    [(("bld_ext", "python_api"), None), (("benchmarks", "tests"), "test")],
    ids=["package", "tests and benchmarks"],
)
def test_what_is_imported_is_a_dependency(folders, extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"] + project["optional-dependencies"].get(extra, [])
    named = {re.split(r"[^\w-]", need)[0].lower() for need in needs}
    text = "\n".join(path.read_text() for f in folders for path in (ROOT / f).rglob("*.py"))
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE))
    optional = set(re.findall(r'importorskip\("(\w+)"\)', text))
    providers = metadata.packages_distributions()
    for name in imported & set(providers) - optional - sys.stdlib_module_names - {"bld_ext"}:
        assert {provider.lower() for provider in providers[name]} & named, name


def test_the_metadata_says_what_pyproject_says(sdist):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = metadata.PathDistribution(sdist / "bld_ext.egg-info").metadata
    assert (info["Name"], info["Version"]) == (project["name"], project["version"])
    assert info["Requires-Python"] == project["requires-python"]
    needs = [need for need in info.get_all("Requires-Dist") if "extra ==" not in need]
    normal = {re.sub(r"[\s'\"]", "", need) for need in needs}
    assert normal == {re.sub(r"[\s'\"]", "", need) for need in project["dependencies"]}
    assert info.get_all("License-File") == project["license-files"]
