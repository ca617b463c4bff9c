"""The ops of bld_ext, each as one function: its documentation, its argument checks and one call.

Each public function checks its arguments and calls `torch.ops.bld_ext.<name>`, where the fastest
kernel registered for the tensors' device runs: C++ on a CPU where bld_ext._C was built, Triton on
CUDA, otherwise the reference; `bld_ext.backend(name, device)` tells which.

Shapes: logits [N, C, *] with the heads side by side on dimension 1, oldest first; * is empty or the
spatial dimensions of a dense prediction. Where an op reads old heads only, `head_sizes` lists
those, and logits may have further columns behind them, which are left alone.

Temperature is a number or a scalar tensor. On a CPU a wrong temperature or label raises. On a GPU
looking would wait for the device: there it makes the loss, and the gradient of its image, nan,
unless `check_inputs=True` asks for the look and the error. Inside torch.compile nobody can look, on
any device: it is nan. A tensor on the GPU can be changed under a captured graph.

Gradients are computed in float32 (float64 for float64 logits) and kept so until backward multiplies
them by what comes in; then they are rounded once to the dtype of logits.
"""

from __future__ import annotations

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
    """Softmax at a temperature inside each head: ŷ = softmax(z / τ). It fills the bank.

    Args:
        logits: `[N, C, *]`, float16, bfloat16, float32 or float64.
        head_sizes: classes of each head to soften, the leading ones of logits; their sum is C_old,
            at most C.
        temperature: τ > 0.
        check_inputs: see the module's notes.

    Returns:
        `[N, C_old, *]`, float32 (float64 for float64 logits). Differentiable, also twice.

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
) -> Tensor:
    """Cross-entropy between the bank and the softened heads: -Σ_o Σ_b ŷ · log softmax(z / τ).

    Equation 2 of Fini et al., ECCV 2020, summed over heads, images and positions, without a factor
    τ². The gradient, (softmax(z / τ) - ŷ) / τ, is computed in the same pass; it is exactly zero,
    bit for bit, at the logits from which `head_softmax` made the bank.

    Args:
        logits: `[N, C, *]`, float16, bfloat16, float32 or float64.
        bank: `[N, C_old, *]`, float32 (float64 for float64 logits); sums to 1 inside each head. It
            gets no gradient.
        head_sizes: classes of each old head, the leading ones of logits; their sum is C_old ≤ C.
        temperature: τ > 0, the one the bank was made with.
        check_inputs: see the module's notes.

    Returns:
        A scalar, float32 (float64 for float64 logits). A second derivative raises RuntimeError.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        heads = (logits[:, :C_old].float() / temperature).split(head_sizes, dim=1)
        loss = -(bank * torch.cat([head.log_softmax(1) for head in heads], dim=1)).sum()
    """
    sizes = checks.logits(logits, head_sizes, exact=False)
    temperature = checks.scalar("temperature", temperature, logits.device, True, check_inputs)
    checks.bank(bank, logits, sizes)
    return torch.ops.bld_ext.distillation_loss(logits, bank, sizes, temperature)[0]


def warm_up_loss(
    logits: Tensor,
    labels: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor = 2.0,
    *,
    check_inputs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 on logits: cross-entropy of the newest head, and the bank of all older ones.

    Args:
        logits: `[N, C, *]`, float16, bfloat16, float32 or float64.
        labels: `[N, *]`, int64, classes of the newest head counted from 0.
        head_sizes: classes of each head, oldest first; their sum is C.
        temperature: τ > 0, for the bank.
        check_inputs: see the module's notes.

    Returns:
        (L_t, bank): the loss summed over images and positions, a scalar (equation 1), and
        `[N, C_old, *]`; float32, float64 for float64 logits. The bank carries no gradient.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        loss = F.cross_entropy(logits[:, C_old:].float(), labels, reduction="sum")
        bank = head_softmax(logits.detach(), head_sizes[:-1], temperature)
    """
    sizes = checks.logits(logits, head_sizes, exact=True)
    temperature = checks.scalar("temperature", temperature, logits.device, True, check_inputs)
    checks.labels(labels, logits, sizes[-1], check_inputs)
    loss, bank, _ = torch.ops.bld_ext.warm_up_loss(logits, labels, sizes, temperature)
    return loss, bank


def joint_loss(
    logits: Tensor,
    labels: Tensor,
    bank: Tensor,
    head_sizes: Sequence[int],
    temperature: float | Tensor = 2.0,
    *,
    check_inputs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 on logits: cross-entropy of the newest head, and distillation of all older ones.

    Args:
        logits: `[N, C, *]`, float16, bfloat16, float32 or float64.
        labels: `[N, *]`, int64, classes of the newest head counted from 0.
        bank: `[N, C_old, *]` from `warm_up_loss`.
        head_sizes: classes of each head, oldest first; their sum is C.
        temperature: τ > 0, the one the bank was made with.
        check_inputs: see the module's notes.

    Returns:
        (L_t, L_d), scalars summed over heads, images and positions. Both gradients come from the
        same pass; each loss can be differentiated alone.

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
    return torch.ops.bld_ext.joint_loss(logits, labels, bank, sizes, temperature)[:2]


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
    """BatchNorm in training of several views in one batch, each by its own statistics.

    y = (x - mean) / sqrt(variance + ε) · w + b with the mean and the biased variance over the
    images and positions of a view; then the residual is added and negative values become 0, where
    asked for. A view's output does not depend on the views beside it, bit for bit.

    Args:
        input: `[V·B, C, *]`, one view after the other; float16, bfloat16, float32 or float64. With
            the channels last in memory (or contiguous) it is read as it lies, and so are the
            results.
        weight, bias: `[C]` or None.
        residual: as input, or None.
        views: V, a divisor of the number of images.
        eps: ε ≥ 0.
        relu: whether y is max(y, 0).

    Returns:
        (output, mean, variance): `[V·B, C, *]` in the dtype of input, and `[V, C]`, float32
        (float64 for float64 input), which carry no gradient. A second derivative raises
        RuntimeError.

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


def _on_layers(name: str, *arguments):
    """Call an op. Its kernels check their lists, in less time than Python takes to look at them;
    only once one has refused does Python look for the argument that was wrong.
    """
    op = getattr(torch.ops.bld_ext, name)
    with torch.no_grad():
        if torch.compiler.is_compiling():
            return op(*arguments)
        try:
            return op(*arguments)
        except (RuntimeError, TypeError) as error:
            getattr(checks, name)(*arguments)
            raise ValueError(str(error).partition("\nException raised from")[0]) from error


def _mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd, which would otherwise use what it saved before, that these have changed."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def layer_norms(
    tensors: Sequence[Tensor], layers: Sequence[int], num_layers: int | None = None
) -> Tensor:
    """L2 norm of each layer over all its tensors: sqrt(Σ_{i in l} ‖t_i‖²). Not differentiable.

    Args:
        tensors: any shapes and float dtypes, on one device.
        layers: the layer index of each tensor.
        num_layers: L; default: the largest index plus one. A layer without tensors has norm 0.

    Returns:
        `[L]`, float32 (float64 where the first tensor is); bitwise the same from run to run.

    Raises:
        ValueError: no tensors, or an index or dtype or device that is not as described.

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

    G_d[l] ← λ ‖G_w[l]‖ / ‖G_d[l]‖ · G_d[l], Algorithm 2 of Fini et al., ECCV 2020, per layer. The
    factor is 0 where finite norms have no finite ratio, as for ‖G_d[l]‖ = 0. It is not finite where
    a norm is not, overflow of the norm's dtype included, nor where a λ in a tensor on a GPU, where
    looking would wait, is negative or not finite. Not differentiable.

    Args:
        grads: the gradients G_d, changed in place; any shapes, layouts and float dtypes, on one
            device, each with memory of its own.
        layers: the layer index of each gradient.
        reference_norms: ‖G_w‖, `[L]`, on the same device.
        balance: λ ≥ 0, a number, or a scalar tensor on the device, which a captured graph reads
            anew at each replay (float64 is taken as it is, others are converted first).

    Returns:
        (factors, norms): what each layer was multiplied by, and ‖G_d‖ before it, `[L]` each.

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

    θ ← θ - α (λ‖G_w‖/‖G_d‖ · G_d + G_t), the end of Algorithm 2 of Fini et al., ECCV 2020, with the
    bits of `balance_layers_`, an addition and torch.optim.SGD (as it rounds where the processor has
    fused multiply-add) for float32 in lists of one layout; bfloat16 and float16 are computed in
    float32 and rounded once. Not differentiable.

    Args:
        params: θ, changed in place; any layouts and float dtypes, each with memory of its own.
        distill_grads, new_grads: G_d and G_t, shaped like the parameters; only read.
        layers: the layer index of each parameter.
        reference_norms: ‖G_w‖, `[L]`, on the same device.
        balance, lr: λ ≥ 0 and α ≥ 0, as in `balance_layers_`.

    Returns:
        (factors, norms) as `balance_layers_`.

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
    """Random views of images, each a pure function of (seed, step, view, image index).

    In this order: crop from the padded image, resized if `resized_crop` is given; horizontal flip;
    shear, scale, rotation and translation about the centre; all of these as one inverse matrix and
    one resample, so that a rotation brings back what the crop alone would have cut off. Then
    brightness, contrast (against the view's own mean) and saturation, each clamped to [0, 1], hue,
    normalisation, and erasing to 0. uint8 images are divided by 255 behind the resample, and never
    rounded to levels, as torchvision rounds them behind each step.

    Random words are Philox4x32-10 with key = seed and counter = (image index, view, step, op): op 0
    gives (left, top, flip, angle), op 1 (scale, translate x, translate y, shear x), op 2
    (brightness, contrast, saturation, hue), op 3 (shear y, area and ratio of the crop, whether to
    erase) and op 4 (area, ratio, left and top of what is erased).

    Args:
        images: `[N, C, H, W]`, uint8, or float in [0, 1]: nothing looks at the values. Others are
            clamped where a colour operation clamps; of nan and inf nothing is promised. Contrast,
            saturation and hue need one or three channels, and the latter two act on three.
        policy: what to draw from; `SeededAugment` describes each setting.
        seed: 0 to 2**63 - 1, or an int64 scalar on the images' device or on the CPU.
        step: 0 to 2**32 - 1, likewise.
        views: view numbers, V of them.
        indices: `[N]` int64, the images' numbers within the step; default 0 to N - 1.
        dtype: of the result, a float dtype.
        channels_last: the memory format of the result.

    Returns:
        `[V·N, C, H, W]`, view by view. Not differentiable.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

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
    """The parameters `augment` draws for images of `size` (H, W), without drawing a picture: each
    field `[V, N]`.
    """
    checks.policy(policy)
    views = checks.views(views)
    checks.tensor("indices", indices)
    seed, step = checks.counter(seed, step, indices, indices.numel(), indices.device)
    size = checks.image_size(size)
    return reference.view_parameters(policy, seed, step, views, indices, size)
