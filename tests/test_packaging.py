"""What is installed: the wheel's files, imports from anywhere, and life without a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bld_ext

ROOT = Path(__file__).parents[1]


def run(*command, cwd, **env):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build_wheel(folder, **env):
    """A wheel from a copy of the sources, so that nothing built before can slip in."""
    source = folder / "source"
    ignore = shutil.ignore_patterns(
        "build", "*.so", "*.egg-info", ".git", "data", "runs", "results"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source, **env)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def installed(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


# An editable install would find the checkout's compiled module for a package that lacks it.
PROBE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import bld_ext
from bld_ext import BLDOptimizer, MultiHead, SeededAugment
print(bld_ext.__file__, bld_ext.backend("head_softmax"), bool(bld_ext.build_info()))
"""


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {p.relative_to(ROOT) for p in (ROOT / "bld_ext").rglob("*.py")}
    api = {Path("bld_ext/api") / p.name for p in (ROOT / "python_api").glob("*.py")}
    compiled = {name for name in names if name.startswith("bld_ext/_C.")}
    assert len(compiled) == 1
    assert names - compiled == {p.as_posix() for p in sources | api}


def test_the_wheel_imports_from_another_folder_with_its_kernels(wheel, tmp_path):
    folder = installed(wheel, tmp_path / "site")
    done = run(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(folder))
    file, backend, info = done.stdout.split()
    assert Path(file).is_relative_to(folder)
    assert (backend, info) == ("compiled", "True")
    assert done.stderr == ""


def test_without_a_compiler_it_installs_and_says_so_once(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    wheel = build_wheel(tmp_path, PATH=str(tools), CXX="no-such-compiler")
    folder = installed(wheel, tmp_path / "site")
    script = (
        PROBE + "import bld_ext.ops, torch\nprint(bld_ext.ops.head_softmax(torch.ones(1, 2), [2]))"
    )
    done = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(folder))
    assert "reference False" in done.stdout and "0.5" in done.stdout
    assert done.stderr.count("every op runs on its PyTorch reference") == 1


def test_build_info_states_how_it_was_built():
    info = bld_ext.build_info()
    assert info["torch_target"] == "2.11"
    assert set(info) == {"torch_target", "torch_built_with", "cuda", "architectures", "compiler"}
    assert all(isinstance(value, str) for value in info.values())
    assert info["torch_built_with"].startswith("2.") and info["compiler"].split()[1][0].isdigit()


def test_the_compiled_module_needs_only_the_stable_abi():
    """No symbol of the C++ libraries whose ABI changes with every torch."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm, from binutils")
    (library,) = (ROOT / "bld_ext").glob("_C*.so")
    symbols = subprocess.run(
        [nm, "-DC", "--undefined-only", library], capture_output=True, text=True
    )
    unstable = [s for s in symbols.stdout.splitlines() if " at::" in s or " c10::" in s]
    assert unstable == []
    assert "aoti_torch_library_init_impl" in symbols.stdout
