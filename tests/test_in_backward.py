"""Updating during backward: the same bits, less memory, and nothing left behind."""

import copy
from functools import partial

import pytest
import torch
from arrange import arranged
from torch import nn
from torch.utils.checkpoint import checkpoint

from bld_ext import BLDOptimizer, MultiHead, SeededAugment
from bld_ext.api import in_backward
from bld_ext.api.in_backward import complete_layers

AUGMENT = SeededAugment(crop_padding=1, rotation=15)
OPTIONS = {"lr": 0.05, "views": 4, "augment": AUGMENT, "seed": 3}
WAYS = {"update": {"schedule": "in_backward"}}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@pytest.fixture(params=[0, 400, 2**40], ids="bucket-{}".format)
def bucket(request, monkeypatch):
    """Buckets of one layer, of a few, and of all."""
    monkeypatch.setattr(in_backward, "BUCKET_BYTES", request.param)


def run(model, make_batch, batches=3, **options):
    """The state and the reports after some batches."""
    optimizer = arranged(model, **OPTIONS | options)
    reports = []
    for number in range(batches):
        optimizer.step(*make_batch(model.head_sizes[-1], number))
        last = optimizer.last
        reports += [last.warm_up_loss, last.reference_norms, *last.new_loss, *last.factors]
        reports += [*last.distillation_loss, *last.distillation_norms]
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    return model.state_dict(), reports


def assert_same(found, expected):
    for name in expected[0]:
        assert torch.equal(found[0][name], expected[0][name]), name
    assert len(found[1]) == len(expected[1]) and all(map(torch.equal, found[1], expected[1]))


@ways
@pytest.mark.parametrize("layer", ["module", "tensor", "network"])
@pytest.mark.parametrize("views_per_pass", [1, 3, 4])
def test_same_bits(bucket, way, layer, views_per_pass, make_model, make_batch):
    options = {"layer": layer, "views_per_pass": views_per_pass}
    expected = run(make_model((2, 3)), make_batch, **options)
    assert_same(run(make_model((2, 3)), make_batch, **options, **way), expected)


@ways
@pytest.mark.parametrize("heads", [(2,), (2, 3)], ids=["first-task", "second-task"])
@pytest.mark.parametrize("balance", [0.0, 2.0])
def test_same_bits_with_nothing_to_distil(way, heads, balance, make_model, make_batch):
    expected = run(make_model(heads), make_batch, balance=balance)
    assert_same(run(make_model(heads), make_batch, balance=balance, **way), expected)


class Odd(nn.Module):
    """A module used twice, one whose weight is another's, one that is not used, a frozen one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(192, 6)
        self.twice = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.twice.weight
        self.unused = nn.Linear(3, 3)
        self.half_used = nn.Bilinear(6, 6, 6)  # its bias alone is used
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, images):
        x = self.first(images.flatten(1)).tanh()
        x = self.twice(self.twice(x).tanh()).tanh()
        return self.frozen(self.tied(x) + self.half_used.bias).tanh()


def odd_model():
    torch.manual_seed(1)
    model = MultiHead(Odd(), 6)
    model.add_head(2)
    model.add_head(3)
    return model


@ways
@pytest.mark.parametrize(
    "base",
    [torch.optim.SGD, lambda params, lr: torch.optim.SGD(params, lr=lr, weight_decay=0.1)],
    ids=["sgd", "weight-decay"],
)
def test_odd_modules(bucket, way, base, make_batch):
    """With weight decay a parameter without a gradient stays and one with a zero gradient moves."""
    start = copy.deepcopy(odd_model().state_dict())
    expected = run(odd_model(), make_batch, base=base)
    found = run(odd_model(), make_batch, base=base, **way)
    assert_same(found, expected)
    for name in ("unused.weight", "half_used.weight", "frozen.weight"):
        assert torch.equal(found[0]["backbone." + name], start["backbone." + name])
    assert not torch.equal(found[0]["backbone.half_used.bias"], start["backbone.half_used.bias"])


class Sometimes(nn.Module):
    """A module that some batches leave out."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.use = nn.Linear(192, 6), nn.Linear(6, 6), True

    def forward(self, images):
        x = self.first(images.flatten(1)).tanh()
        return self.second(x).tanh() if self.use else x


@ways
@pytest.mark.parametrize("option", ["weight_decay", "momentum"])
@pytest.mark.filterwarnings("ignore:BLDOptimizer. SGD keeps state")
def test_what_a_batch_leaves_out_stays(bucket, way, option, make_batch):
    torch.manual_seed(1)
    model = MultiHead(Sometimes(), 6)
    model.add_head(2)
    model.add_head(3)
    base = partial(torch.optim.SGD, **{option: 0.5})
    optimizer = arranged(model, **OPTIONS, base=base, **way)
    optimizer.step(*make_batch(3, 0))
    model.backbone.use, before = False, model.backbone.second.weight.clone()
    optimizer.step(*make_batch(3, 1))
    assert torch.equal(model.backbone.second.weight, before)


@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=["plain", *WAYS])
def test_no_parameter_received_a_gradient(way, make_batch):
    model = MultiHead(Sometimes(), 6)
    model.add_head(2)
    images, labels = make_batch(2)
    head = [*model.parameters()][-2:]
    model.requires_grad_(False)
    model.backbone.second.requires_grad_()
    model.backbone.use = False
    assert not any(p.requires_grad for p in head)
    optimizer = arranged(
        model,
        0.1,
        views=2,
        augment=lambda x, views, **_: x.repeat(len(views), 1, 1, 1).requires_grad_(),
        views_per_pass=2,
        **way,
    )
    with pytest.raises(RuntimeError, match="^model: no parameter received a gradient"):
        optimizer.step(images, labels)


@ways
@pytest.mark.filterwarnings("ignore:BLDOptimizer. Adam keeps state")
def test_a_base_with_state(way, make_model, make_batch):
    expected = run(make_model((2, 3)), make_batch, base=torch.optim.Adam, lr=1e-3)
    found = run(make_model((2, 3)), make_batch, base=torch.optim.Adam, lr=1e-3, **way)
    assert_same(found, expected)


@ways
def test_groups_with_rates_of_their_own(way, make_model, make_batch):
    results = []
    for options in ({}, way):
        model = make_model((2, 3))
        optimizer = arranged(model, **OPTIONS | options)
        first = optimizer.param_groups[0]
        moved = first["params"][:3]
        first["params"], first["param_names"] = first["params"][3:], first["param_names"][3:]
        names = [f"moved.{i}" for i in range(3)]
        optimizer.add_param_group({"params": list(zip(names, moved, strict=True)), "lr": 0.01})
        for number in range(2):
            optimizer.step(*make_batch(3, number))
        assert [len(group["params"]) for group in optimizer.param_groups][1] == 3
        results.append((model.state_dict(), []))
    assert_same(*results)


# ---- complete_layers ----


def test_each_layer_once_and_only_when_complete():
    a, b, c, frozen = (nn.Parameter(torch.ones(4)) for _ in range(4))
    frozen.requires_grad_(False)
    layers, calls = {a: 0, b: 1, frozen: 1, c: 0}, []

    def act(params):
        calls.append([layers[p] for p in params])
        assert all((p.grad == 3).all() for p in params)

    with complete_layers(layers, act, bucket_bytes=0):
        ((a + b + c) * 3).sum().backward()
    assert sorted(map(tuple, calls)) == [(0, 0), (1,)]


def test_earlier_backward_passes_do_not_trigger_it():
    a, calls = nn.Parameter(torch.ones(4)), []
    a.sum().backward()
    with complete_layers({a: 0}, lambda params: calls.append(params[0].grad.clone()), 0):
        assert calls == []
        a.sum().backward()
    a.sum().backward()
    assert len(calls) == 1 and torch.equal(calls[0], torch.full((4,), 2.0))


def test_what_got_no_gradient_in_the_last_pass_is_served_at_its_end():
    a, b, c = (nn.Parameter(torch.ones(4)) for _ in range(3))
    a.sum().backward()
    served = []
    with complete_layers({a: 0, b: 0, c: 1}, served.extend):
        b.sum().backward()
    assert [p is q for p, q in zip(served, (a, b), strict=True)] == [True, True]


class Checkpointed(nn.Module):
    """One module under two checkpoints."""

    def __init__(self, reentrant):
        super().__init__()
        self.shared, self.reentrant = nn.Linear(192, 192), reentrant
        self.end = nn.Linear(192, 6)

    def forward(self, images):
        x = images.flatten(1).requires_grad_()
        for _ in range(2):
            x = checkpoint(self.shared, x, use_reentrant=self.reentrant).tanh()
        return self.end(x)


@ways
def test_a_gradient_that_comes_twice_is_refused(monkeypatch, way, make_batch):
    monkeypatch.setattr(in_backward, "BUCKET_BYTES", 0)
    results = []
    for reentrant, options in ((False, {}), (False, way), (True, way)):
        torch.manual_seed(1)
        model = MultiHead(Checkpointed(reentrant), 6)
        model.add_head(2)
        model.add_head(3)
        if not reentrant:
            results.append(run(model, make_batch, **options))
            continue
        optimizer = arranged(model, **OPTIONS | options)
        with pytest.raises(RuntimeError, match="second gradient after its layer was complete, as "):
            optimizer.step(*make_batch(3))
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())
    assert_same(*results)


@ways
def test_an_error_amid_backward_is_undone_with_check_finite(
    way, monkeypatch, make_model, make_batch
):
    monkeypatch.setattr(in_backward, "BUCKET_BYTES", 0)
    model = make_model((2, 3))
    optimizer = arranged(model, **OPTIONS, check_finite=True, **way)
    before = copy.deepcopy(model.state_dict())
    conv = model.backbone[0].weight
    handle = conv.register_hook(lambda grad: grad * torch.inf)  # the last layer of backward
    with pytest.raises(FloatingPointError, match="warm-up stage"):
        optimizer.step(*make_batch(3))
    handle.remove()
    assert_same((model.state_dict(), []), (before, []))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    optimizer.step(*make_batch(3))


# ---- memory ----


def test_the_warm_up_never_holds_a_whole_gradient(monkeypatch, make_model, make_batch):
    monkeypatch.setattr(in_backward, "BUCKET_BYTES", 0)
    for heads, whole in (((2,), False), ((2, 3), True)):
        model = make_model(heads)
        gradient = sum(4 * p.numel() for p in model.parameters())
        largest = max(4 * p.numel() for p in model.parameters())
        options = OPTIONS | {"views_per_pass": 4, "schedule": "in_backward"}
        optimizer = arranged(model, **options)
        batch = make_batch(heads[-1])
        optimizer.warm_up(*batch)
        assert largest <= optimizer.last.memory["gradients"] < gradient
        optimizer.joint(*batch)
        assert (optimizer.last.memory["gradients"] == gradient) == whole


@pytest.mark.parametrize("schedule", ["two_forward", "in_backward"])
def test_a_frozen_integer_may_come_first(schedule, make_model, make_batch):
    class Quantized(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.int8), requires_grad=False)
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * self.scale.to(x.dtype)

    model = make_model((2, 3))
    model.backbone = Quantized(model.backbone)
    assert not next(model.parameters()).is_floating_point()
    optimizer = BLDOptimizer(model, 0.05, schedule=schedule)
    optimizer.step(*make_batch(3))
    norms = optimizer.last.reference_norms
    assert norms.dtype == torch.float32 and (norms > 0).any()
