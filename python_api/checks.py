"""Checks that BLDOptimizer makes before anything changes; errors name argument and remedy."""

import inspect
import math
import warnings
from collections.abc import Iterable
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bld_ext.api.batch_norm import ViewBatchNorm
from bld_ext.api.layers import KINDS
from bld_ext.api.pass_size import parse_bytes
from bld_ext.api.precision import PRECISIONS, REFUSED
from bld_ext.api.schedules import SCHEDULES


def choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in tuple(choices):
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def some(name: str, values: Iterable[str], choices: Iterable[str]) -> tuple[str, ...]:
    chosen = () if isinstance(values, str) else tuple(values)
    if not chosen or set(chosen) - set(choices):
        raise ValueError(f"{name}: expected a list of {', '.join(choices)}, got {values!r}")
    return chosen


def bank(value: Tensor, labels: Tensor, views: int, classes: int, dtype: torch.dtype) -> None:
    shape = (views * len(labels), classes, *labels.shape[1:])
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"bank: expected probabilities {list(shape)}, of each view of each image and each old "
            f"class, got {got}"
        )
    if value.dtype != dtype or value.device != labels.device:
        got = f"{value.dtype} on {value.device}"
        raise ValueError(f"bank: expected {dtype} on {labels.device}, got {got}")
    if value.device.type == "cpu" and not value.isfinite().all():
        raise ValueError("bank: expected finite probabilities, got nan or inf")


def apart(name: str, value: object, unlike: object, **switch: bool) -> None:
    """Refuse a switch that is on while `value` is `unlike`, the choice that excludes it."""
    ((other, is_on),) = switch.items()
    if not isinstance(is_on, bool):
        raise ValueError(f"{other}: expected True or False, got {is_on!r}")
    if value == unlike and is_on:
        raise ValueError(f"{other}: expected False with {name}={unlike!r}, got {is_on!r}")


def at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def views_per_pass(value: int | str) -> None:
    if not isinstance(value, str):
        at_least("views_per_pass", value, 1)
    elif value != "auto" and not parse_bytes(value):
        raise ValueError(
            "views_per_pass: expected a whole number, 'auto', or the memory that a pass may take, "
            f"such as '512 MiB', got {value!r}"
        )


def precision(value: str) -> None:
    if str(value).lower().removeprefix("torch.") in REFUSED:
        raise ValueError(
            f"precision: expected 'fp32' or 'mixed', got {value!r}. Forward passes in TF32 or "
            "bfloat16 leave rounding noise of the distillation gradient (cosine to float64 below "
            "0.3 in some layer), which balancing scales to full size. 'mixed' keeps them in fp32 "
            "and reduces the backward passes alone"
        )
    choice("precision", value, PRECISIONS)


def number(name: str, value: float, positive: bool = False) -> None:
    try:
        real = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        real = math.nan
    if not math.isfinite(real) or real < 0 or (positive and real == 0):
        bound = ">" if positive else "≥"
        raise ValueError(f"{name}: expected a finite number {bound} 0, got {value!r}")


def removed(given: dict[str, object], known: dict[str, str]) -> None:
    """Refuse removed options, naming what replaces each, and unknown ones."""
    for name in given:
        if name in known:
            raise TypeError(f"{name}: BLDOptimizer has no such option any more; {known[name]}")
        raise TypeError(f"BLDOptimizer.__init__() got an unexpected keyword argument {name!r}")


def options(
    lr: float,
    warmup_lr: float | None,
    temperature: float,
    balance: float | None,
    joint_steps: int,
    views: int,
    per_pass: int | str,
    layer: str,
    schedule: str,
    precision_: str,
    capture: bool,
    check_finite: bool,
) -> None:
    choice("layer", layer, KINDS)
    choice("schedule", schedule, SCHEDULES)
    apart("schedule", schedule, "in_backward", capture=capture)
    apart("check_finite", check_finite, True, capture=capture)
    at_least("views", views, 1)
    views_per_pass(per_pass)
    precision(precision_)
    at_least("joint_steps", joint_steps, 0)
    number("temperature", temperature, positive=True)
    if balance is not None:
        number("balance", balance)
    number("lr", lr, positive=warmup_lr is not None)
    if warmup_lr is not None:
        number("warmup_lr", warmup_lr)


def model(value: nn.Module) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(value).__name__}. BLDOptimizer runs the "
            "forward passes itself, so it takes the model, not its parameters"
        )
    if not hasattr(value, "head_sizes"):
        raise ValueError(
            f"model: {type(value).__name__} has no head_sizes. Wrap the backbone in MultiHead, or "
            "give the model a head_sizes: classes of each head, oldest first"
        )
    if next(value.parameters(), None) is None:
        raise ValueError("model: it has no parameter yet; call add_head(num_classes) first")
    dtypes(value)


def base(value: torch.optim.Optimizer) -> None:
    closure = inspect.signature(value.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"base: {type(value).__name__} evaluates a closure several times an update, which "
            "has no place in the two stages. Use one whose step() needs none, such as SGD"
        )


def trainable(value: nn.Module) -> None:
    if not any(p.requires_grad for p in value.parameters()):
        raise RuntimeError("model: all of its parameters are frozen; call requires_grad_() on some")


def dtypes(value: nn.Module) -> None:
    for name, param in value.named_parameters():
        if param.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"model: parameter {name} is {param.dtype}; expected torch.float32 or float64. In "
                "reduced precision the distillation gradient is rounding noise: call model.float()"
            )


def batch_norms(value: nn.Module, views_per_pass: int | str) -> None:
    """Refuse or warn of a BatchNorm that was not converted: a SyncBatchNorm or a subclass."""
    for name, module in value.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, ViewBatchNorm):
            kind = type(module).__name__
            if views_per_pass != 1:
                raise ValueError(
                    f"views_per_pass: expected 1, since {name} is a {kind}, which normalises all "
                    f"views of a pass together, got {views_per_pass!r}. Or use a plain nn.BatchNorm"
                )
            warnings.warn(
                f"BLDOptimizer: {name} is a {kind}; its running statistics move at every forward "
                "pass, and not once a batch. Use a plain nn.BatchNorm",
                stacklevel=5,
            )


def heads(sizes: Iterable[int]) -> list[int]:
    if not (sizes := list(sizes)):
        raise RuntimeError("model: it has no head yet; call add_head(num_classes) before a step")
    return sizes


def batch(images: Tensor, labels: Tensor, device: torch.device, takes_uint8: bool) -> None:
    """Check types, devices and shapes, none of which waits for the device."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("step: it computes gradients; call it outside torch.inference_mode()")
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        kinds = f"{type(images).__name__} and {type(labels).__name__}"
        raise TypeError(f"images, labels: expected two tensors, step(images, labels), got {kinds}")
    for name, tensor in (("images", images), ("labels", labels)):
        if tensor.device != device:
            raise ValueError(f"{name}: expected the model's device, {device}, got {tensor.device}")
    if images.dim() < 2 or len(images) == 0:
        raise ValueError(f"images: expected [B, ...] with B ≥ 1, got {tuple(images.shape)}")
    if not takes_uint8 and not images.is_floating_point():
        raise ValueError(
            f"images: expected a float dtype where there is no augment, got {images.dtype}. Use "
            "SeededAugment(), which takes uint8, or images.float() / 255"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected torch.int64, got {labels.dtype}: use labels.long()")
    if labels.dim() < 1 or len(labels) != len(images):
        shape = tuple(labels.shape)
        raise ValueError(f"labels: expected one for each of {len(images)} images, got {shape}")


def batch_values(images: Tensor, labels: Tensor, classes: int) -> None:
    """Check the values of images and labels; on an accelerator this waits for the device."""
    if images.is_floating_point() and not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"images: expected finite values, got nan or inf in images {bad}")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels: expected classes of the newest head, 0 to {classes - 1}, got {low} to {high}."
            " Number each task's classes from 0, and add the head before its first batch"
        )
