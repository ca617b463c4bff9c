"""Every op of bld_ext in plain PyTorch.

Each function defines an op, runs where there is no faster kernel, and is the oracle of the parity
tests. It takes any device and float dtype, and computes in float32, or in float64 for float64.

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
    """Return the dtype in which inputs of `dtype` are computed, which is also the bank's."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- multi-head distillation: logits [N, C, *], bank [N, C_old, *], labels [N, *] ----


def head_softmax(logits: Tensor, head_sizes: Sequence[int], temperature: float | Tensor) -> Tensor:
    """Return ŷ = softmax(z / τ) inside each of the leading heads: [N, sum(head_sizes), *]."""
    return over_heads(logits, head_sizes, temperature, torch.softmax)


def over_heads(logits, head_sizes, temperature, function) -> Tensor:
    """Apply `function` to z / τ of each leading head, minus the maximum so that small τ is safe."""
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
    """Return L_d = -Σ ŷ · log softmax(z / τ), summed over everything (eq. 2), and dL_d/dz.

    The gradient is (p - ŷ) / τ. p comes from `head_softmax`, which also fills the bank, so the
    gradient is exactly zero while the logits are unchanged. Logits of other heads get zero.
    """
    old = bank.shape[1]
    log_p = over_heads(logits, head_sizes, temperature, torch.log_softmax)
    grad = logits.new_zeros(logits.shape, dtype=bank.dtype)
    grad[:, :old] = (head_softmax(logits, head_sizes, temperature) - bank) / temperature
    # ŷ = 0 contributes nothing, even where log p = -inf
    return -torch.where(bank == 0, 0, bank * log_p).sum(), grad


IGNORED = -100  # the label of an image or position without a class, as in F.cross_entropy


def new_task_loss(logits: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return L_t = -Σ log softmax(z)_y over the last `classes` logits (eq. 1), and dL_t/dz.

    The label IGNORED has no loss and no gradient. Another one that is not a class makes the loss,
    and the gradient of its image, nan.
    """
    z = logits[:, -classes:].to(compute_dtype(logits.dtype))
    labels = labels.unsqueeze(1)
    ignored = labels == IGNORED
    poison = torch.where((labels >= 0) & (labels < classes), 0, torch.nan)
    labels = labels.clamp(0, classes - 1)
    loss = (poison - z.log_softmax(1).gather(1, labels)).masked_fill(ignored, 0).sum()
    one_hot = torch.zeros_like(z).scatter_(1, labels, 1)
    grad = logits.new_zeros(logits.shape, dtype=z.dtype)
    grad[:, -classes:] = (z.softmax(1) - one_hot + poison).masked_fill(ignored, 0)
    return loss, grad


def warm_up_loss(
    logits: Tensor,
    labels: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return L_t of the last head, the bank of the others, and dL_t/dz (Algorithm 1)."""
    loss, grad = new_task_loss(logits, labels, head_sizes[-1])
    return loss, head_softmax(logits, head_sizes[:-1], temperature), grad


def joint_loss(
    logits: Tensor,
    labels: Tensor,
    bank: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return L_t of the last head, L_d of the others, dL_t/dz and dL_d/dz (Algorithm 2)."""
    new, new_grad = new_task_loss(logits, labels, head_sizes[-1])
    old, old_grad = distillation_loss(logits, bank, head_sizes[:-1], temperature)
    return new, old, new_grad, old_grad


# ---- BatchNorm of several views side by side: input [V·B, C, *], statistics [V, C] ----


def _by_view(x: Tensor, views: int, dtype: torch.dtype) -> Tensor:
    """Reshape [V·B, C, *] to [V, B, C, S]."""
    shape = views, x.shape[0] // views, x.shape[1], math.prod(x.shape[2:])
    return x.reshape(shape).to(dtype)


def _channels(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Reshape [C] or [V, C] so that it broadcasts against [V, B, C, S]."""
    return values.to(dtype).unsqueeze(-1).unsqueeze(-3)


def view_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    views: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y = (x - mean) / sqrt(variance + ε) · w + b of each view, + residual, max(y, 0).

    Returns y, and the mean and biased variance of each view, [V, C].
    """
    dtype = compute_dtype(input.dtype)
    x = _by_view(input, views, dtype)
    variance, mean = torch.var_mean(x, (1, 3), correction=0)
    y = _normalised(x, weight, bias, mean, variance, eps)
    if residual is not None:
        y = y + _by_view(residual, views, dtype)
    y = y.relu() if relu else y
    return _laid_out(y, input), mean, variance


def _normalised(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Tensor:
    scale = _channels((variance + eps).rsqrt(), x.dtype)
    if weight is not None:
        scale = scale * _channels(weight, x.dtype)
    y = (x - _channels(mean, x.dtype)) * scale
    return y if bias is None else y + _channels(bias, x.dtype)


def view_batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    views: int,
    eps: float,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dL/dx, dL/dw, dL/db and, with `residual`, dL/dresidual (else an empty tensor).

    With x̂ = (x - mean) / sqrt(variance + ε) and means over the images and positions of a view:
    dL/dx = w / sqrt(variance + ε) · (g - mean(g) - x̂ · mean(g · x̂)). With `relu` g is zero where
    the output is, which is computed again if it is not given; after a residual it has to be.
    """
    dtype = compute_dtype(input.dtype)
    x, grad = _by_view(input, views, dtype), _by_view(grad_output, views, dtype)
    if relu:
        if output is None:
            y = _normalised(x, weight, bias, mean, variance, eps)
        else:
            y = _by_view(output, views, dtype)
        grad = grad.where(~(y <= 0), 0)
    inverse = _channels((variance + eps).rsqrt(), dtype)
    x_hat = (x - _channels(mean, dtype)) * inverse
    means = [value.mean((1, 3), keepdim=True) for value in (grad, grad * x_hat)]
    scale = inverse if weight is None else inverse * _channels(weight, dtype)
    grad_x = (grad - means[0] - x_hat * means[1]) * scale
    grad_weight, grad_bias = (grad * x_hat).sum((0, 1, 3)), grad.sum((0, 1, 3))
    beside = _laid_out(grad, input) if residual else input.new_empty(0)
    return _laid_out(grad_x, input), grad_weight, grad_bias, beside


def like_input(input: Tensor) -> Tensor:
    """Return an empty tensor of the input's shape, channels-last if the input is, else contiguous.

    The result is not a view of another tensor.
    """
    last = input.movedim(1, -1)
    if input.is_contiguous() or not last.is_contiguous():
        return input.new_empty(input.shape)
    strides = torch.empty(last.shape, device="meta").movedim(-1, 1).stride()
    return input.new_empty_strided(input.shape, strides)


def _laid_out(values: Tensor, input: Tensor) -> Tensor:
    return like_input(input).copy_(values.reshape(input.shape))


# ---- per-layer norms, balance and update: tensors[i] belongs to layer layers[i] ----


def layer_norms(tensors: Sequence[Tensor], layers: Sequence[int], num_layers: int) -> Tensor:
    """Return the L2 norm of each layer over all its tensors, [L], accumulated in float64."""
    dtype = compute_dtype(tensors[0].dtype)
    squares = tensors[0].new_zeros(num_layers, dtype=torch.float64)
    for tensor, l in zip(tensors, layers, strict=True):
        squares[l] += torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2
    return squares.sqrt().to(dtype)


def balance_factors(norms: Tensor, reference_norms: Tensor, balance: Tensor) -> Tensor:
    """Return λ‖G_w‖ / ‖G_d‖ of each layer, [L].

    If the norms are finite but their ratio is not, as for ‖G_d‖ = 0, the factor is 0. A norm that
    is not finite stays visible, because the factor is then not finite either. A λ that is negative
    or not finite makes the factor nan.
    """
    balance = torch.where((balance >= 0) & balance.isfinite(), balance.double(), torch.nan)
    factors = (balance * reference_norms.double() / norms.double()).to(norms.dtype)
    finite = reference_norms.isfinite() & balance.isfinite()
    factors = torch.where(finite & ~factors.isfinite(), 0, factors)
    return torch.where(norms.isfinite(), factors, torch.nan)


def narrow_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a factor to `dtype`; one that is finite but overflows `dtype` becomes 0, as above."""
    narrow = factor.to(dtype)
    return torch.where(factor.isfinite() & ~narrow.isfinite(), 0, narrow)


def balance_layers_(
    grads: Sequence[Tensor], layers: Sequence[int], reference_norms: Tensor, balance: Tensor
) -> tuple[Tensor, Tensor]:
    """Set G_d[l] ← λ‖G_w[l]‖/‖G_d[l]‖ · G_d[l] in place; return factors and ‖G_d‖, [L] each."""
    norms = layer_norms(grads, layers, len(reference_norms))
    factors = balance_factors(norms, reference_norms, balance)
    for grad, l in zip(grads, layers, strict=True):
        grad.mul_(narrow_factor(factors[l], compute_dtype(grad.dtype)))
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
    """Set θ ← θ - α (λ‖G_w‖/‖G_d‖ · G_d + G_t) in place; the gradients are not changed."""
    norms = layer_norms(distill_grads, layers, len(reference_norms))
    factors = balance_factors(norms, reference_norms, balance)
    for param, old, new, l in zip(params, distill_grads, new_grads, layers, strict=True):
        dtype = compute_dtype(param.dtype)
        factor = narrow_factor(factors[l], dtype)
        step = lr.to(dtype) * (factor * old.to(dtype) + new.to(dtype))
        param.copy_(param.to(dtype) - step)
    return factors, norms


# ---- seeded augmentation: images [N, C, H, W] -> views [V·N, C, H, W] ----

GEOMETRY, AFFINE, COLOR, SHAPE, ERASE = range(5)  # the op word of the Philox counter
GRAY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision rounds it
LEVELS = 2.0**19  # from black to white, in a sum for the mean
WHITE = {torch.uint8: 255, torch.uint16: 65_535}  # of whole numbers; of others 1
INTERPOLATIONS = ("bilinear", "nearest")
PADDING_MODES = ("zeros", "reflect", "edge")


class Policy(NamedTuple):
    """The settings of `augment`; in the op's schema they are a flat list of floats."""

    crop_padding: int = 0  # pixels
    resized_crop: tuple[float, float] | None = None  # range of the fraction of the area
    resized_crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0  # probability
    rotation: float = 0  # ± degrees
    translate: tuple[float, float] = (0, 0)  # ± fractions of width and height
    scale: tuple[float, float] = (1, 1)
    shear: tuple[float, float] = (0, 0)  # ± degrees along x and y
    brightness: float = 0  # factors in 1 ± this
    contrast: float = 0
    saturation: float = 0
    hue: float = 0  # ± turns of the colour wheel
    mean: tuple[float, ...] = ()  # normalise: (x - mean) / std per channel
    std: tuple[float, ...] = ()
    erase: float = 0  # probability
    erase_area: tuple[float, float] = (0.02, 0.33)  # range of the fraction of the area
    erase_ratio: tuple[float, float] = (0.3, 3.3)  # width / height
    interpolation: str = "bilinear"
    padding_mode: str = "zeros"  # what lies outside the image

    def geometry(self) -> tuple:
        """Return what moves pixels."""
        return (
            self.crop_padding, self.resized_crop, self.flip, self.rotation, self.translate,
            self.scale, self.shear,
        )  # fmt: skip

    def geometry_alone(self) -> "Policy":
        """Return the policy that moves labels of pixels as this one moves the pixels."""
        return self._replace(
            brightness=0, contrast=0, saturation=0, hue=0, mean=(), std=(), erase=0,
            interpolation="nearest",
        )  # fmt: skip

    def pack(self) -> list[float]:
        """Return 24 numbers, then the mean and the std of each channel."""
        numbers = [
            self.crop_padding, *(self.resized_crop or (0, 0)), *self.resized_crop_ratio,
            self.flip, self.rotation, *self.translate, *self.scale, *self.shear,
            self.brightness, self.contrast, self.saturation, self.hue,
            self.erase, *self.erase_area, *self.erase_ratio,
            INTERPOLATIONS.index(self.interpolation), PADDING_MODES.index(self.padding_mode),
        ]  # fmt: skip
        return [*map(float, numbers), *map(float, self.mean), *map(float, self.std)]

    @classmethod
    def unpack(cls, values: Sequence[float]) -> "Policy":
        pair = {k: (values[k], values[k + 1]) for k in (1, 3, 7, 9, 11, 18, 20)}
        channels = (len(values) - 24) // 2
        return cls(
            int(values[0]), pair[1] if values[2] else None, pair[3],
            values[5], values[6], pair[7], pair[9], pair[11],
            *values[13:17], tuple(values[24 : 24 + channels]), tuple(values[24 + channels :]),
            values[17], pair[18], pair[20],
            INTERPOLATIONS[int(values[22])], PADDING_MODES[int(values[23])],
        )  # fmt: skip

    @property
    def turns(self) -> bool:
        """Whether views need interpolation: they are more than crops of the image or its mirror."""
        still = self._replace(rotation=0, translate=(0, 0), scale=(1, 1), shear=(0, 0))
        return self != still._replace(resized_crop=None)


class ViewParameters(NamedTuple):
    """What was drawn for each image of each view; every field is [V, N]."""

    left: Tensor  # int64: columns of the padded image left of the crop
    top: Tensor  # int64: rows above it
    width: Tensor  # int64: width of the crop, which is the image's unless it is resized
    height: Tensor  # int64
    flip: Tensor  # bool
    angle: Tensor  # degrees, clockwise as displayed
    translate_x: Tensor  # pixels to the right
    translate_y: Tensor  # pixels down
    scale: Tensor
    shear_x: Tensor  # degrees
    shear_y: Tensor
    brightness: Tensor  # factors
    contrast: Tensor
    saturation: Tensor
    hue: Tensor  # turns
    erase_left: Tensor  # int64: the erased rectangle of the view
    erase_top: Tensor
    erase_width: Tensor  # 0 where nothing is erased
    erase_height: Tensor


def view_parameters(
    policy: Policy,
    seed: Tensor,
    step: Tensor,
    views: Sequence[int],
    indices: Tensor,
    size: tuple[int, int],
) -> ViewParameters:
    """Draw the parameters of all views of the images `indices` [N], of `size` (H, W), at a step."""
    view = torch.cat([indices.new_empty(0, 1), *(indices.new_full((1, 1), v) for v in views)])
    key = seed_key(seed)
    H, W = size

    def words(op):
        return philox((indices.unsqueeze(0), view, step, op), key)  # four of [V, N]

    left, top, flip, angle = words(GEOMETRY)
    scale, translate_x, translate_y, shear_x = words(AFFINE)
    shear_y, area, ratio, erase = words(SHAPE)
    width, height = torch.full_like(left, W), torch.full_like(top, H)
    if policy.resized_crop:
        width, height = rectangle(area, ratio, policy.resized_crop, policy.resized_crop_ratio, size)
    erase_area, erase_ratio, erase_left, erase_top = words(ERASE)
    box = rectangle(erase_area, erase_ratio, policy.erase_area, policy.erase_ratio, size)
    erased = uniform(erase) < policy.erase
    erase_width, erase_height = (torch.where(erased, side, 0) for side in box)
    factors = (policy.brightness, policy.contrast, policy.saturation)
    *color, hue = words(COLOR)
    (share_x, share_y), (slant_x, slant_y) = policy.translate, policy.shear
    return ViewParameters(
        below(left, 2 * policy.crop_padding + 1 + W - width),
        below(top, 2 * policy.crop_padding + 1 + H - height),
        width,
        height,
        uniform(flip) < policy.flip,
        between(angle, -policy.rotation, policy.rotation),
        (between(translate_x, -share_x, share_x).double() * W).float(),
        (between(translate_y, -share_y, share_y).double() * H).float(),
        between(scale, *policy.scale),
        between(shear_x, -slant_x, slant_x),
        between(shear_y, -slant_y, slant_y),
        *(between(w, 1 - f, 1 + f) for w, f in zip(color, factors, strict=True)),
        between(hue, -policy.hue, policy.hue),
        below(erase_left, 1 + W - erase_width) * erased,
        below(erase_top, 1 + H - erase_height) * erased,
        erase_width,
        erase_height,
    )


def rectangle(
    area: Tensor,
    ratio: Tensor,
    areas: tuple[float, float],
    ratios: tuple[float, float],
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return the width and height in pixels of a rectangle from two random words.

    Its area and the logarithm of width / height are uniform in their ranges. A rectangle that is
    wider or higher than the image is cut to it.
    """
    H, W = size
    side = (between(area, *areas).double() * (H * W)).sqrt()
    root = exp(between(ratio, math.log(ratios[0]), math.log(ratios[1])).double() * 0.5)
    width, height = (side * root + 0.5).floor().long(), (side / root + 0.5).floor().long()
    return width.clamp(1, W), height.clamp(1, H)


def exp(x: Tensor) -> Tensor:
    """Return e^x of doubles within ± 8, by products and sums that every device rounds alike."""
    x, y = x * 0.0625, torch.ones_like(x)
    for n in range(13, 0, -1):
        y = 1 + y * x * (1 / n)
    for _ in range(4):
        y = y * y
    return y


def sine(degrees: Tensor) -> tuple[Tensor, Tensor]:
    """Return sine and cosine of doubles, the same on every device, exact at multiples of 90."""
    quarters = (degrees * (1 / 90) + 0.5).floor()
    x = (degrees - quarters * 90) * (math.pi / 180)  # within ± π/4
    square = x * x
    sin, cos = torch.ones_like(x), torch.ones_like(x)
    for n in range(16, 1, -2):
        sin = 1 - sin * square * (1 / (n * (n + 1)))
        cos = 1 - cos * square * (1 / (n * (n - 1)))
    sin = sin * x
    quarter = quarters.long() & 3
    odd, back = quarter & 1 == 1, quarter >= 2
    sin, cos = torch.where(odd, cos, sin), torch.where(odd, -sin, cos)
    return torch.where(back, -sin, sin), torch.where(back, -cos, cos)


def augment(
    images: Tensor,
    policy: Sequence[float],
    seed: Tensor,
    step: Tensor,
    views: Sequence[int],
    indices: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Return views of images; view v of image n is row v·N + n.

    Crop from the padded image, flip and the affine map about the centre are one inverse matrix and
    one resampling, at points that are rounded to 1/256 pixel. Then follow brightness, contrast and
    saturation, each clamped to black and white, hue, normalisation and erasing.

    Where an image's levels are those of uint8, nothing is rounded before the colours: products of
    levels and weights, and their sums, are exact in float32.
    """
    settings = Policy.unpack(policy)
    if indices is None:
        indices = torch.arange(len(images), device=images.device)
    p = view_parameters(settings, seed, step, views, indices, images.shape[2:])
    p = ViewParameters(*(field.flatten() for field in p))  # [V·N]
    white = WHITE.get(images.dtype, 1)
    x = resample(images.to(compute_dtype(images.dtype)), p, settings)
    x = recolor(x, p, settings, white)
    if settings.mean:
        channels = zip(x.unbind(1), settings.mean, settings.std, strict=True)
        x = torch.stack([c * (1 / (white * std)) - mean / std for c, mean, std in channels], 1)
    elif white != 1:
        x = quotient(x, white)
    if settings.erase:
        x = erase(x, p)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(dtype).contiguous(memory_format=layout)


def inverse_matrix(p: ViewParameters, settings: Policy, size: tuple[int, int]) -> list[Tensor]:
    """Return a, b, c, d, e, f in double, which map pixels of a view to points of the image.

    The view's pixel (x, y), counted from its centre, shows the point (a x + b y + c, d x + e y + f)
    of the image. The affine map is the inverse of torchvision's.
    """
    H, W = size
    angle, shear_x, shear_y = (t.double() for t in (p.angle, p.shear_x, p.shear_y))
    sin, cos = sine(angle)
    (sin_x, cos_x), (_, cos_y) = sine(shear_x), sine(shear_y)
    sin_between, cos_between = sine(angle - shear_y)
    tan_x, scale = sin_x / cos_x, p.scale.double()
    across, down = cos_between / cos_y, sin_between / cos_y
    a, b = (cos - down * tan_x) / scale, (across * tan_x + sin) / scale
    d, e = -down / scale, across / scale
    shift_x, shift_y = p.translate_x.double(), p.translate_y.double()
    c, f = -(a * shift_x + b * shift_y), -(d * shift_x + e * shift_y)
    # the size of the crop, negative if mirrored, and the position of its centre
    zoom_x = torch.where(p.flip, -1.0, 1.0).double() * quotient(p.width.double(), W)
    zoom_y = quotient(p.height.double(), H)
    middle_x = (p.left - settings.crop_padding).double() + (p.width - 1).double() * 0.5
    middle_y = (p.top - settings.crop_padding).double() + (p.height - 1).double() * 0.5
    return [
        zoom_x * a, zoom_x * b, zoom_x * c + middle_x,
        zoom_y * d, zoom_y * e, zoom_y * f + middle_y,
    ]  # fmt: skip


FRACTION = 8  # bits of a point's position between two pixels


def fixed_point(matrix: list[Tensor], settings: Policy, size: tuple[int, int]) -> list[Tensor]:
    """Return a matrix in int64, and the number of its fractional bits, which leave room in int32.

    Its last column is that of pixels counted from the corner of the view instead of the centre. A
    point is off by at most (W + H) / 2 units: 1/5,000 pixel at 224 x 224, 1/200 at 1024 x 1024.
    """
    H, W = size
    a, b, c, d, e, f = matrix
    across, down = (W - 1) * 0.5, (H - 1) * 0.5
    reach_x = a.abs() * across + b.abs() * down + c.abs()
    reach_y = d.abs() * across + e.abs() * down + f.abs()
    reach = torch.maximum(reach_x, reach_y) + (W + H + settings.crop_padding)
    bits = 29 - torch.frexp(reach).exponent.long()  # every position is below 2^29
    bits = bits.clamp(min=FRACTION + 1)  # checks.reach refuses images for which that is not enough
    c, f = c - (a * across + b * down), f - (d * across + e * down)
    one = (torch.ones_like(bits) << bits).double()
    return [*((x * one + 0.5).floor().long() for x in (a, b, c, d, e, f)), bits]


def resample(images: Tensor, p: ViewParameters, settings: Policy) -> Tensor:
    """Sample each image at the points that the pixels of its views show."""
    N, C, H, W = images.shape
    V = len(p.angle) // max(N, 1)
    if not (settings.turns or settings.crop_padding or settings.flip):
        return images.repeat(V, 1, 1, 1)
    matrix = fixed_point(inverse_matrix(p, settings, (H, W)), settings, (H, W))
    a, b, c, d, e, f, bits = (t.view(-1, 1, 1) for t in matrix)
    x = torch.arange(W, device=images.device)
    y = torch.arange(H, device=images.device).unsqueeze(1)
    source_x, source_y = a * x + b * y + c, d * x + e * y + f
    if settings.resized_crop:
        source_x = snap(source_x, p.left - settings.crop_padding, p.width, bits)
        source_y = snap(source_y, p.top - settings.crop_padding, p.height, bits)
    if settings.padding_mode == "reflect":
        source_x, source_y = reflect(source_x, W, bits), reflect(source_y, H, bits)
    pixels = images.reshape(N, C, H * W).repeat(V, 1, 1)  # [V·N, C, H·W]

    def tap(xs, ys):
        inside = (xs >= 0) & (xs < W) & (ys >= 0) & (ys < H)
        where = (ys.clamp(0, H - 1) * W + xs.clamp(0, W - 1)).flatten(1).unsqueeze(1)
        value = pixels.gather(2, where.expand(-1, C, -1)).view(-1, C, H, W)
        if settings.padding_mode == "zeros":
            value = torch.where(inside.unsqueeze(1), value, 0)
        return value

    if settings.interpolation == "nearest" or not settings.turns:  # a crop: whole pixels
        even = settings.resized_crop is None
        return tap(whole(source_x, W, bits, even), whole(source_y, H, bits, even))
    one = 1 << FRACTION

    def rounded(source, size):
        """To 1/256 pixel; two pixels before the image is far enough, and one behind it."""
        found = (source + (1 << (bits - FRACTION - 1))) >> (bits - FRACTION)
        return found.clamp(-2 * one, size * one)

    source_x, source_y = rounded(source_x, W), rounded(source_y, H)
    column, row = source_x >> FRACTION, source_y >> FRACTION
    right, low = source_x & (one - 1), source_y & (one - 1)  # weights of these neighbours
    total = 0
    for dy, wy in ((0, one - low), (1, low)):
        for dx, wx in ((0, one - right), (1, right)):
            weight = (wx * wy).to(images.dtype) * (1 / one**2)
            total = total + tap(column + dx, row + dy) * weight.unsqueeze(1)
    return total


def whole(source: Tensor, size: int, bits: Tensor, even: bool) -> Tensor:
    """Round to the nearest whole number, ties upwards or, with `even`, to the even number.

    torchvision's affine map rounds ties to even. Its resized crop rounds them upwards, and what a
    point may have lost because the matrix is rounded, `size` units at most, counts as a tie if it
    is less than 1/512 pixel.
    """
    shifted = source + (1 << (bits - 1))
    if not even:
        return (shifted + (1 << (bits - FRACTION - 1)).clamp(max=size)) >> bits
    upper = shifted >> bits
    tie = shifted & ((1 << bits) - 1) == 0
    return torch.where(tie & (upper & 1 == 1), upper - 1, upper)


def snap(source: Tensor, first: Tensor, size: Tensor, bits: Tensor) -> Tensor:
    """Move points on the outer half of a crop's border pixels to the centre of these pixels."""
    first = first.view(-1, 1, 1) << bits
    last = first + ((size - 1).view(-1, 1, 1) << bits)
    half = 1 << (bits - 1)
    on = (source >= first - half) & (source <= last + half)
    return torch.where(on, torch.clamp(source, first, last), source)


def reflect(source: Tensor, size: int, bits: Tensor) -> Tensor:
    """Mirror points outside 0 to size - 1 at the centres of the border pixels."""
    if size == 1:
        return torch.zeros_like(source)
    period = torch.full_like(bits, 2 * (size - 1)) << bits
    folded = torch.remainder(source, period)
    return torch.minimum(folded, period - folded)


def quotient(x: Tensor, divisor: float) -> Tensor:
    """Return x / divisor, rounded once on every device.

    Dividing by a Python number, PyTorch would multiply by 1 / divisor on CUDA.
    """
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def erase(x: Tensor, p: ViewParameters) -> Tensor:
    """Set a rectangle of each view to 0, which is the mean if views are normalised."""
    columns = torch.arange(x.shape[3], device=x.device)
    rows = torch.arange(x.shape[2], device=x.device).unsqueeze(1)
    left, top, width, height = (field.view(-1, 1, 1, 1) for field in p[-4:])
    inside = (columns >= left) & (columns < left + width) & (rows >= top) & (rows < top + height)
    return torch.where(inside, 0, x)


def recolor(x: Tensor, p: ViewParameters, settings: Policy, white: int) -> Tensor:
    """Apply brightness, contrast, saturation and hue, in this order, defined as in torchvision.

    Colours lie between 0 and `white`.
    """

    def blend(x, other, factor):
        factor = factor.to(x.dtype).view(-1, 1, 1, 1)
        return (factor * x + (1 - factor) * other).clamp(0, white)

    if settings.brightness:
        x = blend(x, 0, p.brightness)
    if settings.contrast:
        # a sum of integers does not depend on the order of summation, and so not on the batch
        unit = level_unit(white)
        levels = gray(x).nan_to_num().clamp(0, white) * unit
        mean = levels.round().long().sum((1, 2, 3), keepdim=True).double()
        mean = mean * (1 / (unit * x.shape[2] * x.shape[3]))
        x = blend(x, mean.to(x.dtype), p.contrast)
    if x.shape[1] == 3 and settings.saturation:
        x = blend(x, gray(x), p.saturation)
    if x.shape[1] == 3 and settings.hue:
        x = shift_hue(x, p.hue.to(x.dtype).view(-1, 1, 1))
    return x


def level_unit(white: int) -> float:
    """Return how many of the LEVELS there are from a colour to the next whole number."""
    return LEVELS / (white + 1 if white != 1 else 1)


def gray(x: Tensor) -> Tensor:
    """Return the luma of [N, 3, H, W] as [N, 1, H, W]; images of one channel are returned as is."""
    if x.shape[1] == 1:
        return x
    return (GRAY[0] * x[:, 0] + GRAY[1] * x[:, 1] + GRAY[2] * x[:, 2]).unsqueeze(1)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Convert RGB to HSV, add `turns` to the hue, and convert back, without a division.

    With the hue h in sextants, a channel is value - chroma · clamp(2 - ||k - 5| - 3|, 0, 1), where
    k = h + n + 6 · turns in 0 to 12, and n = 5, 3, 1. All of it is multiplied by the chroma.
    """
    r, g, b = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    twice, thrice = 2 * chroma, 3 * chroma
    start = torch.where(
        value == r, g - b, torch.where(value == g, twice + (b - r), 2 * twice + (r - g))
    )

    def channel(n):
        k = n + 6 * turns
        k = torch.where(k < 0, k + 6, torch.where(k >= 6, k - 6, k)) - 5
        distance = ((start + k * chroma).abs() - thrice).abs()
        return value - torch.minimum((twice - distance).clamp(min=0), chroma)

    return torch.stack([channel(5), channel(3), channel(1)], 1)
