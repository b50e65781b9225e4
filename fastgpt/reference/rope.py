"""Rotary position embedding, by definition. Su et al., "RoFormer" (arXiv:2104.09864), section 3.2.2.

y1 = x1 * cos - x2 * sin
y2 = x2 * cos + x1 * sin

x1 and x2 are the first and the second half of the R features that rotate, or interleaved its even and odd ones; the
features from R on stay as they are. The gradient rotates by the negative angle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.common import Condition, upcast


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """(q', k'), each in its shape and dtype."""
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes: |x1 cos| + |x2 sin| and |x2 cos| + |x1 sin|, forward of q and k, backward of dq' and dk'."""
    cos, sin, interleaved = inputs["cos"].abs(), inputs["sin"].abs(), inputs.get("interleaved", False)
    rotating = {"q_rotated": inputs["q"], "k_rotated": inputs["k"]}
    rotating |= {f"d{name[0]}": dy for name, dy in grads.items()}
    return {
        name: Condition(_combined(x.abs(), cos, sin, interleaved, sign=1.0)) for name, x in rotating.items()
    }


def supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """The definition takes everything."""
    return


def rope_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(q', k'): [B, H, T, D] views of [B, T, H, D] storage."""
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def rope_bwd(
    cos: Tensor, sin: Tensor, dq: Tensor | None, dk: Tensor | None, interleaved: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dq, dk) from those of q' and k', where there are any."""
    sin = -sin
    return (
        None if dq is None else _rotated(dq, cos, sin, interleaved),
        None if dk is None else _rotated(dk, cos, sin, interleaved),
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    y = _combined(upcast(x), cos, sin, interleaved, sign=-1.0)
    # A new tensor, whatever its strides: differentiable, and never x itself.
    return y.to(x.dtype).transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _combined(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, sign: float) -> Tensor:
    """(x1 cos + sign x2 sin, x2 cos + x1 sin, rest) in x's dtype; cos and sin [T, R / 2] or [B, T, R / 2]."""
    cos, sin = (t.to(x.dtype) if t.dim() == 2 else t.to(x.dtype)[:, None] for t in (cos, sin))
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        x1, x2 = turning[..., 0::2], turning[..., 1::2]
    else:
        x1, x2 = turning[..., :half], turning[..., half:]
    y1, y2 = x1 * cos + sign * x2 * sin, x2 * cos + x1 * sin
    turned = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    return torch.cat((turned, rest), -1)
