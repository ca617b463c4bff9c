"""Passes over all views of a batch: each function computes losses and accumulates gradients.

The ops sum losses over the batch; this file averages them over the views. Each pass runs its
backward before the next pass starts, so the activations of only one pass are held at a time. `last`
is a context manager entered around the last backward pass, the one that completes the gradients.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bld_ext import ops
from bld_ext.api.memory_format import NeedsContiguousError, needs_contiguous
from bld_ext.api.precision import backward_arithmetic
from bld_ext.api.shards import is_sharded
from bld_ext.api.views import Pass, Views


def _backward(
    gradient: Tensor,
    views: Views,
    each: Pass,
    last: AbstractContextManager | None = None,
    keep: bool = False,
) -> None:
    """Run backward from the gradient of a loss by the logits, averaged over the V views.

    Raises:
        NeedsContiguousError: a function of the user's cannot run on images in channels_last.
        RuntimeError: the same, where this pass cannot be run again.
    """
    around = last if last is not None and each.is_last else nullcontext()
    try:
        with around, backward_arithmetic(views.precision):
            each.logits.backward(_averaged(gradient, views, each), retain_graph=keep)
    except RuntimeError as error:
        if not views.channels_last or not needs_contiguous(error):
            raise
        updates = not isinstance(around, nullcontext)
        if updates or any(map(is_sharded, views.model.parameters())):
            raise RuntimeError(
                "model: a backward of its own needs contiguous gradients, and gets them in "
                f"channels_last. Call .contiguous() on the gradient in it first ({error})"
            ) from error
        raise NeedsContiguousError from error


def _averaged(gradient: Tensor, views: Views, each: Pass) -> Tensor:
    return gradient.mul_(each.counts / views.count).to(each.logits.dtype)


def _note(losses: list[Tensor], loss: Tensor, each: Pass) -> None:
    if each.counts:
        losses.append(loss)


def _mean(losses: list[Tensor], views: Views) -> Tensor:
    return torch.stack(losses).sum() / views.count


def warm_up_pass(
    views: Views, temperature: float, fill_bank: bool, last: AbstractContextManager
) -> tuple[Tensor, Tensor]:
    """Add G_w to .grad; return L_t and the bank, `[V·B, C_old, *]`.

    Without `fill_bank` the bank has no classes: `[V·B, 0, *]`.
    """
    bank, losses = None, []
    for each in views:
        loss, targets, gradient = ops.warm_up_loss(
            each.logits, each.labels, views.sizes, temperature, with_gradient=True
        )
        targets = targets if fill_bank else targets[:, :0]
        if bank is None:
            bank = targets.new_empty(views.rows, *targets.shape[1:])
        bank[each.rows] = targets
        _backward(gradient, views, each, last)
        _note(losses, loss, each)
    return _mean(losses, views), bank


def new_task_pass(views: Views, temperature: float, last: AbstractContextManager) -> Tensor:
    """Add dL_t/dθ to .grad; return L_t."""
    losses = []
    for each in views:
        loss, _, gradient = ops.warm_up_loss(
            each.logits, each.labels, views.sizes, temperature, with_gradient=True
        )
        _backward(gradient, views, each, last)
        _note(losses, loss, each)
    return _mean(losses, views)


def distillation_pass(
    views: Views, bank: Tensor, temperature: float, last: AbstractContextManager
) -> Tensor:
    """Add G_d to .grad; return L_d."""
    losses = []
    for each in views:
        loss, gradient = ops.distillation_loss(
            each.logits, bank[each.rows], views.sizes[:-1], temperature, with_gradient=True
        )
        _backward(gradient, views, each, last)
        _note(losses, loss, each)
    return _mean(losses, views)


def shared_pass(
    views: Views,
    bank: Tensor,
    temperature: float,
    params: list[Tensor],
) -> tuple[Tensor, Tensor, dict[Tensor, Tensor]]:
    """Add dL_t/dθ to .grad; return L_t, L_d and G_d, all from the same forward passes."""
    new_losses, old_losses = [], []
    aside: dict[Tensor, Tensor | None] = dict.fromkeys(params)

    def swap() -> None:
        for param in params:
            param.grad, aside[param] = aside[param], param.grad

    for each in views:
        new, old, new_gradient, old_gradient = ops.joint_loss(
            each.logits, each.labels, bank[each.rows], views.sizes, temperature, with_gradient=True
        )
        swap()
        _backward(old_gradient, views, each, keep=True)
        swap()
        _backward(new_gradient, views, each)
        new_losses.append(new)
        old_losses.append(old)
    distilled = {param: grad for param, grad in aside.items() if grad is not None}
    return _mean(new_losses, views), _mean(old_losses, views), distilled


def one_graph_pass(
    views: Views, bank: Tensor, temperature: float, rescale: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Add G_d to .grad, call `rescale()`, add dL_t/dθ; return L_t and L_d.

    Everything comes from one forward pass, so all views must be in it.
    """
    (each,) = views
    new, old, new_gradient, old_gradient = ops.joint_loss(
        each.logits, each.labels, bank, views.sizes, temperature, with_gradient=True
    )
    _backward(old_gradient, views, each, keep=True)
    rescale()
    _backward(new_gradient, views, each)
    return new / views.count, old / views.count
