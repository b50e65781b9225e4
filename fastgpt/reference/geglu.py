"""GEGLU, by definition. Shazeer, "GLU variants improve Transformer" (arXiv:2002.05202).

y = gelu(gate) * up,  gelu by erf or by tanh as in `gelu`

The backend functions are those of `swiglu` as well: activation is "gelu", "gelu_tanh" or "silu".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference import gelu as reference
from fastgpt.reference.common import Condition, upcast
from fastgpt.reference.gelu import APPROXIMATE
from fastgpt.reference.swiglu import swiglu, swiglu_bwd

ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}  # by `approximate`


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """y in gate's dtype."""
    y = reference.gelu(upcast(gate), approximate=approximate) * upcast(up)
    return y.to(gate.dtype, memory_format=torch.contiguous_format, copy=True)


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes of y, dgate and dup: those of `gelu`, times the other factor."""
    up, gelu_inputs = inputs["up"], {"x": inputs["gate"], "approximate": inputs.get("approximate", "none")}
    gelu = reference.condition(gelu_inputs, {})["y"].amplitude
    found = {"y": Condition(gelu * up.abs())}
    dy = grads.get("y")
    if dy is not None:
        found["dgate"] = reference.condition(gelu_inputs, {"y": dy * up})["dx"]
        found["dup"] = Condition(dy.abs() * gelu)
    return found


def supports(gate: Tensor, up: Tensor, activation: str) -> None:
    """The definition takes everything."""
    return


def geglu_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """y."""
    if activation == "silu":
        return swiglu(gate, up)
    return geglu(gate, up, approximate=APPROXIMATE[activation])


def geglu_bwd(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dgate, dup)."""
    dgate: Tensor | None
    if activation == "silu":
        dgate, dup = swiglu_bwd(dy, gate, up)
    else:
        z, approximate = upcast(gate), APPROXIMATE[activation]
        dgate, _ = reference.gelu_bwd(upcast(dy) * upcast(up), z, None, approximate, True, False)
        dup = upcast(dy) * reference.gelu(z, approximate=approximate)
    assert dgate is not None
    return (
        dgate.to(gate.dtype, memory_format=torch.contiguous_format, copy=True) if need_dgate else None,
        dup.to(up.dtype, memory_format=torch.contiguous_format, copy=True) if need_dup else None,
    )
