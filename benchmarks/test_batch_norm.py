"""Times BatchNorm by view with ReLU, forward and backward, beside plain PyTorch.

Run it with `pytest benchmarks/test_batch_norm.py --benchmark-enable`. `loop` calls F.batch_norm and
relu view by view. `grouped` moves the views into the channels, [B, V·C, *], which needs copies.
`whole-batch` is one F.batch_norm over all views: a different function, and the least that PyTorch
can do. The bytes are 20 for each element: x and y in the forward pass, and dL/dy, x and dL/dx in
the backward pass.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure
from bld_ext import ops

VIEWS, BATCH = (50, 20) if measure.DEVICE.type == "cuda" else (12, 20)
CASES = {  # channels, side, channels last
    "16x8": (16, 8, False),
    "16x8-last": (16, 8, True),
    "64x8": (64, 8, False),
    "64x8-last": (64, 8, True),
    "512x1": (512, 1, False),
}
CASES = measure.cases(CASES)


def pytorch(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, training=True).relu()


def loop(x, weight, bias):
    return torch.cat([pytorch(view, weight, bias) for view in x.chunk(VIEWS)])


def grouped(x, weight, bias):
    C = x.shape[1]
    views = x.unflatten(0, (VIEWS, -1)).transpose(0, 1).flatten(1, 2)  # [B, V·C, *]
    y = pytorch(views, weight.repeat(VIEWS), bias.repeat(VIEWS))
    return y.unflatten(1, (VIEWS, C)).transpose(0, 1).flatten(0, 1)


def ours(x, weight, bias):
    return ops.view_batch_norm(x, weight, bias, views=VIEWS, relu=True)[0]


IMPLEMENTATIONS = {
    "loop": loop,
    "grouped": grouped,
    "compile-grouped": grouped,
    "whole-batch": pytorch,
    "ours": ours,
}


def both_passes(function, x, weight, bias, upstream):
    out = function(x, weight, bias)
    return out, *torch.autograd.grad(out, (x, weight, bias), upstream)


def make_inputs(C, side, last, seed):
    """x, weight, bias and dL/dy."""
    on = dict(generator=torch.Generator(measure.DEVICE).manual_seed(seed), device=measure.DEVICE)
    layout = torch.channels_last if last else torch.contiguous_format
    x, upstream = (
        torch.randn(VIEWS * BATCH, C, side, side, **on).contiguous(memory_format=layout)
        for _ in range(2)
    )
    weight, bias = torch.rand(2, C, **on)
    exact = (t.double() for t in (x, weight, bias))
    # where y is all but 0 before the ReLU, rounding decides whether a gradient passes
    upstream *= ops.view_batch_norm(*exact, views=VIEWS)[0].abs() > 1e-5
    return [*(t.requires_grad_() for t in (x, weight, bias)), upstream]


def check(function, arguments):
    """Compare with float64, computed view by view."""
    x, weight, bias, upstream = (t.detach().double() for t in arguments)
    exact = both_passes(loop, *(t.requires_grad_() for t in (x, weight, bias)), upstream)
    for found, wanted in zip(both_passes(function, *arguments), exact, strict=True):
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op, name", [("norm", name) for name in IMPLEMENTATIONS])
def test_op(benchmark, case, op, name):
    C, side, last = CASES[case]
    function = IMPLEMENTATIONS[name]
    if name.startswith("compile"):
        if not benchmark.enabled:
            pytest.skip("takes a compilation, and is timed only")
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True)
    elements = VIEWS * BATCH * C * side * side
    nbytes = 20 * elements
    sets = [make_inputs(C, side, last, seed) for seed in range(measure.copies(nbytes))]
    if name != "whole-batch":
        check(function, sets[0])
    benchmark.group = f"{op} {case}"
    calls = [functools.partial(both_passes, function, *arguments) for arguments in sets]
    seconds = measure.time_calls(benchmark, calls, nbytes)
    measure.record(benchmark, seconds, nbytes, calls[0], copied=elements)
