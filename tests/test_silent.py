"""What would be wrong without a word: it is right, refused with its remedy, or warned of."""

import functools
import random

import numpy as np
import pytest
import torch
from test_bad_input import OPTIONS, assert_same, snapshot
from torch import nn

from bld_ext import BLDOptimizer, SeededAugment

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
def test_dense_labels_are_refused_where_the_views_move(moves, make_batch):
    model, (images, _) = Dense(), make_batch(2)
    before = snapshot(model)
    optimizer = BLDOptimizer(model, 0.1, views=2, augment=SeededAugment(**moves))
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


@pytest.mark.parametrize("draw", [lambda: np.random.rand(), lambda: random.random()])
def test_an_augment_that_draws_elsewhere_is_refused(draw, make_model, make_batch):
    def noisy(images, views, **_):
        return torch.cat([images * (1 + 0.1 * draw()) for _ in views])

    with pytest.raises(ValueError, match="^augment: expected the same view .*default_rng"):
        learns(make_model(), noisy, make_batch)


class NumpyNoise(nn.Module):
    def forward(self, x):
        return x * (1 + 0.1 * np.random.rand()) if self.training else x


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
    with pytest.raises(ValueError, match=r"for one-hot rows use labels.argmax\(1\)"):
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
