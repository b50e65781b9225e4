"""SwiGLU, by definition. Shazeer, "GLU variants improve Transformer" (arXiv:2002.05202).

y = silu(gate) * up,  silu(z) = z * sigma(z),  sigma(z) = 1 / (1 + exp(-z))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.common import Condition, upcast


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y in gate's dtype."""
    z = upcast(gate)
    y = z * torch.sigmoid(z) * upcast(up)
    return y.to(gate.dtype, memory_format=torch.contiguous_format, copy=True)


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup) in the dtype computed in: dgate = dy * up * dsilu/dz, dup = dy * silu(gate)."""
    dy, z, up = upcast(dy), upcast(gate), upcast(up)
    sigma = torch.sigmoid(z)
    return dy * up * (sigma * (1.0 + z * (1.0 - sigma))), dy * (z * sigma)


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes of y, dgate and dup: all relative to sigma, so that the negative tail counts as well.

    Rounding the argument of exp(-|z|) moves sigma by |z| (1 - sigma) of itself. In the slope 1 - sigma cancels,
    until sigma is exactly 1 in fp32 and the difference exactly 0.
    """
    z, up = inputs["gate"], inputs["up"]
    sigma = torch.sigmoid(z)
    spread = 1.0 + z.abs() * torch.sigmoid(-z)
    silu = z.abs() * sigma * spread
    found = {"y": Condition(silu * up.abs())}
    dy = grads.get("y")
    if dy is not None:
        cancelling = z.abs() * sigma * (1.0 - sigma > 2.0**-26)
        found["dgate"] = Condition((dy * up).abs() * sigma * (spread.square() + cancelling))
        found["dup"] = Condition(dy.abs() * silu)
    return found
