"""Finds out whether a network computes an image differently when other images are beside it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bld_ext.api.views import Views


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Undo what forward passes change in the buffers, such as spectral_norm's iteration."""
    buffers = [*model.buffers()]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


# A call of a module: its name, its first input and its output.
Call = tuple[str, Tensor, Tensor]


@contextmanager
def _watched(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Record the calls of all modules, inner ones first, with dropout switched off."""

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((names[module], inputs[0].detach(), output.detach()))

    scripted = torch.jit.ScriptModule  # cannot have hooks
    names = {m: name for name, m in model.named_modules() if not isinstance(m, scripted)}
    masks = [m for m in names if isinstance(m, _DropoutNd) and m.training]
    hooks = [m.register_forward_hook(note) for m in names]
    for mask in masks:
        mask.training = False
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for mask in masks:
            mask.training = True


def _same(alone: tuple[Tensor, ...], beside: Tensor) -> bool:
    """Return whether the views have the same values side by side as alone, up to rounding."""
    if any(x.dim() == 0 or x.shape[1:] != beside.shape[1:] for x in alone):
        return all(x.shape == beside.shape and _close(x, beside) for x in alone)
    expected = torch.cat(alone)
    return len(expected) == len(beside) and _close(expected, beside)


def _close(a: Tensor, b: Tensor) -> bool:
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    finite = a.abs().nan_to_num(0, 0, 0)
    scale = finite.max().item() if finite.numel() else 0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


@torch.no_grad()
def what_mixes(first: Views, second: Views, both: Views) -> str | None:
    """Return the name of the module that computes a view differently when another is beside it.

    Returns the first of the innermost such modules, or None. Dropout is ignored, because its masks
    are drawn for each pass anyway. Returns "augment" if the augmentation does not make the same
    view again.
    """
    calls: list[list[Call]] = [[], [], []]
    logits = []
    for views, noted in zip((first, second, both), calls, strict=True):
        with no_trace(first.model), _watched(first.model, noted):
            ((_, found, _),) = views
        logits.append(found)
    for (name, *one), (_, *two), (_, *pair) in zip(*calls, strict=False):
        same_input, same_output = (_same((one[i], two[i]), pair[i]) for i in (0, 1))
        if name == "" and not same_input:
            return "augment"
        if same_input and not same_output:
            return name or type(first.model).__name__
    # only the logits are left to compare in a model that cannot have hooks
    return None if _same(tuple(logits[:2]), logits[2]) else type(first.model).__name__


def warn_of_mixing(first: Views, second: Views, both: Views, per_pass: int) -> None:
    if name := what_mixes(first, second, both):
        warnings.warn(
            f"BLDOptimizer: {name} computes an image differently beside other images, or at "
            f"random. With views_per_pass={per_pass} it sees {per_pass} views at a time, which "
            "changes what is learned and not only how fast; use views_per_pass=1",
            stacklevel=5,
        )
