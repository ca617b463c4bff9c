"""The whole step on a GPU: captured, without waiting, and with its distillation gradient intact."""

import copy

import pytest
import torch
import torchvision
from arrange import arranged
from torch import nn

import bld_ext
from benchmarks import precision as emulation
from bld_ext import MultiHead, SeededAugment, ops
from bld_ext.api.precision import backward_arithmetic, exact_float32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
AUGMENT = SeededAugment(crop_padding=1, rotation=15, jitter=0.2)
SCHEDULES = {
    "two_forward": {},
    "all-views": dict(views_per_pass=4),
    "shared": dict(schedule="shared_forward"),
    "one-graph": dict(schedule="shared_forward", views_per_pass=4),
    "channels-last": dict(views_per_pass=4, channels_last=True),
    "mixed": dict(views_per_pass=4, precision="mixed"),
    "auto": dict(views_per_pass="auto", schedule="shared_forward"),
}


def make_optimizer(model, **options):
    defaults = dict(lr=0.05, views=4, augment=AUGMENT, seed=3)
    return arranged(model.cuda(), **defaults | options)


def on_gpu(batch):
    return [t.cuda() for t in batch]


def test_batch_norm_runs_on_triton():
    for op in ("view_batch_norm", "view_batch_norm_backward"):
        assert bld_ext.backend(op, "cuda") == "triton"


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(1000, 64, 8, 8), (1000, 512, 1, 1), (60, 33, 16, 16)], ids=str)
def test_batch_norm_on_gpu_and_cpu_agree(shape, last):
    x, residual = torch.randn(2, *shape, device="cuda")
    if last:
        x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    weight, bias = torch.rand(2, shape[1], device="cuda")
    exact = [t.double() for t in (x, weight, bias, residual)]
    before_relu = ops.view_batch_norm(*exact, views=20)[0]
    # where that is all but 0, rounding decides whether a gradient passes
    upstream, results = torch.randn_like(x) * (before_relu.abs() > 1e-5), []
    for device in ("cuda", "cpu"):
        inputs = [t.to(device).requires_grad_() for t in (x, weight, bias, residual)]
        out, mean, variance = ops.view_batch_norm(*inputs, views=20, relu=True)
        grads = torch.autograd.grad(out, inputs, upstream.to(device))
        results.append([t.detach().cpu() for t in (out, mean, variance, *grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item())


@pytest.fixture
def deterministic():
    """cuDNN's usual algorithms add up in another order each time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("way", SCHEDULES.values(), ids=SCHEDULES)
def test_eager_steps_repeat(way, make_model, make_batch):
    states = []
    for _ in range(2):
        model = make_model(heads=(2, 2))
        optimizer = make_optimizer(model, **way)
        for number in range(20):
            optimizer.step(*on_gpu(make_batch(2, number)))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("way", SCHEDULES.values(), ids=SCHEDULES)
def test_a_captured_step_has_the_bits_of_an_eager_one(way, make_model, make_batch):
    models = [make_model(heads=(2, 2)) for _ in range(2)]
    optimizers = [
        make_optimizer(m, capture=on, **way) for m, on in zip(models, (False, True), strict=True)
    ]
    for number in range(100):
        batch = on_gpu(make_batch(2, number % 9))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + number)
            optimizer.step(*batch)
        if number == 60:
            for model in models:
                torch.manual_seed(0)
                model.add_head(2)
    for (name, a), b in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_captured_step_does_not_wait(make_model, make_batch):
    optimizer = make_optimizer(make_model(heads=(2, 2)), capture=True, views_per_pass=4)
    batch = on_gpu(make_batch(2))
    for _ in range(3):
        optimizer.step(*batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_waits_cannot_be_recorded_and_says_so(make_model, make_batch):
    model = make_model(heads=(2, 2))
    optimizer = make_optimizer(model, capture=True)
    batch = on_gpu(make_batch(2))
    hook = model.backbone.register_forward_hook(lambda m, x, y: y.sum().item() and None)
    optimizer.step(*batch)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="^capture: the step cannot be recorded"):
        optimizer.step(*batch)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.rand(1, device="cuda").isfinite()  # random numbers are drawn as before
    hook.remove()
    optimizer.step(*batch)
    optimizer.step(*batch)


def test_dropout_is_refused(make_model, make_batch):
    optimizer = make_optimizer(make_model(heads=(2, 2), dropout=0.2), capture=True)
    with pytest.raises(ValueError, match="draws no random numbers"):
        optimizer.step(*on_gpu(make_batch(2)))


def test_auto_takes_all_views_and_backs_off(make_model, make_batch):
    optimizer = make_optimizer(make_model(heads=(2, 2)), views_per_pass="auto")
    optimizer.step(*on_gpu(make_batch(2)))
    assert optimizer.views_in_pass == 4
    total = torch.cuda.get_device_properties(0).total_memory
    model = MultiHead(nn.Sequential(nn.Conv2d(3, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 64)
    model.add_head(2)
    side = int((total / 4 / 64 / 6) ** 0.5)  # two views fit at most, eight were asked for
    optimizer = make_optimizer(
        model, views=8, augment=None, views_per_pass="32768 GiB", joint_steps=0
    )
    images = torch.rand(1, 3, side, side, device="cuda")
    optimizer.step(images, torch.zeros(1, dtype=torch.int64, device="cuda"))
    assert optimizer.views_in_pass < 8
    del optimizer, images
    torch.cuda.empty_cache()


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_every_layer_keeps_its_distillation_gradient(precision):
    """Cosine to float64 with the device's own TF32, early in the second task."""
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    model = MultiHead(backbone, 512)
    for _ in range(2):
        model.add_head(2)
    model.cuda().train()
    views = [torch.rand(20, 3, 32, 32, device="cuda") for _ in range(2)]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-4 * p.abs().mean() * torch.randn_like(p)
    after = copy.deepcopy(model.state_dict())

    def gradient(network, cast, how):
        states = [{k: cast(v) for k, v in s.items()} for s in (before, after)]
        network.load_state_dict(states[0])
        network.zero_grad()
        with exact_float32():
            with torch.no_grad():
                banks = [ops.head_softmax(network(cast(x)), [2]) for x in views]
            network.load_state_dict(states[1])
            for x, bank in zip(views, banks, strict=True):
                loss = ops.distillation_loss(network(cast(x)), bank, [2])
                with backward_arithmetic(how):
                    loss.backward()
        return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    def double(t):
        return t.double() if t.is_floating_point() else t

    exact = gradient(copy.deepcopy(model).double(), double, "fp32")
    found = gradient(model, lambda t: t, precision)
    assert emulation.compare(found, exact)[0] >= 0.999
