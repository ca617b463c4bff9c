"""precision=: what it changes, and what each mode leaves of the distillation gradient."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from benchmarks import precision as emulation
from bld_ext import BLDOptimizer, SeededAugment
from bld_ext.api.precision import _SWITCHES, backward_arithmetic, exact_float32

AUGMENT = SeededAugment(crop_padding=1, rotation=15, jitter=0.2)
SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.conv)


class Spy(TorchFunctionMode):
    """Notes the switches at every convolution, and at the arrival of its output's gradient."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.conv2d and out.requires_grad:
            self.forward.append([s.fp32_precision for s in SWITCHES])
            out.register_hook(
                lambda grad: self.backward.append([s.fp32_precision for s in SWITCHES])
            )
        return out


@pytest.mark.parametrize("schedule", ["two_forward", "shared_forward", "in_backward"])
@pytest.mark.parametrize("views_per_pass", [2, 4])
@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp32", ["ieee"] * 3), ("mixed", ["tf32", "tf32", "bf16"])],
    ids=["fp32", "mixed"],
)
def test_only_backward_passes_are_reduced(
    precision, expected, views_per_pass, schedule, make_model, make_batch
):
    optimizer = BLDOptimizer(
        make_model(heads=(2, 2)), 0.05, views=4, views_per_pass=views_per_pass, augment=AUGMENT,
        schedule=schedule, precision=precision,
    )  # fmt: skip
    before = [s.fp32_precision for s in SWITCHES]
    optimizer.step(*make_batch(2))
    with Spy() as spy:
        optimizer.step(*make_batch(2, 1))
    assert spy.forward and all(found == ["ieee"] * 3 for found in spy.forward)
    assert spy.backward and all(found == expected for found in spy.backward)
    assert [s.fp32_precision for s in SWITCHES] == before


@pytest.fixture
def unset():
    """All switches of float32 products, the root first, as nobody ever set them."""
    every = (torch.backends, *_SWITCHES)
    before = [s.fp32_precision for s in every]
    for switch in every:
        switch.fp32_precision = "none"
    yield every
    for switch, precision in zip(every, before, strict=True):
        switch.fp32_precision = precision


def test_all_switches_are_put_back_and_go_on_following_their_parents(unset):
    draw = random.Random(0)

    def reports():
        return [s.fp32_precision for s in unset]

    for _ in range(300):
        root, values = draw.choice(["none", "ieee", "tf32"]), []
        for switch in unset[1:]:
            values.append(draw.choice(["none", "none", "ieee", "tf32"]))
            switch.fp32_precision = values[-1]
        unset[0].fp32_precision = root
        before = reports()
        with exact_float32():
            assert reports() == ["ieee"] * len(unset)
            with backward_arithmetic("mixed"):
                assert reports()[1:] != ["ieee"] * len(_SWITCHES)
            assert reports() == ["ieee"] * len(unset)
        assert reports() == before
    for switch in unset:
        switch.fp32_precision = "none"
    with exact_float32(), backward_arithmetic("mixed"):
        pass
    assert reports() == ["none"] * len(unset)


def test_the_switches_are_put_back_after_an_error_in_backward(make_model, make_batch):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise KeyError("here")

    model = make_model(heads=(2, 2))
    model.backbone.add_module("failing", nn.Module())
    model.backbone.failing.forward = Failing.apply
    before = [s.fp32_precision for s in SWITCHES]
    with pytest.raises(KeyError, match="here"):
        BLDOptimizer(model, 0.05, precision="mixed").step(*make_batch(2))
    assert [s.fp32_precision for s in SWITCHES] == before


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16", "autocast", "TF32"])
def test_a_mode_that_would_not_distil_is_refused_with_the_reason(name, make_model):
    with pytest.raises(ValueError, match=f"^precision: .*got '{name}'.*rounding noise.*'mixed'"):
        BLDOptimizer(make_model(heads=(2,)), precision=name)


def test_a_dtype_is_refused_with_the_reason_too(make_model):
    with pytest.raises(ValueError, match="^precision: .*got torch.bfloat16.*rounding noise"):
        BLDOptimizer(make_model(heads=(2,)), precision=torch.bfloat16)


def test_an_unknown_mode_is_refused(make_model):
    with pytest.raises(ValueError, match="^precision: expected one of fp32, mixed, got 'fast'"):
        BLDOptimizer(make_model(heads=(2,)), precision="fast")


# ---- what is left of G_d, with the products of tensor cores emulated ----


def test_rounding_to_tf32_and_bf16():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-12), 3e38, 0.0])
    found = emulation.round_tf32(x)
    assert found.tolist() == pytest.approx(
        [1, 1 + 2**-10, 1, 1 + 2**-9, -1, found[5].item(), 0], abs=0
    )
    assert (found - x).abs().max() / 3e38 < 2**-11
    assert torch.equal(emulation.round_bf16(found), x.bfloat16().float())


@pytest.mark.parametrize(("precision", "digits"), [("3xtf32", 20), ("bf16x3", 15), ("bf16x6", 22)])
def test_parts_add_up(precision, digits):
    x = torch.randn(1000)
    parts = emulation.parts(x, precision)
    assert (sum(p.double() for p in parts) - x.double()).abs().max() < 4 * 2.0**-digits


def test_products_of_parts():
    a, b = torch.randn(40, 60), torch.randn(60, 50)
    exact = a.double() @ b.double()
    error = {
        mode: (emulation.product(torch.matmul, a, b, mode).double() - exact).abs().max().item()
        for mode in ("fp32", "3xtf32", "bf16x6", "bf16x3", "tf32", "bf16")
    }
    assert error["3xtf32"] < 4 * error["fp32"] and error["bf16x6"] < 4 * error["fp32"]
    assert error["fp32"] < error["bf16x3"] < error["tf32"] < error["bf16"]


@pytest.fixture(scope="module")
def found():
    """Early and late in the second task of the digits, at the learning rate of their preset."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    model = emulation.make_model("slim")
    situations = emulation.situations(model, "digits", "", lr=3e-3, views=2, train_lr=1e-3)
    exact = {name: emulation.in_float64(s, model) for name, s in situations.items()}
    yield model, situations, exact
    torch.set_num_threads(threads)


def cosine(found, when, mode):
    """The lowest one over the layers."""
    model, situations, exact = found
    s = situations[when]
    gradient = emulation.distillation_gradient(model, s.before, s.after, s.views, mode)
    return emulation.compare(gradient, exact[when])[0]


def test_late_is_late(found):
    assert found[1]["early"].cross_entropy > 0.1 and found[1]["late"].cross_entropy <= 1e-2


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("backward", ["fp32", "tf32", "bf16"])
def test_every_layer_keeps_its_gradient(found, when, backward):
    """What precision= offers: true float32 forward, and any of these backward."""
    assert cosine(found, when, emulation.Mode("fp32", backward)) >= 0.999


@pytest.mark.parametrize("mode", ["tf32", "bf16", None], ids=["tf32", "bf16", "autocast"])
def test_what_is_refused_loses_it(found, mode):
    mode = mode and emulation.Mode(mode, mode)
    assert min(cosine(found, when, mode) for when in ("early", "late")) < 0.9


def test_the_shorter_the_warm_up_the_smaller_is_what_is_distilled(found):
    """‖G_w‖ / ‖G_d‖, where 1e7 is as far as the digits of float32 go."""
    model, situations, exact = found
    early = emulation.shrinkage(situations["early"], exact["early"])
    assert 1e2 < early < 1e6
    short = copy.deepcopy(situations["early"])
    for name, value in short.before.items():  # a hundredth of the warm-up
        if value.is_floating_point() and "running" not in name:
            short.after[name] = (
                value.double() + (short.after[name].double() - value) / 100
            ).float()
    assert 50 < emulation.shrinkage(short, emulation.in_float64(short, model)) / early < 200
