"""Bytes, counted from the tensors that are held."""

from collections.abc import Iterable, Sequence
from math import prod

from torch import Tensor


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of these tensors, each tensor counted once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def bank_bytes(
    batch_size: int, views: int, old_head_sizes: Sequence[int], spatial: Sequence[int] = ()
) -> int:
    """Bytes of the probability bank, B · V · ΣC_old · 4: the paper's "intra-batch" column.

    20 images, 50 views, four old heads of two classes: 32,000.
    """
    return batch_size * views * sum(old_head_sizes) * prod(spatial) * 4
