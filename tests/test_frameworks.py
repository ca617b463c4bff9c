"""BLDOptimizer inside other people's loops and checkpoints: the same bits as a loop of one's own.

What is not installed is skipped; `pip install accelerate lightning "bld_ext[avalanche]"` and
`"bld_ext[capymoa]"` for the rest.
"""

import copy
import io
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.data import DataLoader, TensorDataset

from bld_ext import BLDOptimizer, MultiHead, SeededAugment

pytestmark = pytest.mark.filterwarnings("ignore:BLDOptimizer. SGD keeps state")
IMAGES, LABELS = torch.rand(6, 3, 2, 2), torch.arange(6) % 3


def seeded_head(features, classes):
    """The same weights, however often a framework drew random numbers before."""
    head = nn.Linear(features, classes)
    generator = torch.Generator().manual_seed(classes)
    with torch.no_grad():
        for p in head.parameters():
            p.uniform_(-0.5, 0.5, generator=generator)
    return head


def make(heads=(2, 3), **options):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8))
    model = MultiHead(backbone, 8, head=seeded_head)
    for size in heads:
        model.add_head(size)
    return model, BLDOptimizer(model, 0.01, views=2, augment=SeededAugment(jitter=0.1), **options)


def learned(steps=1):
    model, optimizer = make()
    for _ in range(steps):
        optimizer.step(IMAGES, LABELS)
    return model


def assert_equal(model, other):
    for (name, a), (_, b) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


# ---- checkpoints ----


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_distributed_checkpoint_goes_on_bit_for_bit(momentum):
    base = partial(torch.optim.SGD, momentum=momentum)
    (model, optimizer), (other, again) = make(base=base), make(base=base)
    optimizer.seed = 5
    for _ in range(3):
        optimizer.step(IMAGES, LABELS)
    of_model, of_optimizer = copy.deepcopy(get_state_dict(model, optimizer))
    file = io.BytesIO()
    torch.save((of_model, of_optimizer), file)
    file.seek(0)
    of_model, of_optimizer = torch.load(file, weights_only=True)
    set_state_dict(other, again, model_state_dict=of_model, optim_state_dict=of_optimizer)
    assert (again.seed, again.batches) == (5, 3)
    for _ in range(2):
        optimizer.step(IMAGES, LABELS), again.step(IMAGES, LABELS)
    assert_equal(model, other)


def test_a_distributed_checkpoint_of_heads_that_were_added_later():
    base = partial(torch.optim.SGD, momentum=0.9)
    (model, optimizer), (other, again) = make(heads=(2,), base=base), make(heads=(2,), base=base)
    model.add_head(3)
    optimizer.step(IMAGES, LABELS)
    of_model, of_optimizer = copy.deepcopy(get_state_dict(model, optimizer))
    with pytest.raises(ValueError, match="^state_dict: its parameters differ from the model's"):
        again.load_state_dict(optimizer.state_dict() | {"bld": None})
    other.add_head(3)
    set_state_dict(other, again, model_state_dict=of_model, optim_state_dict=of_optimizer)
    optimizer.step(IMAGES, LABELS), again.step(IMAGES, LABELS)
    assert_equal(model, other)


def test_reading_a_state_for_a_checkpoint_changes_nothing():
    model, optimizer = make(base=partial(torch.optim.SGD, momentum=0.9))
    before = copy.deepcopy(model)
    get_state_dict(model, optimizer)
    assert_equal(model, before)
    assert optimizer.batches == 0 and optimizer.lr == 0.01


# ---- loops ----


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator, (model, optimizer) = accelerate.Accelerator(cpu=True), make()
    prepared, stepper = accelerator.prepare(model, optimizer)
    stepper.step(lambda: (IMAGES, LABELS))
    assert_equal(model, learned())
    accelerator.save_state(tmp_path)
    stepper.step(lambda: (IMAGES, LABELS))
    accelerator.load_state(tmp_path)
    assert optimizer.batches == 1
    stepper.step(lambda: (IMAGES, LABELS))
    assert_equal(model, learned(2))


def test_lightning_fabric():
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model, optimizer = make()
    _, stepper = fabric.setup(model, optimizer)
    stepper.step(lambda: (IMAGES, LABELS))
    assert_equal(model, learned())


def test_lightning():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.model, self.optimizer = make()

        def training_step(self, batch, _):
            self.optimizers().step(closure=lambda: batch)

        def configure_optimizers(self):
            return self.optimizer

    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=6))
    assert_equal(module.model, learned(2))


def test_lightning_s_own_backward_is_refused():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.optimizer = make()

        def training_step(self, batch, _):
            return self.model(batch[0]).sum()

        def configure_optimizers(self):
            return self.optimizer

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match="^step: .* a closure that returned a Tensor"):
        trainer.fit(Module(), DataLoader(TensorDataset(IMAGES, LABELS), batch_size=6))


# ---- continual-learning libraries ----

SIZES = (2, 3)


def tasks():
    """Two tasks, of 2 and 3 classes numbered from 0."""
    generator = torch.Generator().manual_seed(1)
    for size in SIZES:
        yield torch.rand(12, 3, 2, 2, generator=generator), torch.arange(12) % size


def by_a_loop_of_one_s_own():
    model, optimizer = make(heads=())
    for size, (images, labels) in zip(SIZES, tasks(), strict=True):
        model.add_head(size)
        for start in (0, 6):
            optimizer.step(images[start : start + 6], labels[start : start + 6])
    return model


def test_avalanche():
    pytest.importorskip("avalanche")
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
    from avalanche.benchmarks.utils.classification_dataset import (
        _make_taskaware_tensor_classification_dataset as make_dataset,
    )
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    from bld_ext.api.avalanche import BLD

    datasets = [make_dataset(*task, task_labels=t) for t, task in enumerate(tasks())]
    model, optimizer = make(heads=())
    strategy = BLD(
        model=model,
        optimizer=optimizer,
        train_mb_size=6,
        eval_mb_size=6,
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True)),
    )
    benchmark = with_classes_timeline(benchmark_from_datasets(train=datasets, test=datasets))
    for experience in benchmark.train_stream:
        strategy.train(experience, shuffle=False)
        found = strategy.eval(benchmark.test_stream)
    own = by_a_loop_of_one_s_own()
    assert_equal(model, own)
    accuracies = [v for k, v in found.items() if k.startswith("Top1_Acc_Exp")]
    expected = [(own.predict(x, t) == y).float().mean() for t, (x, y) in enumerate(tasks())]
    assert accuracies == pytest.approx([x.item() for x in expected])
    with pytest.raises(ValueError, match="^experience: expected number 1 or the next one"):
        strategy.train(benchmark.train_stream[0])
    model, optimizer = make(heads=())
    skipping = BLD(model=model, optimizer=optimizer, train_mb_size=6)
    with pytest.raises(ValueError, match="^experience: expected 0, .*got 1"):
        skipping.train(benchmark.train_stream[1])
    model.backbone[2].eval()  # on purpose
    strategy.eval(benchmark.test_stream)
    strategy.mbatch = [IMAGES, LABELS, torch.arange(6) % 2]
    with pytest.raises(ValueError, match="^mini-batch: expected images of one task"):
        strategy._require_own_images()


def test_capymoa():
    pytest.importorskip("capymoa")
    from capymoa.ocl.evaluation import ocl_train_eval_loop
    from capymoa.stream import Schema

    from bld_ext.api.capymoa import BLD

    names = [f"pixel{i}" for i in range(12)]
    schema = Schema.from_custom([*names, "class"], "class", {"class": [*"0123456789"]})
    schema.shape = (3, 2, 2)
    classes = [[7, 3], [1, 0, 9]]  # of each task, in the numbers of the data set
    sets = [
        (images, torch.tensor(sorted(names))[labels])
        for names, (images, labels) in zip(classes, tasks(), strict=True)
    ]
    model, optimizer = make(heads=())
    bld = BLD(schema, model, optimizer, classes)
    loaders = [DataLoader(TensorDataset(*task), batch_size=6) for task in sets]
    found = ocl_train_eval_loop(bld, loaders, loaders)
    own = by_a_loop_of_one_s_own()
    assert_equal(model, own)
    expected = [(own.predict(x, t) == y).float().mean() for t, (x, y) in enumerate(tasks())]
    assert found.accuracy_matrix[-1] == pytest.approx([x.item() for x in expected])
    with pytest.raises(ValueError, match=r"^y: expected classes of task 1, \[0, 1, 9\], got \[3\]"):
        bld.batch_train(IMAGES.flatten(1), torch.tensor([0, 1, 9, 3, 0, 1]))
    model.backbone[2].eval()  # on purpose
    bld.batch_predict_proba(IMAGES.flatten(1))
    assert not model.backbone[2].training
    with pytest.raises(ValueError, match="^task: expected 1 or a new one"):
        bld._begin_task(types.SimpleNamespace(train_task=0))


@pytest.mark.parametrize("framework", ["avalanche", "capymoa"])
def test_a_framework_that_is_missing_is_an_error(framework, monkeypatch, capsys):
    from benchmarks import frameworks

    def missing(name):
        raise frameworks.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(frameworks.metadata, "version", missing)
    monkeypatch.setattr("sys.argv", ["frameworks", framework])
    assert frameworks.main() == 2
    assert f'pip install "bld_ext[{framework}]"' in capsys.readouterr().err
