"""Random images where the datasets of the tables would lie, for a rehearsal."""

import os
import sys
from pathlib import Path

import numpy as np


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, channels in (("mnist", 1), ("cifar10", 3)):
        y = np.arange(640) % 10
        x = rng.integers(0, 256, (640, 32, 32, channels), dtype=np.uint8)
        parts = dict(x_train=x[:600], y_train=y[:600], x_test=x[600:], y_test=y[600:])
        file = folder / f"{name}.npz"
        if not file.exists():
            np.savez(file.with_suffix(".new.npz"), **parts)
            os.replace(file.with_suffix(".new.npz"), file)
    print(f"wrote mnist.npz and cifar10.npz, random images, into {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
