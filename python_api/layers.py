"""Layers: groups of parameters whose gradient norms are measured and balanced together."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bld_ext.api import shards
from bld_ext.api.in_backward import complete_layers
from bld_ext.api.memory import tensor_bytes

KINDS = ("module", "tensor", "network")


def release_gradients(params: Iterable[Tensor]) -> None:
    for param in params:
        param.grad = None


def require_gradient(came: Sized) -> None:
    if not came:
        raise RuntimeError("model: no parameter received a gradient; are all of them frozen?")


@dataclass(frozen=True)
class Layers:
    """The assignment of each parameter to one of L layers."""

    names: tuple[str, ...]
    index: dict[Tensor, int]  # the layer of each parameter

    @classmethod
    def of(cls, model: nn.Module, params: Iterable[Tensor], kind: str) -> "Layers":
        """Make a layer of each "module" that owns parameters, each "tensor", or the "network"."""
        names: dict[str, int] = {}
        index: dict[Tensor, int] = {}
        named = model.named_parameters()
        owners = {p: name.replace("_orig_mod.", "") for name, p in named}  # of torch.compile
        for i, param in enumerate(params):
            tensor = owners.get(param, f"parameter {i}")
            module = tensor.rpartition(".")[0] if param in owners else tensor
            name = {"module": module, "tensor": tensor, "network": "network"}[kind]
            index[param] = names.setdefault(name, len(names))
        return cls(tuple(names), index)

    def zeros(self) -> Tensor:
        """Return a zero for each layer, `[L]`."""
        like = next(p for p in self.index if p.is_floating_point())
        return shards.part(like).new_zeros(len(self.names))

    def norms(self, params: Iterable[Tensor]) -> Tensor:
        """Return the norm of these parameters' gradients in each layer, `[L]`."""
        params = list(params)
        require_gradient(params)
        for param in params:
            if param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"model: {self.names[self.index[param]]} has a sparse gradient, which cannot "
                    "be balanced; construct it with sparse=False"
                )
        index = [self.index[p] for p in params]
        return shards.layer_norms([p.grad for p in params], index, len(self.names))

    def rescale(
        self, grads: dict[Tensor, Tensor], reference_norms: Tensor, balance: float | None
    ) -> tuple[Tensor, Tensor]:
        """Rescale G_d in place, unless `balance` is None; return the factors and ‖G_d‖, `[L]`."""
        index = [self.index[p] for p in grads]
        if balance is None:
            norms = shards.layer_norms(list(grads.values()), index, len(self.names))
            return torch.ones_like(norms), norms
        return shards.balance_layers_(list(grads.values()), index, reference_norms, balance)

    @contextmanager
    def updating(
        self,
        update: Callable[[list[Tensor]], None],
        measured: Callable[[Tensor], None] | None,
        held: list[int],
    ) -> Iterator[None]:
        """Call `update(params)` for each layer whose gradient the enclosed backward completes.

        Before each call, the bytes of all gradients held are appended to `held`, and
        `measured(norms)` gets the norms of `params` in each layer, `[L]`; those of the other layers
        are 0.
        """

        def act(params: list[Tensor]) -> None:
            held.append(tensor_bytes(p.grad for p in self.index if p.grad is not None))
            if measured is not None:
                measured(self.norms(params))
            update(params)

        with complete_layers(self.index, act):
            yield
        require_gradient(held)
