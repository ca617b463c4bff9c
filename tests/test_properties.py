"""What must hold of Batch-Level Distillation, one test a property."""

import gc
import weakref

import pytest
import torch
from arrange import arranged
from torch import nn

from bld_ext import (
    BLDOptimizer,
    MultiHead,
    SeededAugment,
    ViewBatchNorm,
    bank_bytes,
    convert_view_batchnorm,
    ops,
    tensor_bytes,
)
from bld_ext.api.pooled import view_statistics

AUGMENT = SeededAugment(crop_padding=1, rotation=15, jitter=0.2)
SCHEDULES = pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])


def make_optimizer(model, **options):
    defaults = {"lr": 0.05, "views": 4, "augment": AUGMENT, "seed": 3}
    return arranged(model, **defaults | options)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


@SCHEDULES
def test_without_balance_it_is_finetuning_bit_for_bit(schedule, make_model, make_batch):
    model, plain = make_model(heads=(2, 2)), convert_view_batchnorm(make_model(heads=(2, 2)))
    plain = plain.to(memory_format=torch.channels_last)
    norms = [m for m in plain.modules() if isinstance(m, ViewBatchNorm)]
    optimizer = make_optimizer(model, balance=0.0, schedule=schedule)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05)
    for number in range(3):
        images, labels = make_batch(2, number)
        optimizer.step(images, labels)
        for lr in (0.05 * 0.01, 0.05, 0.05):  # three updates on L_t alone
            sgd.param_groups[0]["lr"] = lr
            sgd.zero_grad()
            with view_statistics(norms, "keep"):
                for v in range(4):
                    view = AUGMENT(images, seed=3, step=number, views=[v])
                    logits = plain(view.contiguous(memory_format=torch.channels_last))
                    (ops.warm_up_loss(logits, labels, [2, 2])[0] / 4).backward()
            sgd.step()
    assert_same_bits(dict(model.named_parameters()), dict(plain.named_parameters()))


@SCHEDULES
def test_a_vanishing_balance_is_finetuning_too(schedule, make_model, make_batch):
    """The distillation passes run here; they must leave no trace but their gradient."""
    states = []
    for balance in (0.0, 1e-30):
        model = make_model(heads=(2, 2), dropout=0.2)
        optimizer = make_optimizer(model, balance=balance, schedule=schedule)
        for number in range(3):
            optimizer.step(*make_batch(2, number))
        states.append(state(model))
    assert_same_bits(*states)


@SCHEDULES
def test_distillation_gradient_is_zero_before_the_warm_up_update_and_not_after(
    schedule, make_model, make_batch
):
    norms = {}
    for warmup_lr in (0.0, 1e-4):
        model = make_model(heads=(2, 3, 2), dropout=0.2)
        optimizer = make_optimizer(model, warmup_lr=warmup_lr, joint_steps=1, schedule=schedule)
        optimizer.step(*make_batch(2))
        norms[warmup_lr] = optimizer.last.distillation_norms[0]
        assert optimizer.last.factors[0].isfinite().all()
    assert torch.equal(norms[0.0], torch.zeros_like(norms[0.0]))
    newest = optimizer.last.layers.index("heads.2")
    assert (norms[1e-4][torch.arange(len(norms[1e-4])) != newest] > 0).all()


@SCHEDULES
@pytest.mark.parametrize("layer", ["module", "tensor"])
def test_old_heads_are_bit_identical_under_layerwise_balancing(
    layer, schedule, make_model, make_batch
):
    model = make_model(heads=(2, 3, 2))
    before = state(model)
    optimizer = make_optimizer(model, layer=layer, schedule=schedule)
    for number in range(3):
        optimizer.step(*make_batch(2, number))
    old = [name for name in before if name.startswith(("heads.0", "heads.1"))]
    assert len(old) == 4
    assert_same_bits({name: before[name] for name in old}, model.state_dict())
    assert not torch.equal(before["heads.2.weight"], model.heads[2].weight)
    assert not torch.equal(before["backbone.0.weight"], model.backbone[0].weight)


def test_old_heads_move_when_the_network_is_one_layer(make_model, make_batch):
    model = make_model(heads=(2, 2))
    before = state(model)
    make_optimizer(model, layer="network").step(*make_batch(2))
    assert not torch.equal(before["heads.0.weight"], model.heads[0].weight)


def test_the_bank_of_the_paper_s_last_task_is_32_kilobytes():
    model = MultiHead(nn.Flatten(), 12)
    for _ in range(5):
        model.add_head(2)
    optimizer = BLDOptimizer(model, augment=SeededAugment(rotation=15))
    held = {}

    def watch(module, inputs, output):
        banks = [t for t in reachable_tensors(optimizer) if t.shape == (1000, 8)]
        held["bytes"] = tensor_bytes(banks)

    optimizer.warm_up(torch.rand(20, 3, 2, 2), torch.zeros(20, dtype=torch.int64))
    model.register_forward_hook(watch)
    optimizer.joint(torch.rand(20, 3, 2, 2), torch.zeros(20, dtype=torch.int64))
    assert held["bytes"] == optimizer.last.memory["bank"] == bank_bytes(20, 50, [2] * 4) == 32_000


def test_the_bank_of_a_dense_prediction_counts_its_positions(make_batch):
    model = DenseHeads([2, 3, 2])
    optimizer = make_optimizer(model, augment=SeededAugment(jitter=0.2))
    images, _ = make_batch(2)
    optimizer.step(images, torch.randint(2, (5, 8, 8)))
    assert optimizer.last.memory["bank"] == bank_bytes(5, 4, [2, 3], (8, 8))


class DenseHeads(nn.Module):
    """Logits [N, ΣC, H, W], as for segmentation."""

    def __init__(self, head_sizes):
        super().__init__()
        self.head_sizes = head_sizes
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.heads = nn.ModuleList(nn.Conv2d(4, size, 1) for size in head_sizes)

    def forward(self, images):
        features = self.body(images).relu()
        return torch.cat([head(features) for head in self.heads], 1)


def reachable_tensors(root):
    """Every tensor that can be reached by following references from an object."""
    seen, tensors, todo = set(), [], [root]
    skipped = (type, type(gc), type(lambda: 0), type(gc.collect))
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, skipped):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            tensors.append(item)
            todo += [item.grad] if item.is_leaf else [item.grad_fn]
        todo += gc.get_referents(item)
    return tensors


@SCHEDULES
def test_nothing_but_the_network_and_the_report_outlives_a_batch(schedule, make_model, make_batch):
    model = make_model(heads=(2, 2))
    optimizer = make_optimizer(model, schedule=schedule)
    images, labels = make_batch(2)
    watched = [weakref.ref(images), weakref.ref(labels)]
    optimizer.step(images, labels)
    del images, labels
    gc.collect()
    assert [ref() for ref in watched] == [None, None]

    network = {id(t) for t in [*model.parameters(), *model.buffers()]}
    rest = [t for t in reachable_tensors(optimizer) if id(t) not in network]
    report = {id(t) for t in reachable_tensors(optimizer.last)}
    assert {id(t) for t in rest} == report
    layers = len(optimizer.last.layers)
    assert all(t.shape in [(), (layers,)] and not t.requires_grad for t in rest)


def test_a_stream_goes_on_from_the_network_and_two_integers(make_model, make_batch):
    """Rebuild everything after every batch: if anything were carried over, bits would differ."""
    whole = make_model(heads=(2, 3), dropout=0.2)
    optimizer = make_optimizer(whole)
    kept = state(whole)
    for number in range(4):
        batch = make_batch(3, number)
        optimizer.step(*batch)
        rebuilt = make_model(heads=(2, 3), dropout=0.2)
        rebuilt.load_state_dict(kept)
        other = make_optimizer(rebuilt)
        other.batches = number
        other.step(*batch)
        kept = state(rebuilt)
    assert_same_bits(state(whole), kept)


@SCHEDULES
@pytest.mark.parametrize("views_per_pass", [2, 3, 4, 7])
@pytest.mark.parametrize("statistics", ["once", "every_pass"])
def test_views_per_pass_changes_no_result(
    views_per_pass, statistics, schedule, make_model, make_batch
):
    """In float64, to rounding: parameters, buffers, losses, norms and factors."""
    augment = SeededAugment(crop_padding=1, rotation=15, jitter=0.2, dtype=torch.float64)
    models, reports = [], []
    for count in (1, views_per_pass):
        model = make_model(heads=(2, 2), dtype=torch.float64)
        optimizer = make_optimizer(
            model, views_per_pass=count, schedule=schedule, statistics=statistics, augment=augment
        )
        for number in range(3):
            optimizer.step(*make_batch(2, number, dtype=torch.float64))
        models.append(state(model))
        reports.append(optimizer.last)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(*models, **close)
    for name in ("warm_up_loss", "new_loss", "distillation_loss", "factors", "distillation_norms"):
        torch.testing.assert_close(*(getattr(r, name) for r in reports), **close)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_views_per_pass_is_as_exact_in_float32_as_one_view_a_pass(
    channels_last, make_model, make_batch
):
    """Rounding of logits stands in a difference of two of them, and balancing scales what is left
    to full size; how far that goes depends on the weights. So: against float64, over many weights.
    """

    def learn(seed, count, dtype):
        model = make_model(heads=(2, 2), seed=seed).to(dtype)
        augment = SeededAugment(crop_padding=1, rotation=15)
        images, labels = make_batch(2, seed)
        made = [augment(images, seed=3, step=0, views=[v]).to(dtype) for v in range(4)]
        optimizer = make_optimizer(
            model, views_per_pass=count, channels_last=channels_last,
            augment=lambda x, views, **_: torch.cat([made[v] for v in views]),
        )  # fmt: skip
        optimizer.step(images.to(dtype), labels)
        return torch.cat([p.detach().double().flatten() for p in model.parameters()])

    errors = {1: [], 4: []}
    for seed in range(40):  # in one of seven, rounding switches a ReLU, and the error is in percent
        exact = learn(seed, 1, torch.float64)
        moved = (exact - learn_nothing(make_model, seed)).norm()
        for count in errors:
            errors[count].append((learn(seed, count, torch.float32) - exact).norm() / moved)
    one, four = (torch.stack(errors[count]) for count in (1, 4))
    assert four.median() < min(1e-3, 1.5 * one.median())
    assert four.square().mean().sqrt() <= 3 * one.square().mean().sqrt()


def learn_nothing(make_model, seed):
    model = make_model(heads=(2, 2), seed=seed)
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


class SharedGradients(nn.Module):
    """Parameters whose gradients autograd returns as one tensor, or as an expanded one."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.randn(6, 192, dtype=torch.float64) * 0.1)
        self.delta = nn.Parameter(torch.zeros(6, 192, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        return (
            nn.functional.linear(x.flatten(1), self.base + self.delta) + self.shift.sum()
        ).tanh()


def test_schedules_agree_where_parameters_share_a_gradient(make_batch):
    augment = SeededAugment(rotation=15, dtype=torch.float64)
    states = []
    for schedule in ("two_forward", "shared_forward"):
        torch.manual_seed(1)
        model = MultiHead(SharedGradients(), 6)
        model.add_head(2)
        model.add_head(2)
        make_optimizer(model, schedule=schedule, augment=augment).step(
            *make_batch(2, dtype=torch.float64)
        )
        states.append(state(model))
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-9)


def test_schedules_agree_to_rounding(make_model, make_batch):
    augment = SeededAugment(rotation=15, dtype=torch.float64)
    states = []
    for schedule in ("two_forward", "shared_forward"):
        model = make_model(heads=(2, 2), dropout=0.2, dtype=torch.float64)
        optimizer = make_optimizer(model, schedule=schedule, augment=augment)
        for number in range(3):
            optimizer.step(*make_batch(2, number, dtype=torch.float64))
        states.append(state(model))
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-10)
