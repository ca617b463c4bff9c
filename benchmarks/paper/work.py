"""The commands: each runs every method on every seed of every stream, and writes the results."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import provenance
from benchmarks.paper import report, shared, tables
from benchmarks.paper.checkpoint import one_line, write_whole
from benchmarks.paper.estimate import Estimator
from benchmarks.paper.job import devices_of, preflight, run_all, use_device
from benchmarks.paper.methods import PRESETS, Settings
from benchmarks.paper.streams import DatasetError, load_dataset, make_stream
from benchmarks.paper.tables import TABLES

DRY_RUN_SECONDS = 32  # time limit for measuring all streams


def facts(device: str) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    kernels = provenance.kernels(device.partition(":")[0])
    return provenance.versions() | {"device": name, "kernels": kernels}


def describe(dataset: str, settings: Settings, seeds: list[int]) -> str:
    limit = f", {settings.limit:,} images a task" if settings.limit else ""
    name = Path(dataset).stem.encode(errors="replace").decode()  # a file's may be no Unicode
    return (
        f"{name}, {settings.tasks} tasks{limit}, {settings.network}, "
        f"{settings.views} views, lr {settings.lr:g}, {len(seeds)} seeds"
    )


def untuned(dataset: str, lr: float, preset: str) -> str:
    return (
        f"dataset {dataset}: the learning rate is {lr:g}, that of the preset {preset!r}, which was "
        "not tuned for these images; tune it with --lr, because the accuracy of BLD and its gain "
        "over finetuning depend on it"
    )


@dataclass
class Stream:
    """A dataset, the settings it is learned with, and the folder of its results."""

    dataset: str
    settings: Settings
    out: Path

    def title(self, seeds: list[int]) -> str:
        return describe(self.dataset, self.settings, seeds)


@dataclass
class Work:
    """The work of a command: every method on every seed of every stream."""

    args: argparse.Namespace
    methods: list[str]
    seeds: list[int]
    streams: list[Stream]
    out: Path
    start: float
    title: str  # the dataset and settings that all streams share
    told: set[str] = field(default_factory=set)  # notes that have been printed

    @property
    def devices(self) -> list[str]:
        return devices_of(self.args.device)

    @property
    def jobs(self) -> int:
        """The number of runs at a time."""
        cores = max(1, (os.cpu_count() or 1) // self.args.threads)
        jobs = self.args.jobs or (cores if self.args.device == "cpu" else len(self.devices))
        return min(jobs, len(self.seeds) * len(self.methods))

    def check(self, stream: Stream) -> int:
        """Raise the errors that a run would raise; return the number of batches of all runs.

        What the user should know of the dataset and its settings is printed once.
        """
        what = (stream.dataset, self.args.data, self.methods, stream.settings, self.seeds)
        batches, notes = preflight(*what, self.args.device)
        if stream.dataset not in PRESETS and self.args.lr is None:
            notes += (untuned(stream.dataset, stream.settings.lr, self.args.preset),)
        for note in notes:
            if note not in self.told:
                print(note, file=sys.stderr)
        self.told.update(notes)
        return batches

    def train(
        self, stream: Stream, arrived: Callable[[list[dict]], None] = lambda records: None
    ) -> list[dict]:
        """Train all runs of a stream and return their records; with --resume, go on from earlier.

        Whenever a run ends, `arrived` gets the records of all runs that have ended.
        """
        args, settings = self.args, stream.settings
        batches = self.check(stream)
        if args.tensorboard:
            report.summary_writer()
        print(stream.title(self.seeds))

        def tell(record: dict, records: list[dict]) -> None:
            arrived(records)
            beside = tables.printed(stream.dataset, settings.tasks, record["method"])
            print(report.run_line(record, beside), flush=True)

        what = (stream.dataset, args.data, self.methods, settings, self.seeds, batches)
        saving = (args.resume, args.checkpoint_seconds)
        if shared.is_shared():
            device = args.device if args.device == "cpu" else self.devices[0]
            records = shared.run_all(*what, stream.out / "runs", device, *saving, tell)
        else:
            places = (self.devices, self.jobs, args.threads)
            records = run_all(*what, stream.out / "runs", *places, *saving, tell)
        if args.tensorboard:
            report.tensorboard(records, stream.out / "tensorboard")
        return records


def leave_out_missing(work: Work, do: Callable[[Stream], None]) -> None:
    """Call `do` for each stream whose dataset can be loaded; raise an error if none can."""
    errors = []
    for stream in work.streams:
        try:
            do(stream)
        except DatasetError as error:
            errors.append(error)
            if len(errors) == len(work.streams):
                raise
            print(f"left out: {one_line(error)}", file=sys.stderr)


def dry_run(work: Work) -> None:
    """Print an estimate of what the work would take, without doing it."""
    args, spent = work.args, time.perf_counter() - work.start
    use_device(work.devices[0])
    settings = [stream.settings for stream in work.streams]
    limit = DRY_RUN_SECONDS - spent
    measuring = Estimator(work.devices[0], args.threads, limit, work.methods, settings)

    def estimate(stream: Stream) -> None:
        work.check(stream)
        print(stream.title(work.seeds))
        dataset, settings = load_dataset(stream.dataset, args.data), stream.settings
        tasks = make_stream(dataset, settings.tasks, work.seeds[0], settings.limit)
        found = measuring.estimate(tasks, work.methods, settings, work.seeds)
        print(f"\n{report.estimate_table(found, work.jobs)}\n")

    leave_out_missing(work, estimate)


def result(work: Work, stream: Stream, records: list[dict]) -> dict:
    methods = list(dict.fromkeys(r["method"] for r in records))
    return {
        "command": ["python", "-m", "benchmarks.paper", *work.args.argv],
        "dataset": stream.dataset,
        "settings": stream.settings.as_dict(),
        "seeds": work.seeds,
        "versions": facts(work.devices[0]),
        "seconds": round(time.perf_counter() - work.start, 1),
        "summary": report.summarise(records),
        "bld_minus": {
            baseline: report.paired(records, "bld", baseline)
            for baseline in methods
            if baseline != "bld" and "bld" in methods
        },
        "runs": records,
    }


def as_json(found: dict) -> bytes:
    return f"{json.dumps(found, indent=1)}\n".encode()


def draw(records: list[dict], title: str, out: Path) -> None:
    report.figure(records, title, out / "accuracy.png")
    report.figures(records, out)


def one_stream(work: Work) -> None:
    (stream,) = work.streams

    def keep(records: list[dict]) -> dict:
        found = result(work, stream, records)
        write_whole(stream.out / "results.json", as_json(found))
        return found

    records = work.train(stream, keep)
    found = keep(records)
    draw(records, stream.title(work.seeds), stream.out)
    print(report.table(found["summary"]))
    for baseline, difference in found["bld_minus"].items():
        print(report.difference_line(difference, "bld", baseline))
    files = (stream.out / name for name in ("results.json", "accuracy.png"))
    print(f"{found['seconds']:.0f} s; wrote {' and '.join(map(str, files))}")


def paper_table(work: Work) -> None:
    parts: dict[Path, str] = {}  # the table of each stream

    def learn(stream: Stream) -> None:
        title = stream.title(work.seeds)

        def keep(records: list[dict]) -> None:
            found = as_json(result(work, stream, records))
            write_whole(stream.out / "results.json", found)
            rows = tables.table(records, stream.dataset, stream.settings.tasks)
            differences = tables.differences(records)
            parts[stream.out] = f"{title}; in brackets the paper's\n\n{rows}\n\n{differences}\n"
            heads = [f"{work.args.what}: {TABLES[work.args.what].caption}\n"]
            write_whole(work.out / "table.md", "\n".join([*heads, *parts.values()]).encode())

        records = work.train(stream, keep)
        keep(records)
        draw(records, title, stream.out)
        print(parts[stream.out])

    leave_out_missing(work, learn)
    print(f"{time.perf_counter() - work.start:.0f} s; wrote {work.out / 'table.md'}")


def ablation(work: Work) -> None:
    """Change one setting of the preset at a time, and compare the results."""
    for stream in work.streams:
        work.check(stream)
    rows = []
    for stream in work.streams:
        records = work.train(stream)
        name, _, value = stream.out.name.partition("-")
        for method, entry in report.summarise(records).items():
            gain = method != "finetune" and report.paired(records, method, "finetune")
            rows.append((name, value, method, entry | {"gain": gain or None}))
    text = report.ablation_table(rows)
    write_whole(work.out / "ablation.md", f"{text}\n".encode())
    report.ablation_figure(rows, work.title, work.out / "ablation.png")
    print(text)
    seconds = time.perf_counter() - work.start
    print(f"{seconds:.0f} s; wrote {work.out / 'ablation.md'} and ablation.png")
