"""Images go to the network in torch.channels_last where that is faster and possible."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bld_ext.api.out_of_memory import is_out_of_memory


class NeedsContiguousError(RuntimeError):
    """The model cannot run on images in torch.channels_last."""


def needs_contiguous(error: RuntimeError) -> bool:
    """Return whether an error of a pass is about the strides of what it got."""
    named = any(word in str(error) for word in ("view size is not compatible", "contiguous"))
    return named and not is_out_of_memory(error)  # while a kernel makes something contiguous


class MemoryFormat:
    """Whether images go to the network in channels_last: on a CPU, where convolutions are faster
    so, and where a weight of the model lies so. The weights are left as they are.
    """

    def __init__(self) -> None:
        self.possible = True  # until the model was seen to need contiguous activations

    def channels_last(self, model: nn.Module) -> bool:
        return self.possible and (
            next(model.parameters()).device.type == "cpu"
            or any(map(_is_channels_last, model.parameters()))
        )

    def run(self, call: Callable[[], Tensor | None]) -> Tensor | None:
        """Call it; where the model cannot run in channels_last, again with contiguous images."""
        try:
            return call()
        except NeedsContiguousError:
            self.possible = False
        return call()


def _is_channels_last(weight: Tensor) -> bool:
    """And could not be called contiguous as well."""
    last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return last and not weight.is_contiguous()
