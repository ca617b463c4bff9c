"""torch.channels_last for images and weights of convolutions, where it is wanted and possible."""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class NeedsContiguousError(RuntimeError):
    """The model cannot run on images in torch.channels_last."""


class MemoryFormat:
    """Args:
    asked: True or False; None: on a CPU, where it is faster, unless the model cannot.
    """

    def __init__(self, asked: bool | None):
        self.asked = asked
        self.impossible = False  # whether the model was seen to need contiguous activations

    def channels_last(self, device: torch.device) -> bool:
        if self.asked is None:
            return device.type == "cpu" and not self.impossible
        return self.asked

    def apply(self, model: nn.Module, state: Mapping[Tensor, dict] | None = None) -> None:
        """To the weights, and to the state that an optimizer keeps of them."""
        if self.channels_last(next(model.parameters()).device):
            lay_out(model, torch.channels_last)
        lay_out_state(state or {})

    def run(self, model: nn.Module, call: Callable[[], Tensor | None]) -> Tensor | None:
        """Where channels_last is the default and the model cannot, contiguous from now on."""
        try:
            return call()
        except NeedsContiguousError:
            if self.asked is not None:
                raise
        self.impossible = True
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


def lay_out_state(state: dict) -> None:
    """An optimizer's state as its parameters lie: torch's fused kernels pair them by address."""
    for param, entry in state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                if value.stride() != param.stride():
                    entry[name] = torch.empty_like(param).copy_(value)
