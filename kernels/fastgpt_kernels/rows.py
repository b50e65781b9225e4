"""A tensor as rows: what the launchers of several backends need to hand its address to a kernel."""

from __future__ import annotations

from torch import Tensor


def rows_of(x: Tensor, n: int) -> tuple[Tensor, int]:
    """x as rows of n adjacent elements and the stride between rows; copied only if its layout has no such form."""
    if x.is_contiguous():
        return x, n
    shape, stride = x.shape, x.stride()
    if stride[-1] == 1 or n == 1:
        step, expected = n, None
        for size, at in zip(reversed(shape[:-1]), reversed(stride[:-1]), strict=True):
            if size == 1:
                continue
            if expected is None:
                step = at
            elif at != expected:
                break
            expected = at * size
        else:
            return x, step
    return x.contiguous(), n


def address_of(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x with adjacent elements (kept alive by the caller) and its address; 0 for None."""
    if x is None:
        return None, 0
    x = x.contiguous()
    return x, x.data_ptr()
