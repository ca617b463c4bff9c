"""Runs whose views are shared by the processes of torchrun: rank 0 leads, the others follow.

    torchrun --nproc-per-node 2 -m benchmarks.paper --dataset digits

Rank 0 is the command as it is in one process: it prints, and it writes checkpoints and results. It
tells the others which run comes next; they learn it together with rank 0, and write nothing. With
`--max-restarts`, torchrun starts all of them again when one has failed, and they go on from the
last checkpoint.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import distributed
from tqdm import tqdm

from benchmarks.paper.experiment import run
from benchmarks.paper.job import run_or_read, use_device
from benchmarks.paper.methods import Settings
from benchmarks.paper.streams import load_dataset


def is_shared() -> bool:
    """Return whether torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_restarted() -> bool:
    """Return whether torchrun --max-restarts has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def start(device: str, threads: int) -> str:
    """Meet the other processes; return the device of this one."""
    on_gpu = device.startswith("cuda")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else device
    torch.set_num_threads(threads)
    use_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    return device


def leads() -> bool:
    return distributed.get_rank() == 0


def _from_leader(value: object) -> object:
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def follow(device: str) -> int:
    """Take part in the runs that rank 0 names, until there is none left."""
    while (what := _from_leader(None)) is not None:
        dataset, root, method, settings, seed, resume = what
        loaded = load_dataset(dataset, root, download=False)
        group = distributed.group.WORLD
        run(loaded, method, settings, seed, device, resume=resume, process_group=group)
    distributed.destroy_process_group()
    return 0


def dismiss() -> None:
    """Let the others end."""
    _from_leader(None)
    distributed.destroy_process_group()


def run_all(
    dataset: str,
    root: str,
    methods: list[str],
    settings: Settings,
    seeds: list[int],
    batches: int,
    folder: Path,
    device: str,
    resume: bool,
    every: float,
    arrived: Callable[[dict, list[dict]], None],
) -> list[dict]:
    """Run every method on every seed, one after the other, on all processes; only rank 0 calls it.

    `arrived` gets each record, and all so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    loaded, records = load_dataset(dataset, root), []
    with tqdm(total=batches, unit="batch", smoothing=0.05) as bar:
        for seed in seeds:
            for method in methods:
                told = (dataset, root, method, settings, seed, resume)
                record = run_or_read(
                    loaded, method, settings, seed, device, bar.update, folder, resume, every,
                    partial(_from_leader, told), distributed.group.WORLD,
                )  # fmt: skip
                records.append(record)
                with bar.external_write_mode():
                    arrived(record, records)
    return records
