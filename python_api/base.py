"""What an optimizer does to parameters, tried out on copies of one element."""

import copy

import torch
from torch import Tensor

from bld_ext.api.warn import warn

NO_CLOSURE = (
    "The two stages compute the gradients, so there is no closure that it could call again. Use "
    "one whose step() needs none, such as torch.optim.SGD"
)


def try_out(base: torch.optim.Optimizer, warned: set[str]) -> set[str]:
    """Let a copy take steps; warn of what it keeps and moves, unless that is among `warned`.

    Returns:
        What it does: "keeps" state from step to step, "moves" parameters at a gradient of zero.

    Raises:
        ValueError: it cannot take a step without a closure, or does not take the learning rate of
            its groups, which differs between the warm-up and the joint updates.
    """
    kind = type(base).__name__
    twin, params = _twin(base)
    if twin is None:
        return set()
    try:
        with torch.enable_grad():
            _step(twin)
            found = {"keeps"} if any(twin.state.values()) else set()
            found |= {"moves"} if any((p != 1).any() for p in params) else set()
            obeys = _obeys_rate(twin, params)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"base: {kind} could not take a step by itself ({type(error).__name__}: {reason}). "
            f"{NO_CLOSURE if 'closure' in reason else 'Use other options of it, or another base'}"
        ) from error
    if not obeys:
        raise ValueError(
            f"base: {kind} moved parameters at a learning rate of 0, so it does not take the rate "
            "of each step from param_groups. The warm-up and the joint updates have different "
            "rates: use a base that does, such as torch.optim.SGD"
        )
    if "keeps" in found - warned:
        warn(
            f"{kind} keeps state, which carries memory from batch to batch; in the "
            "paper nothing but the network does. Plain torch.optim.SGD keeps none.",
        )
    if "moves" in found - warned:
        warn(
            f"{kind} moves parameters whose gradient is zero, as weight decay does. "
            "Old heads have such a gradient, so each update shrinks them. Give heads a group of "
            "their own without weight decay, or weight_decay=0.",
        )
    return found


def _step(twin: torch.optim.Optimizer) -> None:
    """Without the hooks of the user, which torch calls in a wrapper."""
    step = type(twin).step
    getattr(step, "__wrapped__", step)(twin)


def _obeys_rate(twin: torch.optim.Optimizer, params: list[Tensor]) -> bool:
    """Return whether a learning rate of 0 stops it, also after a step at another one."""
    for group in twin.param_groups:
        rate = group["lr"]
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
    before = [p.detach().clone() for p in params]
    for param in params:
        if param.grad is not None:
            param.grad = torch.ones_like(param)
    _step(twin)
    return all(map(torch.equal, params, before))


def _one_of(tensor: Tensor) -> Tensor:
    """Return a plain zero with as many dimensions; the shape is empty where the tensor's is."""
    shape = [min(size, 1) for size in tensor.shape]
    return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)


def _twin(base: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer | None, list[Tensor]]:
    """A copy of it on parameters of one element, 1, with a gradient of zero."""
    params, memo = [], {}
    for group in base.param_groups:
        for param in group["params"]:
            learns = param.is_floating_point()
            small = _one_of(param).fill_(1).requires_grad_(learns)
            small.grad = torch.zeros_like(small) if small.numel() and learns else None
            params.append(small)
            memo[id(param)] = small
            for value in base.state.get(param, {}).values():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    memo[id(value)] = _one_of(value)
    twin = object.__new__(type(base))
    try:
        twin.__dict__ = copy.deepcopy(vars(base), memo)
    except Exception:  # it holds something that has no copy
        return None, []
    return twin, params
