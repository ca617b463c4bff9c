"""The Triton kernels of view_batch_norm: on a GPU, else under Triton's interpreter."""

import pytest
import torch
from test_view_batch_norm import PARTS, TOLERANCE, arguments, expected, laid_out

from bld_ext import reference

pytest.importorskip("triton")
from bld_ext.triton import batch_norm as kernels  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {  # of one view
    "rows": (5, 19),
    "planes": (3, 5, 4, 6),
    "large-planes": (2, 3, 9, 8),
    "several-tiles": (5, 17, 5, 5),
    "one-position": (6, 33, 1, 1),
    "one-image": (1, 3, 30, 20),
    "more-than-registers-hold": (2, 3, 120, 90),
}
pytestmark = [
    pytest.mark.usefixtures("triton_counts", "poison", "bounds"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_layout = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])


def on_device(tensors):
    return [t if t is None else t.to(DEVICE) for t in tensors]


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@each_shape
def test_parity(shape, parts, dtype, last):
    tensors, options = arguments(shape, parts, dtype, last=last)
    views, relu = options["views"], options["relu"]
    x, weight, bias, residual = on_device(tensors)
    out, mean, variance = kernels.view_batch_norm(x, weight, bias, residual, views, 1e-5, relu)
    tolerance = TOLERANCE[dtype]
    close = dict(rtol=tolerance, atol=8 * tolerance, check_dtype=False)
    torch.testing.assert_close(out.cpu(), expected(tensors, **options), **close)
    assert out.dtype == dtype and out.stride() == tensors[0].stride()

    grad = laid_out(torch.randn(out.shape, dtype=torch.float64).to(dtype), last).to(DEVICE)
    given = grad, x, out, weight, bias, mean, variance
    found = kernels.view_batch_norm_backward(*given, views, 1e-5, relu, True)
    wide = [t if t is None else t.double() for t in given]
    exact = reference.view_batch_norm_backward(*wide, views, 1e-5, relu, True)
    for got, wanted in zip(found, exact, strict=True):
        scale = wanted.abs().max().item() + 1
        torch.testing.assert_close(
            got.double(), wanted, rtol=4 * tolerance, atol=8 * tolerance * scale
        )
    assert found[0].stride() == out.stride() == found[3].stride()
    if residual is None and dtype == torch.float32:  # the mask is that of the output
        again = kernels.view_batch_norm_backward(grad, x, None, *given[3:], views, 1e-5, relu, True)
        assert all(map(torch.equal, again, found))


@each_layout
@each_shape
def test_a_view_does_not_depend_on_the_others_bit_for_bit(shape, last):
    tensors, _ = arguments(shape, last=last)
    x, weight, bias, residual = on_device(tensors)
    grad = torch.randn_like(x)
    out, mean, variance = kernels.view_batch_norm(x, weight, bias, residual, 3, 1e-5, True)
    given = out, weight, bias, mean, variance
    grads = kernels.view_batch_norm_backward(grad, x, *given, 3, 1e-5, True, True)
    for v in range(3):
        part = [t.chunk(3)[v] for t in (x, residual, grad)]
        alone = kernels.view_batch_norm(part[0], weight, bias, part[1], 1, 1e-5, True)
        for a, b in zip((out, mean, variance), alone, strict=True):
            assert torch.equal(a.chunk(3)[v], b)
        lone = kernels.view_batch_norm_backward(
            part[2], part[0], alone[0], weight, bias, *alone[1:], 1, 1e-5, True, True
        )
        for i in (0, 3):
            assert torch.equal(grads[i].chunk(3)[v], lone[i])


def test_a_gradient_of_another_layout():
    x, grad = (torch.randn(6, 5, 4, 4, device=DEVICE) for _ in range(2))
    _, mean, variance = kernels.view_batch_norm(x, None, None, None, 2, 1e-5, False)
    results = [
        kernels.view_batch_norm_backward(
            laid_out(grad, last), x, None, None, None, mean, variance, 2, 1e-5, False, False
        )[0]
        for last in (False, True)
    ]
    assert torch.equal(*results)


def test_float64_and_nothing_run_on_the_definition():
    x = torch.randn(4, 3, 2, dtype=torch.float64, device=DEVICE)
    for input in (x, x[:0].float()):
        args = (input, None, None, None, 2, 1e-5, True)
        for a, b in zip(
            kernels.view_batch_norm(*args), reference.view_batch_norm(*args), strict=True
        ):
            assert torch.equal(a, b) or a.isnan().all()


@each_layout
@each_shape
def test_views_that_int32_cannot_count(shape, last, monkeypatch):
    """The arithmetic of such views, on small ones."""
    found = kernels.tile_shape(513 * 256**2, 64, 256**2, last, kernels.FORWARD_TILES)
    assert found["WIDE"] and not kernels.tile_shape(513 * 256**2, 32, 256**2, last, 6)["WIDE"]
    tensors, _ = arguments(shape, last=last)
    x, weight, bias, residual = on_device(tensors)
    grad, results = torch.randn_like(x), []
    shape_of = kernels.tile_shape
    for wide in (False, True):
        monkeypatch.setattr(kernels, "tile_shape", lambda *a, w=wide: shape_of(*a) | {"WIDE": w})
        out, *found = kernels.view_batch_norm(x, weight, bias, residual, 3, 1e-5, True)
        given = grad, x, out, weight, bias, *found
        results.append(
            [out, *found, *kernels.view_batch_norm_backward(*given, 3, 1e-5, True, True)]
        )
    assert all(map(torch.equal, *results))


def test_more_views_than_a_grid_has_run_on_the_definition():
    x = torch.randn(kernels.MOST_VIEWS + 1, 1, 2, device=DEVICE)
    args = (x, None, None, None, len(x), 1e-5, False)
    for a, b in zip(kernels.view_batch_norm(*args), reference.view_batch_norm(*args), strict=True):
        assert torch.equal(a, b)


def test_nan_stays():
    x = torch.randn(4, 3, 5, device=DEVICE)
    x[0, 1, 0] = torch.nan
    out, *_ = kernels.view_batch_norm(x, None, None, None, 2, 1e-5, True)
    assert out[:2, 1].isnan().all() and out[2:].isfinite().all() and out[:2, 0].isfinite().all()
