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
            if not equal(buffer, before):  # others may refuse to be written to
                buffer.copy_(before)
            if module._buffers.get(key) is not buffer:
                module._buffers[key] = buffer

    def moved(self) -> list[str]:
        """Return the names of the buffers that have other values now."""
        return [
            name
            for name, module, key, _, before in self._places
            if not equal(module._buffers.get(key), before)
        ]


def equal(a: Tensor | None, b: Tensor) -> bool:
    """Return whether two tensors have the same values, where nan is equal to nan."""
    if a is None or a.shape != b.shape or a.layout != b.layout:
        return False
    if a.layout != torch.strided:
        return all(map(equal, _parts(a), _parts(b)))
    if a.is_floating_point() or a.is_complex():
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def _parts(sparse: Tensor) -> tuple[Tensor, ...]:
    if sparse.layout == torch.jagged:
        return sparse.values(), sparse.offsets()
    if sparse.layout == torch._mkldnn:
        return (sparse.to_dense(),)
    if sparse.layout == torch.sparse_coo:
        sparse = sparse.coalesce()
        return sparse.indices(), sparse.values()
    if sparse.layout in (torch.sparse_csr, torch.sparse_bsr):
        return sparse.crow_indices(), sparse.col_indices(), sparse.values()
    return sparse.ccol_indices(), sparse.row_indices(), sparse.values()
