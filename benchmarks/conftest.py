"""`--rows FILE` keeps each figure once it is measured; `--smallest` runs the smallest cases."""

import time
from pathlib import Path

import pytest

from benchmarks import measure, provenance, rows

FILE = pytest.StashKey[Path | None]()


def pytest_addoption(parser):
    group = parser.getgroup("bld_ext benchmarks")
    kept = "append each row to FILE (JSON lines) as soon as it is measured; rows of this commit "
    kept += "that are in it are not measured again"
    group.addoption("--rows", metavar="FILE", help=kept)
    group.addoption("--smallest", action="store_true", help="only the smallest case of each row")


def pytest_configure(config):
    measure.SMALLEST = config.getoption("--smallest", False)
    named = config.getoption("--rows", None)
    config.stash[FILE] = file = Path(named) if named else None
    if file:
        if not config.getoption("--benchmark-enable", False):
            raise pytest.UsageError("--rows: nothing is measured without --benchmark-enable")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            rows.mend(file)
            file.open("ab").close()
        except OSError as error:
            raise pytest.UsageError(f"--rows: {file} cannot be written ({error})") from error


def pytest_collection_modifyitems(config, items):
    if not config.stash[FILE]:
        return
    known = {(row["test"], row["commit"]) for row in rows.read(config.stash[FILE])}
    there = [item for item in items if (item.nodeid, provenance.commit()) in known]
    config.hook.pytest_deselected(items=there)
    items[:] = [item for item in items if item not in there]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    file = item.config.stash[FILE]
    if file and report.when == "call" and report.passed and benchmark and benchmark.extra_info:
        row = {
            "test": item.nodeid,
            "group": benchmark.group,
            "params": item.callspec.params,
            "extra_info": dict(benchmark.extra_info),
            "commit": provenance.commit(),
            "versions": provenance.versions(),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        rows.append(file, row)
    return report
