"""Makes streams of tasks from datasets: random disjoint classes, seen once in small batches."""

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.paper.checkpoint import one_line


class DatasetError(Exception):
    """A dataset could not be found, downloaded or read; the message says what to do."""


@dataclass(frozen=True)
class Dataset:
    name: str
    x_train: Tensor  # [N, C, H, W] uint8, or float in [0, 1]
    y_train: Tensor  # [N] int64
    x_test: Tensor
    y_test: Tensor
    notes: tuple[str, ...] = ()  # what the user should know of how it was read

    @property
    def classes(self) -> int:
        return int(self.y_train.max()) + 1

    @cached_property
    def digest(self) -> str:
        """A digest of the images and labels, by which a checkpoint recognises its dataset."""
        names = ("x_train", "y_train", "x_test", "y_test")
        return digest({name: getattr(self, name) for name in names})


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Task:
    """One task of a stream; labels count from 0 within it."""

    classes: tuple[int, ...]  # classes[i] is the dataset's label of the task's class i
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def batches(
        self, size: int, order: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield positions, training images and labels, each image once, in order or by `order`.

        The last batch may be smaller. A single image that remains is left out, because BatchNorm
        cannot normalise it.
        """
        order = torch.arange(len(self.x_train)) if order is None else order
        for where in order.split(size):
            if len(where) > 1:
                yield where, self.x_train[where], self.y_train[where]

    def with_mixed_tests(self) -> "Task":
        """Return the task with its test images shuffled, always alike; files may be sorted."""
        order = torch.randperm(len(self.x_test), generator=torch.Generator().manual_seed(0))
        return replace(self, x_test=self.x_test[order], y_test=self.y_test[order])

    def batch_count(self, size: int) -> int:
        full, rest = divmod(len(self.x_train), size)
        return full + (rest > 1)


def make_stream(dataset: Dataset, tasks: int, seed: int, limit: int | None = None) -> list[Task]:
    """Split the classes at random into `tasks` disjoint tasks, and shuffle each task's images.

    Args:
        tasks: number of tasks; if the classes do not divide evenly, the first tasks get more.
        seed: decides the split and the order, so every method sees the same.
        limit: most training images of a task; default all.
    """
    if not 1 <= tasks <= dataset.classes:
        raise ValueError(
            f"tasks: expected 1 to {dataset.classes}, the classes of {dataset.name}, got {tasks}"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, or None for all, got {limit}")
    rng = np.random.default_rng(seed)
    splits = np.array_split(rng.permutation(dataset.classes), tasks)
    return [_make_task(dataset, [int(c) for c in split], rng, limit) for split in splits]


def _make_task(dataset: Dataset, classes: list[int], rng, limit: int | None) -> Task:
    local = torch.full((dataset.classes,), -1)
    local[classes] = torch.arange(len(classes))
    train = (local[dataset.y_train] >= 0).nonzero().flatten()
    train = train[torch.from_numpy(rng.permutation(len(train)))][:limit]
    test = (local[dataset.y_test] >= 0).nonzero().flatten()
    return Task(
        tuple(classes),
        dataset.x_train[train],
        local[dataset.y_train[train]],
        dataset.x_test[test],
        local[dataset.y_test[test]],
    )


# ---- where datasets come from ----


def load_dataset(name: str, root: str | Path = "data", download: bool = True) -> Dataset:
    """Load a dataset by name, or your own `.npz` by path.

    Args:
        name: "digits" (ships with scikit-learn), "mnist", "cifar10", "svhn" (torchvision,
            downloaded to `root` and verified by md5), or a path ending in .npz that holds x_train,
            y_train, x_test, y_test; images uint8, or float in [0, 1], as [N, H, W], [N, H, W, C] or
            [N, C, H, W], where a fourth channel, alpha, is left out. A file NAME.npz in `root`
            stands for the dataset of that name.
    """
    if name.lower().endswith(".npz"):
        return _from_npz(Path(name))
    if name not in LOADERS:
        raise DatasetError(
            f"dataset: expected {', '.join(LOADERS)} or the path of an .npz file, got {name!r}"
        )
    if (Path(root) / f"{name}.npz").is_file():
        return _from_npz(Path(root) / f"{name}.npz", name)
    return LOADERS[name](Path(root), download)


def _digits(root: Path, download: bool) -> Dataset:
    """Load scikit-learn's 1,797 digits of 8×8 pixels; 30 % of each class is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(
        images, data.target, test_size=0.3, stratify=data.target, random_state=0
    )
    x_train, x_test, y_train, y_test = split
    return _dataset("digits", x_train, y_train, x_test, y_test)


def _torchvision(name: str, root: Path, download: bool, make: Callable) -> tuple:
    try:
        return make(True), make(False)
    except Exception as error:  # torchvision raises many classes: URLError, RuntimeError, OSError
        raise DatasetError(
            f"dataset {name}: could not be loaded{' or downloaded' if download else ''} "
            f"({one_line(error)}). Without a network, put {SOURCES[name].format(root=root)}, or a "
            f"{name}.npz into {root}, or give an .npz file as --dataset. Archives of another md5 "
            "count as absent"
        ) from error


SOURCES = {
    "mnist": "the four files of https://ossci-datasets.s3.amazonaws.com/mnist/ "
    "(train-images-idx3-ubyte.gz and so on) into {root}/MNIST/raw",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz into {root}",
    "svhn": "train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers/ into "
    "{root}",
}


def _mnist(root: Path, download: bool) -> Dataset:
    from torchvision.datasets import MNIST

    for file in (root / "MNIST" / "raw").glob("*-ubyte"):
        _check_idx(file)

    def make(train):
        return MNIST(str(root), train=train, download=download)

    train, test = _torchvision("mnist", root, download, make)
    dataset = _dataset("mnist", train.data, train.targets, test.data, test.targets)
    pad = [F.pad(x, (2, 2, 2, 2)) for x in (dataset.x_train, dataset.x_test)]  # 28 to 32
    return Dataset("mnist", pad[0], dataset.y_train, pad[1], dataset.y_test)


def _check_idx(file: Path) -> None:
    """Check an unpacked file: it has no md5, and interrupted unpacking leaves it incomplete."""
    dims = 3 if "images" in file.name else 1
    with file.open("rb") as data:
        head = data.read(4 + 4 * dims)
    sizes = [int(size) for size in np.frombuffer(head[4 : len(head) // 4 * 4], ">u4")]
    expected = len(head) + prod(sizes)
    if head[:4] != bytes([0, 0, 8, dims]) or file.stat().st_size != expected:
        raise DatasetError(
            f"dataset mnist: {file} is damaged: expected an idx file of bytes with {dims} "
            "dimensions, as long as its header says. Remove it; it is then unpacked or downloaded "
            "again"
        )


def _cifar10(root: Path, download: bool) -> Dataset:
    from torchvision.datasets import CIFAR10

    def make(train):
        return CIFAR10(str(root), train=train, download=download)

    train, test = _torchvision("cifar10", root, download, make)
    return _dataset("cifar10", train.data, train.targets, test.data, test.targets)


def _svhn(root: Path, download: bool) -> Dataset:
    from torchvision.datasets import SVHN

    def make(train):
        return SVHN(str(root), split="train" if train else "test", download=download)

    train, test = _torchvision("svhn", root, download, make)
    return _dataset("svhn", train.data, train.labels, test.data, test.labels)


LOADERS = {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10, "svhn": _svhn}


def _from_npz(path: Path, name: str | None = None) -> Dataset:
    wanted = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise DatasetError(f"dataset: no file {path}; give the path of an .npz that exists")
    try:
        with path.open("rb") as opened:
            is_zip = zipfile.is_zipfile(opened)
    except OSError as error:
        raise DatasetError(
            f"dataset {path}: could not be opened ({one_line(error)}); make it readable"
        ) from error
    if not is_zip:
        raise DatasetError(f"dataset {path}: not a readable .npz file; write one with np.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in wanted if name not in file.files]
            if missing:
                raise DatasetError(
                    f"dataset {path}: no array {', '.join(missing)}; it has "
                    f"{', '.join(file.files)}. Give np.savez {', '.join(wanted)} by these names"
                )
            arrays = [_read(path, file, name) for name in wanted]
    except DatasetError:
        raise
    except MemoryError as error:
        raise DatasetError(
            f"dataset {path}: not a readable .npz file, or one that does not fit into memory "
            f"({one_line(error)}); give fewer or smaller images"
        ) from error
    except Exception as error:  # zipfile raises many classes of errors for a damaged file
        raise DatasetError(
            f"dataset {path}: not a readable .npz file ({one_line(error)}); write one with np.savez"
        ) from error
    return _dataset(name or str(path), *arrays)


def _read(path: Path, file, array: str) -> np.ndarray:
    try:
        return file[array]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        expected = "uint8 or float32" if array.startswith("x") else "int64"
        raise DatasetError(
            f"dataset {path}: {array} holds Python objects, which are never unpickled, expected "
            f"numbers; give np.savez np.array({array}.tolist(), dtype) with the dtype {expected}"
        ) from error


def _dataset(name: str, x_train, y_train, x_test, y_test) -> Dataset:
    """Check arrays of any known layout and return them as a Dataset."""
    x_train, alpha = _images(name, "x_train", x_train)
    x_test, alpha_of_test = _images(name, "x_test", x_test)
    y_train = _labels(name, "y_train", y_train, len(x_train))
    y_test = _labels(name, "y_test", y_test, len(x_test))
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise DatasetError(
            f"dataset {name}: x_train is {tuple(x_train.shape[1:])} {x_train.dtype} an image, but "
            f"x_test {tuple(x_test.shape[1:])} {x_test.dtype}; give both one size and one dtype"
        )
    seen, tested = set(y_train.unique().tolist()), set(y_test.unique().tolist())
    if seen != tested or seen != set(range(len(seen))):
        raise DatasetError(
            f"dataset {name}: labels must be 0 to K-1, each in both y_train and y_test; got "
            f"{_few(seen)} and {_few(tested)}. np.unique(labels, return_inverse=True)[1] numbers "
            "the labels of both parts together"
        )
    dropped = f"dataset {name}: the fourth channel of the images, alpha, is left out"
    notes = (dropped,) if alpha or alpha_of_test else ()
    return Dataset(name, x_train, y_train, x_test, y_test, notes)


def _few(labels: set[int], most: int = 10) -> str:
    shown = [str(label) for label in sorted(labels)]
    more = [f"... ({len(shown)} in all)"] if len(shown) > most else []
    return f"[{', '.join(shown[:most] + more)}]"


def _images(name: str, array: str, values) -> tuple[Tensor, bool]:
    """Return images as [N, C, H, W], and whether they had an alpha channel, which is left out."""
    values = np.asarray(values)
    if values.size == 0:
        raise DatasetError(
            f"dataset {name}: {array} holds no images, its shape is {values.shape}; give at least "
            "one image of each class"
        )
    if values.dtype != np.uint8 and values.dtype.kind != "f":
        raise DatasetError(
            f"dataset {name}: {array} must be uint8 or float, got {values.dtype}; give 0 to 255 as "
            "uint8, or 0 to 1 as float32"
        )
    values, alpha = _channels_first(f"dataset {name}: {array}", values)
    if values.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(values)), alpha
    lowest, highest = float(values.min()), float(values.max())
    if not (lowest >= 0 and highest <= 1):  # nor does nan
        raise DatasetError(
            f"dataset {name}: float {array} must lie in [0, 1] and hold no nan, got {lowest:g} to "
            f"{highest:g}; divide by the largest value that a pixel can have"
        )
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)), alpha


def _channels_first(what: str, values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return images of a layout that can be read in one way only as [N, C, H, W] without alpha."""
    shape = values.shape
    if values.ndim == 3:
        if {shape[1], shape[2]} & {1, 3}:
            raise DatasetError(
                f"{what} of shape {shape} may be gray images [N, H, W], or images of 1 or 3 "
                "channels with all their pixels in a row; give it four dimensions, [N, C, H, W] or "
                "[N, H, W, C]"
            )
        return values[:, None], False
    if values.ndim != 4:
        raise DatasetError(
            f"{what} must be [N, H, W], [N, H, W, C] or [N, C, H, W], got shape {shape}; give "
            "images that are flat their sides with reshape"
        )
    for channels in ((1, 3), (4,)):  # 4 only where nothing else fits
        found = [axis for axis in (1, 3) if shape[axis] in channels]
        if len(found) == 2:
            raise DatasetError(
                f"{what} of shape {shape} may be [N, C, H, W] or [N, H, W, C]; pad the images with "
                "np.pad until their sides differ from a number of channels"
            )
        if found:
            return np.moveaxis(values, found[0], 1)[:, :3], channels == (4,)
    raise DatasetError(
        f"{what} must have 1 or 3 channels, or 4 with alpha, in its second or last dimension, got "
        f"shape {shape}; keep only these channels"
    )


def _labels(name: str, array: str, values, count: int) -> Tensor:
    values = np.asarray(values)
    if values.dtype.kind not in "iu":
        raise DatasetError(
            f"dataset {name}: {array} must be integers, got {values.dtype}; number the classes "
            "from 0"
        )
    if values.shape != (count,):
        raise DatasetError(
            f"dataset {name}: {array} must hold one label for each of {count} images, got shape "
            f"{values.shape}; give the number of its class for each image"
        )
    return torch.from_numpy(values.astype(np.int64))
