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
from bld_ext.api.precision import backward_arithmetic
from bld_ext.api.views import Pass, Views


def _backward(loss: Tensor, views: Views, each: Pass, last: AbstractContextManager) -> None:
    weighted = loss / views.count if each.counts else 0 * loss
    with last if each.is_last else nullcontext(), backward_arithmetic(views.precision):
        weighted.backward()


def warm_up_pass(
    views: Views, temperature: float, fill_bank: bool, last: AbstractContextManager
) -> tuple[Tensor, Tensor]:
    """Add G_w to .grad; return L_t and the bank, `[V·B, C_old, *]`.

    Without `fill_bank` the bank has no classes: `[V·B, 0, *]`.
    """
    bank, losses = None, []
    for each in views:
        loss, targets = ops.warm_up_loss(each.logits, each.labels, views.sizes, temperature)
        targets = targets if fill_bank else targets[:, :0]
        if bank is None:
            bank = targets.new_empty(views.rows, *targets.shape[1:])
        bank[each.rows] = targets
        _backward(loss, views, each, last)
        _note(losses, loss, each)
    return torch.stack(losses).sum() / views.count, bank


def new_task_pass(views: Views, temperature: float, last: AbstractContextManager) -> Tensor:
    """Add dL_t/dθ to .grad; return L_t."""
    losses = []
    for each in views:
        loss, _ = ops.warm_up_loss(each.logits, each.labels, views.sizes, temperature)
        _backward(loss, views, each, last)
        _note(losses, loss, each)
    return torch.stack(losses).sum() / views.count


def distillation_pass(
    views: Views, bank: Tensor, temperature: float, last: AbstractContextManager
) -> Tensor:
    """Add G_d to .grad; return L_d."""
    losses = []
    for each in views:
        targets = bank[each.rows]
        loss = ops.distillation_loss(each.logits, targets, views.sizes[:-1], temperature)
        _backward(loss, views, each, last)
        _note(losses, loss, each)
    return torch.stack(losses).sum() / views.count


def _note(losses: list[Tensor], loss: Tensor, each: Pass) -> None:
    if each.counts:
        losses.append(loss.detach())


def shared_pass(
    views: Views,
    bank: Tensor,
    temperature: float,
    params: list[Tensor],
) -> tuple[Tensor, Tensor, dict[Tensor, Tensor]]:
    """Add dL_t/dθ to .grad; return L_t, L_d and G_d, all from the same forward passes."""
    new_losses, old_losses = [], []
    distilled: dict[Tensor, Tensor] = {}
    for each in views:
        logits, labels, targets = each.logits, each.labels, bank[each.rows]
        new, old = ops.joint_loss(logits, labels, targets, views.sizes, temperature)
        with backward_arithmetic(views.precision):
            grads = torch.autograd.grad(
                old / views.count, params, retain_graph=True, allow_unused=True
            )
        for param, grad in zip(params, grads, strict=True):
            if grad is not None and param in distilled:
                distilled[param].add_(grad)
            elif grad is not None:
                distilled[param] = grad.clone()  # autograd may return one tensor for two parameters
        with backward_arithmetic(views.precision):
            (new / views.count).backward()
        new_losses.append(new.detach())
        old_losses.append(old.detach())
    new, old = (torch.stack(x).sum() / views.count for x in (new_losses, old_losses))
    return new, old, distilled


def one_graph_pass(
    views: Views, bank: Tensor, temperature: float, rescale: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Add G_d to .grad, call `rescale()`, add dL_t/dθ; return L_t and L_d.

    Everything comes from one forward pass, so all views must be in it.
    """
    (each,) = views
    new, old = ops.joint_loss(each.logits, each.labels, bank, views.sizes, temperature)
    with backward_arithmetic(views.precision):
        (old / views.count).backward(retain_graph=True)
    rescale()
    _backward(new, views, each, nullcontext())
    return new.detach() / views.count, old.detach() / views.count
