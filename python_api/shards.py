"""Shards: parameters of which each process holds a part, as `fully_shard` (FSDP2) leaves them.

Such a parameter is a DTensor. FSDP gathers it for a pass, and adds up its gradient over all
processes when the backward pass is through it; a step works on the part that is here.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, distributed, nn

from bld_ext import ops


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a DTensor, without importing its module, which takes a while."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sharded_modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        yield from (m for m in model.modules() if isinstance(m, fsdp.FSDPModule))


def fsdp1() -> tuple[type, ...]:
    """The wrapper class of the first FSDP, if its module has been imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (fsdp.FullyShardedDataParallel,)


def reshard(model: nn.Module) -> None:
    """Put the parts back where a forward pass without backward left whole parameters."""
    for module in sharded_modules(model):
        module.reshard()


def add_up_gradients(model: nn.Module) -> None:
    """Let FSDP add up gradients at each pass, where it would take their mean by default."""
    reshard(model)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_requires_gradient_sync(True)
        module.set_is_last_backward(True)


def reduced_precision(module: nn.Module) -> torch.dtype | None:
    """The dtype below float32 that a module was told to be sharded with, if there is one."""
    if not hasattr(module, "_get_fsdp_state"):
        return None
    policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
    dtypes = (getattr(policy, name, None) for name in ("param_dtype", "reduce_dtype"))
    return next((d for d in dtypes if d in (torch.bfloat16, torch.float16)), None)


def layer_norms(grads: Sequence[Tensor], layers: Sequence[int], count: int) -> Tensor:
    """Return the norm of each layer's whole gradient, `[count]`."""
    where: dict[object, list[int]] = {}
    for i, grad in enumerate(grads):
        where.setdefault(groups_of(grad), []).append(i)
    if [*where] == [()]:
        return ops.layer_norms(grads, layers, count)
    squares = []
    for groups, members in where.items():
        parts = [part(grads[i]) for i in members]
        found = ops.layer_norms(parts, [layers[i] for i in members], count).double() ** 2
        for group in groups:
            distributed.all_reduce(found, group=group)
        squares.append(found)
    return torch.stack(squares).sum(0).sqrt().to(parts[0].dtype)


def balance_layers_(
    grads: Sequence[Tensor], layers: Sequence[int], reference_norms: Tensor, balance: float
) -> tuple[Tensor, Tensor]:
    """Rescale G_d in place as `ops.balance_layers_` does; return factors and norms, `[L]` each."""
    if not any(map(is_sharded, grads)):
        return ops.balance_layers_(grads, layers, reference_norms, balance)
    norms = layer_norms(grads, layers, len(reference_norms))
    whole = [*norms.clone().split(1)]  # vectors of these norms, whose factors are the same
    factors, _ = ops.balance_layers_(whole, [*range(len(whole))], reference_norms, balance)
    for grad, l in zip(grads, layers, strict=True):
        part(grad).mul_(factors[l])
    return factors, norms


def groups_of(tensor: Tensor) -> tuple[object, ...]:
    """The process groups over which a tensor is divided; FSDP divides it over one."""
    if not is_sharded(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements
    return tuple(mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate())


def ranks_of(tensor: Tensor) -> set[int]:
    """The global ranks that hold a part of a DTensor."""
    return {*tensor.device_mesh.mesh.flatten().tolist()}


def plain(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of which each process holds the whole."""
    return [t for t in tensors if not is_sharded(t)]
