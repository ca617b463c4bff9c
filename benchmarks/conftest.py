"""Options of the benchmarks: `--rows FILE` keeps measured rows, `--smallest` runs small cases."""

import time
from functools import cache
from pathlib import Path

import pytest

from benchmarks import measure, provenance, rows

FILE = pytest.StashKey[Path | None]()
KNOWN = pytest.StashKey[int]()


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
    now = _conditions()
    known = {
        row["test"]
        for row in rows.read(config.stash[FILE])
        if all(row.get(name) == value for name, value in now.items())
    }
    there = [item for item in items if item.nodeid in known]
    config.hook.pytest_deselected(items=there)
    items[:] = [item for item in items if item not in there]
    config.stash[KNOWN] = len(there)


def pytest_sessionfinish(session, exitstatus):
    """Report success if nothing was left to run because all rows are known."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash.get(KNOWN, 0):
        session.exitstatus = pytest.ExitCode.OK


@cache
def _conditions() -> dict:
    """Return the conditions of a measurement; under other conditions a row is measured again."""
    return {
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "machine": measure.machine()["device"],
        "kernels": provenance.kernels(measure.DEVICE.type),
        "smallest": measure.SMALLEST,
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    file = item.config.stash[FILE]
    measured = benchmark is not None and "us" in benchmark.extra_info
    if file and report.when == "call" and report.passed and measured:
        row = {
            "test": item.nodeid,
            "group": benchmark.group,
            "params": item.callspec.params,
            "extra_info": dict(benchmark.extra_info),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            **_conditions(),
        }
        rows.append(file, row)
    return report
