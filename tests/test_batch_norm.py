"""ViewBatchNorm against PyTorch's BatchNorm, view by view."""

import copy

import pytest
import torch
from torch import nn

from bld_ext import ViewBatchNorm, convert_view_batchnorm
from bld_ext.api.pooled import view_statistics

VIEWS, BATCH = 3, 4
KINDS = {
    "1d": (nn.BatchNorm1d, ()),
    "1d-length": (nn.BatchNorm1d, (7,)),
    "2d": (nn.BatchNorm2d, (5, 6)),
    "3d": (nn.BatchNorm3d, (2, 3, 4)),
}
MODES = ("every_pass", "pool", "keep")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])


def pair(kind="2d", dtype=torch.float32, **options):
    """A plain BatchNorm with random parameters and buffers, and its converted twin."""
    plain = KINDS[kind][0](5, **options).to(dtype)
    for tensor in (*plain.parameters(), *plain.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    return plain, convert_view_batchnorm(copy.deepcopy(plain))


def batch(kind="2d", views=VIEWS, dtype=torch.float32):
    """Views whose means differ, so that pooling them is not the same as averaging variances."""
    views = [torch.randn(BATCH, 5, *KINDS[kind][1], dtype=dtype) + v for v in range(views)]
    return torch.cat(views)


def run(layer, x, mode, views=VIEWS):
    """One batch of views, as BLDOptimizer passes it."""
    with view_statistics([layer], mode):
        layer.views = views
        return layer(x)


def buffers(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_close(left, right):
    torch.testing.assert_close(left, right, rtol=2e-6, atol=2e-6)


# ---- conversion ----


def test_conversion_keeps_every_object_and_name():
    module = nn.Sequential(
        *(kind(5) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)), nn.Linear(2, 2)
    )
    children, tensors = list(module), [*module.parameters(), *module.buffers()]
    keys, types = list(module.state_dict()), [type(child) for child in module]
    assert convert_view_batchnorm(module) is module
    assert all(a is b for a, b in zip(module, children, strict=True))
    after = [*module.parameters(), *module.buffers()]
    assert all(a is b for a, b in zip(after, tensors, strict=True))
    assert list(module.state_dict()) == keys
    assert all(isinstance(child, kind) for child, kind in zip(module, types, strict=True))
    assert [isinstance(child, ViewBatchNorm) for child in module] == [True] * 3 + [False]


@each_kind
def test_outside_a_step_it_is_pytorch_bit_for_bit(kind):
    plain, ours = pair(kind)
    for training in (True, True, False):
        x = batch(kind)
        assert torch.equal(ours.train(training)(x), plain.train(training)(x))
        assert_same(buffers(ours), buffers(plain))


# ---- inside a step ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=["affine", "plain"])
@each_kind
def test_each_view_is_normalised_by_its_own_statistics(kind, options, mode):
    plain, ours = pair(kind, **options)
    x = batch(kind)
    assert_close(run(ours, x, mode), torch.cat([plain(view) for view in x.chunk(VIEWS)]))


@pytest.mark.parametrize("mode", MODES)
def test_each_view_is_computed_alone_bit_for_bit(mode):
    _, ours = pair()
    x = batch()
    alone = torch.cat([run(ours, view, mode, views=1) for view in x.chunk(VIEWS)])
    assert torch.equal(run(ours, x, mode), alone)


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_residual_and_relu_are_those_of_pytorch(training, mode):
    plain, ours = pair()
    plain.train(training), ours.train(training)
    x, residual = batch(), batch()
    with view_statistics([ours], mode):
        ours.views = 1
        found = ours(x), ours(x, relu=True), ours(x, residual), ours(x, residual, relu=True)
    expected = plain(x), plain(x).relu(), plain(x) + residual, (plain(x) + residual).relu()
    assert_close(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_separate_calls(mode):
    plain, ours = pair(dtype=torch.float64)
    x = batch(dtype=torch.float64).requires_grad_()
    weight = torch.randn_like(x)
    results = []
    for layer, out in (
        (plain, torch.cat([plain(view) for view in x.chunk(VIEWS)])),
        (ours, run(ours, x, mode)),
    ):
        results.append(torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0], ids=["0.1", "cumulative", "0"])
@each_kind
def test_every_pass_moves_the_statistics_as_pytorch_does(kind, momentum):
    plain, ours = pair(kind, momentum=momentum)
    for _ in range(2):
        x = batch(kind)
        for view in x.chunk(VIEWS):
            plain(view)
        run(ours, x, "every_pass")
        assert_close(buffers(ours), buffers(plain))


@each_kind
def test_keep_changes_nothing(kind):
    _, ours = pair(kind)
    before = buffers(ours)
    run(ours, batch(kind), "keep")
    assert_same(buffers(ours), before)


def weights(momentum, steps):
    """What each of `steps` batches counts: (1-m)^age, normalised, as Adam corrects its averages."""
    decay = 1.0 if momentum is None else 1 - momentum
    raw = torch.tensor([decay ** (steps - 1 - t) for t in range(steps)], dtype=torch.float64)
    return raw / raw.sum()


@pytest.mark.parametrize("momentum", [0.1, 1.0, None], ids=["0.1", "1", "cumulative"])
@each_dtype
@each_kind
def test_pool_averages_the_statistics_of_all_views_as_one_batch(kind, dtype, momentum):
    _, ours = pair(kind, dtype, momentum=momentum)
    ours.reset_running_stats()
    means, variances = [], []
    for t in range(3):
        x = batch(kind, dtype=dtype) * (t + 1)
        run(ours, x, "pool")
        rows = x.double().transpose(0, 1).flatten(1)
        means.append(rows.mean(1))
        variances.append(rows.var(1))
        weight = weights(momentum, t + 1)
        for got, batches in ((ours.running_mean, means), (ours.running_var, variances)):
            expected = (weight.unsqueeze(1) * torch.stack(batches)).sum(0).to(dtype)
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        assert ours.num_batches_tracked == t + 1


def test_pool_gathers_over_passes_of_any_size():
    x, (_, whole) = batch(views=5), pair()
    split = copy.deepcopy(whole)
    run(whole, x, "pool", views=5)
    with view_statistics([split], "pool"):
        for part, split.views in ((x[: 3 * BATCH], 3), (x[3 * BATCH :], 2)):
            split(part)
    assert_same(buffers(split), buffers(whole))


def test_pool_with_momentum_0_only_counts():
    _, ours = pair(momentum=0.0)
    before = buffers(ours)
    run(ours, batch(), "pool")
    assert_same(buffers(ours), before | {"num_batches_tracked": torch.tensor(1)})


@pytest.mark.parametrize("mode", MODES)
def test_without_running_statistics(mode):
    plain, ours = pair(track_running_stats=False)
    x = batch()
    assert_close(run(ours, x, mode), torch.cat([plain(view) for view in x.chunk(VIEWS)]))
    assert ours.running_mean is None


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_layer_uses_its_running_statistics_and_keeps_them(mode):
    plain, ours = pair()
    x = batch()
    assert torch.equal(run(ours.eval(), x, mode), plain.eval()(x))
    assert_same(buffers(ours), buffers(plain))


@pytest.mark.parametrize("mode", ["pool", "keep"])
def test_an_exception_commits_nothing_and_ends_the_mode(mode):
    plain, ours = pair()
    with pytest.raises(KeyError), view_statistics([ours], mode):
        ours.views = VIEWS
        ours(batch())
        raise KeyError
    assert_same(buffers(ours), buffers(plain))
    x = batch()
    assert torch.equal(ours(x), plain(x))
    assert_same(buffers(ours), buffers(plain))


@pytest.mark.parametrize("mode", MODES)
@each_kind
def test_a_single_value_per_channel_is_refused_as_by_pytorch(kind, mode):
    _, ours = pair(kind)
    one = torch.ones(VIEWS, 5, *(1 for _ in KINDS[kind][1]))
    before = buffers(ours)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(ours, one, mode)
    if mode != "every_pass":
        assert_same(buffers(ours), before)


def test_loaded_statistics_without_a_count_are_kept():
    """torchvision's pretrained weights: good statistics, num_batches_tracked 0."""
    norm = convert_view_batchnorm(nn.BatchNorm2d(3, momentum=0.1))
    norm.running_mean.fill_(5)
    with view_statistics([norm], "pool"):
        norm(torch.randn(8, 3, 4, 4))
    assert (norm.running_mean - 5).abs().max() < 0.1 * 5 + 0.1


@pytest.mark.parametrize("mode", ["every_pass", "pool", "keep"])
def test_views_in_bfloat16_have_statistics_in_float32(mode):
    norm = convert_view_batchnorm(nn.BatchNorm2d(3))
    norm.views = 2
    images = torch.rand(8, 3, 4, 4)
    with view_statistics([norm], mode):
        found = norm(images.bfloat16())
    with view_statistics([norm], "keep"):
        norm.views = 2
        expected = norm(images)
    assert norm.running_mean.dtype == torch.float32 and norm.running_mean.isfinite().all()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("mode", ["every_pass", "pool"])
def test_what_a_checkpoint_computes_again_is_counted_once(mode):
    _, ours = pair("1d")
    twin, x = copy.deepcopy(ours), torch.randn(4, 5, requires_grad=True)
    with view_statistics([ours, twin], mode):
        ours(x).square().sum().backward()
        torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=False).square().sum().backward()
    assert_close(buffers(ours), buffers(twin))


@pytest.mark.parametrize("mode", MODES)
def test_a_module_that_is_not_used_keeps_its_statistics(mode):
    _, ours = pair()
    before = buffers(ours)
    with view_statistics([ours], mode):
        pass
    assert_same(buffers(ours), before)


def test_images_that_the_model_has_cut():
    _, ours = pair()
    with pytest.raises(ValueError, match="^views_per_pass: expected 1, .* 11 images of 3 views"):
        run(ours, batch()[1:], "pool")


@pytest.mark.parametrize("mode", MODES)
def test_frozen_without_statistics_it_goes_view_by_view(mode):
    plain, ours = pair(track_running_stats=False)
    x = batch()
    found = run(ours.eval(), x, mode)
    assert_close(found, torch.cat([plain.eval()(view) for view in x.chunk(VIEWS)]))
