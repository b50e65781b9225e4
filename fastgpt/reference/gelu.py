"""GELU of x + bias, by definition. Hendrycks, Gimpel, "Gaussian Error Linear Units" (2016).

z = x + bias
"none":  y = z * Phi(z),  Phi(z) = (1 + erf(z / sqrt(2))) / 2
"tanh":  y = z * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z**3))) / 2
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.common import Condition, upcast

SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
CUBIC = 0.044715

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # by the name of an activation


def gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """y in x's dtype; bias [n] over the last dimension."""
    z = upcast(x)
    if bias is not None:
        z = z + upcast(bias)
    return (z * _gate(z, approximate)).to(x.dtype, memory_format=torch.contiguous_format, copy=True)


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes of y, dx and dbias: rounding inside the gate, and that of x + bias through the derivative."""
    x, bias, approximate = inputs["x"], inputs.get("bias"), inputs.get("approximate", "none")
    z = x if bias is None else x + bias
    z_abs = x.abs() if bias is None else x.abs() + bias.abs()
    found = {"y": Condition(z.abs() + slope(z, approximate).abs() * z_abs)}
    dy = grads.get("y")
    if dy is None:
        return found
    dx = slope_amplitude(dy, z, z_abs, approximate)
    found["dx"] = Condition(dx)
    found["dbias"] = Condition(dx.sum_to_size(x.shape[-1:]))
    return found


def slope_amplitude(dy: Tensor, z: Tensor, z_abs: Tensor, approximate: str) -> Tensor:
    """The amplitude of dy * dgelu/dz, where that of z is z_abs."""
    # dy/dz = Phi + z * phi: the terms as they are summed, and z's own rounding through the bell's curvature.
    dz = dy.abs() * (1.0 + z.abs() * torch.exp(-0.5 * z.square())) + curvature(dy, z) * z_abs
    if approximate == "tanh":
        # 1 - t**2 cancels, until t is exactly 1 in fp32 and the difference exactly 0.
        t, inner = _tanh_and_inner(z)
        dz = dz + dy.abs() * z.abs() * inner * (1.0 - t.abs() > 2.0**-26)
    return dz


def curvature(dy: Tensor, z: Tensor) -> Tensor:
    """What an error of 1 in z makes of dy * dgelu/dz, at the most."""
    return dy.abs() * (1.0 + z.square()) * torch.exp(-0.5 * z.square())


def supports(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    """The definition takes everything."""
    return


def gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """y."""
    return gelu(x, bias, approximate=approximate)


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, need_dx: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dbias): dx = dy * dgelu/dz, dbias = sum of dx over the rows."""
    z = upcast(x)
    if bias is not None:
        z = z + upcast(bias)
    dz = upcast(dy) * slope(z, approximate)
    dbias = dz.sum_to_size(x.shape[-1:]).to(x.dtype, copy=True) if need_dbias else None
    dx = dz.to(x.dtype, memory_format=torch.contiguous_format, copy=True) if need_dx else None
    return dx, dbias


def _gate(z: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return 0.5 * (1.0 + _tanh_and_inner(z)[0])
    return 0.5 * (1.0 + torch.erf(z * SQRT_HALF))


def slope(z: Tensor, approximate: str) -> Tensor:
    """d(z * gate(z)) / dz."""
    if approximate == "tanh":
        t, inner = _tanh_and_inner(z)
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
    return _gate(z, "none") + z * torch.exp(-0.5 * z * z) * INV_SQRT_2PI


def _tanh_and_inner(z: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(w) and dw/dz of w = sqrt(2 / pi) * (z + 0.044715 * z**3)."""
    w = SQRT_2_OVER_PI * (z + CUBIC * z * z * z)
    return torch.tanh(w), SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * z * z)
