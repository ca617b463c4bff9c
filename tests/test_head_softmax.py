"""head_softmax: the kernel of this machine against the float64 reference."""

import pytest
import torch
from torch.library import opcheck

import bld_ext
from bld_ext import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(reference.compute_dtype(dtype)).eps for dtype in DTYPES}
HEADS = {
    "one-class": [1],
    "one-head": [10],
    "pairs": [2] * 5,
    "ragged": [1, 7, 64, 3],
    "wide": [1000, 1, 999],
    "64-heads": list(range(1, 65)),
}
pytestmark = pytest.mark.usefixtures("poison")
ragged = pytest.mark.parametrize("sizes", HEADS.values(), ids=HEADS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def make_logits(*shape, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def assert_parity(logits, sizes, temperature=2.0):
    """Within 4 ε relative of the float64 reference, plus √classes for the sum over a head."""
    bank = ops.head_softmax(logits, sizes, temperature)
    expected = reference.head_softmax(logits.double(), sizes, temperature)
    assert bank.dtype == reference.compute_dtype(logits.dtype)
    assert bank.shape == expected.shape
    assert bank.is_contiguous()
    rtol = EPS[logits.dtype] * (4 + max(sizes, default=0) ** 0.5)
    torch.testing.assert_close(bank.double(), expected, rtol=rtol, atol=1e-30)


@pytest.mark.skipif(bld_ext.build_info() is None, reason="bld_ext._C is not built")
def test_runs_compiled():
    assert bld_ext.backend("head_softmax") == "compiled"


def test_backend_names_its_argument():
    with pytest.raises(ValueError, match="^name: expected one of head_softmax.*got 'softmax'"):
        bld_ext.backend("softmax")


@ragged
@dtypes
def test_parity(sizes, dtype):
    assert_parity(make_logits(5, sum(sizes), dtype=dtype), sizes)


@dtypes
@pytest.mark.parametrize("spatial", [(1,), (3, 5), (2, 3, 4)], ids=str)
def test_dense(spatial, dtype):
    assert_parity(make_logits(3, 9, *spatial, dtype=dtype), [2, 4, 3])


@dtypes
def test_columns_behind_the_old_heads_are_not_read(dtype):
    logits = make_logits(4, 12, 3, dtype=dtype)
    logits[:, 9:] = torch.nan
    assert_parity(logits, [2, 4, 3])


TAU = torch.tensor(2.0, dtype=torch.float64)
LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 3),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x[::2, :, ::2, 1:],
    "expanded": lambda x: x[:1].expand(6, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout(layout):
    logits = layout(make_logits(6, 6, 4, 6))
    assert not logits.is_contiguous()
    assert_parity(logits, [1, 3, 2])
    dense = ops.head_softmax(logits.contiguous(), [1, 3, 2], 2.0)
    assert torch.equal(ops.head_softmax(logits, [1, 3, 2], 2.0), dense)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_reference_lays_out_its_result_as_the_fake_says(layout):
    bank = reference.head_softmax(layout(make_logits(6, 6, 4, 6)), [1, 3, 2], 2.0)
    assert bank.is_contiguous()


@pytest.mark.parametrize(
    "shape, sizes",
    [((0, 5), [2, 3]), ((3, 5), []), ((3, 0), []), ((2, 5, 0, 4), [2, 3]), ((0, 5, 2), [])],
    ids=["no-images", "no-heads", "no-classes", "no-positions", "nothing"],
)
@dtypes
def test_empty(shape, sizes, dtype):
    logits = make_logits(*shape, dtype=dtype).requires_grad_()
    bank = ops.head_softmax(logits, sizes)
    assert bank.shape == (shape[0], sum(sizes), *shape[2:])
    assert bank.dtype == reference.compute_dtype(dtype)
    (grad,) = torch.autograd.grad(bank.sum(), logits)
    assert torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.0, 100.0])
@dtypes
def test_extreme_logits(temperature, dtype):
    logits = make_logits(8, 30, dtype=dtype)
    logits[1], logits[2, ::2], logits[2, 1::2] = 1e4, 1e4, -1e4
    logits[3:6] = make_logits(3, 30, dtype=dtype, scale=4000).clamp(-1e4, 1e4)
    sizes = [1, 9, 20]
    bank = ops.head_softmax(logits, sizes, temperature)
    assert bank.isfinite().all()
    for head in bank.split(sizes, 1):
        torch.testing.assert_close(
            head.sum(1), torch.ones_like(head[:, 0]), rtol=EPS[dtype] * 8, atol=0
        )
    expected = reference.head_softmax(logits.double(), sizes, temperature)
    torch.testing.assert_close(bank.double(), expected, rtol=0, atol=EPS[dtype] * 4)


def test_nan_stays_in_its_head_and_image():
    logits = make_logits(2, 6)
    logits[1, 3] = torch.nan
    bank = ops.head_softmax(logits, [2, 3, 1])
    where = torch.zeros(2, 6, dtype=torch.bool)
    where[1, 2:5] = True
    assert torch.equal(bank.isnan(), where)


def test_logits_are_only_read():
    logits = make_logits(3, 6, 2)
    before = logits.clone()
    ops.head_softmax(logits, [2, 4])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("shape", [(64, 200), (33, 200, 7)], ids=["flat", "dense"])
def test_same_bits_in_any_run_thread_count_and_split(shape):
    logits, sizes = make_logits(*shape), [50, 1, 149]
    bank = ops.head_softmax(logits, sizes)
    assert torch.equal(ops.head_softmax(logits, sizes), bank)
    for rows in (1, 5, 32):
        parts = [ops.head_softmax(part, sizes) for part in logits.split(rows)]
        assert torch.equal(torch.cat(parts), bank)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(ops.head_softmax(logits, sizes), bank)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape, sizes", [((3, 6), [1, 3, 2]), ((2, 7, 2), [2, 3]), ((2, 4), [])])
def test_derivatives(shape, sizes):
    logits = make_logits(*shape, dtype=torch.float64, scale=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ops.head_softmax(z, sizes, 0.7), logits)
    assert torch.autograd.gradgradcheck(lambda z: ops.head_softmax(z, sizes, 0.7), logits)


@dtypes
def test_gradient_dtype_and_unread_columns(dtype):
    logits = make_logits(3, 7, dtype=dtype).requires_grad_()
    (ops.head_softmax(logits, [2, 3]) ** 2).sum().backward()
    assert logits.grad.dtype == dtype
    assert torch.equal(logits.grad[:, 5:], torch.zeros(3, 2, dtype=dtype))
    assert (logits.grad[:, :5] != 0).all()


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize(
    "shape, sizes", [((3, 6), [1, 3, 2]), ((2, 7, 3, 2), [2, 3]), ((2, 4), [])]
)
@dtypes
def test_opcheck(shape, sizes, dtype, requires_grad):
    logits = make_logits(*shape, dtype=dtype).requires_grad_(requires_grad)
    opcheck(torch.ops.bld_ext.head_softmax.default, (logits, sizes, TAU))


def test_compiles_into_one_graph():
    logits = make_logits(4, 9, 3).requires_grad_()
    compiled = torch.compile(
        lambda z: (ops.head_softmax(z, [2, 4], 0.5) ** 2).sum(), fullgraph=True
    )
    eager = (ops.head_softmax(logits, [2, 4], 0.5) ** 2).sum()
    (grad,) = torch.autograd.grad(compiled(logits), logits)
    torch.testing.assert_close(compiled(logits), eager)
    torch.testing.assert_close(grad, torch.autograd.grad(eager, logits)[0])


LOGITS = torch.zeros(2, 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((LOGITS.long(), [5]), "logits: expected a floating-point dtype, got torch.int64"),
        ((LOGITS[0], [5]), r"logits: expected shape \[N, C, \*\], got \(5,\)"),
        ((LOGITS, [3, 3]), r"head_sizes: expected a sum of at most 5, from logits, got \[3, 3\]"),
        ((LOGITS, [3, 0]), r"head_sizes: expected sizes of at least 1, got \[3, 0\]"),
        (
            (LOGITS, [5], 0.0),
            "temperature: expected a positive finite number, at least 1e-38, got 0.0",
        ),
        (
            (LOGITS, [5], -1.0),
            "temperature: expected a positive finite number, at least 1e-38, got -1.0",
        ),
        (
            (LOGITS, [5], float("inf")),
            "temperature: expected a positive finite number, at least 1e-38, got inf",
        ),
        (
            (LOGITS, [5], float("nan")),
            "temperature: expected a positive finite number, at least 1e-38, got nan",
        ),
    ],
)
def test_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ops.head_softmax(*arguments)


def test_logits_of_another_type():
    with pytest.raises(TypeError, match="^logits: expected a tensor, got list$"):
        ops.head_softmax([[0.0]], [1])


def test_sizes_that_overflow_their_sum_are_refused_by_the_kernel():
    with pytest.raises(RuntimeError, match="head_sizes: "):
        torch.ops.bld_ext.head_softmax(torch.randn(2, 5), [2**62] * 4 + [2], TAU)
