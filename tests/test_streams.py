"""Datasets and streams of benchmarks.paper.streams."""

import os

import numpy as np
import pytest
import torch

from benchmarks.paper.streams import Dataset, DatasetError, load_dataset, make_stream

BAD = {  # what is wrong with the file: the arrays that make it so, and what the message must say
    "counts": ({"y_train": np.arange(5) % 3}, "y_train must hold one label for each of 6"),
    "label-matrix": ({"y_test": np.zeros((6, 1), int)}, "y_test must hold one label"),
    "no-images": (
        {"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, int)},
        r"x_train holds no images, its shape is \(0, 8, 8\); give at least one image",
    ),
    "no-floats": (
        {"x_train": np.zeros((0, 8, 8)), "y_train": np.zeros(0, int)},
        "x_train holds no images",
    ),
    "no-tests": (
        {"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)},
        "x_test holds no images",
    ),
    "no-pixels": ({"x_train": np.zeros((6, 0, 8), np.uint8)}, "x_train holds no images"),
    "empty-list": ({"x_train": np.zeros(0)}, "x_train holds no images"),
    "no-labels": ({"y_train": np.zeros(0, int)}, "y_train must hold one label for each of 6"),
    "one-label": ({"y_train": np.array(1)}, r"y_train must hold one label .* got shape \(\)"),
    "other-size": ({"x_test": np.zeros((6, 9, 8), np.uint8)}, "x_train is .* but x_test"),
    "other-dtype": ({"x_test": np.zeros((6, 8, 8), np.float32)}, "x_train is .* but x_test"),
    "two-dims": ({"x_train": np.zeros((6, 8), np.uint8)}, r"x_train must be \[N, H, W\]"),
    "five-dims": ({"x_train": np.zeros((6, 1, 1, 8, 8), np.uint8)}, r"got shape \(6, 1, 1, 8, 8\)"),
    "two-channels": (
        {"x_train": np.zeros((6, 8, 8, 2), np.uint8)},
        r"x_train must have 1 or 3 .*got shape \(6, 8, 8, 2\); keep only",
    ),
    "int-images": ({"x_train": np.zeros((6, 8, 8), int)}, "x_train must be uint8 or float"),
    "above-1": (
        {"x_train": np.linspace(0, 255, 384).reshape(6, 8, 8)},
        r"x_train must lie in \[0, 1\] .*got 0 to 255; divide by",
    ),
    "below-0": ({"x_test": np.full((6, 8, 8), -0.1)}, r"x_test must lie in \[0, 1\]"),
    "nan": ({"x_train": np.full((6, 8, 8), np.nan)}, "x_train must .* no nan"),
    "16-bit": ({"x_train": np.zeros((6, 8, 8), np.uint16)}, "float, got uint16; give 0 to 255 as"),
    "many-labels": ({"y_train": np.arange(6) * 100, "y_test": np.arange(6)}, "unique.*numbers"),
    "long-complex": ({"y_train": np.zeros(6, np.clongdouble)}, "y_train must be integers, got"),
    "long-labels": ({"y_train": np.zeros(6, np.longdouble)}, "y_train must be integers, got"),
    "label-gap": ({"y_train": np.array([0, 3, 2] * 2)}, "labels must be 0 to K-1"),
    "negative": ({"y_train": np.array([-1, 0, 1] * 2)}, "labels must be 0 to K-1"),
    "untested": ({"y_test": np.array([0, 1] * 3)}, "both"),
    "float-labels": ({"y_train": np.arange(6.0) % 3}, "y_train must be integers"),
    "complex": ({"y_train": (np.arange(6) % 3).astype(complex)}, "y_train must be integers"),
    "bool-labels": ({"y_test": np.arange(6) % 2 > 0}, "y_test must be integers"),
    "text-labels": ({"y_train": np.array(["cat", "dog", "ox"] * 2)}, "y_train must be integers"),
    "text-images": ({"x_train": np.full((6, 8, 8), "0")}, "x_train must be uint8 or float"),
}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def arrays(**changed):
    """Six images of three classes, twice."""
    labels = np.array([0, 1, 2] * 2)
    images = (np.arange(6 * 8 * 8) % 251).reshape(6, 8, 8).astype(np.uint8)
    return {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels} | changed


def rows(images):
    """Each image as bytes, to compare sets of images."""
    return [image.numpy().tobytes() for image in images]


# ---- streams ----


def test_digits(digits):
    assert (len(digits.x_train), len(digits.x_test), digits.classes) == (1257, 540, 10)
    assert digits.x_train.dtype == digits.x_test.dtype == torch.uint8
    assert digits.x_train.shape[1:] == digits.x_test.shape[1:] == (1, 8, 8)
    assert digits.x_train.max() == 255
    assert len(digits.y_train) == 1257 and len(digits.y_test) == 540
    shares = digits.y_test.bincount() / (digits.y_test.bincount() + digits.y_train.bincount())
    torch.testing.assert_close(shares, torch.full((10,), 0.3), rtol=0, atol=0.01)


@pytest.mark.parametrize("tasks", range(1, 11))
def test_splits_are_disjoint_complete_and_even(digits, tasks):
    stream = make_stream(digits, tasks, seed=0)
    assert sorted(c for task in stream for c in task.classes) == list(range(10))
    full, rest = divmod(10, tasks)
    assert [len(task.classes) for task in stream] == [full + (i < rest) for i in range(tasks)]


@pytest.mark.parametrize("part", ["train", "test"])
def test_each_image_appears_once_with_its_label(part):
    # every image is its own number, so pixels tell which one it is
    numbers = torch.arange(60, dtype=torch.uint8)
    labels = torch.randint(10, (60,))
    labels[:10] = torch.arange(10)
    images = numbers.view(60, 1, 1, 1).expand(60, 3, 4, 4)
    stream = make_stream(Dataset("numbers", images, labels, images, labels), 3, seed=1)
    met = []
    for task in stream:
        x, y = getattr(task, f"x_{part}"), getattr(task, f"y_{part}")
        which = x[:, 0, 0, 0].long()
        assert torch.equal(x, images[which])
        assert torch.equal(torch.tensor(task.classes)[y], labels[which])
        assert y.unique().tolist() == list(range(len(task.classes)))
        met += which.tolist()
    assert sorted(met) == list(range(60))


def test_training_images_are_shuffled(digits):
    (task,) = make_stream(digits, 1, seed=0)
    assert rows(task.x_train) != rows(digits.x_train)
    assert sorted(rows(task.x_train)) == sorted(rows(digits.x_train))


def same(left, right):
    fields = ("x_train", "y_train", "x_test", "y_test")
    return left.classes == right.classes and all(
        torch.equal(getattr(left, f), getattr(right, f)) for f in fields
    )


def test_stream_depends_on_the_seed_only(digits):
    first = make_stream(digits, 5, seed=3)
    torch.manual_seed(1), np.random.seed(1)
    again = make_stream(digits, 5, seed=3)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    other = make_stream(digits, 5, seed=4)
    assert [task.classes for task in first] != [task.classes for task in other]


@pytest.mark.parametrize("limit", [1, 7, 10_000])
def test_limit_keeps_the_first_training_images_and_the_whole_test(digits, limit):
    pairs = zip(make_stream(digits, 5, 0, limit), make_stream(digits, 5, 0), strict=True)
    for short, full in pairs:
        assert len(short.x_train) == len(short.y_train) == min(limit, len(full.x_train))
        assert torch.equal(short.x_train, full.x_train[:limit])
        assert torch.equal(short.x_test, full.x_test)


@pytest.mark.parametrize(
    ("limit", "size", "expected"),
    [
        (40, 20, [20, 20]),
        (43, 20, [20, 20, 3]),
        (42, 20, [20, 20, 2]),
        (41, 20, [20, 20]),
        (5, 20, [5]),
        (1, 20, []),
    ],
    ids=["even", "rest-3", "rest-2", "rest-1", "short", "one"],
)
def test_batches(digits, limit, size, expected):
    task = make_stream(digits, 5, 0, limit)[0]
    batches = list(task.batches(size))
    assert [len(x) for _, x, _ in batches] == [len(y) for _, _, y in batches] == expected
    assert task.batch_count(size) == len(expected)
    used = sum(expected)
    empty = (task.x_train[:0], task.y_train[:0])
    assert torch.equal(torch.cat([empty[0], *(x for _, x, _ in batches)]), task.x_train[:used])
    assert torch.equal(torch.cat([empty[1], *(y for _, _, y in batches)]), task.y_train[:used])


@pytest.mark.parametrize("tasks", [0, -1, 11])
def test_tasks_out_of_range(digits, tasks):
    with pytest.raises(ValueError, match=f"tasks: expected 1 to 10, .*digits, got {tasks}"):
        make_stream(digits, tasks, seed=0)


@pytest.mark.parametrize("limit", [0, -5])
def test_limit_out_of_range(digits, limit):
    with pytest.raises(ValueError, match=f"limit: .* got {limit}"):
        make_stream(digits, 5, 0, limit)


# ---- a user's own .npz ----


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("layout", ["NHW", "NHWC-1", "NHWC-3", "NCHW-1", "NCHW-3"])
def test_npz_layouts(tmp_path, layout, dtype):
    channels = 3 if layout.endswith("3") else 1
    chw = np.random.default_rng(0).integers(0, 256, (6, channels, 8, 9), np.uint8)
    if dtype != np.uint8:
        chw = (chw / 255).astype(dtype)
    stored = {"NHW": chw[:, 0], "NHWC": chw.transpose(0, 2, 3, 1), "NCHW": chw}[
        layout.split("-")[0]
    ]
    np.savez(tmp_path / "own.npz", **arrays(x_train=stored, x_test=stored))
    dataset = load_dataset(str(tmp_path / "own.npz"))
    native = np.uint8 if dtype == np.uint8 else np.float32
    assert torch.equal(dataset.x_train, torch.from_numpy(chw.astype(native)))
    assert torch.equal(dataset.x_test, dataset.x_train)
    assert torch.equal(dataset.y_train, torch.tensor([0, 1, 2] * 2))
    assert len(make_stream(dataset, 3, 0)) == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_npz_with_alpha_is_read_without_it(tmp_path, layout, dtype):
    chw = np.random.default_rng(0).integers(0, 2, (6, 4, 8, 9)).astype(dtype)
    stored = chw.transpose(0, 2, 3, 1) if layout == "NHWC" else chw
    np.savez(tmp_path / "own.npz", **arrays(x_train=stored, x_test=stored))
    dataset = load_dataset(str(tmp_path / "own.npz"))
    assert torch.equal(dataset.x_train, torch.from_numpy(chw[:, :3]))
    assert torch.equal(dataset.x_test, dataset.x_train)
    (note,) = dataset.notes
    assert "own.npz: the fourth channel of the images, alpha, is left out" in note


def test_npz_without_alpha_has_no_note(tmp_path, digits):
    images = np.zeros((6, 3, 4, 4), np.uint8)  # four pixels wide, which is no alpha channel
    np.savez(tmp_path / "own.npz", **arrays(x_train=images, x_test=images))
    dataset = load_dataset(str(tmp_path / "own.npz"))
    assert dataset.x_train.shape == (6, 3, 4, 4)
    assert dataset.notes == digits.notes == ()


TWO_WAYS = {
    "three-high": (6, 3, 8, 3),
    "three-wide-gray": (6, 1, 8, 3),
    "one-high": (6, 1, 8, 1),
    "one-high-colour": (6, 3, 8, 1),
    "four-and-four": (6, 4, 8, 4),
    "flat-colour": (6, 3, 64),
    "flat-colour-last": (6, 64, 3),
    "flat-gray": (6, 1, 64),
    "flat-gray-last": (6, 64, 1),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", TWO_WAYS.values(), ids=TWO_WAYS)
def test_npz_of_a_layout_that_can_be_read_two_ways(tmp_path, shape, dtype):
    images = np.zeros(shape, dtype)
    np.savez(tmp_path / "own.npz", **arrays(x_train=images, x_test=images))
    with pytest.raises(DatasetError) as refused:
        load_dataset(str(tmp_path / "own.npz"))
    message = str(refused.value)
    assert f"own.npz: x_train of shape {shape} may be " in message and "\n" not in message
    assert ("give it four dimensions" if len(shape) == 3 else "pad the images") in message


@pytest.mark.parametrize("shape", [(6, 1, 3, 64), (6, 1, 1, 64), (6, 3, 1, 8), (6, 3, 3, 8)])
def test_npz_of_flat_or_low_images_in_four_dimensions(tmp_path, shape):
    images = np.zeros(shape, np.uint8)
    np.savez(tmp_path / "own.npz", **arrays(x_train=images, x_test=images))
    assert load_dataset(str(tmp_path / "own.npz")).x_train.shape == shape


@pytest.mark.parametrize("dtype", [np.float16, np.longdouble])
def test_npz_of_floats_that_torch_lacks_or_widens(tmp_path, dtype):
    images = (np.arange(6 * 8 * 8) % 251 / 256).reshape(6, 8, 8)
    np.savez(tmp_path / "own.npz", **arrays(x_train=images.astype(dtype), x_test=images))
    dataset = load_dataset(str(tmp_path / "own.npz"))
    assert dataset.x_train.dtype == torch.float32
    assert torch.equal(dataset.x_train, dataset.x_test)  # exact in all three


def test_a_range_is_checked_before_it_is_rounded(tmp_path):
    images = np.full((6, 8, 8), 1 + 1e-12)
    np.savez(tmp_path / "own.npz", **arrays(x_test=images))
    with pytest.raises(DatasetError, match="float x_test must lie in"):
        load_dataset(str(tmp_path / "own.npz"))


@pytest.mark.parametrize("name", ["own.NPZ", "own.Npz"])
def test_npz_by_a_name_in_upper_case(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        np.savez(file, **arrays())
    assert len(load_dataset(str(tmp_path / name)).x_train) == 6
    with pytest.raises(DatasetError, match="no file .*other.NPZ"):
        load_dataset(str(tmp_path / "other.NPZ"))


def test_labels_that_do_not_fit_are_shown_in_part(tmp_path):
    labels = np.arange(5000) * 2
    images = np.zeros((5000, 2, 2), np.uint8)
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(DatasetError, match=r"\[0, 2, .*, 18, ... \(5000 in all\)\]") as refused:
        load_dataset(str(tmp_path / "own.npz"))
    assert len(str(refused.value)) < 500


def test_npz_of_the_other_byte_order(tmp_path):
    images = np.linspace(0, 1, 6 * 8 * 8).reshape(6, 8, 8).astype(">f4")
    np.savez(tmp_path / "own.npz", **arrays(x_train=images, x_test=images))
    x_train = load_dataset(str(tmp_path / "own.npz")).x_train
    assert torch.equal(x_train, torch.from_numpy(images.astype("=f4")).unsqueeze(1))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16])
def test_npz_labels_of_any_integer_dtype(tmp_path, dtype):
    np.savez(tmp_path / "own.npz", **arrays(y_train=np.array([0, 1, 2] * 2, dtype)))
    assert load_dataset(str(tmp_path / "own.npz")).y_train.dtype == torch.int64


@pytest.mark.parametrize("wrong", BAD)
def test_npz_with_bad_arrays(tmp_path, wrong):
    changed, message = BAD[wrong]
    np.savez(tmp_path / "own.npz", **arrays(**changed))
    with pytest.raises(DatasetError, match=f"own.npz: .*{message}"):
        load_dataset(str(tmp_path / "own.npz"))


def test_npz_without_arrays(tmp_path):
    np.savez(tmp_path / "own.npz", x_train=np.zeros(1), images=np.zeros(1))
    message = "own.npz: no array y_train, x_test, y_test; it has x_train, images. Give np.savez "
    with pytest.raises(DatasetError, match=message):
        load_dataset(str(tmp_path / "own.npz"))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_npz_with_objects_is_not_unpickled(tmp_path):
    fuse = tmp_path / "created"
    np.savez(tmp_path / "own.npz", **arrays(y_train=np.array([Bomb(str(fuse))], dtype=object)))
    message = (
        r"y_train holds Python objects, .* expected numbers; give .*\(y_train.tolist\(\).*int64"
    )
    with pytest.raises(DatasetError, match=message):
        load_dataset(str(tmp_path / "own.npz"))
    assert not fuse.exists()
    with np.load(tmp_path / "own.npz", allow_pickle=True) as file:
        file["y_train"]
    assert fuse.exists()  # so the bomb was live


@pytest.mark.parametrize("array", ["x_train", "y_test"])
def test_the_remedy_for_objects_is_one(tmp_path, array):
    objects = arrays() | {array: arrays()[array].astype(object)}
    np.savez(tmp_path / "own.npz", **objects)
    with pytest.raises(DatasetError) as refused:
        load_dataset(str(tmp_path / "own.npz"))
    assert f"{array} holds" in str(refused.value) and "write one with" not in str(refused.value)
    plain = np.array(objects[array].tolist(), np.uint8 if array == "x_train" else np.int64)
    np.savez(tmp_path / "own.npz", **objects | {array: plain})
    assert len(load_dataset(str(tmp_path / "own.npz")).x_train) == 6


@pytest.mark.parametrize("damage", ["half", "empty", "text", "npy", "flipped-byte"])
def test_damaged_npz(tmp_path, damage):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays())
    content = path.read_bytes()
    np.save(tmp_path / "single.npy", arrays()["x_train"])
    flipped = bytearray(content)
    flipped[300] ^= 255
    path.write_bytes(
        {
            "half": content[: len(content) // 2],
            "empty": b"",
            "text": b"x_train, y_train\n" * 20,
            "npy": (tmp_path / "single.npy").read_bytes(),
            "flipped-byte": bytes(flipped),
        }[damage]
    )
    with pytest.raises(DatasetError, match="own.npz: not a readable .npz file"):
        load_dataset(str(path))


# ---- datasets by name ----


@pytest.mark.parametrize("path", ["nothing.npz", "folder.npz"])
def test_missing_npz(tmp_path, path):
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DatasetError, match=f"no file .*{path}"):
        load_dataset(str(tmp_path / path))


def test_unknown_dataset_lists_the_known_ones():
    with pytest.raises(DatasetError, match="digits, mnist, cifar10, svhn or .*npz.*'imagenet'"):
        load_dataset("imagenet")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_absent_dataset_without_download_says_what_to_do(tmp_path, name):
    message = f"dataset {name}: could not be loaded .* into {tmp_path}.*npz file as --dataset"
    with pytest.raises(DatasetError, match=message):
        load_dataset(name, tmp_path, download=False)
    assert not any(tmp_path.rglob("*.gz"))


def test_mnist_is_padded_to_32(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28), np.uint8)
    labels = np.arange(10, dtype=np.uint8)
    for split in ("train", "t10k"):  # the idx format: type and dimensions, sizes, values
        head = bytes([0, 0, 8, 3]) + np.array([10, 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = bytes([0, 0, 8, 1]) + np.array([10], ">i4").tobytes()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    dataset = load_dataset("mnist", tmp_path, download=False)
    assert dataset.x_train.shape == dataset.x_test.shape == (10, 1, 32, 32)
    assert torch.equal(dataset.x_train[:, 0, 2:30, 2:30], torch.from_numpy(images))
    assert dataset.x_train.sum() == images.sum()
    assert dataset.y_test.tolist() == list(range(10))
