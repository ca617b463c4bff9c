"""Counts the bytes of tensors."""

from collections.abc import Iterable, Sequence
from math import prod

from torch import Tensor

from bld_ext.api.shards import part


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of what is here of these tensors, counting each tensor once."""
    here = [part(t) for t in {id(t): t for t in tensors}.values()]
    return sum(t.numel() * t.element_size() for t in here)


def bank_bytes(
    batch_size: int, views: int, old_head_sizes: Sequence[int], spatial: Sequence[int] = ()
) -> int:
    """Return the bytes of a float32 bank, B · V · ΣC_old · 4: the paper's "intra-batch" column.

    Dense predictions of size `spatial` take this for each position. Example: 20 images, 50 views
    and four old heads of two classes take 32,000 bytes.
    """
    return batch_size * views * sum(old_head_sizes) * prod(spatial) * 4
