"""Philox 4x32-10, the counter-based generator behind dropout, in plain tensor arithmetic.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """An element is kept if its random word is at least this: P(dropped) = dropout_p to 2**-32."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


def keep_mask(shape: Sequence[int], dropout_p: float, rng: Tensor) -> Tensor:
    """Boolean tensor of `shape`, True where the element is kept.

    rng: int64 (seed, offset). The counter of element i (row-major) is offset + i, the key is the seed.
    """
    index = torch.arange(math.prod(shape), device=rng.device)
    return keep_at(index, dropout_p, rng).reshape(tuple(shape))


def keep_at(index: Tensor, dropout_p: float, rng: Tensor) -> Tensor:
    """Boolean in the shape of `index` (int64): True where the element of that index is kept."""
    seed, offset = rng.unbind()
    return first_words(seed, index + offset) >= threshold(dropout_p)  # int64 wraps as uint64 does


def first_words(seed: Tensor, counter: Tensor) -> Tensor:
    """The first of the four 32-bit words of each block, as int64 in [0, 2**32)."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # An int64 product of two 32-bit words wraps, but its bits are those of the uint64 product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0
