"""Attention in Triton: the tiled forward, the decode form for a few queries, and backward in two loops.

One family of kernels for every option and for the dense and the variable-length layout; `attention_tile` holds what
all of them share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgpt_kernels.triton import attention_bwd as backward
from fastgpt_kernels.triton import common
from fastgpt_kernels.triton.attention_config import candidates
from fastgpt_kernels.triton.attention_decode import MAX_QUERIES, launch_decode
from fastgpt_kernels.triton.attention_fwd import launch_forward
from fastgpt_kernels.triton.attention_tile import describe
from fastgpt_kernels.triton.common import Tunable

MAX_WIDTH = 256


def supports(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None,
    kv_lengths: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None,
    scale: float, window_left: int, window_right: int, softcap: float, dropout_p: float,
    max_seqlen_q: int, max_seqlen_k: int, need_lse: bool,
) -> str | None:  # fmt: skip
    """None, or the reason why not."""
    reason = common.unsupported(q)
    if reason is not None:
        return reason
    if max(q.shape[-1], v.shape[-1]) > MAX_WIDTH:
        return f"needs head dimensions of at most {MAX_WIDTH}, got {q.shape[-1]} and {v.shape[-1]}"
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return f"needs a mask of bool, float32 or {q.dtype}, got {mask.dtype}"
    return None


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None,
    kv_lengths: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None,
    scale: float, window_left: int, window_right: int, softcap: float, dropout_p: float,
    max_seqlen_q: int, max_seqlen_k: int, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, H, Tq, Dv] over [B, Tq, H, Dv] storage, lse [B, H, Tq] fp32); lse costs nothing here."""
    call = describe(
        q, k, v, mask, alibi_slopes, kv_lengths, cu_seqlens_q, cu_seqlens_k, rng, scale, window_left, window_right,
        softcap, dropout_p, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    return launch_decode(call) if call.queries <= MAX_QUERIES else launch_forward(call)


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, alibi_slopes: Tensor | None, kv_lengths: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, rng: Tensor | None, scale: float, window_left: int, window_right: int,
    softcap: float, dropout_p: float, max_seqlen_q: int, max_seqlen_k: int, packed: bool, need_dmask: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dmask); packed: (dqkv, None, None, dmask)."""
    return backward.launch_backward(
        dout, dlse, q, k, v, out, lse, mask, alibi_slopes, kv_lengths, cu_seqlens_q, cu_seqlens_k, rng, scale,
        window_left, window_right, softcap, dropout_p, max_seqlen_q, max_seqlen_k, packed, need_dmask,
    )  # fmt: skip


def tunables() -> Sequence[Tunable]:
    forward = [
        Tunable(
            kernel, f"{dtype}-{width}-{form}", candidates(kernel, width), _problem(kernel, dtype, width, form)
        )
        for kernel in ("attention_fwd", "attention_decode", "attention_decode_rows")
        for dtype in ("bf16", "fp16")
        for width in (64, 128, 256)
        for form in (("causal", "full") if kernel == "attention_fwd" else ("causal",))
    ]
    return [*forward, *backward.tunables()]


def _problem(
    kernel: str, dtype: str, width: int, form: str
) -> Callable[[torch.device], Callable[[], object]]:
    """4096 tokens; for the decode forms 16384 keys, one query, or four of eight heads per key head."""

    def make(device: torch.device) -> Callable[[], object]:
        kind = torch.bfloat16 if dtype == "bf16" else torch.float16
        batch, queries, keys, heads = (2, 4096, 4096, 16) if kernel == "attention_fwd" else (8, 4, 16384, 8)
        queries = 1 if kernel == "attention_decode" else queries
        kv_heads = heads // 8 if kernel == "attention_decode_rows" else heads
        q = torch.randn(batch, queries, heads, width, dtype=kind, device=device).transpose(1, 2)
        k, v = (
            torch.randn(batch, keys, kv_heads, width, dtype=kind, device=device).transpose(1, 2) for _ in "kv"
        )
        nothing, right = (None,) * 6, 0 if form == "causal" else -1
        return lambda: attention_fwd(q, k, v, *nothing, width**-0.5, -1, right, 0.0, 0.0, 0, 0, False)

    return make
