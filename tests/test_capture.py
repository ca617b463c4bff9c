"""capture=True: everything around the CUDA graph, with a stand-in for the graph itself.

The stand-in keeps what CUDA does: recording runs nothing, replaying runs the recorded function on
the tensors it was recorded with, and results come in the same memory each time. What only a GPU can
show is in test_gpu.py.
"""

import copy
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from arrange import arranged

from bld_ext import SeededAugment, convert_view_batchnorm
from bld_ext.api import capture

AUGMENT = SeededAugment(crop_padding=1, rotation=15, jitter=0.2)


class Echo:
    """Records by running the function and taking back what it changed; replays by running it."""

    made = []

    def __init__(self, device):
        self.recordings = self.replays = 0
        Echo.made.append(self)

    def rehearse(self, function):
        return function()

    def record(self, function):
        self.function, self.recordings = function, self.recordings + 1
        tensors = [t for t in Echo.tensors()]
        before = [t.detach().clone() for t in tensors]
        self.loss, self.report = function()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        return self.loss, self.report

    def replay(self):
        self.replays += 1
        loss, report = self.function()
        self.loss.copy_(loss)
        for name in ("new_loss", "distillation_loss", "factors", "distillation_norms"):
            for old, new in zip(getattr(self.report, name), getattr(report, name), strict=True):
                old.copy_(new)


@pytest.fixture
def echo(monkeypatch):
    """echo(model): from now on recordings spare this model."""
    monkeypatch.setattr(capture, "CudaGraph", Echo)
    Echo.made = []

    def of(model):
        Echo.tensors = lambda: [*model.parameters(), *model.buffers()]
        return Echo.made

    return of


def make_optimizer(model, **options):
    return arranged(model, **dict(lr=0.05, views=4, augment=AUGMENT, seed=3) | options)


def eager_and_captured(models, **options):
    switches = zip(models, (False, True), strict=True)
    return [make_optimizer(model, capture=on, **options) for model, on in switches]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def report_of(optimizer):
    last = optimizer.last
    return [*last.new_loss, *last.distillation_loss, *last.factors, *last.distillation_norms]


WAYS = {
    "two_forward": {},
    "all-views": dict(views_per_pass=4),
    "shared": dict(schedule="shared_forward"),
    "one-graph": dict(schedule="shared_forward", views_per_pass=4),
    "no-balancing": dict(balance=None),
    "finetune": dict(balance=0.0),
    "every-pass": dict(statistics="every_pass", views_per_pass=3),
    "mixed": dict(precision="mixed"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_equal_to_eager_bit_for_bit_with_a_changing_learning_rate(
    way, echo, make_model, make_batch
):
    models = [make_model(heads=(2, 2)) for _ in range(2)]
    graphs = echo(models[1])
    optimizers = eager_and_captured(models, **way)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
    for number in range(12):
        losses = [o.step(*make_batch(2, number)) for o in optimizers]
        assert torch.equal(*losses)
        for a, b in zip(*map(report_of, optimizers), strict=True):
            assert torch.equal(a, b)
        for s in schedulers:
            s.step()
    assert_same_bits(*(m.state_dict() for m in models))
    (graph,) = graphs
    assert (graph.recordings, graph.replays) == (1, 11)
    assert optimizers[0].batches == optimizers[1].batches == 12


def test_a_hundred_steps(echo, make_model, make_batch):
    models = [make_model(heads=(2, 2)) for _ in range(2)]
    echo(models[1])
    optimizers = [
        make_optimizer(m, capture=on) for m, on in zip(models, (False, True), strict=True)
    ]
    for number in range(100):
        for o in optimizers:
            o.param_groups[0]["lr"] = 0.05 / (1 + number)
            o.step(*make_batch(2, number % 7))
    assert_same_bits(*(m.state_dict() for m in models))


def test_balance_and_seed_may_change(echo, make_model, make_batch):
    models = [make_model(heads=(2, 2)) for _ in range(2)]
    graphs = echo(models[1])
    optimizers = [
        make_optimizer(m, capture=on) for m, on in zip(models, (False, True), strict=True)
    ]
    for number in range(6):
        for o in optimizers:
            o.balance, o.seed = 1.0 + number, 7 * number
            o.step(*make_batch(2, number))
    assert_same_bits(*(m.state_dict() for m in models))
    assert len(graphs) == 1


HOOKS = {
    "module": ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"],
    "tensor": ["hook", "post_accumulate_grad_hook"],
    "base": ["step_pre_hook", "step_post_hook"],
}


def add_hook(owner, kind, model, optimizer):
    owners = {"module": model.backbone[1], "tensor": model.backbone[0].weight}
    register = getattr(owners.get(owner, optimizer.base), f"register_{kind}")
    register(lambda *_, **__: None)


@pytest.mark.parametrize(
    "change",
    {
        "a head": lambda model, o: model.add_head(2),
        "balance 0": lambda model, o: setattr(o, "balance", 0.0),
        "no balancing": lambda model, o: setattr(o, "balance", None),
        "temperature": lambda model, o: setattr(o, "temperature", 1.0),
        "views": lambda model, o: setattr(o, "views", 3),
        "frozen": lambda model, o: model.backbone[0].requires_grad_(False),
        "eval": lambda model, o: model.backbone[1].eval(),
        "another module": lambda model, o: model.backbone.__setitem__(2, torch.nn.Tanh()),
        "momentum": lambda model, o: setattr(model.backbone[1], "momentum", 0.7),
        "augment": lambda model, o: setattr(o, "augment", SeededAugment(crop_padding=2)),
        "joint steps": lambda model, o: setattr(o, "joint_steps", 1),
        "layer": lambda model, o: setattr(o, "layer", "tensor"),
        "schedule": lambda model, o: setattr(o, "schedule", "shared_forward"),
        "statistics": lambda model, o: convert_view_batchnorm(model, "every_pass"),
        "precision": lambda model, o: setattr(o, "precision", "mixed"),
        "warm-up": lambda model, o: setattr(o, "warmup_ratio", 0.5),
        "passes": lambda model, o: setattr(o, "views_per_pass", 2),
        "an option": lambda model, o: o.param_groups[0].update(maximize=True),
        "a loaded state": lambda model, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
        **{
            f"{kind} of a {owner}": partial(add_hook, owner, kind)
            for owner, kinds in HOOKS.items()
            for kind in kinds
        },
    }.items(),
    ids=lambda item: item[0],
)
def test_what_belongs_to_the_recording_makes_a_new_one(change, echo, make_model, make_batch):
    models = [make_model(heads=(2, 2)) for _ in range(2)]
    graphs = echo(models[1])
    optimizers = [
        make_optimizer(m, capture=on) for m, on in zip(models, (False, True), strict=True)
    ]
    for number in range(8):
        for model, o in zip(models, optimizers, strict=True):
            if number == 4:
                torch.manual_seed(0)
                change[1](model, o)
            o.step(*make_batch(2, number))
    assert_same_bits(*(m.state_dict() for m in models))
    assert [(g.recordings, g.replays) for g in graphs] == [(1, 3), (1, 3)]


@pytest.mark.filterwarnings("ignore:BLDOptimizer. .* keeps state")
@pytest.mark.parametrize("how", ["loaded", "cleared"])
def test_a_recording_does_not_outlive_the_state_it_writes_to(how, echo, make_model, make_batch):
    model = make_model(heads=(2, 2))
    graphs = echo(model)
    optimizer = make_optimizer(model, capture=True, base=partial(torch.optim.SGD, momentum=0.5))
    for number in range(7):
        if number == 4:
            if how == "loaded":
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            else:
                optimizer.state.clear()
        optimizer.step(*make_batch(2, number))
    # once without state and once with it before a recording
    first, second, *others = [(g.recordings, g.replays) for g in graphs]
    assert (first, second) == ((0, 0), (1, 2))
    assert others == ([(1, 2)] if how == "loaded" else [(0, 0), (1, 1)])


def test_another_batch_size_makes_a_new_one(echo, make_model, make_batch):
    models = [make_model(heads=(2, 2)) for _ in range(2)]
    graphs = echo(models[1])
    optimizers = [
        make_optimizer(m, capture=on) for m, on in zip(models, (False, True), strict=True)
    ]
    for number, size in enumerate((5, 5, 5, 3, 3, 5)):
        for o in optimizers:
            o.step(*make_batch(2, number, size=size))
    assert_same_bits(*(m.state_dict() for m in models))
    assert [g.replays for g in graphs] == [2, 1, 0]


def test_groups_with_rates_of_their_own(echo, make_model, make_batch):
    models = [make_model(heads=(2, 2)) for _ in range(2)]
    echo(models[1])
    optimizers = []
    for model, on in zip(models, (False, True), strict=True):
        o = make_optimizer(model, capture=on)
        slow = dict(model.backbone.named_parameters())
        fast = o.param_groups[0]
        fast["params"] = [p for p in fast["params"] if p not in {*slow.values()}]
        o.add_param_group({"params": [*slow.items()], "lr": 0.01})
        optimizers.append(o)
    for number in range(5):
        for o in optimizers:
            o.param_groups[1]["lr"] = 0.01 * number
            o.step(*make_batch(2, number))
    assert_same_bits(*(m.state_dict() for m in models))


def test_a_base_that_takes_its_rate_from_the_device(echo, make_model, make_batch):
    models = [make_model(heads=(2, 2)) for _ in range(2)]
    echo(models[1])
    base = partial(torch.optim.SGD, momentum=0.5)
    with pytest.warns(UserWarning, match="keeps state"):
        for number in range(4):
            for i, model in enumerate(models):
                if number == 0:
                    model.optimizer = make_optimizer(model, capture=i == 1, base=base)
                if i == 1:  # a recording is taken back together with the base's state
                    Echo.tensors = lambda model=model: [
                        *model.parameters(), *model.buffers(),
                        *(s["momentum_buffer"] for s in model.optimizer.state.values()),
                    ]  # fmt: skip
                model.optimizer.step(*make_batch(2, number))
    a, b = (dict(m.named_parameters()) for m in models)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_a_loss_is_not_overwritten_by_the_next_step(echo, make_model, make_batch):
    model = make_model(heads=(2, 2))
    echo(model)
    optimizer = make_optimizer(model, capture=True)
    losses = [optimizer.step(*make_batch(2, number)) for number in range(5)]
    kept = [loss.item() for loss in losses]
    optimizer.step(*make_batch(2, 9))
    assert kept == [loss.item() for loss in losses] and len(set(kept)) == 5


def test_a_failed_recording_changes_nothing_and_says_what_to_look_for(
    echo, make_model, make_batch, monkeypatch
):
    model = make_model(heads=(2, 2))
    echo(model)
    optimizer = make_optimizer(model, capture=True)
    optimizer.step(*make_batch(2, 0))

    def refuse(self, function):
        function()  # what was asked of the device before the error does not run
        raise RuntimeError("operation not permitted when stream is capturing")

    tensors = [*model.parameters(), *model.buffers()]
    before, batches = state(model), optimizer.batches
    monkeypatch.setattr(Echo, "record", refuse)
    values = [t.detach().clone() for t in tensors]
    with pytest.raises(RuntimeError, match="^capture: .*not permitted.*capture=False"):
        optimizer.step(*make_batch(2, 1))
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
    assert optimizer.batches == batches and optimizer._recorder.scalars is None
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(optimizer.param_groups[0]["lr"], float)
    optimizer.capture = False
    optimizer.step(*make_batch(2, 1))
    twin = make_model(heads=(2, 2))
    eager = make_optimizer(twin)
    for number in range(2):
        eager.step(*make_batch(2, number))
    assert_same_bits(model.state_dict(), twin.state_dict())
    assert before.keys() == state(model).keys()


def test_an_error_in_a_forward_pass_ends_cleanly(echo, make_model, make_batch):
    model = make_model(heads=(2, 2))
    echo(model)
    optimizer = make_optimizer(model, capture=True)
    before = state(model)

    def fail(module, inputs):
        raise KeyError("here")

    hook = model.backbone[3].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="here"):
        optimizer.step(*make_batch(2))
    hook.remove()
    assert_same_bits(before, model.state_dict())
    assert (
        optimizer._recorder.recorded is None
        and optimizer._recorder.scalars is None
        and optimizer.batches == 0
    )
    optimizer.step(*make_batch(2))


def test_a_model_with_dropout_is_refused_before_anything_changes(echo, make_model, make_batch):
    model = make_model(heads=(2, 2), dropout=0.2)
    echo(model)
    before = state(model)
    optimizer = make_optimizer(model, capture=True)
    with pytest.raises(ValueError, match="^capture: expected a model that draws no random numbers"):
        optimizer.step(*make_batch(2))
    assert_same_bits(before, model.state_dict())


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.rand, lambda: torch.rand(())],
    ids=["random", "numpy", "torch"],
)
def test_random_numbers_of_any_global_generator_are_refused(draw, echo, make_model, make_batch):
    model = make_model(heads=(2, 2))
    echo(model)
    model.backbone.register_forward_pre_hook(lambda *_: draw() and None)
    before = state(model)
    optimizer = make_optimizer(model, capture=True)
    with pytest.raises(ValueError, match="^capture: expected a model that draws no random numbers"):
        optimizer.step(*make_batch(2))
    assert_same_bits(before, model.state_dict())


def test_state_goes_on_from_a_captured_run(echo, make_model, make_batch):
    model = make_model(heads=(2, 2))
    echo(model)
    optimizer = make_optimizer(model, capture=True)
    for number in range(3):
        optimizer.step(*make_batch(2, number))
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    optimizer.step(*make_batch(2, 3))
    for other in copies:
        assert other._recorder.recorded is None
        echo(other.model)
        other.step(*make_batch(2, 3))
        assert_same_bits(model.state_dict(), other.model.state_dict())
    fresh = make_model(heads=(2, 2))
    fresh.load_state_dict(saved[1])
    resumed = make_optimizer(fresh)
    resumed.load_state_dict(saved[0])
    resumed.step(*make_batch(2, 3))
    assert_same_bits(model.state_dict(), fresh.state_dict())


def test_without_a_gpu_it_is_refused(make_model, make_batch):
    optimizer = make_optimizer(make_model(heads=(2, 2)), capture=True)
    with pytest.raises(ValueError, match="^capture: expected False on cpu; CUDA graphs need a GPU"):
        optimizer.step(*make_batch(2))


@pytest.mark.parametrize("options", [dict(schedule="in_backward"), dict(check_finite=True)])
def test_what_it_does_not_go_with(options, make_model):
    with pytest.raises(ValueError, match="^capture: expected False with"):
        make_optimizer(make_model(heads=(2,)), capture=True, **options)


def test_not_a_switch(make_model):
    with pytest.raises(ValueError, match="^capture: expected True or False, got 1"):
        make_optimizer(make_model(heads=(2,)), capture=1)
