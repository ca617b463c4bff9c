"""Prepares the datasets of the tables. A file gets its name only once it is complete.

python -m benchmarks.gpu.datasets stand-in FOLDER     writes random images, for a rehearsal
python -m benchmarks.gpu.datasets unpack SCRIPT FILE  runs a script that writes the dataset to FILE
"""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.paper.checkpoint import write_whole


def stand_in(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, channels in (("mnist", 1), ("cifar10", 3)):
        y = np.arange(640) % 10
        x = rng.integers(0, 256, (640, 32, 32, channels), dtype=np.uint8)
        parts = dict(x_train=x[:600], y_train=y[:600], x_test=x[600:], y_test=y[600:])
        file, data = folder / f"{name}.npz", io.BytesIO()
        if not file.exists():
            np.savez(data, **parts)
            write_whole(file, data.getvalue())
    print(f"mnist.npz and cifar10.npz, random images, are in {folder}")


def unpack(script: Path, file: Path) -> None:
    aside = file.with_suffix(".new.npz")
    subprocess.run([sys.executable, str(script), str(aside)], check=True)
    os.replace(aside, file)
    print(f"{file} is unpacked")


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    {"stand-in": stand_in, "unpack": unpack}[what](*map(Path, paths))
