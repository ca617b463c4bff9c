"""Argument checks of the ops, made before anything is computed.

Each error names the argument, its value, what was expected and the remedy.
"""

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from bld_ext.reference import (
    IGNORED,
    INTERPOLATIONS,
    PADDING_MODES,
    WHITE,
    Policy,
    compute_dtype,
)

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def whole(value: object) -> bool:
    """Return whether a value is a whole number; the first question is the fast one."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def logits(logits: Tensor, head_sizes: Sequence[int], exact: bool) -> list[int]:
    dense("logits", logits)
    require(logits.dtype in FLOATS, "logits", "a floating-point dtype", logits.dtype)
    require(logits.dim() >= 2, "logits", "shape [N, C, *]", tuple(logits.shape))
    plain("logits", logits)
    if not isinstance(head_sizes, Sequence):
        raise TypeError(f"head_sizes: expected a list, got {type(head_sizes).__name__}")
    sizes = list(head_sizes)
    require(all(map(whole, sizes)), "head_sizes", "whole numbers", sizes)
    require(all(s >= 1 for s in sizes), "head_sizes", "sizes of at least 1", sizes)
    total, classes = sum(sizes), logits.shape[1]
    if exact:
        require(bool(sizes), "head_sizes", "at least one head: add one first", sizes)
        require(total == classes, "head_sizes", f"a sum of {classes}, logits' classes", sizes)
    else:
        require(total <= classes, "head_sizes", f"a sum of at most {classes}, from logits", sizes)
    return sizes


LEAST = 1e-38  # of what is divided by; the inverse of a smaller one overflows in float32


def scalar(
    argument: str,
    value: float | Tensor,
    device: torch.device,
    positive: bool = False,
    check_inputs: bool = False,
) -> Tensor:
    """Return a number as the float64 scalar tensor that kernels read, on `device` or on the CPU."""
    least = LEAST if positive else 0
    expected = f"a {'positive ' if positive else ''}finite number, at least {least}"
    if not isinstance(value, Tensor):
        if not isinstance(value, Real):
            kind = type(value).__name__
            raise TypeError(f"{argument}: expected a number or a scalar tensor, got {kind}")
        require(least <= value <= sys.float_info.max, argument, expected, value)
        return torch.full((), float(value), dtype=torch.float64, device="cpu")
    require(value.dim() == 0, argument, "a number or a scalar tensor", tuple(value.shape))
    require(value.dtype in FLOATS, argument, "a floating-point dtype", value.dtype)
    require(not value.requires_grad, argument, "a constant: detach it", "requires_grad=True")
    plain(argument, value)
    devices = dict.fromkeys(("cpu", str(device)))
    require(str(value.device) in devices, argument, f"device {' or '.join(devices)}", value.device)
    if may_look(value, check_inputs):
        valid = bool(value >= least) and bool(value.isfinite())
        require(valid, argument, expected, value.item())
    return value.double()


def may_look(tensor: Tensor, check_inputs: bool) -> bool:
    """Return whether to check values: freely on a CPU; elsewhere only if asked, since it waits.

    A tensor that stands for others, as in a trace or inside torch.func.vmap, has no values.
    """
    if torch.compiler.is_compiling():
        remedy = "False: torch.compile cannot look at values. Check them before the compiled call"
        require(not check_inputs, "check_inputs", remedy, check_inputs)
        return False
    if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type == "cpu" or check_inputs


def plain(argument: str, value: Tensor) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{argument}: expected a plain tensor, got a dual tensor of forward-mode "
            "differentiation, which the ops do not have; use reverse mode (backward, "
            "torch.autograd.grad)"
        )
    if not torch.compiler.is_compiling() and torch._C._functorch.is_gradtrackingtensor(value):
        raise NotImplementedError(
            f"{argument}: expected a plain tensor, got one inside torch.func.grad or another "
            "transform of torch.func, which the ops do not have; use backward or "
            "torch.autograd.grad"
        )


def tensor(argument: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")


def dense(argument: str, value: Tensor) -> None:
    tensor(argument, value)
    layout = value.layout
    require(layout == torch.strided, argument, "a dense tensor: call to_dense()", layout)


def sequence(argument: str, value: Sequence) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{argument}: expected a list, got {type(value).__name__}")


def bank(bank: Tensor, logits: Tensor, head_sizes: Sequence[int]) -> None:
    dense("bank", bank)
    shape = (logits.shape[0], sum(head_sizes), *logits.shape[2:])
    require(tuple(bank.shape) == shape, "bank", f"shape {shape}", tuple(bank.shape))
    dtype = compute_dtype(logits.dtype)
    require(bank.dtype == dtype, "bank", f"{dtype} for {logits.dtype} logits", bank.dtype)
    require(bank.device == logits.device, "bank", f"device {logits.device}", bank.device)


def view_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    views: int,
    eps: float,
) -> None:
    dense("input", input)
    require(input.dtype in FLOATS, "input", "a floating-point dtype", input.dtype)
    require(input.dim() >= 2, "input", "shape [V·B, C, *]", input.shape)
    plain("input", input)
    images = input.shape[0]
    if not (whole(views) and views >= 1 and images % views == 0):
        require(False, "views", f"a divisor of {images}, the images of input", views)
    known = isinstance(eps, Real) and 0 <= eps <= sys.float_info.max
    require(known, "eps", "a finite number, at least 0", eps)
    for name, value in (("weight", weight), ("bias", bias), ("residual", residual)):
        if value is None:
            continue
        dense(name, value)
        plain(name, value)
        if value.shape != (input.shape if name == "residual" else input.shape[1:2]):
            expected = tuple(input.shape) if name == "residual" else f"[{input.shape[1]}]"
            require(False, name, f"shape {expected}", tuple(value.shape))
        if value.dtype != input.dtype:  # parameters may be more precise
            known = name != "residual" and value.dtype == compute_dtype(input.dtype)
            require(known, name, f"{input.dtype}, as input", value.dtype)
        if value.device != input.device:
            require(False, name, f"device {input.device}", value.device)


def labels(labels: Tensor, logits: Tensor, classes: int, check_inputs: bool) -> None:
    dense("labels", labels)
    shape = (logits.shape[0], *logits.shape[2:])
    require(tuple(labels.shape) == shape, "labels", f"shape {shape}", tuple(labels.shape))
    require(labels.dtype == torch.int64, "labels", "torch.int64", labels.dtype)
    require(labels.device == logits.device, "labels", f"device {logits.device}", labels.device)
    if may_look(labels, check_inputs) and (outside := outside_classes(labels, classes)):
        low, high = outside
        require(
            False,
            "labels",
            f"class indices of the newest head, 0 to {classes - 1}, or {IGNORED}",
            f"{low} to {high}. Number each task's classes from 0",
        )


def outside_classes(labels: Tensor, classes: int, ignored: int = IGNORED) -> tuple[int, int] | None:
    """Return the lowest and the highest label if some are neither classes nor `ignored`, else None.

    On an accelerator this waits for the device.
    """
    for given in (labels, labels[labels != ignored]):  # without a copy where none is ignored
        if not given.numel():
            return None
        low, high = (x.item() for x in given.aminmax())
        if low >= 0 and high < classes:
            return None
    return low, high


# ---- lists of tensors that belong to layers ----


MOST_LAYERS = 2**31 - 1


def indices(layers: Sequence[int], count: int = MOST_LAYERS) -> None:
    sequence("layers", layers)
    for i, l in enumerate(layers):
        if not whole(l):
            require(False, f"layers[{i}]", "a whole number", repr(l))
        if not 0 <= l < count:
            require(False, f"layers[{i}]", f"an index from 0 to {count - 1}", l)


def layer_norms(tensors: Sequence[Tensor], layers: Sequence[int], num_layers: int) -> None:
    _tensor_lists({"tensors": tensors}, layers, num_layers)


def balance_layers_(
    grads: Sequence[Tensor],
    layers: Sequence[int],
    reference_norms: Tensor,
    balance: Tensor,
) -> None:
    _reference_norms(reference_norms, grads)
    _tensor_lists({"grads": grads}, layers, len(reference_norms))


def balanced_sgd_(
    params: Sequence[Tensor],
    distill_grads: Sequence[Tensor],
    new_grads: Sequence[Tensor],
    layers: Sequence[int],
    reference_norms: Tensor,
    balance: Tensor,
    lr: Tensor,
) -> None:
    _reference_norms(reference_norms, params)
    lists = {"params": params, "distill_grads": distill_grads, "new_grads": new_grads}
    _tensor_lists(lists, layers, len(reference_norms))


def _reference_norms(reference_norms: Tensor, tensors: Sequence[Tensor]) -> None:
    dense("reference_norms", reference_norms)
    shape, dtype = tuple(reference_norms.shape), reference_norms.dtype
    require(len(shape) == 1, "reference_norms", "one norm a layer, [L]", shape)
    require(dtype in FLOATS, "reference_norms", "a floating-point dtype", dtype)
    if isinstance(tensors, (list, tuple)) and tensors and isinstance(tensors[0], Tensor):
        device, found = tensors[0].device, reference_norms.device
        require(found == device, "reference_norms", f"device {device}", found)


def _tensor_lists(lists: dict[str, Sequence[Tensor]], layers: Sequence[int], L: int) -> None:
    """Check that the lists have equal lengths and shapes, and that no written tensor comes twice.

    Ops that write, all but layer_norms, write the first list.
    """
    for name, value in {**lists, "layers": layers}.items():
        sequence(name, value)
    if not whole(L):
        raise TypeError(f"num_layers: expected a whole number, got {type(L).__name__}")
    (first_name, first), *_ = lists.items()
    written = () if first_name == "tensors" else first
    require(len(first) >= 1, first_name, "at least one tensor", "none")
    require(len(layers) == len(first), "layers", f"{len(first)} indices", len(layers))
    require(0 <= L <= MOST_LAYERS, "num_layers", f"0 to {MOST_LAYERS}", L)
    indices(layers, L)
    for name, tensors in lists.items():
        require(len(tensors) == len(first), name, f"{len(first)} tensors", len(tensors))
        for i, (t, like) in enumerate(zip(tensors, first, strict=True)):
            where = f"{name}[{i}]"
            tensor(where, t)
            layout, device, dtype, shape = t.layout, t.device, t.dtype, tuple(t.shape)
            require(layout == torch.strided, where, "a dense tensor: call to_dense()", layout)
            require(dtype in FLOATS, where, "a floating-point dtype", dtype)
            require(device == first[0].device, where, f"device {first[0].device}", device)
            require(shape == tuple(like.shape), where, f"shape {tuple(like.shape)}", shape)
    before = {id(t): i for i, t in reversed(list(enumerate(written)))}
    for i, t in enumerate(written):
        expected = "a tensor of its own; clone() it"
        require(
            before[id(t)] == i, f"{first_name}[{i}]", expected, f"{first_name}[{before[id(t)]}]"
        )


# ---- seeded augmentation ----


MOST = {
    "crop_padding": 2**20,
    "flip": 1,
    "rotation": 180,
    "brightness": 1,
    "contrast": 1,
    "saturation": 1,
    "hue": 0.5,
    "erase": 1,
}  # the largest value of each setting; the smallest is 0
MOST_EACH = {"translate": 1, "shear": 80}  # a value for x and one for y
RANGES = {
    "resized_crop": (1e-6, 1),
    "resized_crop_ratio": (1e-3, 1e3),
    "scale": (1e-3, 1e3),
    "erase_area": (1e-6, 1),
    "erase_ratio": (1e-3, 1e3),
}  # the bounds of each (low, high)
NAMES = {"interpolation": INTERPOLATIONS, "padding_mode": PADDING_MODES}


def _numbers(value, count: int | None = None) -> bool:
    """Return whether `value` has `count` real numbers, all within ± 1e30."""
    if not isinstance(value, (tuple, list)) or count not in (None, len(value)):
        return False
    return all(isinstance(x, Real) and abs(x) < 1e30 for x in value)  # not nan either


def _known(name: str, value: object) -> bool:
    """Return whether a setting of a policy may have this value."""
    if name in MOST:
        return _numbers((value,)) and 0 <= value <= MOST[name]
    if name in MOST_EACH:
        return _numbers(value, 2) and all(0 <= x <= MOST_EACH[name] for x in value)
    if name in RANGES:
        if name == "resized_crop" and value is None:
            return True
        low, high = RANGES[name]
        return _numbers(value, 2) and low <= value[0] <= value[1] <= high
    if name in NAMES:
        return value in NAMES[name]
    return _numbers(value) and (name == "mean" or all(x > 1e-30 for x in value))


def _expected(name: str) -> str:
    if name in MOST:
        return f"0 to {MOST[name]}"
    if name in MOST_EACH:
        return f"(x, y), each 0 to {MOST_EACH[name]}"
    if name in RANGES:
        low, high = RANGES[name]
        return f"(low, high) within {low:g} to {high:g}, low first"
    if name in NAMES:
        return f"one of {', '.join(NAMES[name])}"
    return f"finite numbers{'' if name == 'mean' else ' above 0'}, one a channel"


def policy(policy: Policy, prefix: str = "policy.") -> None:
    if not isinstance(policy, Policy):
        kind = type(policy).__name__
        raise TypeError(f"policy: expected a Policy, such as SeededAugment(...).policy, got {kind}")
    for name, value in policy._asdict().items():
        if not _known(name, value):
            require(False, prefix + name, _expected(name), repr(value))
    pixels = policy.crop_padding
    require(pixels == int(pixels), f"{prefix}crop_padding", "whole pixels", pixels)
    means, stds = len(policy.mean), len(policy.std)
    require(means == stds, f"{prefix}std", f"as many values as mean, {means}", stds)


def image_size(size: Sequence[int], argument: str = "size") -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else (size,)
    known = len(sides) == 2 and all(whole(side) and side > 0 for side in sides)
    require(known, argument, "(height, width) of at least one pixel", size)
    require(max(sides) <= 2**24, argument, "sides of at most 2**24 pixels", sides)
    small = (sides[0] + 4) * (sides[1] + 4) < 2**31 - 128
    require(small, argument, "fewer than 2**31 pixels, with a border of 2", sides)
    return sides


REACH = 2**20  # pixels; in 32 bits, points so far from an image keep 9 bits behind the point


def reach(policy: Policy, size: tuple[int, int]) -> None:
    """Refuse images so large that some point of a view can be too far away for 32 bits."""
    H, W = size
    (shear_x, shear_y), smallest = map(math.radians, policy.shear), policy.scale[0]
    steps = (1 + math.tan(shear_x)) / math.cos(shear_y) / smallest  # a bound, between two pixels
    furthest = steps * (H + W) * (0.5 + max(policy.translate)) + 2 * (H + W + policy.crop_padding)
    if furthest >= REACH:
        raise ValueError(
            f"images: expected sides for which no pixel of a view shows a point more than {REACH} "
            f"pixels away, with scale {policy.scale}, shear {policy.shear} and crop_padding "
            f"{policy.crop_padding}, got {H} x {W}; make the images, the padding or the ranges "
            "smaller"
        )


def images(images: Tensor, policy: Policy, dtype: torch.dtype, channels_last: bool) -> None:
    tensor("images", images)
    known = images.dtype in (*WHITE, *FLOATS)
    require(known, "images", "uint8, uint16 or a floating-point dtype", images.dtype)
    require(images.dim() == 4, "images", "shape [N, C, H, W]", tuple(images.shape))
    require(min(images.shape[1:]) > 0, "images", "at least one pixel", tuple(images.shape))
    reach(policy, image_size(tuple(images.shape[2:]), "images"))
    require(images.layout == torch.strided, "images", "a dense tensor", images.layout)
    constant = "a constant, since views have no gradient: detach() it"
    require(not images.requires_grad, "images", constant, "requires_grad=True")
    require(dtype in FLOATS, "dtype", "a floating-point dtype", dtype)
    require(isinstance(channels_last, bool), "channels_last", "True or False", channels_last)
    channels = len(policy.mean)
    matches = channels in (0, images.shape[1])
    require(matches, "policy.mean", f"{images.shape[1]} values, one a channel", channels)
    if policy.contrast or policy.saturation or policy.hue:
        known = images.shape[1] in (1, 3)
        require(known, "images", "1 or 3 channels for colour jitter", tuple(images.shape))


def views(views: Sequence[int]) -> list[int]:
    expected = f"a sequence of whole numbers, 0 to {2**32 - 1}, such as range(3)"
    require(isinstance(views, Sequence), "views", expected, views)
    views = list(views)
    require(all(whole(v) and 0 <= v < 2**32 for v in views), "views", expected, views)
    return views


def counter(seed, step, indices, N, device):
    """Return seed and step as int64 scalar tensors; numbers become scalars on the CPU."""
    for name, value, limit in (("seed", seed, 2**63), ("step", step, 2**32)):
        if isinstance(value, Tensor):
            known = value.dtype == torch.int64 and value.dim() == 0
            got = f"{value.dtype} {tuple(value.shape)}"
            require(known, name, "a whole number or an int64 scalar", got)
            where = f"a scalar on the CPU or on {device}, where the images are"
            require(value.device in (device, torch.device("cpu")), name, where, value.device)
            if not may_look(value, check_inputs=False):
                continue
            value = value.item()
        known = whole(value) and 0 <= value < limit
        require(known, name, f"a whole number, 0 to {limit - 1}", value)
    if indices is not None:
        dense("indices", indices)
        require(indices.dtype == torch.int64, "indices", "torch.int64", indices.dtype)
        expected, shape = (N,), tuple(indices.shape)
        require(shape == expected, "indices", f"shape {expected}", shape)
        require(indices.device == device, "indices", f"device {device}", indices.device)
        if indices.numel() and may_look(indices, check_inputs=False):
            low, high = indices.min().item(), indices.max().item()
            require(low >= 0 and high < 2**32, "indices", f"0 to {2**32 - 1}", f"{low} to {high}")
    return tuple(
        x if isinstance(x, Tensor) else torch.full((), int(x), dtype=torch.int64, device="cpu")
        for x in (seed, step)
    )
