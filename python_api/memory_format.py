"""torch.channels_last for images and weights of convolutions, where it is faster and possible."""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class NeedsContiguousError(RuntimeError):
    """The model cannot run on images in torch.channels_last."""


class MemoryFormat:
    """Images lie as the weights of the model's convolutions do.

    On a CPU, where it is faster, `prefer` lays these weights out in channels_last. Elsewhere, and
    after that, the model's own `to(memory_format=...)` decides.
    """

    def __init__(self) -> None:
        self.possible = True  # until the model was seen to need contiguous activations

    def prefer(self, model: nn.Module) -> None:
        if next(model.parameters()).device.type == "cpu":
            lay_out(model, torch.channels_last)

    def channels_last(self, model: nn.Module) -> bool:
        """Whether a weight lies so, and could not be called contiguous too."""
        return self.possible and any(
            p.dim() == 4
            and p.is_contiguous(memory_format=torch.channels_last)
            and not p.is_contiguous()
            for p in model.parameters()
        )

    def follow(self, model: nn.Module, state: Mapping[Tensor, dict]) -> None:
        """Lay out weights that are new, and the state that an optimizer keeps of all."""
        if self.channels_last(model):
            lay_out(model, torch.channels_last)
        lay_out_state(state)

    def run(self, model: nn.Module, call: Callable[[], Tensor | None]) -> Tensor | None:
        """Where the model cannot run in channels_last, contiguous from now on."""
        try:
            return call()
        except NeedsContiguousError:
            self.possible = False
        lay_out(model, torch.contiguous_format)
        return call()


def _may_move(param: Tensor, storages: Counter[int]) -> bool:
    """Nothing else would be left behind: no other tensor, no other process."""
    storage = param.untyped_storage()
    alone = storages[storage.data_ptr()] == 1 and storage.nbytes() == param.nbytes
    return alone and not param.is_shared()


@torch.no_grad()
def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Weights of two-dimensional convolutions in this format, as `model.to` would, one by one."""
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    weights = [p for m in convolutions for p in m.parameters(recurse=False) if p.dim() == 4]
    apart = [p for p in weights if not p.is_contiguous(memory_format=layout)]
    if not apart:  # at every step but the first
        return
    storages = Counter(p.untyped_storage().data_ptr() for p in model.parameters())
    for param in apart:
        if _may_move(param, storages):
            param.data = param.data.contiguous(memory_format=layout)


def lay_out_state(state: Mapping[Tensor, dict]) -> None:
    """An optimizer's state as its parameters lie: torch's fused kernels pair them by address."""
    for param, entry in state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                if value.stride() != param.stride():
                    entry[name] = torch.empty_like(param).copy_(value)
