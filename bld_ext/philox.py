"""Philox4x32-10, the counter-based generator behind every random number of this package.

A random word is a pure function of (key, counter), so there is no state and the order of calls does
not matter:

    key     = (seed mod 2**32, seed div 2**32)
    counter = (image index, view, step, op)

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The
integer words equal Random123's. The maps from words to numbers below are our own. Every device
computes them exactly alike, because they use integer products, and doubles in which a product is
exact before one addition.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counter: tuple, key: tuple) -> tuple:
    """Return four random 32-bit words for each counter.

    Args:
        counter: four Python integers or broadcastable int64 tensors, whose lowest 32 bits count.
        key: two 32-bit values, likewise.
    """
    c0, c1, c2, c3 = (word & MASK for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap around, but their 64 bits are those of the unsigned product
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK) ^ c1 ^ k0,
            product1 & MASK,
            ((product0 >> 32) & MASK) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def seed_key(seed: int | Tensor) -> tuple:
    """Return the key of a seed, 0 to 2**63 - 1."""
    return seed & MASK, (seed >> 32) & MASK


def uniform(word: Tensor) -> Tensor:
    """Return a double in [0, 1) with 24 random bits: (word div 2**8) * 2**-24, exactly."""
    return (word >> 8).double() * 2.0**-24


def between(word: Tensor, low: float, high: float) -> Tensor:
    """Return a float32 in [low, high]; `low` and `high - low` are rounded to float32 first.

    The product of a 24-bit fraction and a 24-bit span is exact in double, so devices with and
    without fused multiply-add agree.
    """
    low32, high32, span32 = torch.tensor([low, high, high - low], dtype=torch.float32).tolist()
    return (low32 + uniform(word) * span32).float().clamp(max=high32)


def below(word: Tensor, n: int) -> Tensor:
    """Return an int64 from 0 to n - 1, the high word of word * n."""
    return (word * n) >> 32


def stream_seed(seed: int, step: int, view: int, op: int) -> int:
    """Return a 63-bit seed for torch's own generators, one for each (step, view)."""
    w0, w1, _, _ = philox((0, view, step, op), seed_key(seed))
    return w0 | (w1 & 0x7FFFFFFF) << 32
