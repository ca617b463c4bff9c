"""view_batch_norm: parity with float64, gradients, layouts, what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from bld_ext import backend, ops, reference

SHAPES = {  # of one view
    "rows": (5, 7),
    "length": (3, 5, 9),
    "planes": (4, 3, 5, 6),
    "wide": (4, 40, 4, 4),
    "sixteen": (3, 16, 8, 8),
    "volume": (2, 5, 2, 3, 4),
    "one-position": (6, 33, 1, 1),
    "one-image": (1, 3, 8, 8),
}
PARTS = {  # weight and bias, residual, relu
    "plain": (False, False, False),
    "affine": (True, False, False),
    "relu": (True, False, True),
    "residual": (True, True, False),
    "everything": (True, True, True),
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_parts = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_layout = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])


def laid_out(x, last):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def arguments(shape, parts=(True, True, True), dtype=torch.float32, views=3, last=False):
    affine, residual, relu = parts
    B, C, *spatial = shape

    def values():
        return laid_out(torch.randn(views * B, C, *spatial, dtype=torch.float64).to(dtype), last)

    compute = reference.compute_dtype(dtype)
    weight, bias = (torch.rand(C, dtype=compute) + 0.5 for _ in range(2)) if affine else (None,) * 2
    x = values() * 2 + 3
    return [x, weight, bias, values() if residual else None], dict(views=views, relu=relu)


def expected(tensors, views, relu, eps=1e-5):
    """In float64, view by view, with PyTorch's own batch_norm."""
    x, weight, bias, residual = (t if t is None else t.double() for t in tensors)
    parts = [
        F.batch_norm(view, None, None, weight, bias, training=True, eps=eps)
        for view in x.chunk(views)
    ]
    y = torch.cat(parts)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def differentiable(tensors):
    return [t if t is None else t.detach().clone().requires_grad_() for t in tensors]


def gradients(out, tensors, weight):
    """dL/dx and so on of L = Σ weight · out; the weights are such that no sum cancels."""
    given = [t for t in tensors if t is not None]
    return torch.autograd.grad((out * weight).sum(), given)


@each_layout
@each_dtype
@each_parts
@each_shape
def test_parity_of_output_statistics_and_gradients(shape, parts, dtype, last):
    tensors, options = arguments(shape, parts, dtype, last=last)
    inputs, exact = differentiable(tensors), differentiable(tensors)
    out, mean, variance = ops.view_batch_norm(*inputs, **options)
    target = expected(exact, **options)
    tolerance = TOLERANCE[dtype]
    close = dict(rtol=tolerance, atol=tolerance * 8, check_dtype=False)
    torch.testing.assert_close(out, target, **close)
    assert out.dtype == dtype and out.stride() == tensors[0].stride()
    views = tensors[0].double().unflatten(0, (3, -1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mean, views.mean(2), **close)
    torch.testing.assert_close(variance, views.var(2, correction=0), **close)

    weight = laid_out(torch.randn(out.shape, dtype=torch.float64), last)
    # the mask of a relu is that of the rounded output
    sure = target.abs() > 8 * tolerance
    weight = weight.where(sure, 0).to(dtype).double()
    found = gradients(out.double(), inputs, weight)
    for got, wanted in zip(found, gradients(target, exact, weight), strict=True):
        scale = wanted.abs().max().item() + 1
        torch.testing.assert_close(
            got.double(), wanted.double(), rtol=4 * tolerance, atol=8 * tolerance * scale
        )


@each_layout
@each_shape
def test_a_view_does_not_depend_on_the_others_bit_for_bit(shape, last):
    tensors, options = arguments(shape, last=last)
    x, weight, bias, residual = differentiable(tensors)
    whole = ops.view_batch_norm(x, weight, bias, residual, **options)
    upstream = torch.randn_like(x)
    grads = torch.autograd.grad(whole[0], (x, residual), upstream)
    for v in range(3):
        view, beside, part = (t.detach().chunk(3)[v] for t in (x, residual, upstream))
        view.requires_grad_(), beside.requires_grad_()
        alone = ops.view_batch_norm(view, weight, bias, beside, views=1, relu=True)
        for a, b in zip(whole, alone, strict=True):
            assert torch.equal(a.chunk(3)[v], b)
        parts = torch.autograd.grad(alone[0], (view, beside), part)
        for a, b in zip(grads, parts, strict=True):
            assert torch.equal(a.chunk(3)[v], b)


@each_layout
def test_threads_do_not_change_a_bit(last, with_threads):
    tensors, options = arguments((20, 16, 12, 12), last=last)
    upstream = torch.randn_like(tensors[0])

    def all_of_it():
        inputs = differentiable(tensors)
        out, *statistics = ops.view_batch_norm(*inputs, **options)
        return [out, *statistics, *torch.autograd.grad(out, inputs, upstream)]

    first, *others = with_threads(all_of_it)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(backend("view_batch_norm") != "compiled", reason="no compiled kernel")
def test_registers_do_not_change_a_bit(outputs_by_registers):
    code = """
import hashlib, torch
from bld_ext import ops
torch.manual_seed(0)
digest = hashlib.sha256()
for shape in ((9, 37), (6, 37, 5, 5), (6, 16, 3, 4)):
    for last in (False, True):
        x = torch.rand(shape) * 4
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        x.requires_grad_()
        w, b = torch.rand(2, shape[1]).unbind()
        w.requires_grad_(), b.requires_grad_()
        out, mean, variance = ops.view_batch_norm(x, w, b, views=3, relu=True)
        grads = torch.autograd.grad(out, (x, w, b), torch.rand(x.shape) - 0.5)
        for t in (out, mean, variance, *grads):
            digest.update(t.detach().contiguous().numpy().tobytes())
print(digest.hexdigest())
"""
    assert len(set(outputs_by_registers(code))) == 1


def test_mean_far_from_zero():
    """Where E[x²] - E[x]² would be rounding alone."""
    x = torch.randn(40, 3, 8, 8) + 1e4
    out, mean, variance = ops.view_batch_norm(x, views=2)
    exact = expected([x, None, None, None], 2, False)
    torch.testing.assert_close(out, exact, rtol=1e-3, atol=1e-3, check_dtype=False)
    flat = x.double().unflatten(0, (2, -1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(variance.double(), flat.var(2, correction=0), rtol=1e-6, atol=0)


def test_constant_channels_have_gradients():
    x = torch.ones(4, 2, 3, 3, requires_grad=True)
    out, _, variance = ops.view_batch_norm(x, views=2)
    assert (out == 0).all() and (variance == 0).all()
    (grad,) = torch.autograd.grad(out, x, torch.randn_like(x))
    assert grad.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible_in_its_view(value):
    x = torch.randn(6, 3, 4, 4)
    x[2, 1, 0, 0] = value
    out, *_ = ops.view_batch_norm(x, views=3, relu=True)
    assert out[2:4, 1].isnan().all()
    assert out[:2].isfinite().all() and out[4:].isfinite().all() and out[2:4, 0].isfinite().all()


def test_a_gradient_is_nan_where_the_output_is():
    x = torch.randn(4, 2, 3, requires_grad=True)
    with torch.no_grad():
        x[0, 0, 0] = torch.nan
    out, *_ = ops.view_batch_norm(x, views=2, relu=True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad[:2, 0].isnan().all() and grad[2:].isfinite().all()


@each_parts
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_opcheck(parts, last):
    tensors, options = arguments((3, 5, 4, 4), parts, last=last)
    args = (*differentiable(tensors), options["views"], 1e-5, options["relu"])
    torch.library.opcheck(torch.ops.bld_ext.view_batch_norm.default, args)
    x, weight, bias, _ = tensors
    out, mean, variance = torch.ops.bld_ext.view_batch_norm(*tensors, *args[4:])
    for output in (out, None):
        given = torch.randn_like(x), x, output, weight, bias, mean, variance
        torch.library.opcheck(
            torch.ops.bld_ext.view_batch_norm_backward.default,
            (*given, 3, 1e-5, options["relu"], True),
        )


@each_parts
def test_gradcheck(parts):
    tensors, options = arguments((2, 3, 3, 2), parts, torch.float64, views=2)
    inputs = differentiable(tensors)
    given = [t for t in inputs if t is not None]

    def output(*given):
        values = iter(given)
        args = [t if t is None else next(values) for t in inputs]
        return ops.view_batch_norm(*args, **options)[0]

    assert torch.autograd.gradcheck(output, given)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3], ids=["input", "weight", "bias", "residual"])
def test_only_wanted_gradients(frozen):
    tensors, options = arguments((3, 4, 5))
    inputs = differentiable(tensors)
    inputs[frozen].requires_grad_(False)
    out, *_ = ops.view_batch_norm(*inputs, **options)
    out.sum().backward()
    assert [t.grad is not None for t in inputs] == [i != frozen for i in range(4)]


@each_layout
@each_shape
def test_results_may_be_changed_in_place(shape, last):
    """As the ReLU behind a BatchNorm does."""
    tensors, options = arguments(shape, (True, False, False), last=last)
    found, wanted = (differentiable(tensors)[:3] for _ in range(2))
    out, *_ = ops.view_batch_norm(*found, views=options["views"])
    out.relu_().sum().backward()
    ops.view_batch_norm(*wanted, **options | dict(relu=True))[0].sum().backward()
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.grad, b.grad)
    assert not out._is_view()


def test_strides_that_are_neither():
    turned, sliced = torch.randn(6, 5, 4, 3).transpose(2, 3), torch.randn(6, 10, 4, 3)[:, ::2]
    for x in (turned, sliced, torch.randn(6, 1, 4, 3).expand(6, 5, 4, 3)):
        out, *_ = ops.view_batch_norm(x, views=2)
        same, *_ = ops.view_batch_norm(x.contiguous(), views=2)
        assert torch.equal(out, same)
    assert ops.view_batch_norm(torch.randn(0, 3, 2), views=2)[0].shape == (0, 3, 2)


def test_a_gradient_of_another_layout():
    x = torch.randn(6, 5, 4, 4, requires_grad=True)
    upstream = torch.randn(6, 5, 4, 4)
    grads = [
        torch.autograd.grad(ops.view_batch_norm(x, views=2)[0], x, laid_out(upstream, last))[0]
        for last in (False, True)
    ]
    assert torch.equal(*grads)


def test_compiles_whole():
    tensors, options = arguments((3, 4, 5, 5))

    def loss(*tensors):
        return ops.view_batch_norm(*tensors, **options)[0].square().sum()

    inputs = differentiable(tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), inputs)
    for a, b in zip(found, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused():
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    out, *_ = ops.view_batch_norm(x, views=2)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_other_modes_of_differentiation_are_refused(name):
    given = dict(input=torch.randn(4, 3, 2), weight=torch.ones(3), bias=torch.zeros(3))
    given["residual"] = given["input"].clone()

    def output(value):
        return ops.view_batch_norm(**given | {name: value})[0].sum()

    value = given[name]
    with pytest.raises(NotImplementedError, match=f"^{name}: .* forward-mode"):
        torch.func.jvp(output, (value,), (torch.ones_like(value),))
    with pytest.raises(NotImplementedError, match=f"^{name}: .* torch.func.grad"):
        torch.func.grad(output)(value)


def test_exports_for_any_number_of_images():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return ops.view_batch_norm(x)[0]

    shapes = ({0: torch.export.Dim.DYNAMIC},)
    for strict in (False, True):
        program = torch.export.export(
            Norm(), (torch.randn(6, 4, 3),), dynamic_shapes=shapes, strict=strict
        )
        x = torch.randn(9, 4, 3)
        assert torch.equal(program.module()(x), Norm()(x))


def test_nothing_unwritten(poison):
    for shape in SHAPES.values():
        for last in (False, True):
            tensors, options = arguments(shape, last=last)
            inputs = differentiable(tensors)
            results = ops.view_batch_norm(*inputs, **options)
            grads = torch.autograd.grad(results[0].sum(), inputs)
            assert all(t.isfinite().all() for t in (*results, *grads))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("input", dict(input=torch.zeros(6, 4, dtype=torch.int64))),
        ("input", dict(input=torch.zeros(6))),
        ("weight", dict(weight=torch.ones(3))),
        ("weight", dict(weight=torch.ones(4, dtype=torch.float64))),
        ("bias", dict(bias=torch.ones(4, 1))),
        ("residual", dict(residual=torch.ones(6, 3))),
        ("residual", dict(residual=torch.ones(6, 4, dtype=torch.float64))),
        ("views", dict(views=4)),
        ("views", dict(views=0)),
        ("views", dict(views=2.0)),
        ("eps", dict(eps=-1e-5)),
        ("eps", dict(eps=float("nan"))),
    ],
)
def test_bad_arguments(name, change):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        ops.view_batch_norm(**dict(input=torch.zeros(6, 4), views=2) | change)


def test_input_that_is_no_tensor():
    with pytest.raises(TypeError, match="^input: expected a tensor"):
        ops.view_batch_norm([1.0])
