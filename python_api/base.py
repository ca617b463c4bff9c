"""What an optimizer does to parameters, tried out on copies of one element."""

import copy

import torch
from torch import Tensor

from bld_ext.api.warn import warn

NO_CLOSURE = (
    "The two stages compute the gradients, so there is no closure that it could call again. Use "
    "one whose step() needs none, such as torch.optim.SGD"
)


def try_out(base: torch.optim.Optimizer) -> None:
    """Let a copy take a step at a gradient of zero; warn of what it keeps and of what it moves.

    Raises:
        ValueError: it cannot take a step without a closure.
    """
    kind = type(base).__name__
    twin, params = _twin(base)
    if twin is None:
        return
    try:
        with torch.enable_grad():
            twin.step()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"base: {kind} could not take a step by itself ({type(error).__name__}: {reason}). "
            f"{NO_CLOSURE if 'closure' in reason else 'Use other options of it, or another base'}"
        ) from error
    if any(twin.state.values()):
        warn(
            f"{kind} keeps state, which carries memory from batch to batch; in the "
            "paper nothing but the network does. Plain torch.optim.SGD keeps none.",
        )
    if any((p != 1).any() for p in params):
        warn(
            f"{kind} moves parameters whose gradient is zero, as weight decay does. "
            "Old heads have such a gradient, so each update shrinks them. Give heads a group of "
            "their own without weight decay, or weight_decay=0.",
        )


def _twin(base: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer | None, list[Tensor]]:
    """A copy of it on parameters of one element, 1, with a gradient of zero."""
    params, memo = [], {}
    for group in base.param_groups:
        for param in group["params"]:
            small = torch.ones_like(param[(slice(1),) * param.dim()], requires_grad=True)
            small.grad = torch.zeros_like(small) if small.numel() else None
            params.append(small)
            memo[id(param)] = small
            for value in base.state.get(param, {}).values():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    memo[id(value)] = value[(slice(1),) * param.dim()].clone()
    twin = object.__new__(type(base))
    try:
        twin.__dict__ = copy.deepcopy(vars(base), memo)
    except Exception:  # it holds something that has no copy
        return None, []
    return twin, params
