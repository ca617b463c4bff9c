"""Every op of bld_ext in plain PyTorch: its definition, its kernel where there is no faster one,
and the oracle of every parity test. Any device; any float dtype, computed in float32, or float64 if
given.

Symbols follow the paper (Fini et al., "Online Continual Learning under Extreme Memory Constraints",
ECCV 2020): logits z of all heads side by side, oldest head first; bank ŷ; temperature τ; balance λ.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bld_ext.philox import below, between, philox, seed_key, uniform


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits of `dtype` are computed, and that of the bank."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- multi-head distillation: logits [N, C, *], bank [N, C_old, *], labels [N, *] ----


def head_softmax(logits: Tensor, head_sizes: Sequence[int], temperature: float | Tensor) -> Tensor:
    """ŷ = softmax(z / τ) inside each of the leading heads: [N, sum(head_sizes), *]."""
    return over_heads(logits, head_sizes, temperature, torch.softmax)


def over_heads(logits, head_sizes, temperature, function) -> Tensor:
    """function(z / τ) of each leading head, shifted by its maximum first so that τ → 0 is safe."""
    z = logits[:, : sum(head_sizes)].to(compute_dtype(logits.dtype))
    if isinstance(temperature, Tensor):
        valid = (temperature > 0) & temperature.isfinite()
        temperature = torch.where(valid, temperature, torch.nan)
    heads = z.split(list(head_sizes), 1) if head_sizes else ()
    shifted = ((head - head.detach().amax(1, keepdim=True)) / temperature for head in heads)
    return torch.cat([z[:, :0], *(function(head, 1) for head in shifted)], 1)


def distillation_loss(
    logits: Tensor,
    bank: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """L_d = -Σ ŷ · log softmax(z / τ), summed over everything (eq. 2), and dL_d/dz.

    The gradient is (p - ŷ) / τ with p from `head_softmax`, which filled the bank: where no logit
    has moved it is exactly zero. Logits behind the old heads get zero.
    """
    old = bank.shape[1]
    log_p = over_heads(logits, head_sizes, temperature, torch.log_softmax)
    grad = logits.new_zeros(logits.shape, dtype=bank.dtype)
    grad[:, :old] = (head_softmax(logits, head_sizes, temperature) - bank) / temperature
    # ŷ = 0 contributes nothing, even where log p = -inf
    return -torch.where(bank == 0, 0, bank * log_p).sum(), grad


def new_task_loss(logits: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """L_t = -Σ log softmax(z)_y of the last `classes` logits, summed (eq. 1), and dL_t/dz.

    A label that is no class makes the loss, and the gradient of its image, nan.
    """
    z = logits[:, -classes:].to(compute_dtype(logits.dtype))
    labels = labels.unsqueeze(1)
    poison = torch.where((labels >= 0) & (labels < classes), 0, torch.nan)
    labels = labels.clamp(0, classes - 1)
    loss = (poison - z.log_softmax(1).gather(1, labels)).sum()
    one_hot = torch.zeros_like(z).scatter_(1, labels, 1)
    grad = logits.new_zeros(logits.shape, dtype=z.dtype)
    grad[:, -classes:] = z.softmax(1) - one_hot + poison
    return loss, grad


def warm_up_loss(
    logits: Tensor,
    labels: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1: L_t of the last head, the bank of the others, and dL_t/dz."""
    loss, grad = new_task_loss(logits, labels, head_sizes[-1])
    return loss, head_softmax(logits, head_sizes[:-1], temperature), grad


def joint_loss(
    logits: Tensor,
    labels: Tensor,
    bank: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Algorithm 2: L_t of the last head, L_d of the others, dL_t/dz and dL_d/dz."""
    new, new_grad = new_task_loss(logits, labels, head_sizes[-1])
    old, old_grad = distillation_loss(logits, bank, head_sizes[:-1], temperature)
    return new, old, new_grad, old_grad


# ---- per-layer norms, balance and update: tensors[i] belongs to layer layers[i] ----


def layer_norms(tensors: Sequence[Tensor], layers: Sequence[int], num_layers: int) -> Tensor:
    """L2 norm of each layer over all its tensors, [L], accumulated in float64."""
    dtype = compute_dtype(tensors[0].dtype)
    squares = tensors[0].new_zeros(num_layers, dtype=torch.float64)
    for tensor, l in zip(tensors, layers, strict=True):
        squares[l] += torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2
    return squares.sqrt().to(dtype)


def balance_factors(norms: Tensor, reference_norms: Tensor, balance: Tensor) -> Tensor:
    """λ‖G_w‖ / ‖G_d‖ per layer, [L]; 0 where finite norms have no finite ratio, as for ‖G_d‖ = 0.

    A norm that is not finite stays visible: the factor is not finite either. A λ that is negative
    or not finite makes it nan.
    """
    balance = torch.where((balance >= 0) & balance.isfinite(), balance.double(), torch.nan)
    factors = (balance * reference_norms.double() / norms.double()).to(norms.dtype)
    finite = reference_norms.isfinite() & balance.isfinite()
    factors = torch.where(finite & ~factors.isfinite(), 0, factors)
    return torch.where(norms.isfinite(), factors, torch.nan)


def balance_layers_(
    grads: Sequence[Tensor], layers: Sequence[int], reference_norms: Tensor, balance: Tensor
) -> tuple[Tensor, Tensor]:
    """G_d[l] ← λ‖G_w[l]‖/‖G_d[l]‖ · G_d[l], in place. Returns the factors and ‖G_d‖, each [L]."""
    norms = layer_norms(grads, layers, len(reference_norms))
    factors = balance_factors(norms, reference_norms, balance)
    for grad, l in zip(grads, layers, strict=True):
        grad.mul_(factors[l])
    return factors, norms


def balanced_sgd_(
    params: Sequence[Tensor],
    distill_grads: Sequence[Tensor],
    new_grads: Sequence[Tensor],
    layers: Sequence[int],
    reference_norms: Tensor,
    balance: Tensor,
    lr: Tensor,
) -> tuple[Tensor, Tensor]:
    """θ ← θ - α (λ‖G_w‖/‖G_d‖ · G_d + G_t), in place; the gradients are only read."""
    norms = layer_norms(distill_grads, layers, len(reference_norms))
    factors = balance_factors(norms, reference_norms, balance)
    for param, old, new, l in zip(params, distill_grads, new_grads, layers, strict=True):
        dtype = compute_dtype(param.dtype)
        step = lr.to(dtype) * (factors[l].to(dtype) * old.to(dtype) + new.to(dtype))
        param.copy_(param.to(dtype) - step)
    return factors, norms


# ---- seeded augmentation: images [N, C, H, W] -> views [V·N, C, H, W] ----

GEOMETRY, ZOOM, COLOR = 0, 1, 2  # the op word of the Philox counter
GRAY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision rounds it
MEAN_SCALE = 2.0**30


class Policy(NamedTuple):
    """What `augment` draws from and applies; a flat list of floats in the op's schema."""

    crop_padding: float = 0  # pixels
    flip: float = 0  # probability
    rotation: float = 0  # ± degrees
    scale_min: float = 1
    scale_max: float = 1
    brightness: float = 0  # factors in 1 ± this
    contrast: float = 0
    saturation: float = 0
    hue: float = 0  # ± turns of the colour wheel
    mean: tuple[float, ...] = ()  # normalise: (x - mean) / std per channel
    std: tuple[float, ...] = ()

    def pack(self) -> list[float]:
        return [*map(float, self[:9]), *self.mean, *self.std]

    @classmethod
    def unpack(cls, values: Sequence[float]) -> "Policy":
        channels = (len(values) - 9) // 2
        return cls(*values[:9], tuple(values[9 : 9 + channels]), tuple(values[9 + channels :]))


class ViewParameters(NamedTuple):
    """What was drawn for each image of each view, every field [V, N]."""

    left: Tensor  # int64: columns of the padded image left of the crop
    top: Tensor  # int64: rows above it
    flip: Tensor  # bool
    angle: Tensor  # degrees, clockwise as displayed
    scale: Tensor
    brightness: Tensor  # factors
    contrast: Tensor
    saturation: Tensor
    hue: Tensor  # turns


def view_parameters(
    policy: Policy, seed: Tensor, step: Tensor, views: Sequence[int], indices: Tensor
) -> ViewParameters:
    """The parameters of the views of the images `indices` [N] at one step: a pure function."""
    view = torch.cat([indices.new_empty(0, 1), *(indices.new_full((1, 1), v) for v in views)])
    key = seed_key(seed)

    def words(op):
        return philox((indices.unsqueeze(0), view, step, op), key)  # four of [V, N]

    shift = 2 * int(policy.crop_padding) + 1
    left, top, flip, angle = words(GEOMETRY)
    factors = (policy.brightness, policy.contrast, policy.saturation)
    *color, hue = words(COLOR)
    return ViewParameters(
        below(left, shift),
        below(top, shift),
        uniform(flip) < policy.flip,
        between(angle, -policy.rotation, policy.rotation),
        between(words(ZOOM)[0], policy.scale_min, policy.scale_max),
        *(between(w, 1 - f, 1 + f) for w, f in zip(color, factors, strict=True)),
        between(hue, -policy.hue, policy.hue),
    )


def augment(
    images: Tensor,
    policy: Sequence[float],
    seed: Tensor,
    step: Tensor,
    views: Sequence[int],
    indices: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Views of images: crop from the padded image, flip, rotate and scale about the centre as one
    inverse matrix and one bilinear resample; brightness, contrast, saturation, hue, each clamped to
    [0, 1]; normalise. View v of image n is row v·N + n.
    """
    settings = Policy.unpack(policy)
    p = view_parameters(settings, seed, step, views, indices)
    p = ViewParameters(*(field.flatten() for field in p))  # [V·N]
    work = compute_dtype(images.dtype)
    x = images.to(work) / 255 if images.dtype == torch.uint8 else images.to(work)
    x = resample(x, p, settings)
    x = recolor(x, p, settings)
    if settings.mean:
        channels = zip(x.unbind(1), settings.mean, settings.std, strict=True)
        x = torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(dtype).contiguous(memory_format=layout)


def resample(images: Tensor, p: ViewParameters, settings: Policy) -> Tensor:
    """Bilinear samples of each image at the inverse map of every output pixel, zero outside."""
    N, C, H, W = images.shape
    V = len(p.angle) // max(N, 1)
    if settings[:5] == Policy()[:5]:
        return images.repeat(V, 1, 1, 1)
    x = torch.arange(W, device=images.device, dtype=images.dtype) - (W - 1) / 2  # from the centre
    y = torch.arange(H, device=images.device, dtype=images.dtype).unsqueeze(1) - (H - 1) / 2
    theta = p.angle.double() * (math.pi / 180)
    cos, sin = (f(theta) / p.scale.double() for f in (torch.cos, torch.sin))
    cos, sin = (t.to(images.dtype).view(-1, 1, 1) for t in (cos, sin))
    mirror = torch.where(p.flip, -1, 1).view(-1, 1, 1)
    padding = int(settings.crop_padding)
    source_x = mirror * (cos * x + sin * y) + (W - 1) / 2 + (p.left - padding).view(-1, 1, 1)
    source_y = cos * y - sin * x + (H - 1) / 2 + (p.top - padding).view(-1, 1, 1)

    column, row = source_x.floor(), source_y.floor()
    right, low = source_x - column, source_y - row  # weights of the right and lower neighbours
    column, row = column.long(), row.long()  # [V·N, H, W]
    pixels = images.reshape(N, C, H * W).repeat(V, 1, 1)  # [V·N, C, H·W]
    total = 0
    for dy, wy in ((0, 1 - low), (1, low)):
        for dx, wx in ((0, 1 - right), (1, right)):
            xs, ys = column + dx, row + dy
            inside = (xs >= 0) & (xs < W) & (ys >= 0) & (ys < H)
            where = (ys.clamp(0, H - 1) * W + xs.clamp(0, W - 1)).flatten(1).unsqueeze(1)
            tap = pixels.gather(2, where.expand(-1, C, -1)).view(-1, C, H, W)
            total = total + tap * torch.where(inside, wx * wy, 0).unsqueeze(1)
    return total


def recolor(x: Tensor, p: ViewParameters, settings: Policy) -> Tensor:
    """Brightness, contrast, saturation, hue, in this order, as torchvision defines each."""

    def blend(x, other, factor):
        factor = factor.to(x.dtype).view(-1, 1, 1, 1)
        return (factor * x + (1 - factor) * other).clamp(0, 1)

    if settings.brightness:
        x = blend(x, 0, p.brightness)
    if settings.contrast:
        # in integers the mean does not depend on the order of summation, so neither on the batch
        levels = (gray(x).double() * MEAN_SCALE).round().long().sum((1, 2, 3), keepdim=True)
        mean = levels.double() / (MEAN_SCALE * x.shape[2] * x.shape[3])
        x = blend(x, mean.to(x.dtype), p.contrast)
    if x.shape[1] == 3 and settings.saturation:
        x = blend(x, gray(x), p.saturation)
    if x.shape[1] == 3 and settings.hue:
        x = shift_hue(x, p.hue.to(x.dtype).view(-1, 1, 1))
    return x


def gray(x: Tensor) -> Tensor:
    """Luma of [N, 3, H, W] as [N, 1, H, W]; images of one channel are their own."""
    if x.shape[1] == 1:
        return x
    return (GRAY[0] * x[:, 0] + GRAY[1] * x[:, 1] + GRAY[2] * x[:, 2]).unsqueeze(1)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """RGB to HSV, hue plus `turns`, and back."""
    r, g, b = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sextant = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    hue = sextant + 6 * turns

    def channel(n):
        k = torch.remainder(n + hue, 6)
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], 1)
