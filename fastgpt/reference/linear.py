"""A linear layer with its activation, by definition.

z = x @ weight.T + bias,  y = z, or gelu(z) by erf ("gelu") or by tanh ("gelu_tanh")

Backward keeps h = x @ weight.T, before the bias: dz = dy * gelu'(h + bias), dx = dz @ weight, dweight = dz.T @ x,
dbias = the sum of dz over the rows. Where x is of 16 bits, so are h and dz, each rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.reference import gelu as reference
from fastgpt.reference.common import Condition, upcast
from fastgpt.reference.gelu import APPROXIMATE


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """y [..., n] in x's dtype, for weight [n, k]."""
    z = product(x, weight)
    if bias is not None:
        z = z + upcast(bias)
    return activated(z, activation).to(x.dtype)


class Errors(NamedTuple):
    """How an error grows through a product: relative to fp32's rounding, and to that of the dtype."""

    amplitude: Tensor
    rounded: Tensor

    def through(self, weight: Tensor) -> Errors:
        """Of self @ weight; weight: absolute values."""
        return Errors(self.amplitude @ weight, self.rounded @ weight)

    @property
    def condition(self) -> Condition:
        return Condition(*self)


class Layer(NamedTuple):
    """z = x @ weight.T + bias of rows, y = gelu(z), and how far each may be off; h, without the bias, is rounded."""

    z: Tensor
    y: Tensor
    z_abs: Tensor  # amplitude of z
    h_abs: Tensor
    approximate: str | None

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Layer:
        h, z_abs = x @ weight.mT, x.abs() @ weight.abs().mT
        z = h if bias is None else h + bias
        z_abs = z_abs if bias is None else z_abs + bias.abs()
        approximate = None if activation is None else APPROXIMATE[activation]
        return cls(z, activated(z, activation), z_abs, h.abs(), approximate)

    @property
    def y_errors(self) -> Errors:
        """Of y before it is rounded itself."""
        if self.approximate is None:
            return Errors(self.z_abs, torch.zeros_like(self.z))
        slope = reference.slope(self.z, self.approximate).abs()
        return Errors(self.z.abs() + slope * self.z_abs, slope * self.h_abs)

    def backward(self, dy: Tensor, dy_errors: Errors | None = None) -> tuple[Tensor, Errors]:
        """dz and its errors, which include its rounding; dy_errors: None where dy is exact."""
        if self.approximate is None:
            zero = torch.zeros_like(dy)
            return dy, dy_errors or Errors(zero, zero)
        slope = reference.slope(self.z, self.approximate)
        dz = dy * slope
        amplitude = reference.slope_amplitude(dy, self.z, self.z_abs, self.approximate)
        rounded = dz.abs() + reference.curvature(dy, self.z) * self.h_abs
        if dy_errors is not None:
            amplitude = amplitude + slope.abs() * dy_errors.amplitude
            rounded = rounded + slope.abs() * dy_errors.rounded
        return dz, Errors(amplitude, rounded)


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Of y, dx, dweight and dbias: the sums' own rounding, and that of h and of dz."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs.get("bias")
    layer = Layer.of(x, weight, bias, inputs.get("activation"))
    found = {"y": layer.y_errors.condition}
    dy = grads.get("y")
    if dy is None:
        return found
    dz, errors = layer.backward(dy)
    found.update(product_conditions(dz, errors, x, weight))
    return found


def product_conditions(
    dz: Tensor, errors: Errors, x: Tensor, weight: Tensor, suffix: str = "", x_errors: Errors | None = None
) -> dict[str, Condition]:
    """Of dx = dz @ weight, dweight = dz.T @ x and dbias. x_errors: of x, rounding included; None: exact."""
    summed = Errors(errors.amplitude + dz.abs(), errors.rounded)
    rows = Errors(*(as_rows(part) for part in summed))
    x_rows, dz_rows = as_rows(x.abs()), as_rows(dz.abs())
    amplitude, rounded = rows.amplitude.mT @ x_rows, rows.rounded.mT @ x_rows
    if x_errors is not None:
        amplitude = amplitude + dz_rows.mT @ as_rows(x_errors.amplitude)
        rounded = rounded + dz_rows.mT @ as_rows(x_errors.rounded)
    found = {f"dweight{suffix}": Condition(amplitude, rounded)}
    found[f"dbias{suffix}"] = Condition(rows.amplitude.sum(0), rows.rounded.sum(0))
    found["dx"] = summed.through(weight.abs()).condition
    return found


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """The definition takes everything."""
    return


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, h): h = x @ weight.T in x's dtype, where there is an activation and backward will need it."""
    h = product(x, weight)
    z = h if bias is None else h + upcast(bias)
    kept = h.to(x.dtype, copy=True) if keep and activation is not None else None
    return activated(z, activation).to(x.dtype, copy=True), kept


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias); bias and h are not needed without an activation."""
    dz = upcast(dy)
    if activation is not None:
        assert h is not None
        z = upcast(h) if bias is None else upcast(h) + upcast(bias)
        dz = dz * reference.slope(z, APPROXIMATE[activation])
    return product_bwd(dz, x, weight, need_dx, need_dweight, need_dbias)


def as_rows(x: Tensor) -> Tensor:
    """x as a matrix; of as many rows, where they are empty."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def product(x: Tensor, weight: Tensor) -> Tensor:
    return upcast(x) @ upcast(weight).mT


def activated(z: Tensor, activation: str | None) -> Tensor:
    return z if activation is None else reference.gelu(z, approximate=APPROXIMATE[activation])


def product_bwd(
    dz: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) of x @ weight.T + bias from dz in the dtype that is computed in."""
    dx = dweight = dbias = None
    rows = as_rows(dz)
    if need_dx:
        dx = (dz @ upcast(weight)).to(x.dtype, copy=True)
    if need_dweight:
        dweight = (rows.mT @ as_rows(upcast(x))).to(x.dtype, copy=True)
    if need_dbias:
        dbias = rows.sum(0).to(x.dtype, copy=True)
    return dx, dweight, dbias
