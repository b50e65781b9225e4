"""The attention softmax by torch.softmax over masked scores. Dropout needs Philox and is refused."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> str | None:
    """None, or why not."""
    return "PyTorch's dropout is not Philox by element index" if dropout_p > 0.0 else None


def softmax_fwd(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(y, None)."""
    hidden = _hidden(x, mask, causal)
    if scale == 1.0 and mask is None and hidden is None:
        return torch.softmax(x, -1).contiguous(), None
    s = (x if x.dtype == torch.float64 else x.float()) * scale
    if mask is not None and mask.dtype != torch.bool:
        s = s + mask
    if hidden is None:
        return torch.softmax(s, -1).to(x.dtype).contiguous(), None
    y = torch.softmax(s.masked_fill_(hidden, -torch.inf), -1)
    # Zeros, not NaN, where a row sees nothing; what is hidden elsewhere is zero already.
    return y.masked_fill_(hidden, 0.0).to(x.dtype).contiguous(), None


def softmax_bwd(
    dy: Tensor,
    p: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    rng: Tensor | None,
    need_dx: bool,
    need_dmask: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dmask)."""
    hidden = _hidden(dy, None, causal)
    if hidden is not None:
        dy = dy.masked_fill(hidden, 0.0)
    wide = dy.dtype if dy.dtype == torch.float64 else torch.float32
    ds = torch.ops.aten._softmax_backward_data(dy.to(wide), p.to(wide), -1, wide)
    dx = dmask = None
    if need_dmask and mask is not None:
        dmask = ds.sum_to_size(mask.shape).to(mask.dtype, copy=True)
    if need_dx:
        dx = (ds * scale if scale != 1.0 else ds).to(dy.dtype).contiguous()
    return dx, dmask


def _hidden(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    hidden = ~mask if mask is not None and mask.dtype == torch.bool else None
    if causal:
        queries, keys = x.shape[-2:]
        future = torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu_(1 + keys - queries)
        hidden = future if hidden is None else hidden | future
    return hidden
