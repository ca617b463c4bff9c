"""Whatever is wrong with a call, the error says so and nothing else has happened."""

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from arrange import arranged
from torch import nn

from bld_ext import BLDOptimizer, MultiHead, SeededAugment
from bld_ext.api.optimizer import REMOVED

pytestmark = pytest.mark.filterwarnings("ignore:BLDOptimizer. SGD keeps state")
SWITCHES = [
    getattr(backend, name)
    for backend in (torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn)
    for name in ("matmul", "conv", "rnn")
    if hasattr(getattr(backend, name, None), "fp32_precision")
]
MOMENTUM = functools.partial(torch.optim.SGD, momentum=0.9)
OPTIONS = {"lr": 0.01, "views": 2, "augment": SeededAugment(crop_padding=1), "base": MOMENTUM}


def snapshot(model, optimizer=None):
    """All that a failed call must leave alone."""
    return copy.deepcopy(
        {
            "state": model.state_dict(),
            "grads": [p.grad for p in model.parameters()],
            "modules": [(name, type(m), m.training) for name, m in model.named_modules()],
            "batch_norm": [getattr(m, "mode", None) for m in model.modules()],
            "optimizer": optimizer and optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "precision": [switch.fp32_precision for switch in SWITCHES],
            "autograd": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        }
    )


def assert_same(left, right, where="snapshot"):
    """Bit for bit, all the way down."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert left == right, where


@pytest.fixture(autouse=True)
def _precision_of_the_user():
    before = [switch.fp32_precision for switch in SWITCHES]
    for switch in SWITCHES:
        switch.fp32_precision = "tf32"
    yield
    after = [switch.fp32_precision for switch in SWITCHES]
    for switch, precision in zip(SWITCHES, before, strict=True):
        switch.fp32_precision = precision
    assert set(after) == {"tf32"}


@pytest.fixture
def make(make_model, make_batch):
    """make(**options): an optimizer after one batch, with a BatchNorm frozen in eval mode."""

    def make(**options):
        model = make_model((2, 3), dropout=0.2)
        model.backbone[1].eval()
        optimizer = arranged(model, **OPTIONS | options)
        optimizer.step(*make_batch(3, number=0))
        return optimizer

    return make


def check(make, make_batch, call, error, message, **options):
    """`call` raises and changes nothing, and the next batch is learned as if it had never been."""
    optimizer, twin = make(**options), make(**options)
    before = snapshot(optimizer.model, optimizer)
    with pytest.raises(error, match=message):
        call(optimizer, *make_batch(3, number=1))
    assert_same(snapshot(optimizer.model, optimizer), before)
    for each in (optimizer, twin):
        each.step(*make_batch(3, number=2))
    assert_same(snapshot(optimizer.model, optimizer), snapshot(twin.model, twin))


# ---- a bad batch ----


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor[2] = value
    return tensor


def wrong_width(optimizer, x, y):
    handle = optimizer.model.register_forward_hook(lambda module, args, logits: logits[:, 1:])
    try:
        optimizer.step(x, y)
    finally:
        handle.remove()


def wrong_augment(change):
    def call(optimizer, x, y):
        right = optimizer.augment
        optimizer.augment = lambda *args, **kwargs: change(right(*args, **kwargs))
        try:
            optimizer.step(x, y)
        finally:
            optimizer.augment = right

    return call


def without_augment(optimizer, x, y, dtype=torch.uint8):
    right, optimizer.augment = optimizer.augment, None
    try:
        optimizer.step((x * 255).to(dtype), y)
    finally:
        optimizer.augment = right


def frozen(optimizer, x, y):
    optimizer.model.requires_grad_(False)
    try:
        optimizer.step(x, y)
    finally:
        optimizer.model.requires_grad_(True)


def load_other(heads):
    def call(optimizer, x, y):
        model = MultiHead(copy.deepcopy(optimizer.model.backbone), 6)
        with torch.random.fork_rng():
            for size in heads:
                model.add_head(size)
        optimizer.load_state_dict(BLDOptimizer(model, **OPTIONS).state_dict())

    return call


BAD_STEPS = {
    "label-too-big": (lambda o, x, y: o.step(x, with_value(y, 3)), ValueError, "labels: .*0 to 2"),
    "label-negative": (
        lambda o, x, y: o.step(x, with_value(y, -1)),
        ValueError,
        "labels: .*got -1",
    ),
    "labels-int32": (
        lambda o, x, y: o.step(x, y.int()),
        ValueError,
        "labels: .*int64, got .*int32",
    ),
    "labels-float": (lambda o, x, y: o.step(x, y.float()), ValueError, "labels: .*int64"),
    "labels-fewer": (lambda o, x, y: o.step(x, y[1:]), ValueError, r"labels: .* 5 images.*\(4,\)"),
    "labels-scalar": (lambda o, x, y: o.step(x, y[0]), ValueError, r"labels: .*\(\)"),
    "labels-column": (
        lambda o, x, y: o.step(x, y[:, None]),
        ValueError,
        r"labels: expected \[B\], .* got \[B, 1\]; use",
    ),
    "labels-device": (
        lambda o, x, y: o.step(x, y.to("meta")),
        ValueError,
        "labels: .*cpu, got meta",
    ),
    "images-device": (
        lambda o, x, y: o.step(x.to("meta"), y),
        ValueError,
        "images: .*cpu, got meta",
    ),
    "images-nan": (
        lambda o, x, y: o.step(with_value(x, torch.nan), y),
        ValueError,
        r"images: .*\[2\]",
    ),
    "images-inf": (
        lambda o, x, y: o.step(with_value(x, torch.inf), y),
        ValueError,
        r"images: .*\[2\]",
    ),
    "images-uint16": (
        lambda optimizer, x, y: without_augment(optimizer, x, y, torch.uint16),
        ValueError,
        "images: .*got torch.uint16. .* / 65535",
    ),
    "images-uint8": (without_augment, ValueError, "images: .*no augment, got torch.uint8"),
    "images-vector": (lambda o, x, y: o.step(x[:, 0, 0, 0], y), ValueError, r"images: .*\(5,\)"),
    "empty-batch": (lambda o, x, y: o.step(x[:0], y[:0]), ValueError, r"images: .*B ≥ 1, got \(0,"),
    "numpy": (lambda o, x, y: o.step(x.numpy(), y), TypeError, "images.* ndarray"),
    "list": (lambda o, x, y: o.step(x, y.tolist()), TypeError, "labels.* list"),
    "closure": (lambda o, x, y: o.step(lambda: 0), TypeError, "labels"),
    "third-argument": (lambda o, x, y: o.step(x, y, lambda: 0), TypeError, "step"),
    "logits-width": (wrong_width, ValueError, "model: expected logits .*5.* got .*4"),
    "views-missing": (wrong_augment(lambda v: v[:-1]), ValueError, "augment: "),
    "views-extra": (wrong_augment(lambda v: torch.cat([v, v])), ValueError, "augment: "),
    "augment-raises": (wrong_augment(lambda v: v.nothing), AttributeError, "nothing"),
    "frozen-model": (frozen, RuntimeError, "model: .*frozen"),
    "joint-first": (lambda o, x, y: o.joint(x, y), RuntimeError, "warm_up"),
    "load-fewer-heads": (load_other((2,)), ValueError, "state_dict: .*heads.1.bias"),
    "load-more-heads": (load_other((2, 3, 2)), ValueError, "state_dict: .*heads.2.bias"),
    "load-other-sizes": (load_other((2, 4)), ValueError, "state_dict: .*heads.1"),
    "load-another-optimizer": (
        lambda o, x, y: o.load_state_dict(torch.optim.SGD(o.model.parameters()).state_dict()),
        ValueError,
        "state_dict: .*BLDOptimizer",
    ),
}


@pytest.mark.parametrize("statistics", ["once", "every_pass"])
@pytest.mark.parametrize("case", BAD_STEPS)
def test_bad_call(make, make_batch, case, statistics):
    check(make, make_batch, *BAD_STEPS[case], statistics=statistics)


def test_without_heads(make_model, make_batch):
    model = make_model()
    optimizer = BLDOptimizer(model, views=2, augment=SeededAugment())
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="model: .*add_head"):
        optimizer.step(*make_batch(2))
    assert_same(snapshot(model, optimizer), before)


def test_reduced_precision_after_construction(make, make_batch):
    optimizer = make(base=torch.optim.SGD)
    optimizer.augment = SeededAugment(dtype=torch.bfloat16)
    optimizer.model.bfloat16()
    before = snapshot(optimizer.model, optimizer)
    with pytest.raises(ValueError, match="model: parameter backbone.0.weight is torch.bfloat16"):
        optimizer.step(*make_batch(3))
    assert_same(snapshot(optimizer.model, optimizer), before)


def with_new_head(optimizer, x, y):
    optimizer.model.add_head(4)
    return x, y


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o, x, y: (x[1:], y[1:]), "images: .*last warm_up"),
        (lambda o, x, y: (x, with_value(y, 3)), "labels: "),
        (with_new_head, r"images: .*last warm_up, .*\[2, 3\] classes, got .*\[2, 3, 4\]"),
    ],
    ids=["other-batch", "other-labels", "new-head"],
)
def test_joint_on_what_was_not_warmed_up(make, make_batch, change, message):
    optimizer = make()
    images, labels = make_batch(3, number=1)
    optimizer.warm_up(images, labels)
    wrong = change(optimizer, images, labels)
    before = snapshot(optimizer.model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.joint(*wrong)
    assert_same(snapshot(optimizer.model, optimizer), before)


@pytest.mark.parametrize("losses", [["new"], ["new", "distillation"]])
@pytest.mark.parametrize("balance", [0.0, 2.0])
def test_a_head_that_is_added_amid_a_batch_is_refused(make, make_batch, losses, balance):
    optimizer = make()
    optimizer.balance = balance
    images, labels = make_batch(3, number=1)
    optimizer.warm_up(images, labels)
    optimizer.model.add_head(3)
    before = snapshot(optimizer.model, optimizer)
    with pytest.raises(ValueError, match="^images: expected the batch of the last warm_up"):
        optimizer.joint(images, labels, losses=losses)
    assert_same(snapshot(optimizer.model, optimizer), before)


def test_what_was_not_kept_cannot_be_distilled(make, make_batch):
    optimizer = make()
    optimizer.balance = 0
    images, labels = make_batch(3, number=1)
    optimizer.warm_up(images, labels)
    optimizer.balance = 2
    before = snapshot(optimizer.model, optimizer)
    with pytest.raises(ValueError, match="^balance: expected 0, with which .*, got 2"):
        optimizer.joint(images, labels)
    assert_same(snapshot(optimizer.model, optimizer), before)
    optimizer.joint(images, labels, losses=["new"])


def test_a_bank_that_was_refused_is_not_distilled_from(make, make_batch):
    optimizer = make()
    images, labels = make_batch(3, number=1)
    optimizer.warm_up(images, labels)
    bank, batches = optimizer._batch.bank, optimizer.batches
    optimizer.temperature = 3.0
    other = torch.full_like(bank, 1 / bank.shape[1])
    with pytest.raises(ValueError, match="^temperature: "):
        optimizer.joint(images, labels, bank=other)
    assert optimizer._batch.bank is bank and optimizer.batches == batches


def test_a_batch_that_fails_as_it_begins_has_not_begun(make, make_batch):
    optimizer = make()
    optimizer.balance = None
    images, labels = make_batch(3, number=1)
    optimizer.step(images, labels)
    begun, bank = optimizer.batches, torch.full((optimizer.views * len(images), 2), 0.5)
    with fails_in_forward(optimizer.model), pytest.raises(RuntimeError, match="^planted"):
        optimizer.joint(images, labels, bank=bank)
    assert optimizer._batch is None and optimizer.batches == begun
    optimizer.joint(images, labels, bank=bank)
    assert optimizer.batches == begun + 1


@contextmanager
def fails_in_forward(model):
    def fail(*_):
        raise RuntimeError("planted")

    hook = model.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


# ---- a bad argument ----

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("views", v) for v in (0, -1, 1.5, True)),
        *(("views_per_pass", v) for v in (0, 2.0)),
        *(("joint_steps", v) for v in (-1, 0.5)),
        *(("temperature", v) for v in (0, -1, NAN, INF, "hot", None)),
        *(("balance", v) for v in (-1, NAN, INF, "2")),
        *(("lr", v) for v in (-1, NAN, "fast")),
        *(("warmup_lr", v) for v in (-1, NAN)),
        *((name, v) for name in ("layer", "schedule") for v in ("other", None, [])),
    ],
    ids=lambda value: str(value).replace("[]", "list"),
)
def test_bad_option(make_model, name, value):
    model = make_model((2, 3))
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .* got "):
        BLDOptimizer(model, **OPTIONS | {name: value})
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("name", REMOVED)
def test_an_option_that_is_no_more_names_what_replaced_it(name, make_model):
    with pytest.raises(TypeError, match=f"^{name}: BLDOptimizer has no such option any more; .*="):
        BLDOptimizer(make_model((2,)), **{name: True})


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("lambda_", "the options are warmup_lr, temperature, balance, .*, reproducible$"),
        ("num_views", "did you mean views=?"),
        ("momentum", r"give it to the base, base=functools.partial\(torch.optim.SGD, momentum=..."),
    ],
)
def test_an_option_that_never_was_has_a_remedy(name, remedy, make_model):
    with pytest.raises(TypeError, match=f"^{name}: BLDOptimizer has no such option; {remedy}"):
        BLDOptimizer(make_model((2,)), **{name: 1})


def test_warmup_lr_needs_an_lr(make_model):
    with pytest.raises(ValueError, match="lr.*> 0, got 0"):
        BLDOptimizer(make_model((2,)), lr=0, warmup_lr=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.bfloat16(), ValueError, "model: parameter .*bfloat16; .*float32 or float64"),
        (lambda m: m.half(), ValueError, "model: parameter .*float16; .*float32 or float64"),
        (lambda m: m.parameters(), TypeError, "model: expected a torch.nn.Module, got generator"),
        (lambda m: MultiHead(nn.Flatten(), 4), ValueError, "model: .*add_head"),
    ],
    ids=["bf16", "fp16", "parameters", "nothing-to-learn"],
)
def test_bad_model(make_model, change, error, message):
    model = make_model((2, 3))
    wrong = change(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        BLDOptimizer(wrong, **OPTIONS)
    assert_same(snapshot(model), before)


# ---- check_finite ----


class Overflow:
    """A forward hook that spoils the logits, or their gradient, of forward pass number `when`."""

    def __init__(self, when, gradient):
        self.left, self.gradient = when, gradient

    def __call__(self, module, args, logits):
        self.left -= 1
        if self.left != -1:
            return logits
        if self.gradient:
            logits.register_hook(lambda grad: grad * torch.inf)
            return logits
        return logits * torch.inf


# Two views: passes 0 and 1 are the warm-up; each repetition then has L_d and L_t, or both at once.
PASSES = {
    "two_forward": {0: "warm-up", 1: "warm-up", 2: "joint", 5: "joint", 7: "joint", 9: "joint"},
    "shared_forward": {0: "warm-up", 1: "warm-up", 2: "joint", 5: "joint"},
}
PASSES["in_backward"] = PASSES["two_forward"]


@pytest.mark.parametrize("statistics", ["once", "every_pass"])
@pytest.mark.parametrize("what", ["loss", "gradient norm"])
@pytest.mark.parametrize(("schedule", "number"), [(s, n) for s in PASSES for n in PASSES[s]])
def test_overflow_is_undone(make, make_batch, schedule, number, what, statistics):
    def call(optimizer, x, y):
        hook = Overflow(number, gradient=what == "gradient norm")
        handle = optimizer.model.register_forward_hook(hook)
        try:
            optimizer.step(x, y)
        finally:
            handle.remove()

    message = f"{PASSES[schedule][number]} stage: .* is not finite"
    options = {"schedule": schedule, "statistics": statistics, "check_finite": True}
    check(make, make_batch, call, FloatingPointError, message, **options)


def test_divergence_is_undone(make, make_batch):
    def call(optimizer, x, y):
        optimizer.param_groups[0]["lr"] = 1e30
        try:
            optimizer.step(x, y)
        finally:
            optimizer.param_groups[0]["lr"] = OPTIONS["lr"]

    check(make, make_batch, call, FloatingPointError, " stage: .*lower lr", check_finite=True)


def test_first_batch_overflow_leaves_no_state(make_model, make_batch):
    model = make_model((2, 3))
    optimizer = BLDOptimizer(model, **OPTIONS | {"check_finite": True})
    before = snapshot(model, optimizer)
    model.register_forward_hook(Overflow(6, gradient=False))
    with pytest.raises(FloatingPointError, match="joint stage: .* is not finite"):
        optimizer.step(*make_batch(3))
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("case", ["label-too-big", "logits-width", "augment-raises"])
def test_bad_call_with_check_finite(make, make_batch, case):
    check(make, make_batch, *BAD_STEPS[case], check_finite=True)


def test_good_steps_are_the_same_with_check_finite(make, make_batch):
    checked, plain = make(check_finite=True), make()
    for optimizer in (checked, plain):
        optimizer.step(*make_batch(3, number=1))
    assert_same(snapshot(checked.model, checked), snapshot(plain.model, plain))
