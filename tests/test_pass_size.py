"""views_per_pass: a number or "auto", running out of memory, and models that mix their images."""

import copy
import gc
import math
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from arrange import arranged
from torch import nn

from bld_ext import MultiHead, SeededAugment
from bld_ext.api import pass_size

AUGMENT = SeededAugment(crop_padding=1, rotation=15, jitter=0.2)
OPTIONS = dict(lr=0.05, views=8, augment=AUGMENT, seed=3)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a)


def optimizer_of(model, **options):
    return arranged(model, **OPTIONS | options)


# ---- "auto" ----


def test_measuring_leaves_no_activation_behind(make_model, make_batch):
    """Nor the graph that holds them, whose nodes belong to the stream it was made on."""
    model, outputs = make_model(heads=(2, 2)), []
    for module in model.modules():
        module.register_forward_hook(lambda m, inputs, out: outputs.append(weakref.ref(out)))
    optimizer_of(model, views_per_pass="auto").step(*make_batch(2))
    gc.collect()
    assert len(outputs) > 50 and not any(ref() is not None for ref in outputs)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("1 B", 1), ("1024 GiB", 8), ("auto", 8)],
    ids=["none", "plenty", "default"],
)
def test_auto_takes_what_fits(budget, expected, make_model, make_batch):
    optimizer = optimizer_of(make_model(heads=(2, 2)), views_per_pass=budget)
    optimizer.step(*make_batch(2))
    assert optimizer.views_in_pass == expected


def test_auto_stays_below_the_budget_and_uses_it(make_model, make_batch):
    """Activations of a pass, counted from outside, against the budget."""
    model, batch = make_model(heads=(2, 2)), make_batch(2, size=20)

    def saved_by(views):
        saved = {}

        def note(t):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        twin = copy.deepcopy(model)
        optimizer = optimizer_of(twin, views=views, views_per_pass=views, joint_steps=0)
        optimizer._pass_size.looked_for_mixing = True
        optimizer._probed_with = (optimizer.augment, 2, True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            optimizer.step(*batch)
        return sum(saved.values())

    budget = 5 * saved_by(1)
    optimizer = optimizer_of(model, views_per_pass=f"{budget} B")
    optimizer.step(*batch)
    assert 2 <= optimizer.views_in_pass <= 4  # beside activations there are two gradients
    assert saved_by(optimizer.views_in_pass) <= budget


def test_passes_are_even(make_model, make_batch):
    """7 of 8 views would leave a pass of one."""
    optimizer = optimizer_of(make_model(heads=(2,)), views_per_pass="auto")
    optimizer.warm_up(*make_batch(2))
    views = optimizer._views(*make_batch(2), [2], 0)
    with optimizer._surroundings("keep"):
        each = pass_size.activation_bytes(replace(views, count=1, per_pass=1))
    size = pass_size.PassSize(f"{7 * each} B")
    with optimizer._surroundings("keep"):
        size.fit(replace(views, count=1, per_pass=1), 8, "key")
    assert size.number == 4


def test_auto_computes_what_that_number_of_views_computes(make_model, make_batch):
    states = []
    for views in ("auto", 8):
        model = make_model(heads=(2, 2), dropout=0.2)
        optimizer = optimizer_of(model, views_per_pass=views)
        for number in range(2):
            optimizer.step(*make_batch(2, number))
        states.append(state(model))
    assert_same_bits(*states)


def test_measuring_leaves_no_trace(make_model, make_batch):
    model = make_model(heads=(2, 2), dropout=0.2)
    optimizer = optimizer_of(model, views_per_pass="auto")
    before, images, rng = state(model), make_batch(2), torch.get_rng_state()
    optimizer._choose_pass_size(*images, [2, 2])
    assert optimizer.views_in_pass == 8
    assert_same_bits(before, model.state_dict())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters()) and optimizer.batches == 0


def test_another_batch_size_is_measured_anew(make_model, make_batch):
    model = make_model(heads=(2, 2))
    optimizer = optimizer_of(model, views_per_pass="1 MiB")
    numbers = []
    for size in (5, 200):
        optimizer.step(*make_batch(2, size=size))
        numbers.append(optimizer.views_in_pass)
    assert numbers[0] > numbers[1]


def test_other_parameters_that_learn_are_measured_anew(make_model, make_batch):
    """A new head, and a backbone that learns no longer, or again."""
    optimizer = optimizer_of(make_model(heads=(2,)), views_per_pass="128 KiB")
    model, numbers = optimizer.model, []
    for change in (
        lambda: None,
        lambda: model.add_head(300),
        lambda: model.backbone.requires_grad_(False),
        lambda: model.backbone.requires_grad_(True),
    ):
        change()
        optimizer.step(*make_batch(2))
        numbers.append(optimizer.views_in_pass)
    learned, with_head, frozen, again = numbers
    assert again == with_head < learned and with_head < frozen, numbers


# ---- running out of memory ----


class Small(nn.Module):
    """A device on which only so many images fit at once."""

    def __init__(self, inner, limit, error):
        super().__init__()
        self.inner, self.limit, self.error, self.calls = inner, limit, error, 0

    def forward(self, images):
        self.calls += 1
        if torch.is_grad_enabled() and len(images) > self.limit:
            raise self.error
        return self.inner(images)


ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
}


def small_model(make_model, limit, error, heads=(2, 2)):
    model = make_model(heads=heads)
    model.backbone = Small(model.backbone, limit, error)
    return model


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
def test_auto_backs_off_and_loses_nothing(kind, schedule, make_model, make_batch):
    states = []
    for views, limit in (("auto", 10), (2, 10**6)):
        model = small_model(make_model, limit, ERRORS[kind])
        optimizer = optimizer_of(model, views_per_pass=views, schedule=schedule)
        for number in range(2):
            optimizer.step(*make_batch(2, number))
        assert optimizer.views_in_pass == 2 and optimizer.batches == 2
        states.append(state(model))
    assert_same_bits(*states)


@pytest.mark.parametrize("stage", ["warm-up", "joint"])
@pytest.mark.parametrize("kind", ERRORS)
def test_the_error_names_the_setting_to_lower(kind, stage, make_model, make_batch):
    model = small_model(make_model, 10**6, ERRORS[kind])
    optimizer = optimizer_of(model, views_per_pass=4)
    batch = make_batch(2)
    if stage == "joint":
        optimizer.warm_up(*batch)
    model.backbone.limit = 10
    call = optimizer.joint if stage == "joint" else optimizer.step
    with pytest.raises(torch.OutOfMemoryError, match="^views_per_pass: 4 views of 5 images .* low"):
        call(*batch)
    assert all(p.grad is None for p in model.parameters())


def test_one_view_that_does_not_fit(make_model, make_batch):
    model = small_model(make_model, 4, ERRORS["gpu"])
    before = state(model)
    with pytest.raises(torch.OutOfMemoryError, match="fewer images a batch"):
        optimizer_of(model, views_per_pass=1).step(*make_batch(2))
    assert_same_bits(before, model.state_dict())


def test_another_error_is_not_retried(make_model, make_batch):
    model = small_model(make_model, 10, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        optimizer_of(model, views_per_pass="auto").step(*make_batch(2))


# ---- what it changes ----


class Centred(nn.Module):
    """Subtracts the mean of its batch."""

    def forward(self, x):
        return x - x.mean(0)


class Mixing(nn.Module):
    """Mixes in its own forward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        features = self.inner(images)
        return features - features.mean(0)


class Later(nn.Module):
    """Adds to each image what came before it in the batch."""

    def forward(self, x):
        return x.cumsum(0)


def mixing_model(make_model, how):
    model = make_model(heads=(2, 2))
    if how in ("module", "later"):
        model.backbone.add_module("centred", Centred() if how == "module" else Later())
        return model, "backbone.centred"
    if how == "attention":
        attention = nn.MultiheadAttention(6, 1)  # along the batch

        class Attending(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = attention

            def forward(self, x):
                return x + self.attention(x, x, x)[0]

        model.backbone.add_module("attending", Attending())
        return model, "backbone.attending.attention"
    model.backbone = Mixing(model.backbone)
    return model, "backbone"


@pytest.mark.parametrize("how", ["module", "later", "attention", "forward"])
def test_a_model_that_mixes_its_images_is_warned_about_once(how, make_model, make_batch):
    model, name = mixing_model(make_model, how)
    optimizer = optimizer_of(model, views_per_pass=4)
    with pytest.warns(
        UserWarning, match=f"{name} computes an image differently .*views_per_pass=1"
    ):
        optimizer.step(*make_batch(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(*make_batch(2, 1))
        optimizer_of(mixing_model(make_model, how)[0], views_per_pass=1).step(*make_batch(2))


def test_an_augment_that_makes_another_view_is_named(make_model, make_batch):
    def augment(images, views, **_):
        return torch.rand(len(views) * len(images), *images.shape[1:])

    optimizer = optimizer_of(make_model(heads=(2,)), views_per_pass=2, augment=augment)
    with pytest.warns(UserWarning, match="augment computes an image differently .* or at random"):
        optimizer.step(*make_batch(2))


QUIET = {
    "group norm": lambda: nn.GroupNorm(2, 6),
    "nothing": lambda: nn.Identity(),
    "not a number": lambda: nn.Threshold(torch.inf, torch.nan),
    "scripted": lambda: torch.jit.script(nn.Tanh()),
    "frozen without statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False).eval(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("layer", QUIET.values(), ids=QUIET)
def test_what_does_not_mix_is_not_warned_about_and_left_as_it_is(layer, make_model, make_batch):
    model = make_model(heads=(2,))
    model.backbone.insert(6, layer())
    optimizer = optimizer_of(model, views_per_pass="auto")
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer._choose_pass_size(*make_batch(2), [2])
    assert_same_bits(before, model.state_dict())


def test_attention_that_drops_out_by_itself_does_not_mix(make_batch):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

        def forward(self, images):
            tokens = images.flatten(2)[:, :, :8]
            return self.attention(tokens, tokens, tokens)[0].mean(1)

    model = MultiHead(Attention(), 8)
    model.add_head(2)
    with warnings.catch_warnings(action="error"):
        optimizer_of(model, views_per_pass=2).step(*make_batch(2))


MOVING = {
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
    "Conv2d": lambda: nn.utils.spectral_norm(nn.Conv2d(6, 6, 1)),
    "_SpectralNorm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1)),
}


@pytest.mark.parametrize("kind", MOVING)
def test_buffers_that_move_at_every_pass_are_named_once(kind, make_model, make_batch):
    """Of whichever module; what the trial itself moved is put back."""
    model = make_model(heads=(2,))
    model.backbone.insert(6, MOVING[kind]())
    optimizer = optimizer_of(model, views_per_pass="auto")
    before = state(model)
    with pytest.warns(UserWarning, match=f"backbone.6.* of {kind}, move at every") as caught:
        optimizer._choose_pass_size(*make_batch(2), [2])
    assert len(caught) == 1 and caught[0].filename == __file__
    assert_same_bits(before, model.state_dict())
    with warnings.catch_warnings(action="error"):
        optimizer.step(*make_batch(2))


def test_memory_that_runs_out_while_measuring(make_model, make_batch):
    class Tiny(Small):
        def forward(self, images):
            if len(images) > self.limit:
                raise self.error
            return self.inner(images)

    for views, limit, message in ((4, 4, "4 views"), ("auto", 4, "fewer images a batch")):
        model = make_model(heads=(2, 2))
        model.backbone = Tiny(model.backbone, limit, ERRORS["gpu"])
        with pytest.raises(torch.OutOfMemoryError, match=f"^views_per_pass: .*{message}|{message}"):
            optimizer_of(model, views_per_pass=views).step(*make_batch(2))
    model = make_model(heads=(2, 2))
    model.backbone = Tiny(model.backbone, 5, ERRORS["gpu"])
    optimizer = optimizer_of(model, views_per_pass="auto")
    optimizer.step(*make_batch(2))
    assert optimizer.views_in_pass == 1


def test_memory_that_runs_out_later_is_less_from_then_on(make_model, make_batch):
    model = small_model(make_model, 10**6, ERRORS["gpu"])
    optimizer = optimizer_of(model, views_per_pass="auto")
    optimizer.step(*make_batch(2))
    model.backbone.limit = 20
    with pytest.raises(torch.OutOfMemoryError, match="^views_per_pass: 8 views.* next batch"):
        optimizer.step(*make_batch(2))
    optimizer.step(*make_batch(2))
    assert optimizer.views_in_pass == 4


def test_memory_that_runs_out_in_the_joint_stage_is_less_from_the_next_batch_on(
    make_model, make_batch
):
    """As the error says; both stages of a batch have the same passes."""
    model = small_model(make_model, 10**6, ERRORS["gpu"])
    optimizer, numbers = optimizer_of(model, views_per_pass="auto"), []
    for _ in range(3):
        model.backbone.limit = 10**6
        optimizer.warm_up(*make_batch(2))
        numbers.append(optimizer.views_in_pass)
        model.backbone.limit = 20
        for _ in range(2):
            if numbers[-1] > 4:
                with pytest.raises(torch.OutOfMemoryError, match="8 views.* next batch"):
                    optimizer.joint(*make_batch(2))
            else:
                optimizer.joint(*make_batch(2))
            assert optimizer.views_in_pass == numbers[-1]
        optimizer.release()
    assert numbers == [8, 4, 4]


def test_the_number_may_be_set_later(make_model, make_batch):
    optimizer = optimizer_of(make_model(heads=(2, 2)))
    optimizer.views_per_pass = 3
    assert optimizer.views_in_pass == 3 and "views_per_pass=3" in repr(optimizer)
    optimizer.views_per_pass = "auto"
    optimizer.step(*make_batch(2))
    optimizer.views = 50
    optimizer.step(*make_batch(2))
    assert optimizer.views_in_pass == 50
    with pytest.raises(ValueError, match="^views_per_pass: expected"):
        optimizer.views_per_pass = -1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batch_norm_and_dropout_are_not(dropout, make_model, make_batch):
    model = make_model(heads=(2, 2), dropout=dropout)
    before = [m.training for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer_of(model, views_per_pass=4).step(*make_batch(2))
    assert [m.training for m in model.modules()] == before
    assert not any(m._forward_hooks for m in model.modules())


def test_looking_for_mixing_leaves_no_trace(make_model, make_batch):
    states = []
    for look in (True, False):
        model = make_model(heads=(2, 2), dropout=0.2)
        optimizer = optimizer_of(model, views_per_pass=4)
        optimizer._pass_size.looked_for_mixing = not look
        optimizer.step(*make_batch(2))
        states.append(state(model))
    assert_same_bits(*states)


@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
@pytest.mark.parametrize("views", [3, 5, 8, 100, "auto"])
def test_any_number_of_views_is_one_view_a_pass_in_float64(schedule, views, make_model, make_batch):
    """Losses, weights and buffers; the last pass is smaller where the number divides no V."""
    results = []
    augment = SeededAugment(crop_padding=1, rotation=15, jitter=0.2, dtype=torch.float64)
    for count in (1, views):
        model = make_model(heads=(2, 3, 2), dtype=torch.float64)
        optimizer = optimizer_of(model, views_per_pass=count, schedule=schedule, augment=augment)
        losses = []
        for number in range(3):
            loss = optimizer.step(*make_batch(2, number, dtype=torch.float64))
            losses += [loss, *optimizer.last.new_loss, *optimizer.last.distillation_loss]
            losses += [*optimizer.last.factors]
        results.append((losses, state(model)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (
                dict(views_per_pass=wrong),
                "views_per_pass: expected a whole number, 'auto', or the memory that a pass may "
                "take, such as '512 MiB', in one of B, kB, MB, GB, KiB, MiB, GiB, "
                f"got '{wrong}'",
            )
            for wrong in ("all", "", "0 MiB", "-1 MiB", "0.5 B", "512", "5 mib", "1e3 B")
        ),
        (dict(views_per_pass=0), "views_per_pass: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings(options, message, make_model):
    with pytest.raises(ValueError, match=message):
        optimizer_of(make_model(heads=(2,)), **options)


def test_free_memory_is_what_linux_says(tmp_path, monkeypatch):
    monkeypatch.setattr(pass_size, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(pass_size, "CGROUP", tmp_path)
    assert pass_size.free_memory() == math.inf
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemAvailable:    1000 kB\n")
    assert pass_size.free_memory() == 1_024_000
    (tmp_path / "memory.current").write_text("100000\n")
    for limit, free in (("max", 1_024_000), ("600000", 500_000), ("50000", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert pass_size.free_memory() == free


@pytest.mark.parametrize(("free", "views"), [(math.inf, 4), (0, 1)])
def test_auto_takes_no_more_than_is_free(free, views, make_model, make_batch, monkeypatch):
    monkeypatch.setattr(pass_size, "free_memory", lambda: free)
    optimizer = optimizer_of(make_model(heads=(2,)), views=4, views_per_pass="auto")
    optimizer.step(*make_batch(2))
    assert optimizer.views_in_pass == views
