"""What goes wrong around a run: kills, damaged and foreign files, no memory, no space."""

import copy
import ctypes
import errno
import gzip
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from arrange import arranged
from kill import SERVER, kill_command, kill_run, without_time
from torch import nn

from benchmarks.paper import __main__ as command
from benchmarks.paper import checkpoint as files
from benchmarks.paper import job, report, work
from benchmarks.paper.checkpoint import (
    MARK,
    Checkpoint,
    CheckpointError,
    load_record,
    save_record,
)
from benchmarks.paper.experiment import conditions, run
from benchmarks.paper.methods import PRESETS, Settings
from benchmarks.paper.streams import DatasetError, load_dataset
from benchmarks.terminal import Lenient
from bld_ext import BLDOptimizer, SeededAugment, ops
from bld_ext.api.out_of_memory import is_out_of_memory

SMALL = Settings("slim", 3e-3, 2, {"crop_padding": 1}, tasks=2, limit=40)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def records(digits):
    """Of runs that nothing happened to."""
    return [run(digits, method, SMALL, 2) for method in ("finetune", "bld")]


class Harm:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def flips(data, count):
    """Copies of it, each with another bit."""
    rng = random.Random(0)
    for _ in range(count):
        where = rng.randrange(len(data))
        yield data[:where] + bytes([data[where] ^ 1 << rng.randrange(8)]) + data[where + 1 :]


def cuts(data, count):
    """Its beginnings: all short ones, and some of any length."""
    lengths = [*range(150), len(data) - 1, *random.Random(0).sample(range(len(data)), count)]
    return (data[:length] for length in lengths)


# ---- kills ----


@pytest.mark.parametrize("slow", [False, True], ids=["anywhere", "amid-a-write"])
def test_kills_in_a_row_leave_the_same_bits(slow, tmp_path):
    """More of them: python -m tests.kill --kills 50."""
    expected, *_ = kill_run(tmp_path / "whole", "bld", [])
    rng, start = random.Random(), time.perf_counter()
    assert kill_run(tmp_path / "again", "bld", [])[0] == expected
    seconds = time.perf_counter() - start  # of a run, on this machine and now
    moments = [rng.uniform(0.1, 0.5) * seconds for _ in range(3)]
    found, kills, amid = kill_run(tmp_path / "killed", "bld", moments, slow=slow)
    assert found == expected and kills > 0, moments


def test_the_command_goes_on_after_its_end(digits, tmp_path):
    """All ways, in any order: python -m tests.kill --command."""
    settings = replace(PRESETS["digits"], tasks=5, views=2)
    expected = json.loads(json.dumps(run(digits, "bld", settings, 0)))
    (found,) = kill_command(tmp_path, ["kill", "kill-worker", "term"], random)
    assert found == without_time(expected)


# ---- checkpoints ----


class Stopped(BaseException):
    pass


@pytest.fixture(scope="module")
def written(digits, tmp_path_factory):
    """The file that a run left when it was stopped after three batches."""
    path, left = tmp_path_factory.mktemp("written") / "run.pt", [3]

    def tick(_):
        left[0] -= 1
        if not left[0]:
            raise Stopped

    with pytest.raises(Stopped):
        run(digits, "bld", SMALL, 2, progress=tick, checkpoint=path, every=0)
    return path.read_bytes()


@pytest.fixture
def saved(written, digits, tmp_path):
    """That file in a folder of its own, and what it depends on."""
    path = tmp_path / "run.pt"
    path.write_bytes(written)
    return Checkpoint(path, conditions(digits, "bld", SMALL, 2, "cpu"), 0)


def seal(body):
    """As a whole file: mark, digest, body."""
    return MARK + files.hashlib.sha256(body).digest() + body


def pickled(value, save=torch.save):
    buffer = files.io.BytesIO()
    save(value, buffer)
    return buffer.getvalue()


def test_a_cut_checkpoint_is_refused_at_any_length(saved, written):
    for cut in cuts(written, 100):
        saved.path.write_bytes(cut)
        with pytest.raises(CheckpointError, match="run.pt: not readable .*Remove it, or start"):
            saved.load("cpu")
    saved.path.write_bytes(written)
    assert saved.load("cpu")["batches"] == 2  # the one before the batch that was stopped


def test_a_flipped_bit_is_found_wherever_it_is(saved, written):
    for flipped in flips(written, 200):
        saved.path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="run.pt: not readable .*Remove it, or start"):
            saved.load("cpu")


FOREIGN = {
    "empty": lambda harm: b"",
    "png": lambda harm: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9,
    "pickle": lambda harm: pickle.dumps(harm),
    "torch-pickle": lambda harm: pickled({"what": {}, "state": harm}),
    "sealed-pickle": lambda harm: seal(pickle.dumps(harm)),
    "sealed-torch-pickle": lambda harm: seal(pickled({"what": {}, "state": harm})),
    "tensor": lambda harm: seal(pickled(torch.ones(3))),
    "dict": lambda harm: seal(pickled({"model": torch.ones(3)})),
    "list": lambda harm: seal(pickled([{}, {}])),
    "nothing": lambda harm: seal(b""),
    "mark": lambda harm: MARK,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_and_not_executed(content, saved, digits, tmp_path):
    saved.path.write_bytes(content(Harm(tmp_path / "harm")))
    with pytest.raises(CheckpointError, match="run.pt: not readable .*Remove it, or start") as no:
        run(digits, "bld", SMALL, 2, checkpoint=saved.path, resume=True)
    assert "\n" not in str(no.value) and not (tmp_path / "harm").exists()


def test_the_harm_would_be_done(tmp_path):
    pickle.loads(pickle.dumps(Harm(tmp_path / "harm")))
    assert (tmp_path / "harm").exists()


def test_a_folder_in_its_place_is_refused(saved, digits):
    saved.path.unlink()
    saved.path.mkdir()
    with pytest.raises(CheckpointError, match="run.pt: not readable .*Remove it"):
        run(digits, "bld", SMALL, 2, checkpoint=saved.path, resume=True)


OTHER = {
    "method": dict(method="l2"),
    "seed": dict(seed=3),
    "views": dict(settings=Settings("slim", 3e-3, 3, {"crop_padding": 1}, tasks=2, limit=40)),
    "augment": dict(settings=Settings("slim", 3e-3, 2, {"flip": 0.5}, tasks=2, limit=40)),
}


@pytest.mark.parametrize("other", OTHER)
def test_the_checkpoint_of_another_run_is_refused(other, saved, digits):
    this = dict(method="bld", settings=SMALL, seed=2) | OTHER[other]
    with pytest.raises(CheckpointError, match=f"run.pt: the configuration has changed: {other}: "):
        run(digits, **this, checkpoint=saved.path, resume=True)


# ---- records ----


def equal_or_refused(file, record, message):
    """Reading it gives that record or an error; whether it was refused."""
    try:
        assert load_record(file, {"seed": 2}) == record
    except CheckpointError as error:
        assert str(file) in str(error) and message in str(error)
        return True
    return False


def test_a_damaged_record_is_refused(records, tmp_path):
    file, record = tmp_path / "bld-2.json", json.loads(json.dumps(records[1]))
    save_record(file, {"seed": 2}, record)
    data = file.read_bytes()
    for cut in cuts(data.rstrip(), 100):
        file.write_bytes(cut)
        assert equal_or_refused(file, record, "remove it")
    refused = 0
    for flipped in flips(data, 400):
        file.write_bytes(flipped)
        refused += equal_or_refused(file, record, "remove it")
    assert refused > 390  # the line feed at the end, an E for an e


@pytest.mark.parametrize("text", ["", "null", "[" * 10**5, '{"record": 1, "what": 2}', "\x89PNG"])
def test_a_foreign_record_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match="a.json: not the record of a run.*remove it"):
        load_record(tmp_path / "a.json", {})


class Ticks:
    def put(self, count):
        pass


@pytest.fixture
def worker(monkeypatch, digits):
    """What a worker process does, in this one."""
    monkeypatch.setattr(job, "_worker", dict(dataset=digits, device="cpu", ticks=Ticks()))
    return lambda folder, method="bld", resume=True, every=0: job._run_in_worker(
        method, SMALL, 2, folder, resume, every
    )


def test_the_record_of_another_run_is_refused(worker, tmp_path):
    worker(tmp_path, "finetune")
    shutil.copy(tmp_path / "finetune-2.json", tmp_path / "bld-2.json")
    with pytest.raises(CheckpointError, match="bld-2.json: the conf.*: method: 'finetune' before"):
        worker(tmp_path)


def test_a_checkpoint_left_beside_a_record_goes(worker, tmp_path, saved):
    """A kill may come between writing the one and removing the other."""
    first = worker(tmp_path)
    shutil.copy(saved.path, tmp_path / "bld-2.pt")
    assert worker(tmp_path) == first and not (tmp_path / "bld-2.pt").exists()


# ---- datasets ----


def labels_and_images():
    labels = np.array([0, 1, 2] * 2)
    images = (np.arange(6 * 8 * 8) % 251).reshape(6, 8, 8).astype(np.uint8)
    return {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def npz(request, tmp_path):
    request.param(tmp_path / "own.npz", **labels_and_images())
    return tmp_path / "own.npz"


def test_a_damaged_npz_is_refused_or_read_as_it_was(npz):
    data, expected, refused = npz.read_bytes(), load_dataset(str(npz)).digest, 0
    for damaged in [*cuts(data, 50), *flips(data, 400)]:
        npz.write_bytes(damaged)
        try:
            assert load_dataset(str(npz)).digest == expected
        except DatasetError as error:
            assert str(npz) in str(error)
            refused += 1
    assert refused > 400  # names, dates and the like of the members are read by nobody


DIRECTORY = b"PK\x01\x02"  # an entry of a zip's directory
ENTRY = {"encrypted": (8, 1), "a-later-zip": (6, 255), "another-compression": (10, 99)}


@pytest.mark.parametrize("field", ENTRY)
def test_an_npz_that_zipfile_cannot_read_is_refused(field, tmp_path):
    np.savez(tmp_path / "own.npz", **labels_and_images())
    data, (offset, value) = bytearray((tmp_path / "own.npz").read_bytes()), ENTRY[field]
    data[data.index(DIRECTORY) + offset] = value
    (tmp_path / "own.npz").write_bytes(data)
    with pytest.raises(DatasetError, match="own.npz: not a readable .npz file .*np.savez"):
        load_dataset(str(tmp_path / "own.npz"))


@pytest.mark.parametrize("array", labels_and_images())
def test_objects_in_an_npz_are_not_unpickled(array, tmp_path):
    harmful = np.array([Harm(tmp_path / "harm")] * 6, dtype=object)
    np.savez(tmp_path / "own.npz", **labels_and_images() | {array: harmful})
    with pytest.raises(DatasetError, match="own.npz: .*[Oo]bject"):
        load_dataset(str(tmp_path / "own.npz"))
    assert not (tmp_path / "harm").exists()


def test_an_npz_larger_than_memory_is_refused(tmp_path):
    np.savez(tmp_path / "own.npz", **labels_and_images())
    data = (tmp_path / "own.npz").read_bytes()
    huge = data.replace(b"(6, 8, 8), }" + b" " * 15, b"(6, 8, 8" + b"0" * 15 + b"), }")
    assert huge != data
    (tmp_path / "own.npz").write_bytes(huge)
    with pytest.raises(DatasetError, match="own.npz: not a readable .npz file"):
        load_dataset(str(tmp_path / "own.npz"))


def test_an_npz_that_memory_cannot_hold_is_not_taken_for_a_damaged_one(tmp_path):
    np.savez(tmp_path / "own.npz", **labels_and_images())
    header = files.io.BytesIO()
    described = {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2**14, 2**14)}
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as huge:
        for array in labels_and_images():
            member = zipfile.ZipFile(tmp_path / "own.npz").read(f"{array}.npy")
            huge.writestr(f"{array}.npy", header.getvalue() if array == "x_train" else member)
    with pytest.raises(DatasetError, match="does not fit into memory .*256. TiB.*fewer or smaller"):
        load_dataset(str(tmp_path / "huge.npz"))


def test_an_npz_that_may_not_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    np.savez(tmp_path / "own.npz", **labels_and_images())

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no mode stops
    with pytest.raises(DatasetError, match="own.npz: could not be opened .*denied.*make it reada"):
        load_dataset(str(tmp_path / "own.npz"))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(dims, values):
    return bytes([0, 0, 8, len(dims)]) + np.array(dims, ">i4").tobytes() + values.tobytes()


@pytest.fixture
def raw(tmp_path):
    """MNIST's folder, as torchvision unpacks it, with ten images."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = rng.integers(0, 256, (10, 28, 28), np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx((10, 28, 28), images))
        labels = np.arange(10, dtype=np.uint8)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx((10,), labels))
    return folder


IDX = {
    "empty": (IMAGES, lambda data: b""),
    "half-a-head": (IMAGES, lambda data: data[:10]),
    "half": (IMAGES, lambda data: data[: len(data) // 2]),
    "longer": (IMAGES, lambda data: data + b"\0"),
    "cut-labels": (LABELS, lambda data: data[:-1]),
    "labels-for-images": (IMAGES, lambda data: idx((10,), np.arange(10, dtype=np.uint8))),
    "images-for-labels": (LABELS, lambda data: idx((10, 28, 28), np.zeros(7840, np.uint8))),
    "floats": (IMAGES, lambda data: data[:2] + b"\x0d" + data[3:]),
    "two-dimensions": (IMAGES, lambda data: data[:3] + b"\2" + data[4:]),
    "huge": (IMAGES, lambda data: data[:4] + b"\xff" * 12 + data[16:]),
    "png": (IMAGES, lambda data: b"\x89PNG\r\n\x1a\n" + data),
    "pickle": (LABELS, lambda data: pickle.dumps(Harm("/nowhere/harm"))),
}


@pytest.mark.parametrize("case", IDX)
def test_a_damaged_mnist_file_is_named(case, raw, tmp_path):
    name, damage = IDX[case]
    (raw / name).write_bytes(damage((raw / name).read_bytes()))
    message = f"dataset mnist: .*{name} is damaged: expected an idx file .*Remove it"
    with pytest.raises(DatasetError, match=message):
        load_dataset("mnist", tmp_path)


def test_mnist_labels_of_another_count_or_range_are_refused(raw, tmp_path):
    for values in ([0, 1, 2], [*range(9), 200]):
        (raw / LABELS).write_bytes(idx((len(values),), np.array(values, np.uint8)))
        with pytest.raises(DatasetError, match="^dataset mnist: (y_train|labels) must "):
            load_dataset("mnist", tmp_path)


def test_a_bit_that_nothing_guards_makes_another_dataset(raw, tmp_path, digits):
    """Unpacked images have no checksum; a run does not go on with others."""
    before = load_dataset("mnist", tmp_path).digest
    data = bytearray((raw / IMAGES).read_bytes())
    data[1000] ^= 1
    (raw / IMAGES).write_bytes(data)
    assert load_dataset("mnist", tmp_path).digest != before


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("half", [False, True], ids=["foreign", "cut"])
def test_an_archive_of_another_md5_is_not_unpacked(half, raw, tmp_path, offline):
    data = gzip.compress((raw / IMAGES).read_bytes())
    (raw / IMAGES).unlink()
    (raw / f"{IMAGES}.gz").write_bytes(data[: len(data) // 2] if half else data)
    with pytest.raises(DatasetError, match=f"{IMAGES}.gz.*no network.*another md5 count as absent"):
        load_dataset("mnist", tmp_path)
    assert not (raw / IMAGES).exists()


HARMFUL = {
    "mnist": ["MNIST/processed/training.pt", "MNIST/processed/test.pt"],
    "cifar10": [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)],
    "svhn": ["train_32x32.mat", "test_32x32.mat"],
}


@pytest.mark.parametrize("save", [pickle.dump, torch.save], ids=["pickle", "torch"])
@pytest.mark.parametrize("name", HARMFUL)
def test_what_lies_in_a_dataset_s_place_is_not_executed(name, save, tmp_path, offline):
    for file in HARMFUL[name]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(pickled(Harm(tmp_path / "harm"), save))
    with pytest.raises(DatasetError, match=f"dataset {name}: could not be loaded .*--dataset"):
        load_dataset(name, tmp_path)
    assert not (tmp_path / "harm").exists()


# ---- memory ----


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fail):
        ctx.fail = fail
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.fail("backward")
        return grad, None


class Failing(nn.Module):
    """A backbone in which memory runs out at the `left`-th call of a `stage`."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.stage, self.left, self.fail = inner, None, 0, None

    def count(self, stage):
        self.left -= stage == self.stage
        if stage == self.stage and self.left == 0:
            self.fail()

    def forward(self, images):
        if not torch.is_grad_enabled():  # it only looks
            return self.inner(images)
        self.count("forward")
        return FailingBackward.apply(self.inner(images), self.count)


def gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


KINDS = {
    "gpu": gpu,
    "cpu": lambda: torch.empty(2**62, dtype=torch.uint8),
    "python": lambda: bytearray(2**62),
    "kernel": lambda: ops.head_softmax(torch.zeros(1, 1).expand(2**45, 2), [2], 2.0),
}
STAGES = {  # two passes of four views in each loop over the views
    "warm-up forward": ("forward", 2),
    "warm-up backward": ("backward", 2),
    "warm-up update": ("update", 1),
    "joint forward": ("forward", 4),
    "joint backward": ("backward", 4),
    "joint update": ("update", 2),
}


def learner(make_model, monkeypatch, **options):
    """An optimizer that has learned a batch, and its backbone that can run out of memory."""
    model = make_model(heads=(2, 2), dropout=0.2)
    model.backbone = backbone = Failing(model.backbone)
    optimizer = arranged(
        model, lr=0.05, views=8, augment=SeededAugment(crop_padding=1), seed=3, **options
    )

    def counted(update):
        def call(*arguments):
            backbone.count("update")
            return update(*arguments)

        return call

    monkeypatch.setattr(optimizer.base, "step", counted(optimizer.base.step))
    monkeypatch.setattr(ops, "balanced_sgd_", counted(ops.balanced_sgd_))
    return optimizer, backbone


def bits(module):
    return copy.deepcopy(module.state_dict())


def assert_same_bits(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("undone", [False, True], ids=["", "check_finite"])
@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_memory_that_runs_out_amid_a_step(
    stage, schedule, undone, make_model, make_batch, monkeypatch
):
    options = dict(views_per_pass=4, schedule=schedule, check_finite=undone)
    optimizer, backbone = learner(make_model, monkeypatch, **options)
    twin, _ = learner(make_model, monkeypatch, **options)
    batches = [make_batch(2, number) for number in range(3)]
    for each in (optimizer, twin):
        each.step(*batches[0])
    rng = torch.get_rng_state()
    (backbone.stage, backbone.left), backbone.fail = STAGES[stage], gpu
    with pytest.raises(torch.OutOfMemoryError, match="^views_per_pass: 4 views of 5 images.*low"):
        optimizer.step(*batches[1])
    assert backbone.left == 0 and torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in optimizer.model.parameters())
    if "joint" in stage and not undone:  # it may hold the warm-up update
        twin.warm_up(*batches[1])
        twin.release()
    elif stage == "warm-up update" and not undone:  # its passes have moved the running statistics
        buffers = zip(twin.model.buffers(), optimizer.model.buffers(), strict=True)
        for ours, theirs in buffers:
            ours.copy_(theirs)
    assert_same_bits(bits(optimizer.model), bits(twin.model))
    assert optimizer.batches == twin.batches
    assert torch.equal(optimizer.step(*batches[2]), twin.step(*batches[2]))
    assert_same_bits(bits(optimizer.model), bits(twin.model))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_it_is_known_and_backed_off_from(kind, make_model, make_batch, monkeypatch):
    optimizer, backbone = learner(make_model, monkeypatch, views_per_pass="auto")
    twin, _ = learner(make_model, monkeypatch, views_per_pass=4)
    (backbone.stage, backbone.left), backbone.fail = ("backward", 1), KINDS[kind]
    for each in (optimizer, twin):
        each.step(*make_batch(2))
    assert backbone.left < 1 and optimizer.views_in_pass == 4
    assert_same_bits(bits(optimizer.model), bits(twin.model))


def learn_with_less_and_less(pipe):
    """In a process of its own: a step with so many MiB beyond what is held, and one without."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed is given back
    optimizer = BLDOptimizer(
        nn_model(), lr=1e-3, views=2, views_per_pass=2, augment=SeededAugment(crop_padding=1)
    )
    small = torch.rand(2, 1, 16, 16), torch.tensor([0, 1])
    large = torch.rand(100, 1, 16, 16), torch.randint(2, (100,))
    optimizer.step(*large)  # what is compiled for a shape is there from now on
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for more in (1, 4, 7, 10):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (more << 20), limits[1]))
        try:
            optimizer.step(*large)
            found = "fits"
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        clean = all(p.grad is None for p in optimizer.model.parameters())
        loss = optimizer.step(*small)
        pipe.send((more, found, clean and bool(loss.isfinite())))
    pipe.send(None)


def nn_model():
    from benchmarks.paper.networks import make_model

    model = make_model("slim")
    model.add_head(2)
    model.add_head(2)
    return model


def test_memory_that_really_runs_out():
    """The processor's own allocator, in torch's kernels and in those of this package."""
    ours, theirs = SERVER.Pipe()
    process = SERVER.Process(target=learn_with_less_and_less, args=(theirs,))
    process.start()
    theirs.close()
    outcomes = list(iter(lambda: ours.recv() if ours.poll(60) else 1 / 0, None))
    process.join()
    assert process.exitcode == 0 and all(whole for *_, whole in outcomes)
    assert len(outcomes) == 4
    for more, found, _ in outcomes:
        assert "OutOfMemoryError: views_per_pass: 2 views of 100" in found, f"{more} MiB"


@pytest.mark.parametrize("text", ["shapes cannot be multiplied", "Could not run 'aten::clone'"])
def test_another_error_is_not_taken_for_it(text):
    assert not is_out_of_memory(RuntimeError(text))


# ---- space ----


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(name): no space is left for that file; full_disk(None): there is some again."""
    plain = Path.open

    def choose(name):
        def attempt(path, *mode, **options):
            full = path.name == f"{name}.new" and mode == ("wb",)
            return plain(Path("/dev/full") if full else path, *mode, **options)

        monkeypatch.setattr(Path, "open", attempt)

    return choose


@pytest.fixture
def finished(monkeypatch, records):
    """The command where all runs have come to their end; finished(out, *options): its code."""
    monkeypatch.setattr(work, "run_all", lambda *_: records)
    options = "--tasks 2 --limit 40 --views 2 --seeds 2 --resume".split()
    return lambda out, *more: command.main([*options, *more, "--out", str(out)])


@pytest.mark.parametrize("name", ["results.json", "accuracy.png", "memory.png"])
def test_a_full_disk_leaves_the_results_before(name, finished, full_disk, tmp_path, capsys):
    for before in ("results.json", "accuracy.png", "matrix.png", "factors.png", "memory.png"):
        (tmp_path / before).write_text("the one before")
    full_disk(name)
    assert finished(tmp_path) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert f"{tmp_path / name}: could not be written, perhaps for want of space" in line
    assert "No space left" in line and "before is whole" in line and "--resume" in line
    assert (tmp_path / name).read_text() == "the one before"
    assert not list(tmp_path.glob("*.new"))
    full_disk(None)
    assert finished(tmp_path) == 0 and (tmp_path / name).read_text("latin1") != "the one before"


def test_results_that_were_half_written_are_written_again(finished, tmp_path):
    for name in ("results.json", "results.json.new", "accuracy.png"):
        (tmp_path / name).write_bytes(b'{"runs": [')
    assert finished(tmp_path) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 2
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.new"))


@pytest.fixture
def no_file_over():
    """no_file_over(size): what is written beyond that many bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_for_tensorboard(finished, no_file_over, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "results.json").write_text("the one before")
    no_file_over(50)
    assert finished(tmp_path, "--tensorboard") == 2
    assert "tensorboard/finetune-2: could not be written" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "the one before"
    no_file_over(resource.RLIM_INFINITY)
    assert finished(tmp_path, "--tensorboard") == 0


def test_a_record_for_which_there_is_no_space(worker, full_disk, records, tmp_path):
    full_disk("bld-2.json")
    with pytest.raises(CheckpointError, match="bld-2.json: could not be written.*none before it"):
        worker(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["bld-2.pt"]
    full_disk(None)
    assert without_time(worker(tmp_path)) == without_time(records[1])
    assert [file.name for file in tmp_path.iterdir()] == ["bld-2.json"]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_disk_that_fails_at_any_call_leaves_the_checkpoint(call, saved, written, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "open" else files.os, call, fail)
        with pytest.raises(CheckpointError, match="run.pt: could not be written.*before is whole"):
            saved.save({"model": torch.ones(3)})
    assert [file.name for file in saved.path.parent.iterdir()] == ["run.pt"]
    assert saved.path.read_bytes() == written
    saved.save({"model": torch.ones(3)})
    assert torch.equal(saved.load("cpu")["model"], torch.ones(3))


# ---- terminals and pipes ----


class FailingStream(files.io.StringIO):
    """A stream that fails at its first write, or at its first flush."""

    def __init__(self, number, at):
        super().__init__()
        self.number, self.at, self.calls = number, at, 0

    def fail(self):
        self.calls += 1
        raise OSError(self.number, os.strerror(self.number))

    def write(self, text):
        return self.fail() if self.at == "write" else len(text)

    def flush(self):
        if self.at == "flush":
            self.fail()


def assert_whole(out, runs=2):
    assert len(json.loads((out / "results.json").read_text())["runs"]) == runs
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("at", ["write", "flush"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_results_do_not_depend_on_where_is_printed_to(
    number, stream, at, finished, tmp_path, monkeypatch, capsys
):
    failing = FailingStream(number, at)
    monkeypatch.setattr(sys, stream, failing)
    code = finished(tmp_path)
    assert sys.stdout is failing or sys.stderr is failing
    assert_whole(tmp_path)
    lost = stream == "stdout" and number != errno.EPIPE
    assert code == 2 * lost
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == lost
    assert not lost or os.strerror(number) in lines[0] and "print to where there is" in lines[0]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_results_do_not_depend_on_an_open_terminal(stream, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, stream, None)  # as Python has it where the descriptor is closed
    assert finished(tmp_path / "none") == 0
    assert_whole(tmp_path / "none")
    closed = files.io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, stream, closed)
    assert finished(tmp_path / "closed") == 2 * (stream == "stdout")
    assert_whole(tmp_path / "closed")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_results_do_not_depend_on_an_encoding(encoding, finished, records, tmp_path, monkeypatch):
    written, twice = files.io.BytesIO(), [r | {"seed": seed} for r in records for seed in (2, 3)]
    monkeypatch.setattr(sys, "stdout", files.io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(work, "run_all", lambda *_: twice)
    assert finished(tmp_path, "--seeds", "2,3") == 0
    sys.stdout.flush()
    assert_whole(tmp_path, runs=4)
    sign = "?" if encoding == "ascii" else "±"
    assert f" {sign} " in written.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_does_not_depend_on_an_encoding(encoding, monkeypatch):
    written = files.io.BytesIO()
    monkeypatch.setattr(sys, "stdout", files.io.TextIOWrapper(written, encoding=encoding))
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    sys.stdout.flush()
    assert end.value.code == 0
    assert b"?, weight of the distillation gradient" in written.getvalue()
    assert b"mine.npz" in written.getvalue()


def test_the_streams_are_there_again_after_a_command(monkeypatch):
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        command.main(["--views", "0"])
    assert (sys.stdout, sys.stderr) == before


def test_nothing_is_written_to_a_closed_pipe_again(capfd):
    """The descriptor then leads nowhere, or Python would fail as it flushes at its exit."""
    ours, theirs = os.pipe()
    os.close(ours)
    pipe = os.fdopen(theirs, "w")
    stream = Lenient(pipe)
    stream.write("a" * 100)
    stream.flush()
    assert isinstance(stream.error, BrokenPipeError)
    pipe.write("b")
    pipe.close()


@pytest.mark.parametrize("both", [True, False], ids=["2>&1 | head -1", "> /dev/full"])
def test_the_command_goes_on_where_its_output_ends(both, tmp_path):
    """A run each of two methods, in the process of a user, whose pipe closes at its first line."""
    tiny = "--tasks 2 --seeds 0 --jobs 1 --views 1 --limit 4 --methods finetune,bld"
    run = f"{sys.executable} -W ignore -m benchmarks.paper {tiny} --out {tmp_path}"
    shell = f"{run} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}" if both else f"{run} > /dev/full"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == (0 if both else 2), done.stderr
    assert_whole(tmp_path)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    if both:
        assert len(done.stdout.splitlines()) == 1 and not done.stderr
    else:
        assert done.stderr.splitlines()[-1].startswith("error: stdout: not all could be printed")


@pytest.mark.parametrize(
    "command",
    ["paper.__main__", "views", "table", "schedules", "precision", "profile_step", "gpu.__main__"],
)
def test_help_that_could_not_be_printed_is_an_error(command, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{command}")
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            module.main()
    assert ended.value.code == 2 and "not all could be printed" in capsys.readouterr().err


def last_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("out", ["file", "file/below", "file/far/below", "x" * 300])
def test_an_output_that_is_no_folder_is_refused(out, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert command.main(["--out", str(tmp_path / out)]) == 2
    line = last_line(capsys)
    assert line.startswith("error: ") and str(tmp_path / out) in line
    assert "give another --out" in line
    assert (tmp_path / "file").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("exists", [True, False], ids=["itself", "its-parent"])
def test_a_folder_that_cannot_be_written_to_is_refused(exists):
    """As nobody, whom access rights stop even where the tests run as root."""
    folder = Path(tempfile.mkdtemp())
    out = folder if exists else folder / "new"
    said = tempfile.TemporaryFile("w+")
    try:
        folder.chmod(0o555)
        if (child := os.fork()) == 0:
            try:
                sys.stderr = said
                if os.getuid() == 0:
                    os.setuid(65534)
                code = command.main(["--out", str(out)])
                said.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        (line,) = said.read().splitlines()
        assert code == 2 and f"error: out: {out} is no folder to write to" in line
        assert "Permission denied" in line and "give another --out" in line
        assert not list(folder.iterdir())
    finally:
        said.close()
        folder.chmod(0o755)
        folder.rmdir()


def test_memory_that_runs_out_in_a_run_ends_with_one_line(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("views_per_pass: 50 views of 20 images do not fit")

    monkeypatch.setattr(work, "run_all", fail)
    assert command.main(["--out", str(tmp_path / "new")]) == 2
    assert last_line(capsys) == "error: views_per_pass: 50 views of 20 images do not fit"


def test_a_figure_is_closed_where_it_cannot_be_written(records, full_disk, tmp_path):
    import matplotlib.pyplot as plt

    full_disk("memory.png")
    with pytest.raises(CheckpointError, match="memory.png"):
        report.figures(records, tmp_path)
    assert not plt.get_fignums()
