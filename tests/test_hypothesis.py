"""Every op on whatever Hypothesis makes up, against its definition in float64.

Shapes may be empty, strides anything, numbers from denormals to 1e30, nan and inf anywhere. What an
op is given lies in larger buffers, of which it may change nothing else. What rounding may cost is
counted in ε of the dtype it computes in. BLD_EXT_HYPOTHESIS=N tries N other examples of each test.
"""

import inspect
import math
import os
import re

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bld_ext import checks, ops, reference
from bld_ext.reference import Policy, compute_dtype

EXAMPLES = int(os.environ.get("BLD_EXT_HYPOTHESIS", 0))
COMMON = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("bld_ext", derandomize=True, max_examples=200, **COMMON)
settings.register_profile("bld_ext-long", max_examples=EXAMPLES or 1, **COMMON)
examples = settings.get_profile("bld_ext-long" if EXAMPLES else "bld_ext")
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom"),  # of no images
]

f32, f64, bf16, f16 = FLOATS = torch.float32, torch.float64, torch.bfloat16, torch.float16
E64 = torch.finfo(f64).eps


def precision(dtype):
    """(ε, smallest normal number, smallest number) of what computes in the dtype and in float64."""
    info = torch.finfo(compute_dtype(dtype))
    return info.eps + E64, info.smallest_normal, info.smallest_normal * info.eps


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_within(found, expected, bound=0.0):
    """Rounded from expected ± bound; nan, inf and -inf where that is expected, and only there."""
    low, high = ((expected + side * bound).to(found.dtype) for side in (-1, 1))
    same = (found == expected) | (found.isnan() & expected.isnan())
    right = torch.where(expected.isfinite(), (low <= found) & (found <= high), same)
    if not right.all():
        at = tuple((~right).nonzero()[0].tolist())
        allowed = torch.as_tensor(bound).expand(expected.shape)[at].item()
        pytest.fail(f"at {at}: {found[at].item()!r}, not {expected[at].item()!r} ± {allowed}")


# ---- numbers, and where they lie ----


class Guarded:
    """`values`, and a `view` of the same numbers inside a buffer of nan: memory in the `order` of
    dimensions, with gaps of `steps`; an `expanded` dimension shows its first ones again and again.
    """

    def __init__(self, values, order, steps, expanded, offset):
        shape, strides, reach = values.shape, [0] * values.dim(), 1
        for d in reversed(order):
            if d not in expanded:
                strides[d] = reach * steps[d]
                reach = strides[d] * max(1, shape[d])
        once = [min(1, n) if d in expanded else n for d, n in enumerate(shape)]
        guard = torch.nan if values.is_floating_point() else 0xA5
        self.whole = torch.full((offset + reach + 16,), guard, dtype=values.dtype)
        first = self.whole.as_strided(once, strides, offset)
        self.view = first.copy_(values[tuple(map(slice, once))]).expand(shape)
        self.values = self.view.clone(memory_format=torch.contiguous_format)
        self.before = self.whole.clone()

    def __repr__(self):
        values = self.values if self.values.numel() < 50 else tuple(self.view.shape)
        return f"<{values} {self.values.dtype}, strides {self.view.stride()}>"

    def written(self):
        """What the view holds now; around it, nothing may have changed."""
        found = self.view.clone(memory_format=torch.contiguous_format)
        self.view.copy_(self.values)
        assert_untouched(self)
        return found


@st.composite
def layouts(draw, rank, repeats=None):
    """What Guarded needs besides; of the dimensions only `repeats`, by default any, expand."""
    repeats = range(rank) if repeats is None else repeats
    kind = draw(st.sampled_from(["contiguous", "channels-last", "any", "any"]))
    order, steps, expanded = list(range(rank)), [1] * rank, set()
    if kind == "channels-last" and rank > 1:
        order = [0, *range(2, rank), 1]
    elif kind == "any":
        order = draw(st.permutations(order))
        steps = draw(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=rank, max_size=rank))
        expanded = draw(st.sets(st.sampled_from(repeats), max_size=1)) if repeats else expanded
    return order, steps, expanded, draw(st.integers(0, 17))


generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))
dtypes = st.sampled_from(FLOATS)
spatials = st.just(()) | st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def numbers(draw, shape, dtype, most=1e30, special=(math.nan, math.inf, -math.inf)):
    """Of one magnitude or of many, fine or coarse, with some of `special` at a few places."""
    generator = draw(generators)
    x = torch.randn(shape, generator=generator, dtype=f64)
    x = x.round() if draw(st.booleans()) else x
    scales = [s for s in (1, 1, 1e-3, 1e3, 1e-12, 1e10, 1e-40, 1e30) if s <= most]
    scale = draw(st.sampled_from([*scales, None]))
    if scale is None:
        exponents = torch.rand(shape, generator=generator, dtype=f64)
        scale = 10 ** (exponents * (45 + math.log10(most)) - 45)
    most = min(most, torch.finfo(dtype).max)
    x = (x * scale).clamp(-most, most).to(dtype)
    if special and x.numel():
        places = st.tuples(st.integers(0, x.numel() - 1), st.sampled_from(special))
        for at, value in draw(st.lists(places, max_size=2)):
            x.view(-1)[at] = value
    return x


@st.composite
def guarded(draw, shape, dtype, **options):
    return Guarded(draw(numbers(shape, dtype, **options)), *draw(layouts(len(shape))))


def assert_untouched(*tensors):
    for tensor in tensors:
        if tensor is not None:
            assert torch.equal(*(t.view(torch.uint8) for t in (tensor.whole, tensor.before)))


# ---- multi-head distillation ----


@st.composite
def heads(draw):
    """Guarded logits, labels and bank of these logits or of others; head sizes, temperature."""
    sizes = draw(st.lists(st.integers(1, 5) | st.just(33), min_size=1, max_size=5))
    N, dtype = draw(st.sampled_from([*range(21), 70])), draw(dtypes)
    shape = N, sum(sizes), *draw(spatials)
    tau = draw(st.sampled_from([2.0, 1, 0.7, 1e-3, 1e3, 1e-6, 1e6]))
    logits = draw(guarded(shape, dtype))
    others = logits.values if draw(st.booleans()) else draw(numbers(shape, dtype))
    bank = ops.head_softmax(others, sizes[:-1], tau)
    bank = Guarded(bank, *draw(layouts(bank.dim(), [0])))  # each head still sums to 1
    places = N, *shape[2:]
    labels = torch.randint(sizes[-1], places, generator=draw(generators))
    return logits, Guarded(labels, *draw(layouts(len(places)))), bank, sizes, tau


def times(a, b):
    return torch.where(a == 0, 0, a * b)


def softmax_bounds(logits, sizes, tau):
    """|log Σ e^x| + |x| with x = (z - max) / τ, and how far off p and log Σ e^x may be, of each
    logit: what rounding x, e^x and the sums of a head does.
    """
    (unit, normal, _), terms = precision(logits.dtype), max(sizes, default=0) + 8

    def bounds(x, dim):
        p, log_sum, size = x.softmax(1), x.logsumexp(1, keepdim=True), x.abs()
        moved = times(p, size).sum(1, keepdim=True)  # times ε: what that in x does to log Σ e^x
        of_p = unit * (2 * times(p, size) + p * (2 * moved + terms)) + 2 * normal
        of_log = unit * (2 * moved + terms * log_sum) + terms * (normal + E64)
        return torch.stack([log_sum + size, of_p, of_log.expand_as(x)])

    def of(i):
        return reference.over_heads(logits.double(), sizes, tau, lambda x, dim: bounds(x, dim)[i])

    return map(of, range(3))


def over_each_head(x, sizes):
    """The sum over a head, beside each of its classes."""
    heads = x.split(sizes, 1) if sizes else ()
    return torch.cat([x[:, :0], *(head.sum(1, True).expand_as(head) for head in heads)], 1)


def loss_bounds(logits, labels, bank, sizes, tau):
    """Of each loss and its gradient, as joint_loss returns them."""
    *old, C = sizes
    of_new, of_old = torch.zeros((2, *logits.shape), dtype=f64)
    unit, terms = precision(logits.dtype)[0], sum(sizes) + len(sizes) + 8
    size, of_p, of_log = softmax_bounds(logits[:, -C:], [C], 1)
    new = (of_log + 4 * unit * size).gather(1, labels.unsqueeze(1)).sum()
    of_new[:, -C:] = of_p + 2 * unit
    size, of_p, of_log = softmax_bounds(logits, old, tau)
    distilled = times(bank, of_log + terms * unit * size).sum()
    p = reference.head_softmax(logits.double(), old, tau)
    of_old[:, :-C] = (of_p + 2 * unit * (p - bank).abs()) / tau
    return (new, of_new), (distilled, of_old)


def assert_loss(loss, logits, expected, bounds, scale):
    """A loss, and its gradient times what comes in."""
    (value, grad), (of_value, of_grad) = expected, bounds
    unit, normal, _ = precision(logits.dtype)
    assert loss.dtype == compute_dtype(logits.dtype) and loss.shape == ()
    assert_within(loss.detach(), value, of_value)
    incoming = torch.tensor(scale, dtype=loss.dtype)
    (found,) = torch.autograd.grad(loss, logits, incoming, retain_graph=True)
    rounding = 2 * unit * (scale * grad).abs() + normal * (grad != 0)
    assert found.dtype == logits.dtype
    assert_within(found, scale * grad, scale * of_grad + rounding)


@examples
@given(heads(), st.sampled_from([1.0, 0.25, 2.0**16, 1 / 3]))
def test_losses(case, scale):
    logits, labels, bank, sizes, tau = case
    old = sizes[:-1]
    z, exact = logits.view.detach().requires_grad_(), logits.values.double()
    given_ = labels.values, bank.values.double(), sizes, tau
    new, distilled, *grads = reference.joint_loss(exact, *given_)
    values, bounds = ((new, grads[0]), (distilled, grads[1])), loss_bounds(logits.values, *given_)

    loss, filled = ops.warm_up_loss(z, labels.view, sizes, tau)
    assert_loss(loss, z, values[0], bounds[0], scale)
    loss = ops.distillation_loss(z, bank.view, old, tau)
    assert_loss(loss, z, values[1], bounds[1], scale)
    losses = ops.joint_loss(z, labels.view, bank.view, sizes, tau)
    for loss, expected, bound in zip(losses, values, bounds, strict=True):
        assert_loss(loss, z, expected, bound, scale)

    assert_same(filled, ops.head_softmax(logits.values, old, tau))
    (grad,) = torch.autograd.grad(ops.distillation_loss(z, filled, old, tau), z)
    assert not grad[:, : sum(old)].where(filled.isfinite(), 0).any()
    assert_untouched(logits, labels, bank)


@examples
@given(heads(), st.data())
def test_head_softmax(case, data):
    logits, _, _, sizes, tau = case
    sizes = sizes[: data.draw(st.integers(0, len(sizes)))]  # the others are left alone
    z, exact = logits.view.detach().requires_grad_(), logits.values.double().requires_grad_()
    bank, expected = ops.head_softmax(z, sizes, tau), reference.head_softmax(exact, sizes, tau)
    _, of_p, _ = softmax_bounds(logits.values, sizes, tau)
    assert bank.dtype == compute_dtype(z.dtype) and bank.is_contiguous()
    assert_within(bank.detach(), expected.detach(), of_p)

    incoming = data.draw(guarded(bank.shape, bank.dtype, most=1e3, special=()))
    (found,) = torch.autograd.grad(bank, z, incoming.view)
    (grad,) = torch.autograd.grad(expected, exact, incoming.values.double())
    unit, normal, _ = precision(z.dtype)
    g, p = incoming.values.double().abs(), expected.detach()

    # p (g - Σ p g) / τ
    bound, terms = torch.zeros_like(grad), (2 * max(sizes, default=0) + 8) * unit
    inner = (of_p + terms * p) * (g + over_each_head(p * g, sizes))
    inner += p * over_each_head(of_p * g, sizes)
    bound[:, : sum(sizes)] = 1.01 * inner / tau + normal * (1 + g)
    assert_within(found, grad, bound)
    assert_untouched(logits, incoming)


# ---- per-layer norms, balance and update ----


@st.composite
def layered(draw):
    """Guarded params, distillation and new gradients; layers; guarded reference norms; λ; α."""
    dims = st.lists(st.integers(0, 5), max_size=4) | st.sampled_from([[513], [9000], [30, 17]])
    shapes = draw(st.lists(dims, min_size=1, max_size=5))
    L, one_dtype = draw(st.integers(1, 4)), draw(st.none() | dtypes)
    lists = [], [], []
    for shape in shapes:
        alike = draw(st.none() | layouts(len(shape), []))
        for tensors, repeats in zip(lists, ([], [], None), strict=True):
            values = draw(numbers(shape, one_dtype or draw(dtypes)))
            tensors.append(Guarded(values, *(alike or draw(layouts(len(shape), repeats)))))
    layers = [draw(st.integers(0, L - 1)) for _ in shapes]
    norms = draw(numbers((L,), draw(dtypes))).abs()
    kinds = st.sampled_from([float, lambda x: torch.tensor(x, dtype=f64), torch.tensor])
    balance = draw(kinds)(float(draw(st.sampled_from([2, 0, 0.3, 1e-20, 1000]))))
    lr = draw(st.sampled_from([0.1, 1e-4, 0, 1e-30, 1]))
    return *lists, layers, Guarded(norms, *draw(layouts(1))), balance, lr


def narrowed(factor, dtype):
    """As tensors of the dtype are multiplied: by 0 where a finite factor is too large for them."""
    narrow = factor.to(compute_dtype(dtype))
    return torch.where(factor.isfinite() & narrow.isinf(), 0, narrow)


def assert_norms(norms, tensors, layers):
    """Accumulated in float64."""
    squares = torch.zeros(len(norms), dtype=f64)
    for tensor, l in zip(tensors, layers, strict=True):
        squares[l] += tensor.values.double().square().sum()
    assert norms.dtype == compute_dtype(tensors[0].values.dtype)
    terms = sum(tensor.values.numel() for tensor in tensors) + 8
    assert_within(norms, squares.sqrt(), squares.sqrt() * terms * E64)


@examples
@given(layered(), st.booleans())
def test_layers(case, counted):
    params, old, new, layers, reference_norms, balance, lr = case
    L = len(reference_norms.values)
    p_views, d_views, n_views = ([t.view for t in tensors] for tensors in (params, old, new))
    for tensors, views in ((old, d_views), (new, n_views)):  # the new ones may be expanded
        norms = ops.layer_norms(views, layers, L if counted else None)
        assert len(norms) == (L if counted else max(layers) + 1)
        assert_norms(norms, tensors, layers)

    options = layers, reference_norms.view, balance
    factors, norms = ops.balanced_sgd_(p_views, d_views, n_views, *options, lr)
    assert_norms(norms, old, layers)
    exact = torch.as_tensor(balance, dtype=f64)
    assert_same(factors, reference.balance_factors(norms, reference_norms.values, exact))
    for param, d, n, l in zip(params, old, new, layers, strict=True):
        unit, _, tiny = precision(param.values.dtype)
        f = narrowed(factors[l], param.values.dtype)
        p, f, d, n = (t.double() for t in (param.values, f, d.values, n.values))
        size = p.abs() + lr * ((f * d).abs() + n.abs())
        bound = 3 * unit * size + tiny * (1 + lr + lr * f)
        assert_within(param.written(), p - lr * (f * d + n), bound)
    assert_untouched(*old, *new)

    for result, same in zip(ops.balance_layers_(d_views, *options), (factors, norms), strict=True):
        assert_same(result, same)
    for grad, l in zip(old, layers, strict=True):
        dtype = grad.values.dtype
        expected = grad.values.to(compute_dtype(dtype)) * narrowed(factors[l], dtype)
        assert_same(grad.written(), expected.to(dtype))
    assert_untouched(reference_norms)


# ---- BatchNorm of several views side by side ----


@st.composite
def batches(draw):
    """Guarded input, weight, bias, residual and incoming gradient; options of view_batch_norm."""
    views, B, C = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(0, 20))
    shape, dtype = (views * B, C, *draw(spatials)), draw(dtypes)
    wide = draw(st.sampled_from([dtype, compute_dtype(dtype)]))
    x = draw(guarded(shape, dtype, most=1e18))  # whose square, a variance, float32 still holds
    mild = dict(most=1e6, special=[math.nan])
    weight, bias = (draw(guarded((C,), wide, **mild)) for _ in range(2))
    residual, grad = draw(guarded(shape, dtype)), draw(guarded(shape, dtype, **mild))
    absent = draw(st.sets(st.integers(1, 3)))
    tensors = [None if i in absent else t for i, t in enumerate([x, weight, bias, residual])]
    eps = draw(st.sampled_from([1e-5, 1e-3, 1.0]))
    return tensors, grad, dict(views=views, eps=eps, relu=draw(st.booleans()))


def largest(x):
    """Of each channel of each view, beside them."""
    return x.abs().amax((1, 3), keepdim=True) if x.numel() else x.abs()


@examples
@given(batches())
def test_view_batch_norm(case):
    tensors, upstream, options = case
    views, eps, relu = options["views"], options["eps"], options["relu"]
    inputs = [t if t is None else t.view.detach().requires_grad_() for t in tensors]
    x, weight, bias, residual = (t if t is None else t.values.double() for t in tensors)
    dtype, shape = inputs[0].dtype, (views, len(x) // views, x.shape[1], math.prod(x.shape[2:]))
    unit, _, tiny = precision(dtype)
    unit *= 32  # so many numbers at a time are added up in the dtype
    results = ops.view_batch_norm(*inputs, **options)
    out, found_statistics = results[0].detach(), [t.unsqueeze(-1).unsqueeze(1) for t in results[1:]]
    assert out.dtype == dtype and found_statistics[0].dtype == compute_dtype(dtype)
    assert out.stride() == reference.like_input(inputs[0]).stride()

    # how far off may be the mean, the variance, relatively 1 / sqrt(variance + ε), and x̂
    y, *statistics = reference.view_batch_norm(x, weight, bias, residual, views, eps, relu)
    x_ = x.reshape(shape)
    mean = x_.mean((1, 3), keepdim=True)
    variance = (x_ - mean).square().mean((1, 3), keepdim=True)
    inverse, apart = (variance + eps).rsqrt(), largest(x_ - mean)
    of_mean = unit * largest(x_) + tiny
    of_variance = unit * variance + 2 * of_mean * (of_mean + apart * unit) + tiny
    relative = unit + of_variance / (2 * (variance + eps))
    x_hat, of_x_hat = inverse * apart, inverse * (of_mean * (1 + relative) + apart * relative)
    w = 1 if weight is None else weight.abs().view(-1, 1)
    added = 0 if residual is None else residual.reshape(shape).abs()
    added = added + (0 if bias is None else bias.abs().view(-1, 1))
    bound = w * of_x_hat + unit * (w * x_hat + added) + tiny * (apart + 4)
    if x.numel():
        assert_within(found_statistics[0], mean, of_mean)
        assert_within(found_statistics[1], variance, of_variance)
    assert_within(out.reshape(shape), y.reshape(shape), bound)

    # a relu's mask is that of the output
    wanted = [i for i, t in enumerate(inputs) if t is not None]
    found = torch.autograd.grad(results[0], [inputs[i] for i in wanted], upstream.view)
    backward = upstream.values.double(), x, out.double(), weight, bias, *statistics
    backward = *backward, views, eps, relu, True
    expected = reference.view_batch_norm_backward(*backward)
    g, n = largest(expected[3].reshape(shape)), max(1, shape[1] * shape[3])
    of_product = g * of_x_hat + unit * g * x_hat + tiny * inverse
    inner = of_product * (x_hat + of_x_hat) + g * (x_hat * of_x_hat + 3 * unit)
    inner = inner + (relative + unit) * g * (2 + x_hat.square()) + tiny * (1 + apart)
    of_grad = w * inverse * inner + tiny * (1 + g * (2 + x_hat.square()))
    bounds = [
        of_grad.expand(shape).reshape(x.shape),
        (n * of_product).sum((0, 1, 3)) + tiny,
        (n * unit * g).sum((0, 1, 3)) + tiny,
        0.0,
    ]
    for i, grad in zip(wanted, found, strict=True):
        assert_within(grad, expected[i], bounds[i])
    assert_untouched(*tensors, upstream)


# ---- seeded augmentation ----


def ranges(low, high):
    return st.tuples(*[st.floats(low, high)] * 2).map(lambda ends: tuple(sorted(ends)))


shares, areas, ratios = st.floats(0, 1), ranges(1e-6, 1), ranges(1e-3, 1e3)
SETTINGS = dict(
    crop_padding=st.integers(0, 40) | st.just(2**20), scale=ratios | ranges(0.5, 2),
    resized_crop=areas, resized_crop_ratio=ratios, rotation=st.floats(0, 180),
    translate=st.tuples(shares, shares), shear=st.tuples(*[st.floats(0, 80)] * 2),
    flip=shares, brightness=shares, contrast=shares, saturation=shares, hue=st.floats(0, 0.5),
    erase=shares, erase_area=areas, erase_ratio=ratios,
    interpolation=st.sampled_from(reference.INTERPOLATIONS),
    padding_mode=st.sampled_from(reference.PADDING_MODES),
)  # fmt: skip
words = st.integers(0, 2**32 - 1) | st.integers(0, 9)


@st.composite
def pictures(draw):
    """Guarded images, a policy for them, (seed, step, views), and guarded indices or None."""
    N, C = draw(st.integers(0, 4)), draw(st.sampled_from([3, 1, 2, 4, 5]))
    names = SETTINGS.keys() - (set() if C in (1, 3) else {"contrast", "saturation", "hue"})
    chosen = draw(st.sets(st.sampled_from(sorted(names)), max_size=6))
    policy = Policy(**{name: draw(SETTINGS[name]) for name in sorted(chosen)})
    if draw(st.booleans()):
        mean, std = (draw(st.tuples(*[st.floats(low, 2)] * C)) for low in (-2, 0.01))
        policy = policy._replace(mean=mean, std=std)
    shape = N, C, draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([*reference.WHITE, *FLOATS]))
    if white := reference.WHITE.get(dtype):
        images = torch.randint(white + 1, shape, generator=draw(generators)).to(dtype)
    else:
        images = draw(numbers(shape, dtype, most=1e3 if policy.contrast else 1e30))
        images = images.abs().clamp(max=1) if draw(st.booleans()) else images
    indices = draw(st.none() | st.lists(words, min_size=N, max_size=N))
    if indices is not None:
        indices = Guarded(torch.tensor(indices, dtype=torch.int64), *draw(layouts(1)))
    coordinates = draw(st.integers(0, 2**63 - 1)), draw(words), draw(st.lists(words, max_size=3))
    return Guarded(images, *draw(layouts(4))), policy, coordinates, indices


def view_bounds(images, policy, seed, step, views, indices):
    """Of each view [V·N, 1, 1, 1], how far float32 may be off: where a point lies, then what
    becomes of it. A colour operation enlarges a difference threefold at most, hue sixfold.
    """
    size = images.shape[2:]
    drawn = reference.view_parameters(policy, seed, step, views, indices, size)
    a, b, c, d, e, f = reference.inverse_matrix(drawn, policy, size)
    H, W = size
    reach = sum(t.abs() * n for t, n in ((a, W), (b, H), (c, 1), (d, W), (e, H), (f, 1)))
    moved = (policy.turns * 8 * reach.flatten() + 32) * torch.finfo(f32).eps
    factors = {"brightness": 2, "contrast": 3, "saturation": 3, "hue": 6}
    enlarged = math.prod(k for name, k in factors.items() if getattr(policy, name))
    return (enlarged * 2 * moved / min(policy.std, default=1)).view(-1, 1, 1, 1)


@examples
@given(pictures(), dtypes, st.booleans())
def test_augment(case, dtype, channels_last):
    images, policy, (seed, step, views), indices = case
    (N, C, H, W), V = images.view.shape, len(views)
    try:
        checks.reach(policy, (H, W))
    except ValueError:  # its points are too far away
        assume(False)
    given_ = None if indices is None else indices.view
    where = torch.arange(N) if indices is None else indices.values
    out = ops.augment(images.view, policy, seed, step, views, given_, dtype, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert out.dtype == dtype and out.shape == (V * N, C, H, W)
    assert out.is_contiguous(memory_format=layout)

    # bit for bit as defined, whatever the values; of nan and inf, only where they are no others'
    scalars = torch.tensor(seed), torch.tensor(step), views, where
    x, finite = images.values, images.values.isfinite().all(3).all(2).all(1).repeat(V)
    same = reference.augment(x, policy.pack(), *scalars, dtype, channels_last)
    assert_same(out[finite], same[finite])

    # and near to the same in float64, where a little to the side is no other colour
    smooth = policy.resized_crop is None and policy.interpolation == "bilinear"
    wide = x.double() / reference.WHITE.get(x.dtype, 1)
    inside = ((wide >= 0) & (wide <= 1)).all(3).all(2).all(1).repeat(V)
    if smooth and x.dtype != f64:
        expected = reference.augment(wide, policy.pack(), *scalars, f64, False)
        bound = view_bounds(x, policy, *scalars).expand_as(expected)
        assert_within(out[inside], expected[inside], bound[inside])
    assert_untouched(images, indices)


# ---- illegal arguments ----


OPS = """head_softmax distillation_loss warm_up_loss joint_loss layer_norms balance_layers_
balanced_sgd_ view_batch_norm augment""".split()
LISTS = "tensors", "grads", "params", "distill_grads", "new_grads"
NUMBERS = [None, "2", 1j, math.nan, -1.0, math.inf, 10**400, torch.ones(2), torch.tensor(1)]
SCALARS = [None, -1, 0.5, "1", 2**64, torch.tensor(0.5), torch.tensor([1]), torch.tensor(-1)]
ILLEGAL = {
    "head_sizes": [None, 3, "ab", [2.0], [None], [0, 5], [-1, 6], [2**63], [2, 2, 2]],
    "temperature": [0, *NUMBERS],
    "layers": [None, 3, [0], [0, 1, 1], [0, 2], [-1, 0], [0, None], [0, 0.5], [0, 2**63]],
    "num_layers": ["2", 2.0, -1],
    "balance": NUMBERS,
    "lr": NUMBERS,
    "views": [None, 0.5, "ab", -1, [0.5], [-1], [None], [2**32], torch.tensor([1])],
    "eps": [None, "1", -1, math.nan, math.inf, 10**400],
    "policy": [None, {}, *(Policy()._replace(**{name: -1}) for name in sorted(SETTINGS))],
    "seed": SCALARS,
    "step": [2**32, *SCALARS],
    "dtype": [None, "float32", torch.uint8],
    "channels_last": [None, 1],
}


def legal(op):
    whole, wide = torch.ones(2, dtype=torch.int64), torch.ones(2, 4)
    arguments = dict(logits=torch.ones(2, 5), labels=whole, bank=torch.ones(2, 2), temperature=2.0)
    arguments |= {name: [torch.ones(2, 3), torch.ones(4)] for name in LISTS}
    arguments |= dict(layers=[1, 0], num_layers=2, reference_norms=torch.ones(2), balance=2.0, lr=1)
    arguments |= dict(input=wide, weight=wide[0], bias=wide[1], residual=wide.clone(), eps=1e-5)
    arguments |= dict(images=torch.ones(2, 3, 4, 5), policy=Policy(), seed=1, step=2, indices=whole)
    arguments |= dict(dtype=f32, channels_last=False, views=2 if op == "view_batch_norm" else [2])
    arguments["head_sizes"] = [2] if op == "distillation_loss" else [2, 3]
    names = inspect.signature(getattr(ops, op)).parameters
    return {name: arguments[name] for name in names if name in arguments}


def illegal(name, value):
    """Values that cannot stand in: no tensor, or one of another dtype, layout, place or shape."""
    if name in ILLEGAL:
        return ILLEGAL[name]
    if name in LISTS:
        others = illegal(f"{name}[1]", value[1])[: 5 if name in LISTS[:3] else 6]
        return [None, value[0], [], *([value[0], other] for other in others)]
    found = [
        value.tolist(),
        value.bool(),
        value.to_sparse(),
        value.to("meta"),
        value[..., None, None],
    ]
    found = found[:3] if name in ("logits", "input", "images") else found
    return found if name in ("weight", "bias", "residual", "indices") else [None, *found]


@pytest.mark.parametrize("op", OPS)
def test_illegal_arguments(op):
    """An error names the argument, and nothing has been touched."""
    for name, value in legal(op).items():
        for bad in illegal(name, value):
            arguments = legal(op)
            with pytest.raises((ValueError, TypeError)) as caught:
                getattr(ops, op)(**arguments | {name: bad})
            named = re.match(rf"{name}(\[\d\])?(\.\w+)?: expected ", str(caught.value))
            assert named, f"{name}={bad!r}: {caught.value!r}"
            for written in arguments.keys() & set(LISTS):
                assert_same(arguments[written], legal(op)[written])
