"""Counts the bytes of tensors."""

from collections.abc import Iterable, Sequence
from math import prod

from torch import Tensor


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the elements of these tensors, counting each tensor once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def bank_bytes(
    batch_size: int, views: int, old_head_sizes: Sequence[int], spatial: Sequence[int] = ()
) -> int:
    """Return the bytes of a float32 bank, B · V · ΣC_old · 4: the paper's "intra-batch" column.

    Dense predictions of size `spatial` take this for each position. Example: 20 images, 50 views
    and four old heads of two classes take 32,000 bytes.
    """
    return batch_size * views * sum(old_head_sizes) * prod(spatial) * 4
