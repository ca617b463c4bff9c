"""What would be wrong without a word: it is right, refused with its remedy, or warned of."""

import functools
import random
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_bad_input import OPTIONS, assert_same, snapshot
from torch import nn

from bld_ext import BLDOptimizer, MultiHead, SeededAugment, convert_view_batchnorm

pytestmark = pytest.mark.filterwarnings("ignore:BLDOptimizer. SGD keeps state")


# ---- labels that have positions ----

MOVES = [
    dict(crop_padding=1), dict(flip=0.5), dict(rotation=1), dict(scale=(0.9, 1)),
    dict(shear=(1, 0)), dict(translate=(0.1, 0)), dict(resized_crop=(0.5, 1)),
]  # fmt: skip


class Dense(nn.Module):
    head_sizes = (2,)

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, images):
        return self.layer(images)


@pytest.mark.parametrize("moves", MOVES, ids=lambda moves: next(iter(moves)))
def test_dense_labels_are_refused_where_they_cannot_move_with_the_views(moves, make_batch):
    class Own(SeededAugment):  # does not say that it takes masks
        def __call__(self, images, **where):
            return super().__call__(images, **where)

    model, (images, _) = Dense(), make_batch(2)
    before = snapshot(model)
    optimizer = BLDOptimizer(model, 0.1, views=2, augment=Own(**moves))
    with pytest.raises(ValueError, match=r"^labels: expected one for each image, got \[5, 8, 8\]"):
        optimizer.step(images, torch.zeros(5, 8, 8, dtype=torch.int64))
    assert_same(snapshot(model), before)


def test_dense_labels_go_with_what_moves_nothing(make_batch):
    images, _ = make_batch(2)
    labels = torch.zeros(5, 8, 8, dtype=torch.int64)

    def own(images, views, **_):
        return images.repeat(len(views), 1, 1, 1)

    for augment in (None, SeededAugment(jitter=0.2, erase=0.5, mean=[0.5] * 3, std=[1.0] * 3)):
        BLDOptimizer(Dense(), 0.1, augment=augment, views=2).step(images, labels)
    with pytest.raises(ValueError, match="^labels: .*keeps_positions = True"):
        BLDOptimizer(Dense(), 0.1, augment=own, views=2).step(images, labels)
    own.keeps_positions = True
    BLDOptimizer(Dense(), 0.1, augment=own, views=2).step(images, labels)


# ---- values whose range a dtype does not tell ----

RANGES = {
    "0..255": (lambda x: x * 255, r"got 0.*images / 255"),
    "-1..1": (lambda x: 2 * x - 1, r"got -0.*SeededAugment\(mean=..., std=...\)"),
    "standardised": (lambda x: (x - x.mean()) / x.std(), r"got -1.*mean="),
}


@pytest.mark.parametrize("case", RANGES)
@pytest.mark.parametrize("colour", [dict(jitter=0.1), dict(hue=0.1), dict(contrast=0.1)])
def test_float_images_of_another_range_are_refused_where_they_would_be_clamped(
    case, colour, make_model, make_batch
):
    change, message = RANGES[case]
    images, labels = make_batch(2)
    optimizer = BLDOptimizer(make_model((2,)), 0.01, views=2, augment=SeededAugment(**colour))
    before = snapshot(optimizer.model, optimizer)
    with pytest.raises(ValueError, match=f"^images: expected values from 0 to 1, .*{message}"):
        optimizer.step(change(images), labels)
    assert_same(snapshot(optimizer.model, optimizer), before)
    optimizer.step(1.04 * images - 0.02, labels)  # as a bicubic filter overshoots
    optimizer.augment = SeededAugment(crop_padding=1)  # clamps nothing
    optimizer.step(change(images), labels)


# ---- random numbers that do not come again ----


def learns(model, augment, make_batch, **options):
    optimizer = BLDOptimizer(model, lr=1e-12, views=4, augment=augment, **options)
    for classes in (2, 2):
        model.add_head(classes)
        optimizer.step(*make_batch(2))
    return optimizer


@pytest.mark.parametrize("views_per_pass", [1, 4])
def test_an_augment_may_draw_from_torch(views_per_pass, make_model, make_batch):
    """Nothing was learned, so there is nothing to distil."""

    def noisy(images, views, **_):
        return torch.cat([images + 0.1 * torch.randn_like(images) for _ in views])

    optimizer = learns(make_model(), noisy, make_batch, views_per_pass=views_per_pass)
    assert max(n.max() for n in optimizer.last.distillation_norms) < 1e-6
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    optimizer.step(*make_batch(2))
    assert torch.equal(torch.rand(3), first)  # torch's own state is as it was


GLOBAL = {"numpy": lambda: np.random.rand(), "python": lambda: random.random()}


@pytest.mark.parametrize("draw", GLOBAL.values(), ids=GLOBAL)
@pytest.mark.parametrize("where", ["augment", "layer"])
def test_other_global_generators_are_seeded_too(where, draw, make_model, make_batch):
    """Events of a small probability as well, which two tries would not show."""

    def flips(images, views, **_):
        return torch.cat([images.flip(-1) if draw() < 0.3 else images for _ in views])

    class Drops(nn.Module):
        def forward(self, x):
            return 0 * x if draw() < 0.1 else x

    model = make_model()
    if where == "layer":
        model.backbone.insert(3, Drops())
    before = np.random.get_state()[1].tolist(), random.getstate()
    optimizer = learns(model, flips if where == "augment" else None, make_batch)
    assert max(n.max() for n in optimizer.last.distillation_norms) < 1e-6
    assert before == (np.random.get_state()[1].tolist(), random.getstate())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_augment_that_draws_elsewhere_is_refused(compiled, make_model, make_batch):
    generator = np.random.default_rng(0)

    def noisy(images, views, **_):
        return torch.cat([images * (1 + 0.1 * float(generator.random())) for _ in views])

    model = make_model()
    if compiled:
        model.backbone.compile(backend="eager")
    with pytest.raises(ValueError, match="^augment: expected the same view .*default_rng"):
        learns(model, noisy, make_batch)


class NumpyNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def forward(self, x):
        return x * (1 + 0.1 * float(self.generator.random())) if self.training else x


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


@pytest.mark.parametrize("layer", [NumpyNoise, Counting])
def test_a_layer_that_computes_something_else_the_second_time_is_named(
    layer, make_model, make_batch
):
    model = make_model((2,))
    model.backbone.insert(3, layer())
    optimizer = BLDOptimizer(model, 0.1, augment=SeededAugment(crop_padding=1))
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^model: backbone.3, a {layer.__name__}, computed anoth"):
        optimizer.step(*make_batch(2))
    assert_same(snapshot(model), before)


# ---- settings ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schedule", "in_bakward"), ("layer", "modul"), ("precision", "bf16"), ("views", 0),
        ("joint_steps", -1), ("temperature", 0), ("balance", "2"), ("capture", 1), ("seed", -1),
        ("check_finite", None), ("views_per_pass", 0), ("warmup_ratio", -1), ("augment", 3),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_when_it_is_set(name, value, make_model):
    optimizer = BLDOptimizer(make_model((2,)), **OPTIONS)
    before = getattr(optimizer, name)
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .*got "):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before


def test_settings_that_do_not_go_together_are_refused_when_they_are_set(make_model):
    optimizer = BLDOptimizer(make_model((2,)), **OPTIONS, schedule="in_backward")
    with pytest.raises(ValueError, match="^capture: expected False with schedule='in_backward'"):
        optimizer.capture = True
    optimizer.schedule = "two_forward"
    optimizer.capture = True
    with pytest.raises(ValueError, match="^capture: expected False with check_finite=True"):
        optimizer.check_finite = True


NUMBERS = [np.int64(3), torch.tensor(3), np.float32(3), torch.tensor(3.0)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: str(n.dtype))
def test_numbers_may_be_arrays_and_tensors(number, make_model, make_batch):
    options = {"temperature": number, "balance": number}
    if float(number).is_integer() and "float" not in str(number.dtype):
        options |= {"views": number, "joint_steps": number, "views_per_pass": number}
    optimizer = BLDOptimizer(make_model((2, 2)), **OPTIONS | options)
    optimizer.step(*make_batch(2))
    assert {type(getattr(optimizer, name)) for name in options} <= {int, float}


# ---- remedies: what a message says is tried ----


def test_the_remedy_for_one_hot_labels(make_model, make_batch):
    optimizer = BLDOptimizer(make_model((3,)), **OPTIONS)
    images, labels = make_batch(3)
    with pytest.raises(ValueError, match=r"for one-hot or soft labels use labels.argmax\(1\)"):
        optimizer.step(images, torch.eye(3)[labels])
    optimizer.step(images, torch.eye(3)[labels].argmax(1))
    with pytest.raises(ValueError, match=r"use labels.long\(\)"):
        optimizer.step(images, labels.float())


@pytest.mark.parametrize("wrap", [nn.DataParallel], ids=["DataParallel"])
def test_the_remedy_for_a_model_that_reduces_by_itself(wrap, make_model, make_batch):
    model = make_model((2,))
    wrapped = wrap(model)
    with pytest.raises(ValueError, match="^model: it is a DataParallel.* its .module"):
        BLDOptimizer(wrapped, **OPTIONS)
    BLDOptimizer(wrapped.module, **OPTIONS).step(*make_batch(2))
    model.backbone = wrap(model.backbone)
    with pytest.raises(ValueError, match="^model: backbone is a DataParallel"):
        BLDOptimizer(model, **OPTIONS)


class NeedsClosure(torch.optim.SGD):
    """As SAM: a closure is asked for only when a step is made."""

    def step(self, closure=None):
        assert closure is not None, "a closure is needed"


def test_a_base_that_cannot_make_a_step_is_refused_before_anything_changes(make_model):
    model = make_model((2,))
    kinds = [type(m) for m in model.modules()]
    before = snapshot(model)
    with pytest.raises(ValueError, match="^base: NeedsClosure .*closure is needed.*such as"):
        BLDOptimizer(model, **OPTIONS | {"base": NeedsClosure})
    with pytest.raises(TypeError, match="^base: expected it to make a torch.optim.Optimizer, got"):
        BLDOptimizer(model, **OPTIONS | {"base": lambda params, lr: None})
    assert_same(snapshot(model), before) and kinds == [type(m) for m in model.modules()]


def test_weight_decay_is_warned_of(make_model):
    base = functools.partial(torch.optim.SGD, weight_decay=0.05)
    with pytest.warns(UserWarning, match="SGD moves parameters whose gradient is zero") as caught:
        BLDOptimizer(make_model((2,)), **OPTIONS | {"base": base})
    assert len(caught) == 1 and caught[0].filename == __file__


# ---- what a first reader of the code broke ----


class Frozen(nn.BatchNorm2d):
    """By its statistics alone, though it is in training mode."""

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, *statistics, self.weight, self.bias, False, 0.0, 1e-5)


@pytest.mark.parametrize("statistics", ["once", "every_pass"])
def test_a_batch_norm_that_is_frozen_by_its_forward_keeps_its_statistics(
    statistics, make_model, make_batch
):
    model = make_model((2,))
    model.backbone[1] = norm = Frozen(4)
    norm.running_var.fill_(2), norm.num_batches_tracked.fill_(100)
    before = {name: b.clone() for name, b in norm.named_buffers()}
    convert_view_batchnorm(model, statistics)
    optimizer = BLDOptimizer(model, 0.01, views=2, augment=SeededAugment(crop_padding=1))
    for number in range(3):
        optimizer.step(*make_batch(2, number))
    assert_same(dict(norm.named_buffers()), before)


class Replaces(nn.Module):
    """A running mean that is a new tensor at each pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x


def test_buffers_that_are_replaced_are_named_and_put_back(make_model, make_batch):
    model = make_model((2,))
    model.backbone.insert(1, Replaces())
    options = dict(views=2, augment=SeededAugment(crop_padding=1), check_finite=True)
    optimizer = BLDOptimizer(model, 0.01, **options)
    with pytest.warns(UserWarning, match="backbone.1.mean, of Replaces, move at every"):
        optimizer.step(*make_batch(2))
    before = model.backbone[1].mean.clone()
    optimizer.param_groups[0]["lr"] = 1e30
    with pytest.raises(FloatingPointError):
        optimizer.step(*make_batch(2))
    assert torch.equal(model.backbone[1].mean, before)


class FurtherBuffer(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x) * (1 + 1e-7 * self.seen)


def test_a_further_buffer_of_a_batch_norm_is_named(make_model, make_batch):
    model = make_model((2,))
    model.backbone[1] = FurtherBuffer(4)
    with pytest.warns(UserWarning, match="BLDOptimizer: backbone.1.seen, of "):
        BLDOptimizer(model, 0.01).step(*make_batch(2))


def test_normalisation_expects_images_in_their_range(make_model, make_batch):
    images, labels = make_batch(2)
    augment = SeededAugment(mean=[0.5] * 3, std=[0.25] * 3)
    with pytest.raises(ValueError, match="^images: expected values from 0 to 1"):
        BLDOptimizer(make_model((2,)), 0.01, views=2, augment=augment).step(images * 255, labels)


class OwnCall(SeededAugment):
    def __call__(self, images, *, views, **options):
        return super().__call__(images, views=views, **options) + 0.1 * torch.rand(1)


def test_a_subclass_of_seeded_augment_is_an_augment_of_one_s_own(make_model, make_batch):
    optimizer = learns(make_model(), OwnCall(jitter=0.1), make_batch)
    assert max(n.max() for n in optimizer.last.distillation_norms) < 1e-6
    images, _ = make_batch(2)
    with pytest.raises(ValueError, match="^labels: .*have positions"):
        dense = BLDOptimizer(Dense(), 0.1, views=2, augment=OwnCall(jitter=0.1))
        dense.step(images, torch.zeros(5, 8, 8, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:BLDOptimizer. .* (keeps state|moves parameters)")
@pytest.mark.parametrize(
    "base", [o for o in vars(torch.optim).values() if isinstance(o, type)], ids=lambda o: o.__name__
)
def test_every_optimizer_of_torch_is_a_base_or_says_why_not(base, make_model, make_batch):
    """Muon takes matrices alone, SparseAdam sparse gradients, LBFGS a closure; ASGD has the rate
    of the step before, and Rprop that of the first.
    """
    if base is torch.optim.Optimizer:
        return
    model = make_model((2,))
    refused = {"LBFGS": "closure", "SparseAdam": "dense gradients", "Muon": "2D"}
    refused |= dict.fromkeys(("ASGD", "Rprop"), "moved parameters at a learning rate of 0")
    if reason := refused.get(base.__name__):
        with pytest.raises((ValueError, RuntimeError), match=reason):
            BLDOptimizer(model, 0.01, base=base)
        return
    BLDOptimizer(model, 0.01, base=base).step(*make_batch(2))


def test_a_group_for_that_names_no_group_is_refused(make_model, make_batch):
    optimizer = BLDOptimizer(make_model((2,)), **OPTIONS)
    optimizer.group_for = lambda name, param: 5
    optimizer.model.add_head(2)
    with pytest.raises(ValueError, match="^group_for: .*0 to 0, .* heads.1.weight, got 5"):
        optimizer.step(*make_batch(2))


def test_the_newest_namesake_counts(make_model, make_batch):
    """An old head in a group that does not learn keeps the next one out of it."""
    optimizer = BLDOptimizer(make_model((2, 2)), **OPTIONS)
    frozen = optimizer.model.heads[0].parameters()
    optimizer.add_param_group({"params": frozen, "lr": 0.0})
    optimizer.model.add_head(2)
    optimizer.step(*make_batch(2))
    assert "heads.2.weight" in optimizer.param_groups[0]["param_names"]


# ---- what is set, changed or shared later ----


def test_a_learning_rate_that_is_set_reaches_every_group(make_model, make_batch):
    optimizer = BLDOptimizer(make_model([2]), 0.1)
    head = optimizer.model.heads[0].parameters()
    optimizer.add_param_group({"params": head, "lr": 1.0})
    optimizer.lr = 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert optimizer.warmup_lr == 0.005
    optimizer.warmup_lr = 0.25
    assert optimizer.warmup_ratio == 0.5
    optimizer.lr = 1.0
    assert optimizer.warmup_lr == 0.5


@pytest.mark.parametrize("lr", [float("nan"), -0.1, torch.tensor(float("inf"))])
def test_a_learning_rate_that_a_scheduler_may_set_is_checked(lr, make_model, make_batch):
    model = make_model([2])
    optimizer, before = BLDOptimizer(model, 0.1), snapshot(model)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"^param_groups\[0\]\['lr'\]: expected a finite number"):
        optimizer.step(*make_batch(2))
    with pytest.raises(ValueError, match="^lr: expected a finite number"):
        optimizer.lr = lr
    assert_same(snapshot(model), before)


CHANGES = {
    "temperature": 4.0, "views": 1, "views_per_pass": 2, "augment": SeededAugment(), "seed": 1,
    "layer": "tensor",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_makes_the_views_stays_until_the_batch_ends(name, make_model, make_batch):
    model, batch = make_model([2, 3]), make_batch(3)
    optimizer = BLDOptimizer(model, 0.1, views=2, augment=SeededAugment(jitter=0.1))
    optimizer.seed = 0
    optimizer.warm_up(*batch)
    setattr(optimizer, name, CHANGES[name])
    before = snapshot(model)
    name = name.replace("views_per_pass", "views_in_pass")
    with pytest.raises(ValueError, match=f"^{name}: expected .*, as in the last warm_up, got"):
        optimizer.joint(*batch)
    assert_same(snapshot(model), before)
    optimizer.warm_up(*batch)
    optimizer.joint(*batch)


def test_heads_that_share_parameters_are_refused():
    one = nn.Linear(4, 2)
    model = MultiHead(nn.Flatten(), 4, head=lambda *_: one)
    model.add_head(2)
    with pytest.raises(ValueError, match="^head: expected a new module for each task"):
        model.add_head(2)
    assert len(model.heads) == 1


class Torchvisions(nn.Module):
    def forward(self, *images):
        return images


def only_images(images):
    return images


@pytest.mark.parametrize("augment", [Torchvisions(), only_images, lambda x, seed: x])
def test_an_augment_that_takes_other_arguments_is_refused_at_once(augment, make_model):
    with pytest.raises(TypeError, match="^augment: expected a callable .*Call a transform"):
        BLDOptimizer(make_model([2]), 0.1, augment=augment)


def test_a_state_of_another_base_is_refused(make_model, make_batch):
    model, batch = make_model([2]), make_batch(2)
    saved = BLDOptimizer(model, 0.1).state_dict()
    adam = BLDOptimizer(model, 0.1, base=torch.optim.Adam)
    with pytest.raises(ValueError, match="^state_dict: expected one of base Adam, got one of SGD"):
        adam.load_state_dict(saved)
    adam.step(*batch)


class Tokens(nn.BatchNorm1d):
    """Of [N, L, C]: the channels come last."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_a_batch_norm_of_tokens_counts_its_values_by_its_own_channels(make_model):
    images, labels = torch.rand(5, 4, 3), torch.tensor([0, 1, 0, 1, 1])
    found = []
    for norm in (Tokens(3), nn.BatchNorm1d(3)):
        plain = type(norm) is nn.BatchNorm1d
        x = images.transpose(1, 2).contiguous() if plain else images
        torch.manual_seed(0)
        model = MultiHead(nn.Sequential(norm, nn.Flatten()), 12)
        model.add_head(2)
        BLDOptimizer(model, 0.1, views=2, views_per_pass=2).step(x, labels)
        found.append(torch.stack((norm.running_mean, norm.running_var)))
    torch.testing.assert_close(*found)


# ---- groups of parameters that are replaced or wrapped ----


def split(params, lr):
    """Matrices in a group of their own, vectors in one that stays as it is."""
    params = list(params)
    matrices, vectors = ([p for p in params if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "lr": 0.0}]
    return torch.optim.SGD(groups, lr=lr)


def test_a_parameter_that_is_replaced_keeps_its_group(make_model, make_batch):
    model = make_model([2, 3])
    optimizer = BLDOptimizer(model, 0.1, base=split)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    optimizer.step(*make_batch(3))
    assert {len(p.shape) > 1 for p in optimizer.param_groups[0]["params"]} == {True}
    assert {len(p.shape) > 1 for p in optimizer.param_groups[1]["params"]} == {False}
    for name, param in model.named_parameters():
        assert (param.dim() > 1) or torch.equal(param, state[name]), name


def test_a_parametrization_stays_in_the_group_of_what_it_makes(make_model, make_batch):
    model = make_model([2])
    optimizer = BLDOptimizer(model, 0.1)
    optimizer.add_param_group({"params": [model.backbone[0].weight], "lr": 0.0})
    nn.utils.parametrizations.weight_norm(model.backbone[0])
    optimizer.step(*make_batch(2))
    names = [f"backbone.0.parametrizations.weight.original{i}" for i in (0, 1)]
    assert optimizer.param_groups[1]["param_names"] == names


class Slow(torch.optim.Optimizer):
    """Wraps another optimizer, whose groups it hands to the constructor as copies."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__([dict(group) for group in inner.param_groups], {})

    def step(self, closure=None):
        self.inner.step()


class Shares(Slow):
    """Has the groups of the other optimizer, and keeps them."""

    param_groups = property(lambda self: self.inner.param_groups, lambda self, value: None)

    def __init__(self, inner):
        self.__dict__ |= inner.__dict__ | {"inner": inner}


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Slow, "moved parameters at a learning rate of 0"), (Shares, "param_groups of its own")],
)
def test_an_optimizer_around_another_one_is_refused(kind, message, make_model):
    def base(params, lr):
        return kind(torch.optim.SGD(params, lr=lr))

    with pytest.raises(ValueError, match=f"^base: .*{message}"):
        BLDOptimizer(make_model([2]), 0.1, base=base)


def test_parameters_that_the_base_leaves_out_are_refused(make_model, make_batch):
    model = make_model([2])

    def heads_alone(params, lr):
        return torch.optim.SGD(model.heads.parameters(), lr=lr)

    with pytest.raises(ValueError, match=r"^base: .* left out backbone.0.weight.*requires_grad_"):
        BLDOptimizer(model, 0.1, base=heads_alone)
    model.backbone.requires_grad_(False)
    before = snapshot(model.backbone)
    BLDOptimizer(model, 0.1, base=heads_alone).step(*make_batch(2))
    assert_same(
        snapshot(model.backbone)["state"],
        before["state"]
        | dict(
            (k, v) for k, v in model.backbone.state_dict().items() if "running" in k or "num_" in k
        ),
    )


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_an_option_that_is_used_later_is_warned_of_once(name, make_model, make_batch, recwarn):
    model = make_model([2, 3])
    optimizer = BLDOptimizer(model, 0.1)
    optimizer.step(*make_batch(3))
    assert not recwarn
    for value in (0.5, 0.6):
        optimizer.param_groups[0][name] = value
        optimizer.step(*make_batch(3))
    (warning,) = recwarn
    what = "keeps state" if name == "momentum" else "moves parameters whose gradient is zero"
    assert what in str(warning.message) and warning.filename == __file__


# ---- hooks ----

schedules = pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
passes = pytest.mark.parametrize("views_per_pass", [1, 2])


@schedules
@passes
def test_a_hook_on_an_accumulated_gradient_is_called(
    schedule, views_per_pass, make_model, make_batch
):
    model, augment = make_model([2, 3]), SeededAugment(crop_padding=1)
    options = dict(views=2, views_per_pass=views_per_pass, schedule=schedule)
    optimizer = BLDOptimizer(model, 0.1, augment=augment, **options)
    weight = model.backbone[0].weight
    before = weight.detach().clone()

    def mask(param):
        param.grad[0] = 0

    weight.register_post_accumulate_grad_hook(mask)
    optimizer.step(*make_batch(3))
    assert torch.equal(weight[0], before[0]) and not torch.equal(weight[1], before[1])


@schedules
@passes
def test_a_hook_of_all_optimizers_is_called(schedule, views_per_pass, make_model, make_batch):
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    model, calls = make_model([2, 3]), []

    def clear(optimizer, args, kwargs):
        calls.append(type(optimizer).__name__)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None if p.grad is None else torch.zeros_like(p)

    options = dict(views=2, views_per_pass=views_per_pass, schedule=schedule)
    optimizer = BLDOptimizer(model, 0.1, augment=SeededAugment(crop_padding=1), **options)
    before = [p.detach().clone() for p in model.parameters()]
    handle = register_optimizer_step_pre_hook(clear)
    try:
        optimizer.step(*make_batch(3))
    finally:
        handle.remove()
    assert calls.count("SGD") >= 3
    assert all(map(torch.equal, model.parameters(), before))


def test_global_backward_hooks_see_heads_and_relus(make_model, make_batch):
    from torch.nn.modules.module import register_module_full_backward_hook

    model, seen = make_model([2, 3]), set()
    optimizer = BLDOptimizer(model, 0.1)
    handle = register_module_full_backward_hook(lambda module, *_: seen.add(module))
    try:
        optimizer.step(*make_batch(3))
    finally:
        handle.remove()
    assert {*model.heads} <= seen
    assert {m for m in model.modules() if type(m) is nn.ReLU} <= seen


# ---- layouts and precisions of the network's own ----


class ReadsMemory(nn.Module):
    """Weighs each pixel by where it lies in memory, as a kernel that knows no strides."""

    def forward(self, x):
        size = x.numel() // len(x)
        return x * torch.linspace(0, 1, size).as_strided(x.shape[1:], x.stride()[1:])


class Demands(nn.Module):
    def forward(self, x):
        if not x.is_contiguous():
            raise RuntimeError("x must be contiguous")
        return x


@pytest.mark.parametrize("layer", [ReadsMemory, Demands])
def test_a_layer_that_needs_contiguous_images_gets_them(layer, make_batch):
    torch.manual_seed(0)
    backbone = nn.Sequential(layer(), nn.Flatten(), nn.Linear(192, 4))
    model, (images, labels) = MultiHead(backbone, 4), make_batch(2)
    images = images.float() / 255
    model.add_head(2)
    expected = nn.functional.cross_entropy(model(images), labels, reduction="sum")
    loss = BLDOptimizer(model, 0.1).step(images, labels)
    torch.testing.assert_close(loss, expected)


def test_an_autocast_of_the_network_s_own_is_warned_of(make_model, make_batch):
    class Cast(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    model = MultiHead(Cast(nn.Flatten(), nn.Linear(192, 4)), 4)
    model.add_head(2)
    images, labels = make_batch(2)
    with pytest.warns(UserWarning, match="backbone.1 computes in torch.bfloat16"):
        BLDOptimizer(model, 0.1).step(images.float() / 255, labels)


@pytest.mark.parametrize(
    "outside",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    ],
    ids=["enabled", "disabled"],
)
def test_an_autocast_outside_does_not_keep_old_weights(outside, make_batch):
    """Inside one, torch would keep the casts that the network's own made of them."""

    class Cast(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    def learn(outside):
        torch.manual_seed(0)
        model = MultiHead(Cast(nn.Flatten(), nn.Linear(192, 4)), 4)
        model.add_head(2), model.add_head(3)
        optimizer = BLDOptimizer(model, 0.1, warmup_lr=0.1, balance=None)
        with outside:
            images, labels = make_batch(3)
            optimizer.step(images.float() / 255, labels)
        return torch.stack([*optimizer.last.new_loss, *optimizer.last.distillation_norms[0]])

    found = learn(outside())
    assert torch.equal(found, learn(nullcontext())) and found[2:].max() > 0


class Apart(nn.Module):
    """Old heads, and whether they are run as one should not run them."""

    def __init__(self, how):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        self.heads, self.how = nn.ModuleList(), how

    def forward(self, x):
        features = self.backbone(x)
        *old, new = self.heads
        with torch.no_grad() if self.how == "no_grad" else nullcontext():
            known = features.detach() if self.how == "detach" else features
            logits = [head(known) for head in old]
        return [*logits, new(features)]


def by_step(optimizer, images, labels):
    optimizer.step(images, labels)


def by_stages(optimizer, images, labels):
    optimizer.warm_up(images, labels)
    for _ in range(2):
        optimizer.joint(images, labels)


def by_stages_with_an_end(optimizer, images, labels):
    by_stages(optimizer, images, labels)
    optimizer.release()


@pytest.mark.parametrize("how", ["no_grad", "detach", "frozen", "together"])
@pytest.mark.parametrize("balance", [2.0, 0.0])
@pytest.mark.parametrize("learn", [by_step, by_stages, by_stages_with_an_end])
def test_old_heads_that_nothing_can_be_distilled_from_are_warned_of(
    learn, how, balance, make_batch
):
    model = Apart(how)
    model.heads.append(nn.Linear(4, 2))
    images, labels = make_batch(2)
    images = images.float() / 255
    optimizer = BLDOptimizer(model, 0.1, balance=balance)
    learn(optimizer, images, labels)  # the first task has no old head
    model.heads.append(nn.Linear(4, 2))
    model.backbone.requires_grad_(how != "frozen")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            learn(optimizer, images, labels)
    found = [w for w in caught if "no layer was distilled" in str(w.message)]
    assert len(found) == (balance > 0 and how != "together")
    assert any(n.any() for n in optimizer.last.distillation_norms) == (
        balance > 0 and how in ("together", "detach")
    )


@pytest.mark.parametrize(
    ("options", "classes", "distils"),
    [
        ({"joint_steps": 0}, 2, False),
        ({"joint_steps": 1, "warmup_lr": 0}, 2, False),
        ({}, 1, False),
        ({"joint_steps": 2, "warmup_lr": 0}, 2, True),
        ({"balance": None}, 2, True),
        ({"joint_steps": 0, "balance": 0}, 2, None),
    ],
)
def test_settings_that_never_distil_are_warned_of(
    options, classes, distils, make_model, make_batch
):
    model = make_model([2, classes])
    optimizer = BLDOptimizer(model, 0.1, views=2, augment=SeededAugment(jitter=0.1), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            optimizer.step(*make_batch(classes, number))
    found = [w for w in caught if "no layer was distilled in two batches with 2" in str(w.message)]
    assert len(found) == (distils is False)


def test_a_first_batch_that_distils_nothing_is_not_warned_of(make_model, make_batch):
    """A new head that begins with zeros has no gradient for the backbone yet."""
    model = make_model([2, 2])
    for param in model.heads[1].parameters():
        nn.init.zeros_(param)
    optimizer = BLDOptimizer(model, 0.1, views=2, augment=SeededAugment(jitter=0.1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no layer was distilled")
        for number in range(3):
            optimizer.step(*make_batch(2, number))
    assert optimizer.last.distillation_norms[0].any()


class Noise(nn.Module):
    """Draws from a generator of its own, which goes on from pass to pass."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.generator = scale, torch.Generator().manual_seed(0)

    def forward(self, x):
        return x + self.scale * torch.randn(x.shape, generator=self.generator)


def test_last_digits_that_do_not_repeat_are_warned_of(make_batch):
    model = MultiHead(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), Noise(1e-7)), 4)
    model.add_head(2)
    images, labels = make_batch(2)
    with pytest.warns(UserWarning, match="backbone.2 computed other last digits"):
        BLDOptimizer(model, 0.1).step(images.float() / 255, labels)


@pytest.mark.parametrize("noise", [1e-3, 1e-7])
def test_a_compiled_model_is_tried_out_as_it_is_written(noise, make_batch):
    model = MultiHead(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), Noise(noise)), 4)
    model.add_head(2)
    model.backbone.compile(backend="eager")
    images, labels = make_batch(2)
    optimizer = BLDOptimizer(model, 0.1)
    if noise == 1e-3:
        with pytest.raises(ValueError, match="backbone.2, a Noise, computed another output"):
            optimizer.step(images.float() / 255, labels)
    else:
        with pytest.warns(UserWarning, match="backbone.2 computed other last digits"):
            optimizer.step(images.float() / 255, labels)


@pytest.mark.parametrize("how", ["plain", "backbone", "forward", "model"])
def test_a_step_inside_a_compiled_function(how, make_model, make_batch):
    def learn(compiled):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = make_model([2, 2])
        if compiled and how == "backbone":
            model.backbone.compile(backend="eager")
        elif compiled and how == "forward":
            model.backbone.forward = torch.compile(model.backbone.forward, backend="eager")
        network = torch.compile(model, backend="eager") if compiled and how == "model" else model
        optimizer = BLDOptimizer(network, 0.1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        images, labels = make_batch(2)
        return torch.stack([step(images.float() / 255, labels) for _ in range(2)])

    torch.testing.assert_close(learn(True), learn(False))


# ---- what belongs to old heads alone ----


class Inside(nn.Module):
    """A MultiHead under another name."""

    def __init__(self, model):
        super().__init__()
        self.classifier = model

    @property
    def head_sizes(self):
        return self.classifier.head_sizes

    def forward(self, images):
        return self.classifier(images)


def test_statistics_of_branches_inside_a_backbone_move(make_batch):
    """Though these have `heads` and `head_sizes` of their own."""

    class Branches(nn.Module):
        head_sizes = [4, 4]

        def __init__(self):
            super().__init__()
            parts = (nn.Sequential(nn.Linear(192, 4), nn.BatchNorm1d(4)) for _ in range(2))
            self.heads = nn.ModuleList(parts)

        def forward(self, x):
            return torch.cat([head(x.flatten(1)) for head in self.heads], 1)

    model = MultiHead(Branches(), 8)
    model.add_head(2), model.add_head(2)
    images, labels = make_batch(2)
    BLDOptimizer(model, 0.1).step(images.float() / 255, labels)
    assert [head[1].num_batches_tracked for head in model.backbone.heads] == [1, 1]


@pytest.mark.parametrize("wrap", [lambda model: model, Inside], ids=["", "inside"])
@pytest.mark.parametrize("views_per_pass", [1, 2])
@pytest.mark.parametrize("statistics", ["once", "every_pass"])
def test_the_statistics_of_an_old_head_stay(views_per_pass, statistics, wrap, make_batch):
    def head(features, classes):
        return nn.Sequential(nn.Linear(features, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))

    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6), nn.ReLU())
    model = MultiHead(backbone, 6, head=head)
    model.add_head(2)
    convert_view_batchnorm(model, statistics=statistics)
    augment = SeededAugment(crop_padding=1)
    options = dict(views=2, views_per_pass=views_per_pass, augment=augment)
    optimizer = BLDOptimizer(wrap(model), 0.1, **options)
    optimizer.step(*make_batch(2))
    old = snapshot(model.heads[0])["state"]
    assert old["1.running_mean"].any()
    model.add_head(3)
    for number in range(2):
        optimizer.step(*make_batch(3, number=number))
    assert_same(snapshot(model.heads[0])["state"], old)
    assert model.heads[1][1].running_mean.any() and model.backbone[2].num_batches_tracked >= 3


def zeroed(kind):
    """A network in which, at first, nothing reaches the newest head, or a layer."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6), nn.ReLU())
    model = MultiHead(body, 6)
    model.add_head(2), model.add_head(3)
    with torch.no_grad():
        if kind == "head":
            model.heads[1].weight.zero_()
        else:
            body.insert(3, nn.Linear(6, 6))
            body[3].weight.zero_(), body[3].bias.zero_()
    return model


@pytest.mark.parametrize("kind", ["head", "layer"])
def test_statistics_move_where_no_gradient_comes_yet(kind, make_batch):
    model = zeroed(kind)
    BLDOptimizer(model, 0.1).step(*(x.float() / 255 if x.dim() > 1 else x for x in make_batch(3)))
    assert model.backbone[2].num_batches_tracked == 1 and model.backbone[2].running_mean.any()


def test_a_norm_that_heads_share_moves(make_batch):
    shared = nn.BatchNorm1d(6)
    model = MultiHead(nn.Sequential(nn.Flatten(), nn.Linear(192, 6)), 6)
    model.heads.extend(nn.Sequential(shared, nn.Linear(6, size)) for size in (2, 3))
    images, labels = make_batch(3)
    BLDOptimizer(model, 0.1).step(images.float() / 255, labels)
    assert shared.num_batches_tracked == 1


def test_checkpointed_blocks_with_norms(make_batch):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    body = Checkpointed(nn.Linear(192, 6), nn.BatchNorm1d(6), nn.ReLU())
    model = MultiHead(nn.Sequential(nn.Flatten(), body), 6)
    model.add_head(2), model.add_head(3)
    images, labels = make_batch(3)
    BLDOptimizer(model, 0.1).step(images.float() / 255, labels)
    assert body[1].num_batches_tracked == 1


# ---- parameters and inputs of other kinds ----


def test_buffers_that_cannot_be_written_to(make_batch):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(1).expand(192))
            with torch.inference_mode():
                self.register_buffer("scale", torch.ones(192))

        def forward(self, x):
            return x.flatten(1) * self.mask * self.scale

    model = MultiHead(nn.Sequential(Masked(), nn.Linear(192, 4)), 4)
    model.add_head(2)
    images, labels = make_batch(2)
    BLDOptimizer(model, 0.1, check_finite=True).step(images.float() / 255, labels)


def test_token_numbers_and_frozen_integers():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
            self.embedding = nn.EmbeddingBag(10, 4)

        def forward(self, x):
            return self.embedding(x)

    model = MultiHead(Tokens(), 4)
    model.add_head(2), model.add_head(2)
    tokens, labels = torch.randint(10, (6, 5)), torch.arange(6) % 2
    optimizer = BLDOptimizer(model, 0.1)
    optimizer.step(tokens, labels)
    assert optimizer.last.distillation_norms[0].any()
    model.backbone.embedding.sparse = True
    with pytest.raises(RuntimeError, match="^model: backbone.embedding has a sparse gradient"):
        optimizer.step(tokens, labels)


def test_a_subclass_of_tensor(make_model, make_batch):
    class Picture(torch.Tensor):
        pass

    images, labels = make_batch(3)
    found = []
    for kind in (torch.Tensor, Picture):
        torch.manual_seed(0)
        model = make_model([2, 3])
        optimizer = BLDOptimizer(model, 0.1, views=2, augment=SeededAugment(crop_padding=1))
        found.append(optimizer.step(images.as_subclass(kind), labels.as_subclass(kind)))
    assert type(found[1]) is torch.Tensor and torch.equal(*found)


def test_a_state_of_a_compiled_model_goes_into_a_plain_one(make_model, make_batch):
    model, other = make_model([2, 3]), make_model([2, 3])
    saved = BLDOptimizer(torch.compile(model), 0.1).state_dict()
    BLDOptimizer(other, 0.1).load_state_dict(saved)


# ---- what is distilled, and whether it is more than noise ----


@pytest.mark.parametrize(
    "rate, dtype, noisy",
    [(1e-6, torch.float32, True), (1e-2, torch.float32, False), (1e-6, torch.float64, False)],
)
def test_a_distillation_gradient_of_rounding_errors_is_warned_of(rate, dtype, noisy, make_batch):
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip
    model = MultiHead(backbone, 8).to(dtype)
    for _ in range(2):
        model.add_head(2).to(dtype)
    optimizer = BLDOptimizer(
        model, rate, views=2, augment=SeededAugment(crop_padding=1, dtype=dtype)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            optimizer.step(*make_batch(2, number))
    about = [str(w.message) for w in caught if "distils rounding errors" in str(w.message)]
    assert len(about) == noisy
    remedy = (
        "Raise warmup_lr, now 1e-08, with which the old predictions hardly move: a tenth of lr is"
    )
    assert all("only 7 digits" in text and f"{remedy} 1e-07" in text for text in about)


class OnlyTheNewest(nn.Module):
    """A model of several heads that returns the logits of one."""

    def __init__(self):
        super().__init__()
        self.backbone, self.heads = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), nn.ModuleList()

    def forward(self, x):
        return [self.heads[-1](self.backbone(x))]


def exchanged(model):
    model.heads[0] = nn.Linear(4, 2)


def appended(model):
    model.heads.append(nn.Linear(4, 2))


@pytest.mark.parametrize("change", [exchanged, appended])
@pytest.mark.parametrize("balance", [2.0, 0.0])
def test_a_new_head_beside_which_no_old_one_is_returned_is_warned_of(change, balance, make_batch):
    model = OnlyTheNewest()
    appended(model)
    images, labels = make_batch(2)
    optimizer = BLDOptimizer(model, 0.1, balance=balance, views=1, augment=SeededAugment())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step(images, labels)
        assert not [w for w in caught if "single head" in str(w.message)]
        change(model)
        for _ in range(2):
            optimizer.step(images, labels)
    assert len([w for w in caught if "single head" in str(w.message)]) == (balance > 0)


def test_statistics_of_another_range_are_refused():
    with pytest.raises(ValueError, match=r"^mean: expected values from 0 to 1, .* divide by 255"):
        SeededAugment(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7))


@pytest.mark.parametrize("base", ["sgd", torch.optim.SGD([torch.zeros(1)], 0.1)])
def test_a_base_that_is_no_class_is_refused(base, make_model):
    with pytest.raises(TypeError, match="^base: expected the class of a torch optimizer, such as"):
        BLDOptimizer(make_model((2,)), base=base)


def test_remedies_at_test_time_and_for_one_hot_labels(make_batch):
    images, _ = make_batch(2)
    model = MultiHead(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 4)
    model.add_head(2)
    images = (255 * images).to(torch.uint8)
    with pytest.raises(ValueError, match=r"^images: .* torch.uint8; use SeededAugment.plain"):
        model.predict(images, task=0)
    optimizer = BLDOptimizer(model, views=1, augment=SeededAugment(crop_padding=1))
    with pytest.raises(ValueError, match=r"^labels: .* of one-hot labels use labels.argmax\(1\)"):
        optimizer.step(images, torch.zeros(len(images), 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="^name: .* but this model has none: use MultiHead"):
        MultiHead.replacing(nn.Sequential(nn.Conv2d(3, 4, 1)), "fc")


def test_a_state_of_other_options_is_told_of(make_model):
    def make(**options):
        augment = options.pop("augment", SeededAugment(crop_padding=2))
        return BLDOptimizer(make_model((2,)), 1e-2, augment=augment, **options)

    saved = make(views=3).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(views=3).load_state_dict(saved)
        make(views=3, views_per_pass=3, check_finite=True).load_state_dict(saved)
        make(views=4).load_state_dict({k: v for k, v in saved.items() if k != "bld"})
    with pytest.warns(UserWarning, match=r"views=4 \(it was 3\), warmup_lr=0.1 · lr \(it was 0.01"):
        make(views=4, warmup_lr=1e-3).load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"augment=.*flip=0.5.* \(it was .*crop_padding=2\)\)"):
        make(views=3, augment=SeededAugment(flip=0.5)).load_state_dict(saved)
