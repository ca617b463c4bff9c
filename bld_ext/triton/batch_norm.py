"""view_batch_norm and its backward in one launch each, for float32, bfloat16 and float16; float64
runs on the reference.

A program has one view of a few channels, a slab. It loads a slab whole into its registers, if it
fits, and so reads it once; a larger one it reads in pieces, for the statistics and again for what
depends on them. No program waits for another, so a view's results do not depend on the views beside
it. The last program of a group of channels adds up the gradients of weight and bias.
"""

import contextlib

import torch
import triton
import triton.language as tl

from bld_ext import reference
from bld_ext.triton.device_data import tickets

VECTOR = 4  # elements that a thread loads at once
WARPS = (4, 8, 16)  # of a program, the fewest that hold its slab
FORWARD_TILES, BACKWARD_TILES = 10, 6  # at most in registers, for each of x, and x and dL/dy
MANY_TILES = 12  # forward, for the most warps; with more, registers spill
FEWEST = 2048  # elements of a slab, if there are as many
MOST_VIEWS = 65_535  # along the second axis of a grid
VIEWS_BLOCK = tl.constexpr(32)  # views whose parts are added up at once


@triton.jit
def _tile(start, n, C, S, stride_b, c, ROWS: tl.constexpr, LAST: tl.constexpr):
    """Offsets [ROWS, channels] of images and positions from `start` on in a view; which exist."""
    r = start + tl.arange(0, ROWS)
    if LAST:
        offsets = r[:, None] * C + c[None, :]
    else:
        offsets = ((r // S) * stride_b + r % S)[:, None] + (c * S)[None, :]
    return offsets, (r < n)[:, None] & (c < C)[None, :]


@triton.jit
def _load(
    ptr, start, n, C, S, stride_b, c,
    ROWS: tl.constexpr, LAST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles from `start` on, all of which are on their way before the first is needed."""
    values = ()
    for i in tl.static_range(TILES):
        at, mask = _tile(start + i * ROWS, n, C, S, stride_b, c, ROWS, LAST)
        values = values + (tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _through(
    grads, xs, y_ptr, mean, scale, shift, start, n, C, S, stride_b, c,
    ROWS: tl.constexpr, LAST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The gradient where the ReLU let y through; without y, it is computed again as in `_put`."""
    through = ()
    for i in tl.static_range(TILES):
        if y_ptr is None:
            y = (xs[i] - mean[None, :]) * scale[None, :] + shift[None, :]
        else:
            at, mask = _tile(start + i * ROWS, n, C, S, stride_b, c, ROWS, LAST)
            y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        through = through + (tl.where(y <= 0, 0.0, grads[i]),)
    return through


@triton.jit
def _load_both(
    x_ptr, grad_ptr, y_ptr, mean, scale, shift, start, n, C, S, stride_b, c, RELU: tl.constexpr,
    ROWS: tl.constexpr, LAST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """x and the gradient that arrives at the normalisation."""
    xs = _load(x_ptr, start, n, C, S, stride_b, c, ROWS, LAST, TILES)
    grads = _load(grad_ptr, start, n, C, S, stride_b, c, ROWS, LAST, TILES)
    if RELU:
        grads = _through(
            grads, xs, y_ptr, mean, scale, shift, start, n, C, S, stride_b, c, ROWS, LAST, TILES
        )
    return xs, grads


@triton.jit
def _statistics(xs, start, n, C, c, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Mean and Σ (x - mean)² of the values in these tiles, and how many of a channel there are."""
    count = tl.minimum(n - start, ROWS * TILES)
    total = xs[0]
    for i in tl.static_range(1, TILES):
        total += xs[i]
    mean = tl.sum(total.to(tl.float64), 0) / count
    rounded = mean.to(tl.float32)[None, :]
    squares = tl.zeros_like(total)
    for i in tl.static_range(TILES):
        r = start + i * ROWS + tl.arange(0, ROWS)
        apart = tl.where((r < n)[:, None] & (c < C)[None, :], xs[i] - rounded, 0.0)
        squares += apart * apart
    return mean, tl.sum(squares.to(tl.float64), 0), count


@triton.jit
def _put(
    xs, mean, scale, shift, residual_ptr, y_ptr, start, n, C, S, stride_b, c,
    RELU: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write y of these tiles."""
    for i in tl.static_range(TILES):
        at, mask = _tile(start + i * ROWS, n, C, S, stride_b, c, ROWS, LAST)
        y = (xs[i] - mean[None, :]) * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)  # nan stays
        tl.store(y_ptr + at, y, mask=mask)


@triton.jit
def forward_kernel(
    x_ptr,  # [V·B, C, S]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    residual_ptr,  # [V·B, C, S]
    y_ptr,  # [V·B, C, S]
    mean_ptr,  # [V, C]
    variance_ptr,  # [V, C]
    n,  # B · S, values of a channel in a view
    C,
    S,
    stride_b,
    eps,
    RELU: tl.constexpr,
    LAST: tl.constexpr,  # the channels are neighbours in memory
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,  # TILES tiles hold the slab
    WIDE: tl.constexpr,  # a view has elements that int32 cannot count
):
    """A pointer that is None leaves its part out."""
    if WIDE:
        C, S, stride_b = tl.cast(C, tl.int64), tl.cast(S, tl.int64), tl.cast(stride_b, tl.int64)
    view = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    x_ptr += view * n * C
    y_ptr += view * n * C
    if residual_ptr is not None:
        residual_ptr += view * n * C

    xs = _load(x_ptr, 0, n, C, S, stride_b, c, ROWS, LAST, TILES)
    mean, squares, count = _statistics(xs, 0, n, C, c, ROWS, TILES)
    if not WHOLE:
        for start in range(ROWS * TILES, n, ROWS * TILES):
            xs = _load(x_ptr, start, n, C, S, stride_b, c, ROWS, LAST, TILES)
            more_mean, more_squares, more = _statistics(xs, start, n, C, c, ROWS, TILES)
            apart, share = more_mean - mean, more.to(tl.float64) / (count + more)
            squares += more_squares + apart * apart * share * count
            mean += apart * share
            count += more
    variance = (squares / n).to(tl.float32)
    mean = mean.to(tl.float32)
    tl.store(mean_ptr + view * C + c, mean, mask=c < C)
    tl.store(variance_ptr + view * C + c, variance, mask=c < C)

    scale = (1.0 / tl.sqrt(variance.to(tl.float64) + eps)).to(tl.float32)
    shift = tl.zeros([CHANNELS], tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=c < C, other=0.0)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask=c < C, other=0.0)
    if WHOLE:
        _put(xs, mean, scale, shift, residual_ptr, y_ptr, 0, n, C, S, stride_b, c,
             RELU, ROWS, LAST, TILES)  # fmt: skip
    else:
        for start in range(0, n, ROWS * TILES):
            xs = _load(x_ptr, start, n, C, S, stride_b, c, ROWS, LAST, TILES)
            _put(xs, mean, scale, shift, residual_ptr, y_ptr, start, n, C, S, stride_b, c,
                 RELU, ROWS, LAST, TILES)  # fmt: skip


@triton.jit
def _add_products(grads, xs, mean, total, product, TILES: tl.constexpr):
    """Add up g and g · (x - mean); what does not exist has g = 0."""
    for i in tl.static_range(TILES):
        total += grads[i]
        product += grads[i] * (xs[i] - mean[None, :])
    return total, product


@triton.jit
def _put_gradients(
    grads, xs, mean, average, slope, scale, grad_x_ptr, grad_residual_ptr,
    start, n, C, S, stride_b, c,
    ROWS: tl.constexpr, LAST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write dL/dx of these tiles."""
    for i in tl.static_range(TILES):
        at, mask = _tile(start + i * ROWS, n, C, S, stride_b, c, ROWS, LAST)
        apart = xs[i] - mean[None, :]
        grad_x = (grads[i] - average[None, :] - apart * slope[None, :]) * scale[None, :]
        tl.store(grad_x_ptr + at, grad_x, mask=mask)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + at, grads[i], mask=mask)


@triton.jit
def _sum_over_views(parts_ptr, views, C, c):
    """Σ over the views of a part [V, C], in their order."""
    total = tl.zeros([VIEWS_BLOCK], tl.float64)[:, None] + tl.zeros_like(c).to(tl.float64)[None, :]
    for start in range(0, views, VIEWS_BLOCK):
        view = start + tl.arange(0, VIEWS_BLOCK)
        mask = (view < views)[:, None] & (c < C)[None, :]
        at = view[:, None] * C + c[None, :]
        # .cg: past the first-level cache, which may hold what was there before
        total += tl.load(parts_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0).to(tl.float32)


@triton.jit
def backward_kernel(
    grad_ptr,  # [V·B, C, S], dL/dy
    x_ptr,  # [V·B, C, S]
    y_ptr,  # [V·B, C, S], of a ReLU behind a residual
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    mean_ptr,  # [V, C]
    variance_ptr,  # [V, C]
    grad_x_ptr,  # [V·B, C, S]
    grad_residual_ptr,  # [V·B, C, S]
    grad_weight_ptr,  # [C]
    grad_bias_ptr,  # [C]
    parts_ptr,  # [2, V, C], of dL/dw and dL/db, float64
    tickets_ptr,  # one for each group of channels
    n,  # B · S, values of a channel in a view
    C,
    S,
    stride_b,
    eps,
    RELU: tl.constexpr,
    LAST: tl.constexpr,  # the channels are neighbours in memory
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,  # TILES tiles hold the slab
    WIDE: tl.constexpr,  # a view has elements that int32 cannot count
):
    """A pointer that is None leaves its part out."""
    if WIDE:
        C, S, stride_b = tl.cast(C, tl.int64), tl.cast(S, tl.int64), tl.cast(stride_b, tl.int64)
    view = tl.program_id(1).to(tl.int64)
    views = tl.num_programs(1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    grad_ptr += view * n * C
    x_ptr += view * n * C
    grad_x_ptr += view * n * C
    if y_ptr is not None:
        y_ptr += view * n * C
    if grad_residual_ptr is not None:
        grad_residual_ptr += view * n * C

    mean = tl.load(mean_ptr + view * C + c, mask=c < C, other=0.0)
    variance = tl.load(variance_ptr + view * C + c, mask=c < C, other=0.0)
    inverse = (1.0 / tl.sqrt(variance.to(tl.float64) + eps)).to(tl.float32)
    scale, shift = inverse, tl.zeros([CHANNELS], tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=c < C, other=0.0)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask=c < C, other=0.0)
    xs, grads = _load_both(
        x_ptr, grad_ptr, y_ptr, mean, scale, shift, 0, n, C, S, stride_b, c,
        RELU, ROWS, LAST, TILES,
    )  # fmt: skip
    zeros = tl.zeros([ROWS, CHANNELS], tl.float32)
    total, product = _add_products(grads, xs, mean, zeros, zeros, TILES)
    if not WHOLE:
        for start in range(ROWS * TILES, n, ROWS * TILES):
            xs, grads = _load_both(
                x_ptr, grad_ptr, y_ptr, mean, scale, shift, start, n, C, S, stride_b, c,
                RELU, ROWS, LAST, TILES,
            )  # fmt: skip
            total, product = _add_products(grads, xs, mean, total, product, TILES)
    bias = tl.sum(total.to(tl.float64), 0)
    gain = tl.sum(product.to(tl.float64), 0) * inverse.to(tl.float64)
    tl.store(parts_ptr + view * C + c, gain, mask=c < C)
    tl.store(parts_ptr + (views + view) * C + c, bias, mask=c < C)

    average = (bias / n).to(tl.float32)
    slope = (gain * inverse.to(tl.float64) / n).to(tl.float32)
    if WHOLE:
        _put_gradients(grads, xs, mean, average, slope, scale, grad_x_ptr, grad_residual_ptr,
                       0, n, C, S, stride_b, c, ROWS, LAST, TILES)  # fmt: skip
    else:
        for start in range(0, n, ROWS * TILES):
            xs, grads = _load_both(
                x_ptr, grad_ptr, y_ptr, mean, scale, shift, start, n, C, S, stride_b, c,
                RELU, ROWS, LAST, TILES,
            )  # fmt: skip
            _put_gradients(grads, xs, mean, average, slope, scale, grad_x_ptr, grad_residual_ptr,
                           start, n, C, S, stride_b, c, ROWS, LAST, TILES)  # fmt: skip

    tl.debug_barrier()
    mine = tickets_ptr + tl.program_id(0)
    if tl.atomic_add(mine, 1, sem="acq_rel", scope="gpu") == views - 1:
        tl.store(mine, 0)
        tl.store(grad_weight_ptr + c, _sum_over_views(parts_ptr, views, C, c), mask=c < C)
        behind = parts_ptr + views.to(tl.int64) * C
        tl.store(grad_bias_ptr + c, _sum_over_views(behind, views, C, c), mask=c < C)


def tile_shape(n: int, C: int, S: int, last: bool, most: int) -> dict[str, int | bool]:
    """How a slab of n values in each of a few channels is divided into tiles.

    It depends on a single view alone, and so does the order in which that is added up. `most` tiles
    stay in registers.
    """
    channels = (4 if C <= 16 else 8) if last else 16 if S < 16 else 2
    while n * channels < FEWEST and channels < C:
        channels *= 2
    for warps in WARPS:
        rows = max(1, 32 * warps * VECTOR // channels)
        tiles = triton.cdiv(n, rows)
        limit = MANY_TILES if warps == WARPS[-1] and most == FORWARD_TILES else most
        if tiles <= limit:
            break
    whole = tiles <= limit
    tiles = tiles if whole else most
    return dict(
        ROWS=rows, CHANNELS=channels, TILES=tiles, WHOLE=whole, LAST=last, WIDE=n * C >= 2**31,
        num_warps=warps,
    )  # fmt: skip


class _Layout:
    """How the elements of tensors [V·B, C, *] lie: contiguous, or with the channels last."""

    def __init__(self, input, views, tiles):
        N, self.C = input.shape[:2]
        self.like = reference.like_input(input)
        S = input.numel() // max(1, N * self.C)
        last = S == 1 or not self.like.is_contiguous()
        n = N // views * S
        self.sizes = (n, self.C, S, self.C * S)
        self.tile = tile_shape(n, self.C, S, last, tiles) | {"enable_fp_fusion": False}
        self.groups = triton.cdiv(self.C, self.tile["CHANNELS"])
        self.grid = (self.groups, views)
        on_gpu = input.is_cuda
        self.guard = torch.cuda.device(input.device) if on_gpu else contextlib.nullcontext()

    def __call__(self, tensor):
        if tensor is None or tensor.stride() == self.like.stride():
            return tensor
        return torch.empty_like(self.like).copy_(tensor)


def _runs(input, views):
    """Whether the kernels take such an input."""
    return input.dtype != torch.float64 and input.numel() > 0 and views <= MOST_VIEWS


def view_batch_norm(input, weight, bias, residual, views, eps, relu):
    if not _runs(input, views):
        return reference.view_batch_norm(input, weight, bias, residual, views, eps, relu)
    layout = _Layout(input, views, FORWARD_TILES)
    y = layout.like
    mean = torch.empty(views, layout.C, dtype=torch.float32, device=input.device)
    variance = torch.empty_like(mean)
    with layout.guard:
        forward_kernel[layout.grid](
            layout(input), weight, bias, layout(residual), y, mean, variance,
            *layout.sizes, eps, RELU=relu, **layout.tile,
        )  # fmt: skip
    return y, mean, variance


def view_batch_norm_backward(
    grad_output, input, output, weight, bias, mean, variance, views, eps, relu, residual
):
    if not _runs(input, views):
        return reference.view_batch_norm_backward(
            grad_output, input, output, weight, bias, mean, variance, views, eps, relu, residual
        )
    layout = _Layout(input, views, BACKWARD_TILES)
    grad_x = layout.like
    grad_residual = torch.empty_like(grad_x) if residual else None
    parts = torch.empty(2, views, layout.C, dtype=torch.float64, device=input.device)
    grad_weight = torch.empty(layout.C, dtype=torch.float32, device=input.device)
    grad_bias = torch.empty_like(grad_weight)
    with layout.guard:
        backward_kernel[layout.grid](
            layout(grad_output), layout(input), layout(output), weight, bias, mean, variance,
            grad_x, grad_residual, grad_weight, grad_bias, parts,
            tickets(input.device, layout.groups), *layout.sizes, eps, RELU=relu, **layout.tile,
        )  # fmt: skip
    beside = input.new_empty(0) if grad_residual is None else grad_residual
    return grad_x, grad_weight, grad_bias, beside
