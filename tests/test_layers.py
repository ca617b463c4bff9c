"""layer_norms, balance_layers_ and balanced_sgd_ against straight float64 arithmetic."""

import pytest
import torch
from torch.library import opcheck

from bld_ext import ops
from bld_ext.reference import compute_dtype

# weight and bias, a layer of nothing, single numbers, no layer 3, a strided pair, no layer 5
SHAPES = [(6, 4, 3, 3), (6,), (0,), (1,), (), (300, 70), (5, 7)]
LAYERS = [0, 0, 1, 2, 2, 4, 4]
L = 6
REFERENCE = torch.tensor([3.0, 2.0, 0.5, 1.0, 40.0, 1.0])
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    "float32": [f32] * 7,
    "float64": [f64] * 7,
    "bfloat16": [bf16] * 7,
    "float16": [f16] * 7,
    "mixed": [bf16, f32, f16, f32, bf16, f16, f64],
}
dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())


def make_tensors(dtypes=DTYPES["float32"], scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        (scale * torch.randn(shape, generator=generator, dtype=f64)).to(dtype)
        for shape, dtype in zip(SHAPES, dtypes, strict=True)
    ]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    tensors[5] = tensors[5].t().contiguous().t()
    return tensors


def clones(tensors):
    return [tensor.clone() for tensor in tensors]


def exact_norms(tensors, layers=LAYERS, L=L):
    squares = [0.0] * L
    for tensor, l in zip(tensors, layers, strict=True):
        squares[l] += tensor.double().square().sum().item()
    return torch.tensor(squares, dtype=f64).sqrt()


def exact_factors(grads, balance):
    norms = exact_norms(grads)
    return torch.where(norms > 0, balance * REFERENCE.double() / norms, 0)


def eps(tensor):
    return torch.finfo(tensor.dtype).eps


def smallest(tensor):
    return torch.finfo(tensor.dtype).smallest_normal * eps(tensor)


def assert_rounded(tensor, expected, rtol=None):
    """Rounded once from float64, whose sums are good to 16 ε, unless rtol allows more."""
    rtol = 16 * torch.finfo(f64).eps + (rtol or eps(tensor))
    torch.testing.assert_close(tensor.double(), expected, rtol=rtol, atol=smallest(tensor))


def sgd_by_hand(params, old, new, balance, lr):
    """θ - α (f G_d + G_t) in float64, and the size of the terms that were added."""
    f = exact_factors(old, balance)
    p, d, n = ([t.double() for t in tensors] for tensors in (params, old, new))
    results = [p[i] - lr * (f[l] * d[i] + n[i]) for i, l in enumerate(LAYERS)]
    sizes = [p[i].abs() + lr * ((f[l] * d[i]).abs() + n[i].abs()) for i, l in enumerate(LAYERS)]
    return results, sizes


@dtypes
def test_layer_norms(dtypes):
    tensors = make_tensors(dtypes)
    norms = ops.layer_norms(tensors, LAYERS, L)
    assert norms.dtype == compute_dtype(dtypes[0])
    assert_rounded(norms, exact_norms(tensors))
    assert norms[[1, 3, 5]].tolist() == [0, 0, 0]
    assert torch.equal(ops.layer_norms(tensors, LAYERS), norms[:5])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_underflow_nor_overflow(scale):
    tensors = make_tensors(scale=scale)
    assert_rounded(ops.layer_norms(tensors, LAYERS, L), exact_norms(tensors))


@dtypes
@pytest.mark.parametrize("balance", [2.0, torch.tensor(0.3, dtype=f64)], ids=["float", "tensor"])
def test_balance(balance, dtypes):
    grads = make_tensors(dtypes, scale=0.01)
    before = clones(grads)
    factors, norms = ops.balance_layers_(grads, LAYERS, REFERENCE, balance)
    assert factors.dtype == norms.dtype == compute_dtype(dtypes[0])
    expected = exact_factors(before, float(balance))
    assert_rounded(norms, exact_norms(before))
    assert_rounded(factors, expected, rtol=2 * eps(factors))
    for grad, old, l in zip(grads, before, LAYERS, strict=True):
        assert grad.stride() == old.stride()
        assert_rounded(grad, old.double() * expected[l], rtol=eps(grad) / 2 + 2 * eps(factors))
    target = torch.where(expected > 0, float(balance) * REFERENCE.double(), 0)
    coarsest = max(eps(tensor) for tensor in (factors, *grads))
    assert_rounded(exact_norms(grads), target, rtol=coarsest)


@dtypes
def test_factor_is_zero_where_the_gradient_is(dtypes):
    grads = [torch.zeros_like(tensor) for tensor in make_tensors(dtypes)]
    factors, norms = ops.balance_layers_(grads, LAYERS, REFERENCE, 2.0)
    assert factors.tolist() == norms.tolist() == [0] * L
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_factor_may_exceed_the_range_of_the_gradient():
    grads = [torch.full((4,), 2.0**-20, dtype=f16)]
    factors, _ = ops.balance_layers_(grads, [0], torch.ones(1), 1.0)
    assert factors.item() == 2.0**19 > torch.finfo(f16).max
    assert torch.equal(grads[0], torch.full((4,), 0.5, dtype=f16))


@pytest.mark.parametrize(
    "size, reference_norm, balance",
    [(1e-30, 1e30, 2.0), (1.0, 1e30, 1e30)],
    ids=["small-gradient", "large-balance"],
)
def test_factor_is_zero_where_finite_norms_have_no_finite_ratio(size, reference_norm, balance):
    grads = [torch.full((3,), size), torch.ones(2)]
    factors, _ = ops.balance_layers_(grads, [0, 1], torch.tensor([reference_norm, 0.0]), balance)
    assert factors.tolist() == [0, 0]
    assert torch.equal(torch.cat(grads), torch.zeros(5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_reference_norm_that_is_not_finite_stays_visible(value):
    grads = [torch.ones(3), torch.ones(2)]
    factors, _ = ops.balance_layers_(grads, [0, 1], torch.tensor([value, 1.0]), 1.0)
    assert not factors[0].isfinite() and not grads[0].isfinite().any()
    assert factors[1].isfinite() and grads[1].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_gradient_that_is_not_finite_stays_visible(value):
    grads, clean = make_tensors(), make_tensors()
    grads[0][0, 1, 2, 1] = value
    params = make_tensors(seed=1)
    ops.balanced_sgd_(params, grads, make_tensors(seed=2), LAYERS, REFERENCE)
    assert params[0][0, 1, 2, 1].isnan()
    ops.balance_layers_(grads, LAYERS, REFERENCE)
    assert grads[0][0, 1, 2, 1].isnan()
    assert not any(tensor.isnan().any() for tensor in params[2:])
    ops.balance_layers_(clean, LAYERS, REFERENCE)
    assert all(torch.equal(a, b) for a, b in zip(grads[2:], clean[2:], strict=True))


@dtypes
@pytest.mark.parametrize("lr, gradient_scale", [(0.3, 1.0), (1e-6, 1e4)], ids=["usual", "small-lr"])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_balanced_sgd(kind, lr, gradient_scale, dtypes):
    params = make_tensors(dtypes, scale=lr * gradient_scale)
    old, new = make_tensors(dtypes, seed=1), make_tensors(dtypes, gradient_scale, seed=2)
    expected, sizes = sgd_by_hand(params, old, new, 2.0, float(kind(lr)))
    arguments = (clones(old), clones(new), LAYERS, REFERENCE)
    factors, norms = ops.balanced_sgd_(params, *arguments, kind(2.0), kind(lr))
    assert_rounded(norms, exact_norms(old))
    assert_rounded(factors, exact_factors(old, 2.0), rtol=2 * eps(factors))
    for param, value, size in zip(params, expected, sizes, strict=True):
        bound = 2 * (eps(param) + eps(factors)) * size + smallest(param)
        assert ((param.double() - value).abs() <= bound).all()
    for tensors, before in ((arguments[0], old), (arguments[1], new)):
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_balanced_sgd_is_balance_and_step():
    fused, params = make_tensors(), make_tensors()
    old, new = make_tensors(seed=1), make_tensors(seed=2)
    fused_diagnostics = ops.balanced_sgd_(fused, old, new, LAYERS, REFERENCE, 2.0, 0.1)
    diagnostics = ops.balance_layers_(old, LAYERS, REFERENCE, 2.0)
    assert all(map(torch.equal, fused_diagnostics, diagnostics))
    for f, p, d, n in zip(fused, params, old, new, strict=True):
        size = p.abs() + 0.1 * (d.abs() + n.abs())
        p -= 0.1 * (d + n)
        assert ((f - p).abs() <= 2 * eps(f) * size).all()


def test_balance_zero_is_plain_sgd():
    params, zeros = make_tensors(), [torch.zeros_like(t) for t in make_tensors()]
    with_old, without = clones(params), clones(params)
    new = make_tensors(seed=2)
    ops.balanced_sgd_(with_old, make_tensors(seed=1), new, LAYERS, REFERENCE, 0.0, 0.1)
    ops.balanced_sgd_(without, zeros, new, LAYERS, REFERENCE, 2.0, 0.1)
    assert all(map(torch.equal, with_old, without))


def test_parameters_know_that_they_changed():
    params = [torch.nn.Parameter(tensor) for tensor in make_tensors()]
    with torch.no_grad():
        ops.balanced_sgd_(params, make_tensors(), make_tensors(), LAYERS, REFERENCE)
    # what autograd compares when it finds that a saved tensor was modified
    assert all(param._version > 0 for param in params)


def test_same_bits_in_any_run():
    grads = [torch.cat([tensor.flatten()] * 50) for tensor in make_tensors()]
    runs = []
    for _ in range(3):
        changed = clones(grads)
        diagnostics = ops.balance_layers_(changed, LAYERS, REFERENCE)
        runs.append([*changed, *diagnostics, ops.layer_norms(grads, LAYERS)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@dtypes
def test_opcheck(dtypes):
    library, one = torch.ops.bld_ext, torch.tensor(1.0)
    params, old, new = (make_tensors(dtypes, seed=seed) for seed in range(3))
    opcheck(library.layer_norms.default, (params, LAYERS, L))
    opcheck(library.balance_layers_.default, (old, LAYERS, REFERENCE, one))
    opcheck(library.balanced_sgd_.default, (params, old, new, LAYERS, REFERENCE, one, one))


def test_compiles_into_one_graph():
    def step(params, old, new):
        norms = ops.layer_norms(new, LAYERS, L)
        ops.balance_layers_(new, LAYERS, REFERENCE, 2.0)
        factors, _ = ops.balanced_sgd_(params, old, new, LAYERS, norms, 2.0, 0.1)
        return factors

    eager = [make_tensors(seed=seed) for seed in range(3)]
    compiled = [make_tensors(seed=seed) for seed in range(3)]
    assert torch.equal(torch.compile(step, fullgraph=True)(*compiled), step(*eager))
    for tensors, expected in zip(compiled, eager, strict=True):
        assert all(map(torch.equal, tensors, expected))


T, NORM = [torch.ones(3), torch.ones(2)], torch.ones(2)
FLOAT = "a floating-point dtype, got torch.int64"


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("params", [], "at least one tensor, got none"),
        ("params", [T[0], T[1].long()], FLOAT),
        ("params", [T[0], T[1].to("meta")], "device cpu, got meta"),
        ("distill_grads", T[:1], "2 tensors, got 1"),
        ("distill_grads", [T[0], T[1].to("meta")], "device cpu, got meta"),
        ("new_grads", T[::-1], r"shape \(3,\), got \(2,\)"),
        ("new_grads", [T[0], T[1].long()], FLOAT),
        ("layers", [0], "2 indices, got 1"),
        ("layers", [0, 2], r"indices from 0 to 1, got \[0, 2\]"),
        ("layers", [-1, 0], r"indices from 0 to 1, got \[-1, 0\]"),
        ("reference_norms", NORM[0], r"one norm a layer, \[L\], got \(\)"),
        ("reference_norms", NORM.long(), "floats, got torch.int64"),
        ("reference_norms", NORM.to("meta"), "device cpu, got meta"),
        ("balance", NORM, ".*scalar.*, got .*"),
        ("lr", NORM, ".*scalar.*, got .*"),
    ],
)
def test_bad_argument(argument, value, message):
    arguments = {"params": clones(T), "distill_grads": T, "new_grads": T, "layers": [0, 1]}
    arguments |= {"reference_norms": NORM, argument: value}
    match = rf"^{argument}(\[[01]\])?: expected {message}$"
    with pytest.raises(ValueError, match=match):
        ops.balanced_sgd_(**arguments)
    if argument in ("layers", "reference_norms", "balance"):
        for name in ("params", "distill_grads", "new_grads"):
            del arguments[name]
        with pytest.raises(ValueError, match=match):
            ops.balance_layers_(clones(T), **arguments)


@pytest.mark.parametrize("num_layers", [None, 3])
def test_bad_arguments_of_layer_norms(num_layers):
    with pytest.raises(ValueError, match="^tensors: expected at least one tensor, got none$"):
        ops.layer_norms([], [], num_layers)
    with pytest.raises(ValueError, match=r"^tensors\[1\]: expected a floating-point dtype, got"):
        ops.layer_norms([T[0], T[1].bool()], [0, 1], num_layers)
    with pytest.raises(ValueError, match="^layers: expected 2 indices, got 1$"):
        ops.layer_norms(T, [0], num_layers)
    with pytest.raises(ValueError, match=r"^layers: expected indices from 0 to 2, got \[0, 3\]$"):
        ops.layer_norms(T, [0, 3], 3)
