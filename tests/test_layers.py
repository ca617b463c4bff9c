"""layer_norms, balance_layers_ and balanced_sgd_ against straight float64 arithmetic."""

import re

import numpy as np
import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from bld_ext import backend, ops, reference
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


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's SGD rounds twice without fused multiply-add",
)
@pytest.mark.parametrize("lr", [0.1, 1e-4])
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_balanced_sgd_is_balance_and_sgd_bit_for_bit(dtype, lr):
    fused, plain = ([t.to(dtype) for t in make_tensors()] for _ in range(2))
    old, new = ([t.to(dtype) for t in make_tensors(seed=seed)] for seed in (1, 2))
    fused_diagnostics = ops.balanced_sgd_(fused, old, new, LAYERS, REFERENCE, 2.0, lr)
    diagnostics = ops.balance_layers_(old, LAYERS, REFERENCE, 2.0)
    assert all(map(torch.equal, fused_diagnostics, diagnostics))
    params = [torch.nn.Parameter(t) for t in plain]
    for param, d, n in zip(params, old, new, strict=True):
        param.grad = n + d
    torch.optim.SGD(params, lr=lr, foreach=False).step()
    assert all(map(torch.equal, fused, params))


def test_memory_that_overlaps_itself_is_refused():
    before = torch.arange(1.0, 9)
    memory = before.clone()
    windows = memory.as_strided((3, 3), (1, 1))
    with pytest.raises(ValueError, match=r"^grads\[1\]: expected a tensor whose elements do not"):
        ops.balance_layers_([torch.ones(2), windows], [0, 0], torch.ones(1))
    assert torch.equal(memory, before)


def test_strided_memory_that_is_shared_is_refused():
    memory = torch.arange(1.0, 9)
    before, square, one = memory.clone(), torch.ones(3, 3), torch.ones(1)
    for grads in (
        [memory, memory[::2]],
        [memory[::2], memory[::2][:]],
        [memory[1::2], memory[2:4]],
    ):
        with pytest.raises(ValueError, match=r"^grads\[\d\]: expected memory of its own"):
            ops.balance_layers_(grads, [0, 0], one)
    news = [torch.ones_like(square)] * 2
    with pytest.raises(ValueError, match=r"^params\[\d\]: expected memory of its own"):
        ops.balanced_sgd_([square, square.t()], news, news, [0, 0], one)
    assert torch.equal(memory, before) and torch.equal(square, torch.ones(3, 3))


def test_interleaved_views_are_apart():
    memory = torch.arange(1.0, 9)
    expected, one = memory * 3 / memory.norm(), torch.ones(1)
    ops.balance_layers_([memory[::2], memory[1::2]], [0, 0], one, balance=3.0)
    torch.testing.assert_close(memory, expected)


def test_a_norm_that_overflows_makes_nan():
    grads = [torch.full((100,), 3e38), torch.ones(3)]
    factors, norms = ops.balance_layers_(grads, [0, 1], torch.ones(2))
    assert norms[0].isinf() and factors[0].isnan() and grads[0].isnan().all()
    assert grads[1].isfinite().all() and factors[1].isfinite()


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf, -torch.inf])
def test_a_balance_nobody_looked_at_makes_nan(value):
    """As on a GPU, where looking would wait."""
    grads = [torch.ones(3), torch.zeros(2)]
    balance = torch.tensor(value, dtype=f64)
    factors, _ = reference.balance_layers_(grads, [0, 1], torch.tensor([1.0, 0.0]), balance)
    assert factors.isnan().all() and torch.cat(grads).isnan().all()


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


@pytest.fixture
def chunks_of():
    """chunks_of(n): the kernels' unit of work becomes n elements."""
    if backend("layer_norms") != "compiled":
        pytest.skip("bld_ext._C was not built")
    from bld_ext import _C

    before = _C.set_chunk_size(8192)
    yield _C.set_chunk_size
    _C.set_chunk_size(before)


def three_ops(dtypes, repeat=1):
    """All results of the three ops on tensors `repeat` times as long."""

    def long(**options):
        return [torch.cat([t.flatten()] * repeat) for t in make_tensors(dtypes, **options)]

    params, old, new = (long(seed=seed) for seed in range(3))
    norms = ops.layer_norms(old, LAYERS, L)
    updated = ops.balanced_sgd_(params, old, new, LAYERS, REFERENCE, 2.0, 0.1)
    balanced = ops.balance_layers_(old, LAYERS, REFERENCE)
    return [norms, *updated, *balanced, *params, *old]


@dtypes
def test_same_bits_in_any_run_and_thread_count(dtypes, with_threads):
    expected = three_ops(dtypes, repeat=50)
    for found in with_threads(lambda: three_ops(dtypes, repeat=50)):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("size", [1, 7, 1000, 2**20])
def test_chunk_size_changes_a_norm_by_one_ulp_at_most(chunks_of, size):
    tensors = [torch.cat([t.flatten()] * 20) for t in make_tensors()]
    expected = ops.layer_norms(tensors, LAYERS, L)
    chunks_of(size)
    found = ops.layer_norms(tensors, LAYERS, L)
    assert ((found - expected).abs() <= eps(expected) * expected).all()


BITS = """
import hashlib, sys
from tests.test_layers import DTYPES, three_ops
digest = hashlib.sha256()
for dtypes in DTYPES.values():
    for tensor in three_ops(dtypes, repeat=9):
        digest.update(tensor.double().numpy().tobytes())
print(digest.hexdigest())
"""


def test_same_bits_whatever_the_vector_registers(outputs_by_registers):
    assert len(set(outputs_by_registers(BITS))) == 1


@pytest.mark.parametrize("count", [1, 2, 60, 2000])
def test_lists_of_any_length(count):
    generator = torch.Generator().manual_seed(0)
    layers = [(7 * i) % (count // 2 + 1) for i in range(count)]  # in no order
    num_layers = count // 2 + 1
    params, old, new = (
        [torch.randn(i % 37, generator=generator) for i in range(count)] for _ in range(3)
    )
    expected = [[t.double() for t in tensors] for tensors in (params, old, new)]
    norms = torch.rand(num_layers, generator=generator)
    lam, lr = (torch.tensor(value, dtype=f64) for value in (2.0, 0.1))
    factors, _ = ops.balanced_sgd_(params, old, new, layers, norms)
    exact, _ = reference.balanced_sgd_(*expected, layers, norms.double(), lam, lr * 1e-3)
    torch.testing.assert_close(factors.double(), exact, rtol=4 * eps(factors), atol=0)
    for found, value in zip(params, expected[0], strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-6)


def test_layers_larger_than_a_cache():
    """Chunks, groups and threads of the real size."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=generator) for size in (5_000_001, 3, 700_000, 8192)]
    before = clones(grads)
    factors, norms = ops.balance_layers_(grads, [1, 0, 1, 2], torch.tensor([1.0, 2.0, 3.0]), 1.0)
    exact = exact_norms(before, [1, 0, 1, 2], 3)
    assert_rounded(norms, exact)
    for grad, old, l in zip(grads, before, [1, 0, 1, 2], strict=True):
        assert torch.equal(grad, old * factors[l])


def columns(tensor):
    """The same numbers with gaps between them."""
    wide = tensor.new_zeros(*tensor.shape, 2)
    wide[..., 0] = tensor
    return wide[..., 0]


def shifted(tensor):
    """The same numbers, one element after an aligned address."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def transposed(tensor):
    """The same numbers in another order in memory."""
    return tensor.mT.clone(memory_format=torch.contiguous_format).mT


@dtypes
@pytest.mark.parametrize("view", [columns, shifted, transposed])
@pytest.mark.parametrize("which", range(3), ids=["params", "distill_grads", "new_grads"])
def test_views_of_any_layout(which, view, dtypes):
    plain = [[t.reshape(-1, 1) for t in make_tensors(dtypes, seed=seed)] for seed in range(3)]
    plain = [[t.reshape(2, -1) if len(t) % 2 == 0 else t for t in tensors] for tensors in plain]
    viewed = [[view(t) if i == which else t.clone() for t in ts] for i, ts in enumerate(plain)]
    for lists in (plain, viewed):
        lists.append(ops.balanced_sgd_(*lists, LAYERS, REFERENCE, 2.0, 0.1))
        lists.append(ops.balance_layers_(lists[which], LAYERS, REFERENCE, 0.5))
    for found, expected in zip(viewed, plain, strict=True):
        if view is not transposed:
            assert all(map(torch.equal, found, expected))
        for one, other in zip(found, expected, strict=True):  # summed in memory's order
            torch.testing.assert_close(one, other, rtol=4 * eps(one), atol=smallest(one))


@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 511, 512, 513, 8191, 8192, 8193, 20_000])
def test_nothing_outside_a_tensor_is_touched(size, dtype):
    generator = torch.Generator().manual_seed(0)

    def guarded():
        whole = torch.randn(size + 64, generator=generator).to(dtype)
        whole[:32] = whole[32 + size :] = torch.nan
        return whole, whole[32 : 32 + size]

    (whole_p, p), (whole_d, d), (whole_n, n) = (guarded() for _ in range(3))
    before = p.clone()
    factors, norms = ops.balanced_sgd_([p], [d], [n], [0], torch.ones(1), 1.0, 0.1)
    ops.balance_layers_([d], [0], torch.ones(1), 1.0)
    for whole in (whole_p, whole_d, whole_n):
        assert whole[:32].isnan().all() and whole[32 + size :].isnan().all()
        assert not whole[32 : 32 + size].isnan().any()
    assert size == 0 or (p != before).any()


# ---- the table of chunks ----


@pytest.mark.parametrize("chunk_size", [1, 3, 8192])
def test_chunks_cover_each_tensor_once_and_in_order(chunks_of, chunk_size):
    from bld_ext import _C

    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 40, (30,), generator=generator).tolist()
    layers = torch.randint(0, 12, (30,), generator=generator).tolist()
    chunks, first = _C.make_chunks(sizes, layers, 14, chunk_size)
    assert len(first) == 15 and first[0] == 0 and first[-1] == len(chunks)
    found = []
    for l in range(14):
        mine = chunks[first[l] : first[l + 1]]
        assert mine  # a layer without elements still has one to report its norm
        assert [t for t, _, size in mine if size] == sorted(t for t, _, size in mine if size)
        assert all(layers[t] == l and size <= chunk_size for t, _, size in mine if size)
        found += [(t, start + i) for t, start, size in mine for i in range(size)]
    assert sorted(found) == [(t, i) for t, size in enumerate(sizes) for i in range(size)]


def test_chunks_of_tensors_beyond_int32(chunks_of):
    from bld_ext import _C

    size = 2**33 + 5
    chunks, first = _C.make_chunks([size, 1], [1, 0], 2, 2**30)
    assert chunks[0] == (1, 0, 1) and first == [0, 1, 10]
    assert chunks[1:] == [(0, k * 2**30, 2**30) for k in range(8)] + [(0, 2**33, 5)]


@pytest.mark.parametrize("size", [0, -1, 2**31])
def test_bad_chunk_size(chunks_of, size):
    with pytest.raises(ValueError, match="size: expected 1 to 2"):
        chunks_of(size)


@dtypes
def test_opcheck(dtypes):
    library, one = torch.ops.bld_ext, torch.tensor(1.0, dtype=f64)
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
LIST = "a list, got Tensor"
NUMBER = "a finite number, at least 0, got "


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("params", [], "at least one tensor, got none"),
        ("params", torch.ones(2, 2), LIST),
        ("params[1]", [T[0], None], "a tensor, got NoneType"),
        ("params[1]", [T[0], torch.eye(2).to_sparse()], "a dense tensor: .*, got torch.sparse_coo"),
        ("params[1]", [T[0], T[1].long()], FLOAT),
        ("params[1]", [T[0], T[1].to("meta")], "device cpu, got meta"),
        ("distill_grads", T[:1], "2 tensors, got 1"),
        ("distill_grads[1]", [T[0], None], "a tensor, got NoneType"),
        ("distill_grads[1]", [T[0], T[1].to("meta")], "device cpu, got meta"),
        ("new_grads[0]", T[::-1], r"shape \(3,\), got \(2,\)"),
        ("new_grads[1]", [T[0], T[1].long()], FLOAT),
        ("new_grads[1]", [T[0], torch.ones(2).to_sparse()], "a dense tensor: .*torch.sparse_coo"),
        ("layers", [0], "2 indices, got 1"),
        ("layers", torch.tensor([0, 1]), LIST),
        ("layers[1]", [0, 1.5], "a whole number, got 1.5"),
        ("layers[1]", [0, 2], "an index from 0 to 1, got 2"),
        ("layers[0]", [-1, 0], "an index from 0 to 1, got -1"),
        ("reference_norms", None, "a tensor, got NoneType"),
        ("reference_norms", NORM[0], r"one norm a layer, \[L\], got \(\)"),
        ("reference_norms", NORM.long(), FLOAT),
        ("reference_norms", NORM.to("meta"), "device cpu, got meta"),
        ("balance", NORM, r"a number or a scalar tensor, got \(2,\)"),
        ("balance", "2", "a number or a scalar tensor, got str"),
        ("balance", torch.tensor(2), FLOAT),
        *(("balance", value, NUMBER + str(value)) for value in (-1, torch.nan, torch.inf)),
        ("balance", torch.tensor(-1.0), NUMBER + "-1.0"),
        ("lr", NORM, r"a number or a scalar tensor, got \(2,\)"),
        ("lr", -1, NUMBER + "-1"),
    ],
)
def test_bad_argument(argument, value, message):
    arguments = {"params": clones(T), "distill_grads": clones(T), "new_grads": T, "layers": [0, 1]}
    arguments |= {"reference_norms": NORM, argument.partition("[")[0]: value}
    match = rf"^{re.escape(argument)}: expected {message}$"
    with pytest.raises((ValueError, TypeError), match=match):
        ops.balanced_sgd_(**arguments)
    lists = [arguments.pop(name) for name in ("params", "distill_grads", "new_grads")]
    if not argument.startswith("params"):
        assert all(map(torch.equal, lists[0], T))
    if argument.partition("[")[0] in ("layers", "reference_norms", "balance"):
        with pytest.raises((ValueError, TypeError), match=match):
            ops.balance_layers_(lists[0], **arguments)
        assert all(map(torch.equal, lists[0], T))
    if argument.startswith("params"):
        match = match.replace("params", "grads")
        with pytest.raises((ValueError, TypeError), match=match):
            ops.balance_layers_(value, [0, 1], NORM)
    assert all((t == 1).all() for t in T)  # nor where `value` holds them


def test_tensors_that_share_memory():
    whole = torch.ones(10)
    with pytest.raises(
        ValueError, match=r"^grads\[1\]: expected a tensor of its own; clone\(\) it"
    ):
        ops.balance_layers_([whole, whole], [0, 1], NORM)
    with pytest.raises(
        ValueError, match=r"^grads\[1\]: expected memory of its own, got some that "
    ):
        ops.balance_layers_([whole[:6], whole[5:]], [0, 1], NORM)
    with pytest.raises(ValueError, match=r"_grads\[0\]: expected memory of its own, .*params\[0\]"):
        ops.balanced_sgd_([whole], [whole], [torch.ones(10)], [0], NORM)
    with pytest.raises(
        ValueError, match=r"^grads\[1\]: expected a tensor whose elements do not sh"
    ):
        ops.balance_layers_([whole, torch.ones(1).expand(3)], [0, 1], NORM)
    assert torch.equal(whole, torch.ones(10))
    ops.balance_layers_([whole[:5], whole[5:]], [0, 1], NORM)
    ops.balanced_sgd_([torch.ones(10)], [whole], [whole], [0], NORM)
    assert ops.layer_norms([whole, whole[:3], torch.ones(1).expand(3)], [0, 0, 1]).isfinite().all()
    assert ops.layer_norms([whole, whole[:3]], [0, 1]).isfinite().all()
    with pytest.raises(ValueError, match=r"^grads\[\d\]: expected memory of its own"):
        ops.balance_layers_([whole, whole[:3]], [0, 1], NORM)  # though known from being read


def test_reference_norms_may_be_among_what_is_rescaled():
    reference = torch.tensor([3.0, 4.0, 5.0])
    others = [torch.randn(600_000) for _ in range(2)]
    copies = [t.clone() for t in (reference, *others)]
    expected, _ = ops.balance_layers_(copies, [0, 1, 2], reference.clone(), 1.0)
    found, _ = ops.balance_layers_([reference, *others], [0, 1, 2], reference, 1.0)
    assert torch.equal(found, expected) and all(map(torch.equal, (reference, *others), copies))


class OutOfMemory(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise torch.OutOfMemoryError("no memory is left")


def test_running_out_of_memory_stays_what_it_is():
    with OutOfMemory(), pytest.raises(torch.OutOfMemoryError, match="^no memory is left$"):
        ops.layer_norms(T, [0, 1])


def test_indices_and_layers_beyond_any_list():
    for index in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"^layers\[1\]: expected an index .* got {index}$"):
            ops.layer_norms(T, [0, index])
    with pytest.raises(ValueError, match=f"^num_layers: expected 0 to {2**31 - 1}, got {2**63}$"):
        ops.layer_norms(T, [0, 1], 2**63)
    assert torch.equal(ops.layer_norms(T, np.array([0, 1]).tolist()), ops.layer_norms(T, [0, 1]))
    assert torch.equal(ops.layer_norms(T, [np.int64(0), np.int64(1)]), ops.layer_norms(T, [0, 1]))


@pytest.mark.parametrize("num_layers", [None, 3])
def test_bad_arguments_of_layer_norms(num_layers):
    with pytest.raises(ValueError, match="^tensors: expected at least one tensor, got none$"):
        ops.layer_norms([], [], num_layers)
    with pytest.raises(ValueError, match=r"^tensors\[1\]: expected a floating-point dtype, got"):
        ops.layer_norms([T[0], T[1].bool()], [0, 1], num_layers)
    with pytest.raises(ValueError, match="^layers: expected 2 indices, got 1$"):
        ops.layer_norms(T, [0], num_layers)
    with pytest.raises(ValueError, match=r"^layers\[1\]: expected an index from 0 to 2, got 3$"):
        ops.layer_norms(T, [0, 3], 3)
    with pytest.raises(TypeError, match="^num_layers: expected a whole number, got str$"):
        ops.layer_norms(T, [0, 1], "2")
