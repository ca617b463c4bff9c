"""The ops of bld_ext, one function each, with documentation and argument checks.

Each function checks its arguments and calls `torch.ops.bld_ext.<name>`. The dispatcher runs the
fastest kernel registered for the tensors' device: C++ on a CPU if bld_ext._C was built, Triton on
CUDA, otherwise the PyTorch reference. `bld_ext.backend(name, device)` returns which.

Terms: a head is the classifier of one task. The newest head learns; the older heads are to keep
their predictions. A view is one random augmentation of a batch. The bank holds the older heads'
predictions for every view, softened at a temperature. A layer is a group of tensors with one norm.

Shapes: logits are [N, C, *] with the heads side by side on dimension 1, oldest first. * is empty or
the spatial dimensions of a dense prediction. Where an op reads only old heads, `head_sizes` lists
those; logits may have further columns behind them, which the op ignores.

Checks of values: the temperature is a number or a scalar tensor. On a CPU a wrong temperature or
label raises an error. On a GPU the check would wait for the device, so it is made only with
`check_inputs=True`; without it, a wrong value makes the loss, and the gradient of its image, nan.
Inside torch.compile values cannot be checked on any device, and wrong ones give nan. A tensor on
the GPU may be changed between the replays of a captured graph.

Gradients are computed and kept in float32 (float64 for float64 logits). Backward multiplies them by
the incoming gradient and then rounds once, to the dtype of logits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

import bld_ext.registry  # noqa: F401  (defines torch.ops.bld_ext)
from bld_ext import checks, reference
from bld_ext.reference import Policy, ViewParameters

# ---- multi-head distillation ----


def head_softmax(
    logits: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor = 2.0,
    *,
    check_inputs: bool = False,
) -> Tensor:
    """Compute the softmax at a temperature inside each head, which fills the bank.

    ŷ = softmax(z / τ) for each head.

    Args:
        logits: `[N, C, *]`, float16, bfloat16, float32 or float64.
        head_sizes: number of classes of each head to soften, which are the leading columns of
            logits; their sum is C_old ≤ C.
        temperature: τ > 0.
        check_inputs: whether to check values on a GPU; see the module's docstring.

    Returns:
        `[N, C_old, *]`, float32 (float64 for float64 logits). Differentiable twice.

    Raises:
        ValueError: an argument's shape, dtype or value is not as described.

    Equivalent to:
        heads = (logits[:, :C_old].float() / temperature).split(head_sizes, dim=1)
        bank = torch.cat([head.softmax(1) for head in heads], dim=1)
    """
    sizes = checks.logits(logits, head_sizes, exact=False)
    temperature = checks.scalar("temperature", temperature, logits.device, True, check_inputs)
    return torch.ops.bld_ext.head_softmax(logits, sizes, temperature)


def distillation_loss(
    logits: Tensor,
    bank: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor = 2.0,
    *,
    check_inputs: bool = False,
    with_gradient: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the distillation loss, the cross-entropy between the bank and the softened heads.

    L_d = -Σ_o Σ_b ŷ · log softmax(z / τ), equation 2 of Fini et al., ECCV 2020, summed over heads,
    images and positions, without a factor τ². The forward pass also computes the gradient,
    (softmax(z / τ) - ŷ) / τ. It is exactly zero at the logits from which `head_softmax` made the
    bank.

    Args:
        logits: `[N, C, *]`, float16, bfloat16, float32 or float64.
        bank: `[N, C_old, *]`, float32 (float64 for float64 logits); sums to 1 inside each head. It
            gets no gradient.
        head_sizes: number of classes of each old head, which are the leading columns of logits;
            their sum is C_old ≤ C.
        temperature: τ > 0, the one with which the bank was made.
        check_inputs: whether to check values on a GPU; see the module's docstring.
        with_gradient: whether to return the gradient, too, and record nothing for autograd.

    Returns:
        A scalar, float32 (float64 for float64 logits). Differentiable once; a second derivative
        raises RuntimeError. With `with_gradient` the loss and dL_d/dlogits in that dtype, which can
        go to `logits.backward(gradient)`: three kernels fewer than `loss.backward()`.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        heads = (logits[:, :C_old].float() / temperature).split(head_sizes, dim=1)
        loss = -(bank * torch.cat([head.log_softmax(1) for head in heads], dim=1)).sum()
    """
    sizes = checks.logits(logits, head_sizes, exact=False)
    temperature = checks.scalar("temperature", temperature, logits.device, True, check_inputs)
    checks.bank(bank, logits, sizes)
    if with_gradient:
        logits = logits.detach()
    found = torch.ops.bld_ext.distillation_loss(logits, bank, sizes, temperature)
    return found if with_gradient else found[0]


def warm_up_loss(
    logits: Tensor,
    labels: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor = 2.0,
    *,
    check_inputs: bool = False,
    with_gradient: bool = False,
) -> tuple[Tensor, ...]:
    """Compute the newest head's cross-entropy and the bank of all older heads (Algorithm 1).

    Args:
        logits: `[N, C, *]`, float16, bfloat16, float32 or float64.
        labels: `[N, *]`, int64, classes of the newest head counted from 0; -100 has no loss.
        head_sizes: number of classes of each head, oldest first; their sum is C.
        temperature: τ > 0, for the bank.
        check_inputs: whether to check values on a GPU; see the module's docstring.
        with_gradient: whether to return the gradient, too, and record nothing for autograd.

    Returns:
        (L_t, bank): the loss (equation 1), a scalar summed over images and positions, and the bank,
        `[N, C_old, *]`. Both are float32 (float64 for float64 logits). The bank carries no
        gradient. With `with_gradient` also dL_t/dlogits, as of `distillation_loss`.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        loss = F.cross_entropy(logits[:, C_old:].float(), labels, reduction="sum")
        bank = head_softmax(logits.detach(), head_sizes[:-1], temperature)
    """
    sizes = checks.logits(logits, head_sizes, exact=True)
    temperature = checks.scalar("temperature", temperature, logits.device, True, check_inputs)
    checks.labels(labels, logits, sizes[-1], check_inputs)
    if with_gradient:
        logits = logits.detach()
    found = torch.ops.bld_ext.warm_up_loss(logits, labels, sizes, temperature)
    return found if with_gradient else found[:2]


def joint_loss(
    logits: Tensor,
    labels: Tensor,
    bank: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor = 2.0,
    *,
    check_inputs: bool = False,
    with_gradient: bool = False,
) -> tuple[Tensor, ...]:
    """Compute the newest head's cross-entropy and the older heads' distillation loss (Algorithm 2).

    Args:
        logits: `[N, C, *]`, float16, bfloat16, float32 or float64.
        labels: `[N, *]`, int64, classes of the newest head counted from 0; -100 has no loss.
        bank: `[N, C_old, *]` from `warm_up_loss`.
        head_sizes: number of classes of each head, oldest first; their sum is C.
        temperature: τ > 0, the one with which the bank was made.
        check_inputs: whether to check values on a GPU; see the module's docstring.
        with_gradient: whether to return the gradients, too, and record nothing for autograd.

    Returns:
        (L_t, L_d), scalars summed over heads, images and positions. The forward pass computes both
        gradients; each loss can be differentiated on its own. With `with_gradient` also
        dL_t/dlogits and dL_d/dlogits, as of `distillation_loss`.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        new = F.cross_entropy(logits[:, C_old:].float(), labels, reduction="sum")
        old = distillation_loss(logits, bank, head_sizes[:-1], temperature)
    """
    sizes = checks.logits(logits, head_sizes, exact=True)
    temperature = checks.scalar("temperature", temperature, logits.device, True, check_inputs)
    checks.labels(labels, logits, sizes[-1], check_inputs)
    checks.bank(bank, logits, sizes[:-1])
    if with_gradient:
        logits = logits.detach()
    found = torch.ops.bld_ext.joint_loss(logits, labels, bank, sizes, temperature)
    return found if with_gradient else found[:2]


# ---- BatchNorm of several views side by side ----


def view_batch_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    views: int = 1,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each of several views in a batch by its own statistics, as BatchNorm in training.

    y = (x - mean) / sqrt(variance + ε) · w + b, with the mean and the biased variance over the
    images and positions of a view. If given, the residual is then added; with `relu`, negative
    values become 0. The output of a view does not depend on the views beside it, bit for bit.

    Args:
        input: `[V·B, C, *]`, one view after the other; float16, bfloat16, float32 or float64. Best
            contiguous or channels-last, which needs no copy; the output then has the same layout.
        weight, bias: `[C]` or None.
        residual: shaped like input and of its dtype, or None.
        views: V, a divisor of the number of images.
        eps: ε ≥ 0.
        relu: whether to return max(y, 0).

    Returns:
        (output, mean, variance): the output is `[V·B, C, *]` in the dtype of input. Mean and
        variance are `[V, C]`, float32 (float64 for float64 input), and carry no gradient. A second
        derivative raises RuntimeError.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        norm = functools.partial(F.batch_norm, running_mean=None, running_var=None, training=True)
        y = torch.cat([norm(x, weight=weight, bias=bias, eps=eps) for x in input.chunk(views)])
        output = torch.relu(y + residual)
    """
    checks.view_batch_norm(input, weight, bias, residual, views, eps)
    dtype = reference.compute_dtype(input.dtype)
    weight, bias = (t if t is None else t.to(dtype).contiguous() for t in (weight, bias))
    args = input, weight, bias, residual, views, eps, relu
    return torch.ops.bld_ext.view_batch_norm(*args)


# ---- per-layer norms, balance and update ----


# how the kernels begin an error that is about an argument
REFUSED = re.compile(
    r"(tensors|grads|params|distill_grads|new_grads|layers|num_layers|reference_norms|balance|lr)"
    r"(\[\d+\])?: "
)


def _on_layers(name: str, *arguments):
    """Call an op on lists of tensors; if it fails, raise an error that names the wrong argument.

    The kernels check their lists faster than Python could, so Python looks at the arguments only
    after a kernel has refused them.
    """
    op = getattr(torch.ops.bld_ext, name)
    with torch.no_grad():
        if torch.compiler.is_compiling():
            return op(*arguments)
        try:
            return op(*arguments)
        except (RuntimeError, TypeError) as error:
            getattr(checks, name)(*arguments)
            message = str(error).partition("\nException raised from")[0]
            if not REFUSED.match(message):  # such as one of memory
                raise
            raise ValueError(message) from error


def _mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that these tensors changed, so that it does not use what it saved before."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def layer_norms(
    tensors: Sequence[Tensor], layers: Sequence[int], num_layers: int | None = None
) -> Tensor:
    """Compute the L2 norm of each layer over all its tensors: sqrt(Σ_{i in l} ‖t_i‖²).

    Not differentiable.

    Args:
        tensors: any shapes and float dtypes, on one device.
        layers: the layer index of each tensor.
        num_layers: L; default: the largest index plus one. A layer without tensors has norm 0.

    Returns:
        `[L]`, float32 (float64 if the first tensor is), bitwise reproducible from run to run.

    Raises:
        ValueError: there is no tensor, or an index, dtype or device is not as described.

    Equivalent to:
        norms = [torch.cat([t.flatten() for t, k in zip(tensors, layers) if k == l]).norm()
                 for l in range(L)]
    """
    if num_layers is None:
        checks.indices(layers)
        num_layers = max(layers, default=-1) + 1
    return _on_layers("layer_norms", tensors, layers, num_layers)


def balance_layers_(
    grads: Sequence[Tensor],
    layers: Sequence[int],
    reference_norms: Tensor,
    balance: float | Tensor = 2.0,
) -> tuple[Tensor, Tensor]:
    """Rescale each layer's gradient, in place, to `balance` times a reference norm.

    G_d[l] ← λ ‖G_w[l]‖ / ‖G_d[l]‖ · G_d[l] for each layer l, from Algorithm 2 of Fini et al., ECCV
    2020. If the norms are finite but their ratio is not, as for ‖G_d[l]‖ = 0, the factor is 0. If a
    norm is not finite, for example because it overflows its dtype, the factor is not finite either.
    The same holds if λ is a tensor on a GPU, where checking it would wait for the device, and is
    negative or not finite. Not differentiable.

    Args:
        grads: the gradients G_d, changed in place; any shapes, layouts and float dtypes, on one
            device, each with memory of its own.
        layers: the layer index of each gradient.
        reference_norms: ‖G_w‖, `[L]`, on the same device.
        balance: λ ≥ 0, a number or a scalar tensor. A float64 tensor on the device is read again at
            each replay of a captured graph; another dtype is converted first.

    Returns:
        (factors, norms): the factor of each layer, and ‖G_d‖ before rescaling, `[L]` each.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        norms = layer_norms(grads, layers, L)
        for g, l in zip(grads, layers): g *= balance * reference_norms[l] / norms[l]
    """
    checks.tensor("reference_norms", reference_norms)
    balance = checks.scalar("balance", balance, reference_norms.device)
    result = _on_layers("balance_layers_", grads, layers, reference_norms, balance)
    _mark_written(grads)
    return result


def balanced_sgd_(
    params: Sequence[Tensor],
    distill_grads: Sequence[Tensor],
    new_grads: Sequence[Tensor],
    layers: Sequence[int],
    reference_norms: Tensor,
    balance: float | Tensor = 2.0,
    lr: float | Tensor = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Balance each layer's distillation gradient and take the SGD step.

    θ ← θ - α (λ‖G_w‖/‖G_d‖ · G_d + G_t), the end of Algorithm 2 of Fini et al., ECCV 2020. For
    float32 tensors whose lists share one layout, the result is bitwise equal to `balance_layers_`,
    an addition and torch.optim.SGD on a processor with fused multiply-add. bfloat16 and float16 are
    computed in float32 and rounded once. Not differentiable.

    Args:
        params: θ, changed in place; any layouts and float dtypes, each with memory of its own.
        distill_grads, new_grads: G_d and G_t, shaped like the parameters; not changed.
        layers: the layer index of each parameter.
        reference_norms: ‖G_w‖, `[L]`, on the same device.
        balance, lr: λ ≥ 0 and α ≥ 0, each a number or a scalar tensor as in `balance_layers_`.

    Returns:
        (factors, norms) as in `balance_layers_`.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        balance_layers_(distill_grads, layers, reference_norms, balance)
        for p, d, n in zip(params, distill_grads, new_grads): p -= lr * (d + n)
    """
    checks.tensor("reference_norms", reference_norms)
    balance = checks.scalar("balance", balance, reference_norms.device)
    lr = checks.scalar("lr", lr, reference_norms.device)
    lists = (params, distill_grads, new_grads)
    result = _on_layers("balanced_sgd_", *lists, layers, reference_norms, balance, lr)
    _mark_written(params)
    return result


# ---- seeded augmentation ----


def augment(
    images: Tensor,
    policy: Policy,
    seed: int | Tensor,
    step: int | Tensor,
    views: Sequence[int],
    indices: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Make random views of images, each a pure function of (seed, step, view, image index).

    First come, in this order: crop from the padded image, resized if `resized_crop` is given;
    horizontal flip; shear, scale, rotation and translation about the centre. All of these are
    combined into one inverse matrix and one resampling, so a rotation brings back what the crop
    alone would have cut off. Then follow brightness, contrast (against the view's own mean) and
    saturation, each clamped to black and white, hue, normalisation, and erasing to 0.

    The points that a view shows are rounded to 1/256 pixel and kept in whole numbers, so every
    device makes the same views. Each operation differs from torchvision's by at most one level of
    255, on pictures of noise of up to 512 pixels a side. On larger ones the error of a point grows
    with the square of the side, to 1/200 pixel at 1,024 and 1/50 pixel at 2,048. Levels of uint8
    images are exact until the colours change. Those of uint8 and uint16 are divided by 255 and
    65,535 at the end; they are never rounded to integers, which torchvision does after each
    operation.

    Random words are Philox4x32-10 with key = seed and counter = (image index, view, step, op): op 0
    gives (left, top, flip, angle), op 1 (scale, translate x, translate y, shear x), op 2
    (brightness, contrast, saturation, hue), op 3 (shear y, area and ratio of the crop, whether to
    erase) and op 4 (area, ratio, left and top of the erased rectangle).

    Args:
        images: `[N, C, H, W]`, uint8, uint16, or float in [0, 1]. The range is not checked: a
            colour operation that clamps also clamps values outside it, and the result for nan and
            inf is undefined. Contrast, saturation and hue need one or three channels; with one
            channel, saturation and hue have no effect.
        policy: what to draw from; `SeededAugment` describes each setting.
        seed: 0 to 2**63 - 1, a number or an int64 scalar on the images' device or on the CPU.
        step: 0 to 2**32 - 1, likewise.
        views: the V view numbers.
        indices: `[N]` int64, the images' numbers within the step; default 0 to N - 1.
        dtype: float dtype of the result.
        channels_last: whether the result is in torch.channels_last.

    Returns:
        `[V·N, C, H, W]`, view by view. Not differentiable.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described, or a view may
            show points more than 2**20 pixels away from the image.

    Equivalent to:
        parameters = view_parameters(policy, seed, step, views, indices, size)
        # torchvision.transforms.v2.functional: pad, crop or resized_crop, hflip, affine, adjust_*,
        # normalize, erase
    """
    checks.policy(policy)
    checks.images(images, policy, dtype, channels_last)
    views = checks.views(views)
    seed, step = checks.counter(seed, step, indices, images.shape[0], images.device)
    return torch.ops.bld_ext.augment(
        images, policy.pack(), seed, step, views, indices, dtype, channels_last
    )


def view_parameters(
    policy: Policy,
    seed: int | Tensor,
    step: int | Tensor,
    views: Sequence[int],
    indices: Tensor,
    size: tuple[int, int],
) -> ViewParameters:
    """Return the parameters that `augment` draws for images of `size` (H, W).

    The arguments are those of `augment`; each field of the result is `[V, N]`. No view is made.
    """
    checks.policy(policy)
    views = checks.views(views)
    checks.tensor("indices", indices)
    seed, step = checks.counter(seed, step, indices, indices.numel(), indices.device)
    size = checks.image_size(size)
    return reference.view_parameters(policy, seed, step, views, indices, size)
