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

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

import bld_ext.registry  # noqa: F401  (defines torch.ops.bld_ext)
from bld_ext import reference
from bld_ext.reference import Policy, ViewParameters, compute_dtype

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---- argument checks ----


def _require(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def _check_logits(logits: Tensor, head_sizes: Sequence[int], exact: bool) -> list[int]:
    _check_tensor("logits", logits)
    _require(logits.dtype in FLOATS, "logits", "a floating-point dtype", logits.dtype)
    _require(logits.dim() >= 2, "logits", "shape [N, C, *]", tuple(logits.shape))
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None:
        raise NotImplementedError(
            "logits: expected a plain tensor, got a dual tensor of forward-mode differentiation, "
            "which the ops do not have; use reverse mode (backward, torch.autograd.grad)"
        )
    sizes = list(head_sizes)
    _require(all(s >= 1 for s in sizes), "head_sizes", "sizes of at least 1", sizes)
    total, classes = sum(sizes), logits.shape[1]
    if exact:
        _require(bool(sizes), "head_sizes", "at least one head: add one first", sizes)
        _require(total == classes, "head_sizes", f"a sum of {classes}, logits' classes", sizes)
    else:
        _require(total <= classes, "head_sizes", f"a sum of at most {classes}, from logits", sizes)
    return sizes


def _temperature(value: float | Tensor, logits: Tensor, check_inputs: bool) -> Tensor:
    """τ as the float64 scalar that kernels read, on logits' device or, passed by value, a CPU."""
    if not isinstance(value, Tensor):
        if not isinstance(value, (int, float)):
            kind = type(value).__name__
            raise TypeError(f"temperature: expected a number or a scalar tensor, got {kind}")
        _require(0 < value < math.inf, "temperature", "a positive finite number", value)
        return torch.full((), value, dtype=torch.float64, device="cpu")
    _require(value.dim() == 0, "temperature", "a number or a scalar tensor", tuple(value.shape))
    _require(value.dtype in FLOATS, "temperature", "a floating-point dtype", value.dtype)
    _require(not value.requires_grad, "temperature", "a constant: detach it", "requires_grad=True")
    devices = dict.fromkeys(("cpu", str(logits.device)))
    allowed = str(value.device) in devices
    _require(allowed, "temperature", f"device {' or '.join(devices)}", value.device)
    if _may_look(value, check_inputs):
        valid = bool(value > 0) and bool(value.isfinite())
        _require(valid, "temperature", "a positive finite number", value.item())
    return value.double()


def _may_look(tensor: Tensor, check_inputs: bool) -> bool:
    """Values are free to look at on a CPU; elsewhere looking waits for the device."""
    if torch.compiler.is_compiling():
        remedy = "False: torch.compile cannot look at values. Check them before the compiled call"
        _require(not check_inputs, "check_inputs", remedy, check_inputs)
        return False
    return tensor.device.type == "cpu" or check_inputs


def _check_tensor(argument: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")


def _check_bank(bank: Tensor, logits: Tensor, head_sizes: Sequence[int]) -> None:
    _check_tensor("bank", bank)
    shape = (logits.shape[0], sum(head_sizes), *logits.shape[2:])
    _require(tuple(bank.shape) == shape, "bank", f"shape {shape}", tuple(bank.shape))
    dtype = compute_dtype(logits.dtype)
    _require(bank.dtype == dtype, "bank", f"{dtype} for {logits.dtype} logits", bank.dtype)
    _require(bank.device == logits.device, "bank", f"device {logits.device}", bank.device)


def _check_labels(labels: Tensor, logits: Tensor, classes: int, check_inputs: bool) -> None:
    _check_tensor("labels", labels)
    shape = (logits.shape[0], *logits.shape[2:])
    _require(tuple(labels.shape) == shape, "labels", f"shape {shape}", tuple(labels.shape))
    _require(labels.dtype == torch.int64, "labels", "torch.int64", labels.dtype)
    _require(labels.device == logits.device, "labels", f"device {logits.device}", labels.device)
    if labels.numel() and _may_look(labels, check_inputs):
        low, high = labels.min().item(), labels.max().item()
        _require(
            low >= 0 and high < classes,
            "labels",
            f"class indices of the newest head, 0 to {classes - 1}",
            f"{low} to {high}. Number each task's classes from 0",
        )


def _check_layers(argument: str, tensors: Sequence[Tensor], layers: Sequence[int], L: int) -> None:
    _require(len(tensors) >= 1, argument, "at least one tensor", "none")
    _require(len(layers) == len(tensors), "layers", f"{len(tensors)} indices", len(layers))
    _require(all(0 <= l < L for l in layers), "layers", f"indices from 0 to {L - 1}", layers)
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        _require(tensor.dtype in FLOATS, f"{argument}[{i}]", "a floating-point dtype", tensor.dtype)
        same = tensor.device == first.device
        _require(same, f"{argument}[{i}]", f"device {first.device}", tensor.device)


def _check_same_shapes(argument: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    _require(len(tensors) == len(like), argument, f"{len(like)} tensors", len(tensors))
    for i, (t, p) in enumerate(zip(tensors, like, strict=True)):
        _require(t.shape == p.shape, f"{argument}[{i}]", f"shape {tuple(p.shape)}", tuple(t.shape))
        _require(t.dtype in FLOATS, f"{argument}[{i}]", "a floating-point dtype", t.dtype)
        _require(t.device == p.device, f"{argument}[{i}]", f"device {p.device}", t.device)


def _check_reference_norms(reference_norms: Tensor, tensors: Sequence[Tensor]) -> None:
    shape = tuple(reference_norms.shape)
    _require(len(shape) == 1, "reference_norms", "one norm a layer, [L]", shape)
    _require(reference_norms.dtype in FLOATS, "reference_norms", "floats", reference_norms.dtype)
    device = tensors[0].device
    same = reference_norms.device == device
    _require(same, "reference_norms", f"device {device}", reference_norms.device)


def _scalar(argument: str, value: float | Tensor, device: torch.device) -> Tensor:
    """A device scalar: floats keep all their digits in float64, tensors are taken as they are."""
    if isinstance(value, Tensor):
        _require(value.dim() == 0, argument, "a number or a scalar tensor", tuple(value.shape))
        return value
    _require(math.isfinite(value), argument, "a finite number", value)
    return torch.full((), value, dtype=torch.float64, device=device)


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
    sizes = _check_logits(logits, head_sizes, exact=False)
    temperature = _temperature(temperature, logits, check_inputs)
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
    sizes = _check_logits(logits, head_sizes, exact=False)
    temperature = _temperature(temperature, logits, check_inputs)
    _check_bank(bank, logits, sizes)
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
    sizes = _check_logits(logits, head_sizes, exact=True)
    temperature = _temperature(temperature, logits, check_inputs)
    _check_labels(labels, logits, sizes[-1], check_inputs)
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
    sizes = _check_logits(logits, head_sizes, exact=True)
    temperature = _temperature(temperature, logits, check_inputs)
    _check_labels(labels, logits, sizes[-1], check_inputs)
    _check_bank(bank, logits, sizes[:-1])
    return torch.ops.bld_ext.joint_loss(logits, labels, bank, sizes, temperature)[:2]


# ---- per-layer norms, balance and update ----


def layer_norms(
    tensors: Sequence[Tensor], layers: Sequence[int], num_layers: int | None = None
) -> Tensor:
    """L2 norm of each layer over all its tensors: sqrt(Σ_{i in l} ‖t_i‖²).

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
        num_layers = max(layers, default=-1) + 1
    _check_layers("tensors", tensors, layers, num_layers)
    return torch.ops.bld_ext.layer_norms(tensors, layers, num_layers)


def balance_layers_(
    grads: Sequence[Tensor],
    layers: Sequence[int],
    reference_norms: Tensor,
    balance: float | Tensor = 2.0,
) -> tuple[Tensor, Tensor]:
    """Rescale each layer's gradient, in place, to `balance` times a reference norm.

    G_d[l] ← λ ‖G_w[l]‖ / ‖G_d[l]‖ · G_d[l], Algorithm 2 of Fini et al., ECCV 2020, per layer. The
    factor is 0 where finite norms have no finite ratio, as for ‖G_d[l]‖ = 0; a norm that is not
    finite makes the gradient nan, so that it stays visible.

    Args:
        grads: the gradients G_d, changed in place; any shapes and float dtypes, on one device.
        layers: the layer index of each gradient.
        reference_norms: ‖G_w‖, `[L]`, on the same device.
        balance: λ, a number or a scalar tensor on the device.

    Returns:
        (factors, norms): what each layer was multiplied by, and ‖G_d‖ before it, `[L]` each.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        norms = layer_norms(grads, layers, L)
        for g, l in zip(grads, layers): g *= balance * reference_norms[l] / norms[l]
    """
    _check_reference_norms(reference_norms, grads or [reference_norms])
    _check_layers("grads", grads, layers, len(reference_norms))
    balance = _scalar("balance", balance, reference_norms.device)
    return torch.ops.bld_ext.balance_layers_(grads, layers, reference_norms, balance)


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

    θ ← θ - α (λ‖G_w‖/‖G_d‖ · G_d + G_t), the end of Algorithm 2 of Fini et al., ECCV 2020.

    Args:
        params: θ, changed in place.
        distill_grads, new_grads: G_d and G_t, shaped like the parameters; only read.
        layers: the layer index of each parameter.
        reference_norms: ‖G_w‖, `[L]`, on the same device.
        balance, lr: λ and α, numbers or scalar tensors on the device.

    Returns:
        (factors, norms) as `balance_layers_`.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        balance_layers_(distill_grads, layers, reference_norms, balance)
        for p, d, n in zip(params, distill_grads, new_grads): p -= lr * (d + n)
    """
    _check_reference_norms(reference_norms, params or [reference_norms])
    _check_layers("params", params, layers, len(reference_norms))
    _check_same_shapes("distill_grads", distill_grads, params)
    _check_same_shapes("new_grads", new_grads, params)
    device = reference_norms.device
    balance, lr = _scalar("balance", balance, device), _scalar("lr", lr, device)
    return torch.ops.bld_ext.balanced_sgd_(
        params, distill_grads, new_grads, layers, reference_norms, balance, lr
    )


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

    In this order: crop from the padded image, horizontal flip, rotation and scale about the centre,
    as one inverse matrix and one bilinear resample, zero outside the image (so a rotation brings
    back what the crop alone would have cut off); brightness, contrast (against the image's own
    mean), saturation, hue, each clamped to [0, 1]; normalisation.

    Random words are Philox4x32-10 with key = seed and counter = (image index, view, step, op): op 0
    gives (left, top, flip, angle), op 1 (scale, -, -, -), op 2 (brightness, contrast, saturation,
    hue).

    Args:
        images: `[N, C, H, W]`, uint8, or float in [0, 1]. Saturation and hue act on three channels.
        policy: what to draw from.
        seed: 0 to 2**63 - 1, or such an int64 scalar on the images' device.
        step: 0 to 2**32 - 1, or such an int64 scalar on the images' device.
        views: view numbers, V of them.
        indices: `[N]` int64, the images' numbers within the step; default 0 to N - 1.
        dtype: of the result, a float dtype.
        channels_last: the memory format of the result.

    Returns:
        `[V·N, C, H, W]`, view by view. Not differentiable.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described.

    Equivalent to:
        parameters = view_parameters(policy, seed, step, views, indices)
        # torchvision.transforms.v2.functional: crop(pad), hflip, affine, adjust_*, normalize
    """
    uint8_or_float = images.dtype == torch.uint8 or images.dtype in FLOATS
    _require(uint8_or_float, "images", "uint8 or a floating-point dtype", images.dtype)
    _require(images.dim() == 4, "images", "shape [N, C, H, W]", tuple(images.shape))
    _require(dtype in FLOATS, "dtype", "a floating-point dtype", dtype)
    channels = len(policy.mean)
    matches = channels in (0, images.shape[1])
    _require(matches, "policy.mean", f"{images.shape[1]} values, one a channel", channels)
    if policy.contrast or policy.saturation or policy.hue:
        known = images.shape[1] in (1, 3)
        _require(known, "images", "1 or 3 channels for colour jitter", tuple(images.shape))
    views = _check_views(views)
    seed, step, indices = _counter(seed, step, indices, images)
    return torch.ops.bld_ext.augment(
        images, policy.pack(), seed, step, views, indices, dtype, channels_last
    )


def view_parameters(
    policy: Policy,
    seed: int | Tensor,
    step: int | Tensor,
    views: Sequence[int],
    indices: Tensor,
) -> ViewParameters:
    """The parameters `augment` draws, without drawing a picture: each field `[V, N]`."""
    views = _check_views(views)
    seed, step, indices = _counter(seed, step, indices, indices)
    return reference.view_parameters(policy, seed, step, views, indices)


def _check_views(views: Sequence[int]) -> list[int]:
    expected = f"whole numbers, 0 to {2**32 - 1}"
    _require(isinstance(views, Sequence), "views", expected, views)
    views = list(views)
    whole = all(isinstance(v, int) and 0 <= v < 2**32 for v in views)
    _require(whole, "views", expected, views)
    return views


def _counter(seed, step, indices, images):
    device = images.device
    for name, value, limit in (("seed", seed, 2**63), ("step", step, 2**32)):
        if isinstance(value, Tensor):
            scalar = value.dtype == torch.int64 and value.dim() == 0
            got = f"{value.dtype} {tuple(value.shape)}"
            _require(scalar, name, "a whole number or an int64 scalar", got)
        else:
            whole = isinstance(value, int) and 0 <= value < limit
            _require(whole, name, f"0 to {limit - 1}", value)
    if indices is None:
        indices = torch.arange(images.shape[0], device=device)
    _require(isinstance(indices, Tensor), "indices", "a tensor", indices)
    _require(indices.dtype == torch.int64, "indices", "torch.int64", indices.dtype)
    expected = (images.shape[0],)
    shape = tuple(indices.shape)
    _require(shape == expected, "indices", f"shape {expected}", shape)
    if device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = indices.min().item(), indices.max().item()
        _require(low >= 0 and high < 2**32, "indices", f"0 to {2**32 - 1}", f"{low} to {high}")
    seed, step = (x if isinstance(x, Tensor) else indices.new_full((), x) for x in (seed, step))
    return seed, step, indices
