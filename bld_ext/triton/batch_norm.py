"""view_batch_norm and its backward in one launch each, for float32, bfloat16 and float16; float64
runs on the reference.

A program has one view of a few channels: it reads it for the mean, for the variance and for the
output, the second and third time from the cache. No program waits for another, so a view's results
do not depend on the views beside it.
"""

import contextlib

import torch
import triton
import triton.language as tl

from bld_ext import reference

WARPS = 4


@triton.jit
def _positions(start, B, C, S, stride_b, stride_c, stride_s, c, ROWS: tl.constexpr):
    """Offsets [ROWS, channels] of images and positions from `start` on in a view; which exist."""
    r = start + tl.arange(0, ROWS)
    offsets = (r // S) * stride_b + (r % S) * stride_s
    return offsets[:, None] + (c * stride_c)[None, :], (r < B * S)[:, None] & (c < C)[None, :]


@triton.jit
def _incoming(grad_ptr, y_ptr, at, mask):
    """The gradient where the ReLU let its input through."""
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(y <= 0, 0.0, grad)
    return grad


@triton.jit
def forward_kernel(
    x_ptr,  # [V·B, C, S]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    residual_ptr,  # [V·B, C, S]
    y_ptr,  # [V·B, C, S]
    mean_ptr,  # [V, C]
    variance_ptr,  # [V, C]
    B,
    C,
    S,
    stride_b,
    stride_c,
    stride_s,
    eps,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A pointer that is None leaves its part out."""
    view = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first, n = view * B * stride_b, B * S

    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, n, ROWS):
        at, mask = _positions(start, B, C, S, stride_b, stride_c, stride_s, c, ROWS)
        total += tl.load(x_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
    mean = (tl.sum(total.to(tl.float64), 0) / n).to(tl.float32)

    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, n, ROWS):
        at, mask = _positions(start, B, C, S, stride_b, stride_c, stride_s, c, ROWS)
        x = tl.load(x_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
        apart = tl.where(mask, x - mean[None, :], 0.0)
        squares += apart * apart
    variance = (tl.sum(squares.to(tl.float64), 0) / n).to(tl.float32)
    tl.store(mean_ptr + view * C + c, mean, mask=c < C)
    tl.store(variance_ptr + view * C + c, variance, mask=c < C)

    scale = (1.0 / tl.sqrt(variance.to(tl.float64) + eps)).to(tl.float32)
    shift = tl.zeros([CHANNELS], tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=c < C, other=0.0)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask=c < C, other=0.0)
    for start in range(0, n, ROWS):
        at, mask = _positions(start, B, C, S, stride_b, stride_c, stride_s, c, ROWS)
        x = tl.load(x_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)  # nan stays
        tl.store(y_ptr + first + at, y, mask=mask)


@triton.jit
def backward_kernel(
    grad_ptr,  # [V·B, C, S], dL/dy
    x_ptr,  # [V·B, C, S]
    y_ptr,  # [V·B, C, S], of a ReLU
    weight_ptr,  # [C]
    mean_ptr,  # [V, C]
    variance_ptr,  # [V, C]
    grad_x_ptr,  # [V·B, C, S]
    grad_residual_ptr,  # [V·B, C, S]
    parts_ptr,  # [2, V, C], of dL/dw and dL/db, float64
    B,
    C,
    S,
    stride_b,
    stride_c,
    stride_s,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A pointer that is None leaves its part out."""
    view = tl.program_id(1).to(tl.int64)
    views = tl.num_programs(1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first, n = view * B * stride_b, B * S
    mean = tl.load(mean_ptr + view * C + c, mask=c < C, other=0.0)
    variance = tl.load(variance_ptr + view * C + c, mask=c < C, other=0.0)
    inverse = (1.0 / tl.sqrt(variance.to(tl.float64) + eps)).to(tl.float32)

    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, n, ROWS):
        at, mask = _positions(start, B, C, S, stride_b, stride_c, stride_s, c, ROWS)
        grad = _incoming(grad_ptr + first, None if y_ptr is None else y_ptr + first, at, mask)
        x = tl.load(x_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
        total += grad
        product += grad * (x - mean[None, :])
    bias = tl.sum(total.to(tl.float64), 0)
    gain = tl.sum(product.to(tl.float64), 0) * inverse.to(tl.float64)
    tl.store(parts_ptr + view * C + c, gain, mask=c < C)
    tl.store(parts_ptr + (views + view) * C + c, bias, mask=c < C)

    average = (bias / n).to(tl.float32)
    slope = (gain * inverse.to(tl.float64) / n).to(tl.float32)
    scale = inverse
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=c < C, other=0.0)
    for start in range(0, n, ROWS):
        at, mask = _positions(start, B, C, S, stride_b, stride_c, stride_s, c, ROWS)
        grad = _incoming(grad_ptr + first, None if y_ptr is None else y_ptr + first, at, mask)
        x = tl.load(x_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
        apart = x - mean[None, :]
        grad_x = (grad - average[None, :] - apart * slope[None, :]) * scale[None, :]
        tl.store(grad_x_ptr + first + at, grad_x, mask=mask)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + first + at, grad, mask=mask)


def tile_shape(S: int, channels_last: bool) -> tuple[int, int]:
    """(images and positions, channels) of a tile: neighbours in memory side by side."""
    return (64, 16) if channels_last or S < 64 else (512, 2)


class _Layout:
    """How the elements of tensors [V·B, C, *] lie: contiguous, or with the channels last."""

    def __init__(self, input, views):
        N, self.C = input.shape[:2]
        self.like = reference.like_input(input)
        self.channels_last = not self.like.is_contiguous()
        self.B, self.S = N // views, input.numel() // max(1, N * self.C)
        strides = (1, self.C) if self.channels_last else (self.S, 1)
        self.sizes = (self.B, self.C, self.S, self.C * self.S, *strides)
        self.rows, self.channels = tile_shape(self.S, self.channels_last)
        self.grid = (triton.cdiv(self.C, self.channels), views)
        on_gpu = input.is_cuda
        self.guard = torch.cuda.device(input.device) if on_gpu else contextlib.nullcontext()

    def __call__(self, tensor):
        if tensor is None or tensor.stride() == self.like.stride():
            return tensor
        return torch.empty_like(self.like).copy_(tensor)

    @property
    def tile(self):
        return dict(ROWS=self.rows, CHANNELS=self.channels, num_warps=WARPS, enable_fp_fusion=False)


def view_batch_norm(input, weight, bias, residual, views, eps, relu):
    if input.dtype == torch.float64 or input.numel() == 0:
        return reference.view_batch_norm(input, weight, bias, residual, views, eps, relu)
    layout = _Layout(input, views)
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
    grad_output, input, output, weight, mean, variance, views, eps, residual
):
    if input.dtype == torch.float64 or input.numel() == 0:
        return reference.view_batch_norm_backward(
            grad_output, input, output, weight, mean, variance, views, eps, residual
        )
    layout = _Layout(input, views)
    grad_x = layout.like
    grad_residual = torch.empty_like(grad_x) if residual else None
    parts = torch.empty(2, views, layout.C, dtype=torch.float64, device=input.device)
    with layout.guard:
        backward_kernel[layout.grid](
            layout(grad_output), layout(input), layout(output), weight, mean, variance,
            grad_x, grad_residual, parts, *layout.sizes, eps, **layout.tile,
        )  # fmt: skip
    grad_weight, grad_bias = parts.sum(1).to(torch.float32).unbind()
    beside = input.new_empty(0) if grad_residual is None else grad_residual
    return grad_x, grad_weight.clone(), grad_bias.clone(), beside
