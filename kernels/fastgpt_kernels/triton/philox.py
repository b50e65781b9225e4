"""Philox 4x32-10 in Triton: the dropout mask of the reference, bit by bit.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import triton
import triton.language as tl


def threshold(dropout_p: float) -> int:
    """An element is kept if its random word is at least this."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


@triton.jit
def keep(seed, offset, index, threshold):
    """Boolean block: which of the elements `index` (int64 or uint64) are kept.

    seed, offset: int64 scalars, loaded from rng. threshold: an integer below 2**32 of any type.
    """
    counter = index.to(tl.uint64) + offset.to(tl.uint64)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # A product of 64 bits, not umulhi: the same instruction on a GPU, and fast in the interpreter.
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0 >= tl.cast(threshold, tl.uint32)
