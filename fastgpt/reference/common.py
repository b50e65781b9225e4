"""What the references share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Condition(NamedTuple):
    """How large an error E one output may have before it is rounded.

    E = c * 2**-24 * amplitude + unit_roundoff * rounded + eta * underflow

    amplitude: the output's own expression summed over absolute values (what fp32 rounding is relative to).
    rounded: the same for an intermediate that is rounded on purpose, or None.
    underflow: how much of the output one unit of absolute error in that intermediate is: below the smallest
        normal number of its dtype, rounding is off by up to eta = unit_roundoff * smallest normal.
    """

    amplitude: Tensor
    rounded: Tensor | None = None
    underflow: Tensor | None = None


def upcast(x: Tensor) -> Tensor:
    """`x` in the dtype that the reference computes in: fp64 stays, all else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()
