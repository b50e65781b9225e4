"""Self-attention of a packed projection, by definition: split, then `attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference import attention_condition
from fastgpt.reference.attention import Window, attention
from fastgpt.reference.common import Condition


def attention_qkv(
    qkv: Tensor,
    num_heads: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: Window = None,
    softcap: float = 0.0,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """out [B, H, T, D] of qkv [B, T, 3 * H * D], with return_lse (out, lse)."""
    return attention(
        *split(qkv, num_heads),
        causal=causal,
        scale=scale,
        mask=mask,
        alibi_slopes=alibi_slopes,
        window=window,
        softcap=softcap,
        kv_lengths=kv_lengths,
        dropout_p=dropout_p,
        rng=rng,
        return_lse=return_lse,
    )


def split(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, T, D], views of qkv [B, T, 3 * H * D]."""
    width = qkv.shape[-1] // (3 * num_heads)
    q, k, v = qkv.unflatten(-1, (3, num_heads, width)).permute(2, 0, 3, 1, 4)
    return q, k, v


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """The conditions of `attention`, those of the three gradients packed."""
    q, k, v = split(inputs["qkv"], inputs["num_heads"])
    found = attention_condition.condition({**inputs, "q": q, "k": k, "v": v}, grads)
    if "dq" in found:
        three = [found.pop(name) for name in ("dq", "dk", "dv")]
        packed = (torch.stack(part).permute(1, 3, 0, 2, 4).flatten(2) for part in zip(*three, strict=True))
        found["dqkv"] = Condition._make(packed)
    return found
