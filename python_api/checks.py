"""Checks that BLDOptimizer makes before anything changes; errors name argument and remedy."""

import difflib
import inspect
import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bld_ext.api.augment import parameters_of
from bld_ext.api.batch_norm import ViewBatchNorm
from bld_ext.api.pass_size import UNITS, parse_bytes
from bld_ext.api.precision import PRECISIONS, REFUSED
from bld_ext.api.processes import Processes
from bld_ext.api.shards import (
    fsdp1,
    groups_of,
    is_sharded,
    ranks_of,
    reduced_precision,
    sharded_modules,
)


def choice(name: str, value: str, choices: Iterable[str]) -> str:
    if value not in tuple(choices):
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


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


def switch(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value


def together(settings: dict[str, object]) -> None:
    """Refuse settings that do not go with a CUDA graph, or with sums in a fixed order."""
    if settings.get("reproducible"):
        for name, only in (("schedule", "two_forward"), ("capture", False)):
            if settings.get(name, only) != only:
                raise ValueError(
                    f"reproducible: expected False with {name}={settings[name]!r}, got True"
                )
    if not settings.get("capture"):
        return
    for name, unlike in (("schedule", "in_backward"), ("check_finite", True)):
        if settings.get(name) == unlike:
            raise ValueError(f"capture: expected False with {name}={unlike!r}, got True")


def at_least(name: str, value: int, least: int) -> int:
    """Return a whole number; an integer of NumPy or a tensor of one element is one."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = least - 1
    if isinstance(value, bool) or whole < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return whole


def label(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None


def seed(name: str, value: int) -> int:
    if (whole := at_least(name, value, 0)) >= 2**63:
        raise ValueError(f"{name}: expected 0 to 2**63 - 1, got {whole}")
    return whole


def views_per_pass(name: str, value: int | str) -> int | str:
    if not isinstance(value, str):
        return at_least(name, value, 1)
    if value != "auto" and not parse_bytes(value):
        raise ValueError(
            f"{name}: expected a whole number, 'auto', or the memory that a pass may take, such as "
            f"'512 MiB', in one of {', '.join(UNITS)}, got {value!r}"
        )
    return value


def precision(name: str, value: str) -> str:
    if str(value).lower().removeprefix("torch.") in REFUSED:
        raise ValueError(
            f"{name}: expected 'fp32' or 'mixed', got {value!r}. Forward passes in TF32 or "
            "bfloat16 leave rounding noise of the distillation gradient (cosine to float64 below "
            "0.3 in some layer), which balancing scales to full size. 'mixed' keeps them in fp32 "
            "and reduces the backward passes alone"
        )
    return choice(name, value, PRECISIONS)


def number(name: str, value: float, positive: bool = False) -> float:
    try:
        real = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        real = math.nan
    if not math.isfinite(real) or real < 0 or (positive and real == 0):
        bound = ">" if positive else "≥"
        raise ValueError(f"{name}: expected a finite number {bound} 0, got {value!r}")
    return real


def balance(name: str, value: float | None) -> float | None:
    return None if value is None else number(name, value)


def augment(name: str, value: object) -> object:
    if value is None:
        return None
    if not callable(value):
        raise TypeError(
            f"{name}: expected a SeededAugment, a callable of your own or None, got "
            f"{type(value).__name__}"
        )
    parameters = parameters_of(value)
    called_with = {"seed": 0, "step": 0, "views": range(1), "indices": None}
    try:
        parameters is None or parameters.bind(None, **called_with)
    except TypeError as error:
        raise TypeError(
            f"{name}: expected a callable augment(images, seed=, step=, views=, indices=), got "
            f"{type(value).__name__}{parameters} ({error}). Call a transform of torchvision from a "
            "function that takes these and returns the views one after the other"
        ) from None
    return value


def removed(given: dict[str, object], known: dict[str, str], optimizer: type) -> None:
    """Refuse removed options, naming what replaces each, and unknown ones."""
    for name in given:
        if name in known:
            raise TypeError(f"{name}: BLDOptimizer has no such option any more; {known[name]}")
        if name in inspect.signature(torch.optim.SGD).parameters:
            remedy = f"give it to the base, base=functools.partial(torch.optim.SGD, {name}=...)"
        else:
            options = inspect.getfullargspec(optimizer).kwonlyargs
            names = difflib.get_close_matches(name, options, 1)
            remedy = (
                f"did you mean {names[0]}=?" if names else f"the options are {', '.join(options)}"
            )
        raise TypeError(f"{name}: BLDOptimizer has no such option; {remedy}")


def rates(lr: float, warmup_lr: float | None) -> float:
    """Return the ratio of the warm-up's learning rate to that of the joint updates."""
    rate = number("lr", lr, positive=warmup_lr is not None)
    return 0.01 if warmup_lr is None else number("warmup_lr", warmup_lr) / rate


def rate(name: str, value: float | Tensor) -> float | Tensor:
    """Keep a learning rate as it is; a tensor on a GPU is not read."""
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        number(name, value)
    return value


def learning_rates(groups: Iterable[dict]) -> None:
    """Check the rates that a scheduler or the user may have set; those on a GPU are not read."""
    for i, group in enumerate(groups):
        rate(f"param_groups[{i}]['lr']", group["lr"])


def model(value: nn.Module) -> None:
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel, *fsdp1())
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(value).__name__}. BLDOptimizer runs the "
            "forward passes itself, so it takes the model, not its parameters"
        )
    wrapped = [(n, m) for n, m in value.named_modules() if isinstance(m, parallel)]
    if wrapped:
        name, module = wrapped[0]
        raise ValueError(
            f"model: {name or 'it'} is a {type(module).__name__}, which would reduce gradients on "
            "its own and let heads that are added later drift apart. Give the network inside, its "
            ".module, and divide steps by process_group="
        )
    if next(value.parameters(), None) is None:
        raise ValueError("model: it has no parameter yet; call add_head(num_classes) first")
    dtypes(value)


def trainable(value: nn.Module) -> None:
    if not any(p.requires_grad for p in value.parameters()):
        raise RuntimeError("model: all of its parameters are frozen; call requires_grad_() on some")


def dtypes(value: nn.Module) -> None:
    for name, param in value.named_parameters():
        frozen_integers = not param.is_floating_point() and not param.requires_grad
        if param.dtype not in (torch.float32, torch.float64) and not frozen_integers:
            raise ValueError(
                f"model: parameter {name} is {param.dtype}; expected torch.float32 or float64. In "
                "reduced precision the distillation gradient is rounding noise: call model.float()"
            )


def batch_norms(value: nn.Module, views_per_pass: int | str) -> None:
    """Refuse several views a pass with a BatchNorm that would normalise them together."""
    for name, module in value.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, ViewBatchNorm):
            if views_per_pass != 1:
                raise ValueError(
                    f"views_per_pass: expected 1, since {name} is a {type(module).__name__}, which "
                    "normalises all views of a pass together, got "
                    f"{views_per_pass!r}. Or use a plain nn.BatchNorm"
                )


def tree(processes: Processes, views_per_pass: int | str) -> None:
    """Refuse what leaves no power-of-two number of processes with single views."""
    if views_per_pass != 1:
        raise ValueError(
            f"reproducible: expected False with views_per_pass={views_per_pass!r}, got True"
        )
    if processes.size & (processes.size - 1) or not (processes.alone or processes.shard == "views"):
        raise ValueError(
            "reproducible: expected False, or a power-of-two number of processes that share views, "
            f"got {processes.size} with shard={processes.shard!r}"
        )


def shared(value: nn.Module, alone: bool, shard: str, capture: bool) -> None:
    """Refuse what does not go with a step that is divided among several processes."""
    if alone:
        return
    if capture:
        raise ValueError(
            "capture: expected False with several processes, got True, since a CUDA graph that "
            "contains their reductions has not been tried"
        )
    for name, module in value.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and shard == "views":
            raise ValueError(
                f"model: {name} is a SyncBatchNorm, which would normalise the views of all "
                "processes together. Use nn.BatchNorm, or shard='images'"
            )
        if getattr(module, "statistics", "once") != "once" and isinstance(module, ViewBatchNorm):
            raise ValueError(
                f"model: {name} updates its statistics at every pass, of which the processes make "
                "different ones; call convert_view_batchnorm(model, statistics='once')"
            )


def sharded(
    value: nn.Module, processes: Processes, views_per_pass: int | str, reproducible: bool
) -> None:
    """Refuse parameters that are divided among other processes than those of the step."""
    managed = {p for module in sharded_modules(value) for p in module.parameters()}
    found = {name: p for name, p in value.named_parameters() if is_sharded(p)}
    for name, param in found.items():
        if param not in managed or len(groups_of(param)) != 1:
            raise ValueError(
                f"model: parameter {name} is a DTensor with {param.placements}; expected those of "
                "torch.distributed.fsdp.fully_shard alone, which divides each parameter once"
            )
        if ranks_of(param) != processes.ranks:
            raise ValueError(
                f"process_group: expected the processes among which parameter {name} is divided, "
                f"ranks {sorted(ranks_of(param))}, got ranks {sorted(processes.ranks)}"
            )
    for name, module in value.named_modules():
        if lowered := reduced_precision(module):
            raise ValueError(
                f"model: {name or 'it'} is sharded with a MixedPrecisionPolicy of {lowered}; "
                "expected float32 or none. In reduced precision the distillation gradient is "
                "rounding noise"
            )
    if found and isinstance(views_per_pass, str):
        raise ValueError(
            "views_per_pass: expected a whole number with sharded parameters, since all processes "
            f"need as many passes, got {views_per_pass!r}"
        )
    if found and reproducible:
        raise ValueError("reproducible: expected False with sharded parameters, got True")


def mixed(value: nn.Module, groups: Iterable[dict]) -> None:
    """Refuse torch's joint kernels for whole and sharded parameters together."""
    if len({is_sharded(param) for param in value.parameters()}) < 2:
        return
    for i, group in enumerate(groups):
        for option in ("foreach", "fused"):
            if group.get(option):
                raise ValueError(
                    f"param_groups[{i}]['{option}']: expected None or False with whole and sharded "
                    "parameters, got True"
                )


def heads(sizes: Iterable[int]) -> list[int]:
    if not (sizes := list(sizes)):
        raise RuntimeError("model: it has no head yet; call add_head(num_classes) before a step")
    return sizes


def tensors(images: object, labels: object) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("step: it computes gradients; call it outside torch.inference_mode()")
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        kinds = f"{type(images).__name__} and {type(labels).__name__}"
        raise TypeError(
            f"images, labels: expected two tensors, step(images, labels), got {kinds}; make them "
            "with torch.as_tensor"
        )
