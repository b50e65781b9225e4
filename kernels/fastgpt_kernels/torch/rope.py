"""Rotary position embedding by PyTorch's elementwise ops, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """PyTorch's ops take everything that the public function lets through."""
    return None


def rope_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(q', k')."""
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def rope_bwd(
    cos: Tensor, sin: Tensor, dq: Tensor | None, dk: Tensor | None, interleaved: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dq, dk): by the negative angle."""
    sin = -sin
    return (
        None if dq is None else _rotated(dq, cos, sin, interleaved),
        None if dk is None else _rotated(dk, cos, sin, interleaved),
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    # [B, T, H, D] from here on: results are written where they belong.
    x = x.transpose(1, 2)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (table.to(wide).unsqueeze(-2) for table in (cos, sin))  # [(B,) T, 1, R / 2]
    half = cos.shape[-1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    x1, x2 = x[..., first].to(wide), x[..., second].to(wide)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y[..., first] = torch.addcmul(x1 * cos, x2, sin, value=-1)
    y[..., second] = torch.addcmul(x2 * cos, x1, sin)
    y[..., 2 * half :] = x[..., 2 * half :]
    return y.transpose(1, 2)
