"""The error bound of every element, and the comparison against it.

    E     = c * 2**-24 * amplitude + u * rounded + u * tiny * underflow + 2**-126
    bound = half_ulp(|exact| + E) + E

amplitude, rounded and underflow are the op's condition (`reference/common.py`), u and tiny the unit roundoff and
smallest normal number of the dtype that an intermediate is rounded to. half_ulp is that of the result's dtype,
exact by binade and below the normal numbers: the one rounding that nobody can avoid. The last term of E lets a
kernel flush fp32 subnormals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.reference.common import Condition

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST_NORMAL = {dtype: torch.finfo(dtype).tiny for dtype in UNIT}


class Comparison(NamedTuple):
    """One tensor against its bound, at the element that comes closest to it or is furthest past it."""

    ratio: float  # error / bound; inf where a NaN or infinity stands alone
    error: float
    bound: float
    place: tuple[int, ...]
    got: float
    exact: float

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return (
            f"at {self.place}: got {self.got:.9g}, exact {self.exact:.9g},"
            f" error {self.error:.3g} = {self.ratio:.3g} x bound"
        )


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between the numbers of `dtype` around each |value| (fp64)."""
    _, exponent = torch.frexp(value.abs().clamp(min=SMALLEST_NORMAL[dtype]))
    return torch.ldexp(torch.full_like(value, UNIT[dtype]), exponent - 1)


def allowed_error(
    c: float, condition: Condition, rounded_to: torch.dtype, shape: torch.Size, working: torch.dtype
) -> Tensor:
    """E of the formula above, in fp64; working: fp32, or fp64 for an fp64 call."""
    error = c * UNIT[working] * condition.amplitude + SMALLEST_NORMAL[working]
    if condition.rounded is not None:
        error = error + UNIT[rounded_to] * condition.rounded
    if condition.underflow is not None:
        error = error + UNIT[rounded_to] * SMALLEST_NORMAL[rounded_to] * condition.underflow
    return error.expand(shape)


def ratios(got: Tensor, exact: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """(error / bound, bound) of every element, in fp64; inf where a NaN or an infinity stands alone."""
    wide = got.detach().double()
    magnitude = exact.abs() + error
    bound = half_ulp(magnitude.nan_to_num(), got.dtype) + error
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    # Past the largest number of its dtype a result rounds to infinity.
    limits = torch.finfo(got.dtype)
    overflowed = (
        wide.isinf() & (wide.sign() == exact.sign()) & (magnitude >= limits.max * (1 + UNIT[got.dtype]))
    )
    ratio = ((wide - exact).abs() / bound).masked_fill(same | overflowed, 0.0).nan_to_num(nan=torch.inf)
    return ratio, bound


def compare(got: Tensor, exact: Tensor, error: Tensor) -> Comparison:
    """`got` against `exact` with the allowed error E; NaN and infinities must stand in the same places."""
    if exact.numel() == 0:
        return Comparison(0.0, 0.0, 0.0, (), 0.0, 0.0)
    ratio, bound = ratios(got, exact, error)
    wide = got.detach().double()
    difference = (wide - exact).abs()
    flat = int(ratio.argmax())

    def worst(values: Tensor) -> float:
        return float(values.reshape(-1)[flat])

    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), exact.shape))
    error_there = 0.0 if worst(ratio) == 0.0 else worst(difference)
    return Comparison(worst(ratio), error_there, worst(bound), place, worst(wide), worst(exact))
