"""Attention by PyTorch's scaled_dot_product_attention.

On the CPU its flash kernel is called as the pair of forward and backward that it is. For what that kernel does not
take, and elsewhere, backward is written out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PAIR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None) -> str | None:
    """PyTorch's op takes everything that the public function lets through."""
    return None


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse); lse only where PyTorch's kernel gives it, else zeros."""
    if not _is_pair(q, k, v):
        out = _attend(q, k, v, causal, scale, mask)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return _heads_inside(out), q.new_zeros(q.shape[:3], dtype=wide)
    bias, top_left = _bias(q, k, causal, mask)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, top_left, attn_mask=bias, scale=scale
    )
    return _heads_inside(out), lse.contiguous()


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dmask)."""
    if _is_pair(q, k, v) and not need_dmask:
        # In bf16 and fp16 that kernel adds up dk and dv block by block in the low precision: widen it all.
        dout, q_wide, k_wide, v_wide, out = (t.float() for t in (dout, q, k, v, out))
        bias, top_left = _bias(q_wide, k, causal, mask)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q_wide, k_wide, v_wide, out, lse, 0.0, top_left, attn_mask=bias, scale=scale
        )
        return (*(_heads_inside(grad.to(q.dtype)) for grad in grads), None)  # type: ignore[return-value]
    # By the formulas: autograd does not run inside an op that was called below a dispatch mode.
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // max(k.shape[1], 1)
    q_wide, g = q.to(wide), dout.to(wide)
    k_wide, v_wide = (t.to(wide).repeat_interleave(groups, dim=1) for t in (k, v))
    bias, hidden = _scores(q, k, causal, mask)
    s = scale * (q_wide @ k_wide.mT)
    if bias is not None:
        s = s + bias
    if hidden is not None:
        s = s.masked_fill(hidden, -torch.inf)
    p = torch.softmax(s, -1)
    if hidden is not None:  # zeros, not NaN, where a query sees nothing
        p = p.masked_fill(hidden, 0.0)
    dp = g @ v_wide.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    if hidden is not None:  # a NaN in what is seen stays there
        ds = ds.masked_fill(hidden, 0.0)
    dq, dk, dv = scale * (ds @ k_wide), scale * (ds.mT @ q_wide), p.mT @ g
    dk, dv = (t.unflatten(1, (k.shape[1], groups)).sum(2) if groups > 1 else t for t in (dk, dv))
    dmask = ds.sum_to_size(mask.shape).to(mask.dtype, copy=True) if need_dmask and mask is not None else None
    return *(_heads_inside(t.to(q.dtype)) for t in (dq, dk, dv)), dmask  # type: ignore[return-value]


def _scores(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(what is added to the scores, what is hidden)."""
    hidden = None
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    if causal:
        queries, keys = q.shape[2], k.shape[2]
        future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu_(1 + keys - queries)
        hidden = future if hidden is None else hidden | future
    return mask if mask is not None and mask.dtype != torch.bool else None, hidden


def _is_pair(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's CPU flash kernel takes the call."""
    return (
        q.device.type == "cpu"
        and q.dtype in _PAIR_DTYPES
        and q.shape[1] == k.shape[1]
        and q.shape[-1] == v.shape[-1]
        and 0 not in (*q.shape, *k.shape)
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None) -> Tensor:
    bias, top_left = _bias(q, k, causal, mask)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=top_left, scale=scale, enable_gqa=gqa
    )


def _bias(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor | None, bool]:
    """(what to add to the scores, SDPA's is_causal). Its causality is top-left: only the square case agrees."""
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and (not causal or queries == keys):
        return None, causal
    added, hidden = _scores(q, k, causal, mask)
    assert hidden is not None
    if added is None:
        added = torch.zeros((), dtype=q.dtype, device=q.device)
    elif added.dtype != torch.float32:  # SDPA takes q's dtype or fp32
        added = added.to(q.dtype)
    bias = added.masked_fill(hidden, -torch.inf)
    return bias.view((1,) * (4 - bias.dim()) + tuple(bias.shape)), False


def _heads_inside(out: Tensor) -> Tensor:
    """A [B, H, T, D] view of [B, T, H, D] storage that is nobody else's."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
