"""The buffers of a network as they were, whether they are written to or replaced."""

import torch
from torch import Tensor, nn


class Buffers:
    """A copy of the values of all buffers of a model."""

    def __init__(self, model: nn.Module):
        places = [
            (f"{name}.{key}".lstrip("."), module, key, buffer)
            for name, module in model.named_modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._places = [(*place, place[-1].detach().clone()) for place in places]

    @torch.no_grad()
    def restore(self) -> None:
        """Give every buffer its tensor and its values back."""
        for _, module, key, buffer, before in self._places:
            if not _equal(buffer, before):  # others may refuse to be written to
                buffer.copy_(before)
            if module._buffers.get(key) is not buffer:
                module._buffers[key] = buffer

    def moved(self) -> list[str]:
        """Return the names of the buffers that have other values now."""
        return [
            name
            for name, module, key, _, before in self._places
            if not _equal(module._buffers.get(key), before)
        ]


def _equal(now: Tensor | None, before: Tensor) -> bool:
    return now is not None and now.shape == before.shape and torch.equal(now, before)
