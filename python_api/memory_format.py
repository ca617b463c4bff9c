"""MemoryFormat: lays out images and convolution weights in torch.channels_last where possible."""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class NeedsContiguousError(RuntimeError):
    """The model cannot run on images in torch.channels_last."""


class MemoryFormat:
    """Gives images the memory format of the model's convolution weights.

    On a CPU, where channels_last is faster, `prefer` puts these weights into it. On other devices,
    and after that, the user decides with `model.to(memory_format=...)`.
    """

    def __init__(self) -> None:
        self.possible = True  # False once the model has shown that it needs contiguous images

    def prefer(self, model: nn.Module) -> None:
        if next(model.parameters()).device.type == "cpu":
            lay_out(model, torch.channels_last)

    def channels_last(self, model: nn.Module) -> bool:
        """Return whether images go in channels_last: a weight is so, and is not contiguous too."""
        return self.possible and any(
            p.dim() == 4
            and p.is_contiguous(memory_format=torch.channels_last)
            and not p.is_contiguous()
            for p in model.parameters()
        )

    def follow(self, model: nn.Module, state: Mapping[Tensor, dict]) -> None:
        """Lay out weights that are new, and the optimizer's state of all parameters."""
        if self.channels_last(model):
            lay_out(model, torch.channels_last)
        lay_out_state(state)

    def run(self, model: nn.Module, call: Callable[[], Tensor | None]) -> Tensor | None:
        """Run `call`; if the model cannot run in channels_last, run it contiguous from now on."""
        try:
            return call()
        except NeedsContiguousError:
            self.possible = False
        lay_out(model, torch.contiguous_format)
        return call()


def _may_move(param: Tensor, storages: Counter[int]) -> bool:
    """Return whether no other tensor and no other process shares the parameter's storage."""
    storage = param.untyped_storage()
    alone = storages[storage.data_ptr()] == 1 and storage.nbytes() == param.nbytes
    return alone and not param.is_shared()


@torch.no_grad()
def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Convert the weights of two-dimensional convolutions one by one, except shared ones."""
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
    """Give an optimizer's state the strides of its parameters.

    torch's fused kernels pair the elements of both by their position in memory.
    """
    for param, entry in state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                if value.stride() != param.stride():
                    entry[name] = torch.empty_like(param).copy_(value)
