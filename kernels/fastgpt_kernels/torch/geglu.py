"""Gated linear units by PyTorch's aten::gelu and aten::silu, in fp32, rounded only after the product."""

from __future__ import annotations

import torch
from torch import Tensor

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def supports(gate: Tensor, up: Tensor, activation: str) -> str | None:
    """PyTorch's ops take everything that the public function lets through."""
    return None


def geglu_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """y."""
    return (_activate(_wide(gate), activation) * _wide(up)).to(gate.dtype).contiguous()


def geglu_bwd(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dgate, dup)."""
    dy, z = _wide(dy), _wide(gate)
    dgate = dup = None
    if need_dgate:
        dz = dy * _wide(up)
        if activation == "silu":
            dz = torch.ops.aten.silu_backward(dz, z)
        else:
            dz = torch.ops.aten.gelu_backward(dz, z, approximate=_APPROXIMATE[activation])
        dgate = dz.to(gate.dtype).contiguous()
    if need_dup:
        dup = (dy * _activate(z, activation)).to(up.dtype).contiguous()
    return dgate, dup


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(z)
    return torch.nn.functional.gelu(z, approximate=_APPROXIMATE[activation])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
