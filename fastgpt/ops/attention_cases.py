"""What attention is proven and timed on: its cases, the inputs they stand for, their cost, and PyTorch's own way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt._core.spec import Case, Cost, Draw
from fastgpt.reference.attention import Window, band


def make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """Of a case whose shape is (B, H, Tq, Tk, D)."""
    batch, heads, queries, keys, width = case.shape
    kv_heads = case.options.get("kv_heads", heads)
    return {
        "q": draw.normal((batch, heads, queries, width), dtype),
        "k": draw.normal((batch, kv_heads, keys, width), dtype),
        "v": draw.normal((batch, kv_heads, keys, case.options.get("v_width", width)), dtype, mean=0.2),
        **make_options(case, (batch, heads, queries, keys), dtype, draw),
    }


def make_options(
    case: Case, scores: tuple[int, int, int, int], dtype: torch.dtype, draw: Draw
) -> dict[str, Any]:
    """The keyword arguments that all forms of attention share."""
    batch, heads, _, keys = scores
    options = case.options
    made: dict[str, Any] = {"causal": options.get("causal", False)}
    for name in ("scale", "softcap", "return_lse"):
        if name in options:
            made[name] = options[name]
    if "window" in options:
        sides = [None if side == "x" else int(side) for side in str(options["window"]).split("_")]
        made["window"] = sides[0] if len(sides) == 1 else (sides[0], sides[1])
    kind = options.get("mask")
    if kind is not None:
        over = options.get("over", "b11k" if kind == "bool" else "1hqk")
        shape = tuple(1 if letter == "1" else size for letter, size in zip(over, scores, strict=True))
        if kind == "bool":
            made["mask"] = draw.bernoulli(shape, 0.7)
        else:
            made["mask"] = draw.normal(shape, torch.float32 if kind == "fp32" else dtype)
    if "alibi" in options:
        shape = (heads,) if options["alibi"] == "h" else (batch, heads)
        made["alibi_slopes"] = draw.normal(shape, torch.float32, mean=0.3, std=0.1)
    if options.get("lengths"):
        made["kv_lengths"] = draw.integers(0, keys + 1, (batch,))
    if "dropout" in options:
        made["dropout_p"] = options["dropout"]
        made["rng"] = draw.integers(0, 2**62, (2,))
    return made


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two products forward, five backward, over the pairs that causality leaves."""
    batch, heads, queries, keys, width = case.shape
    kv_heads = case.options.get("kv_heads", heads)
    pairs = batch * heads * queries * keys
    if case.options.get("causal"):
        pairs = batch * heads * sum(min(max(q + 1 + keys - queries, 0), keys) for q in range(queries))
    moved = batch * width * dtype.itemsize * 2 * (heads * queries + kv_heads * keys)
    return Cost(moved, 2 * moved, 4 * pairs * width, 10 * pairs * width)


def baseline(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """As a PyTorch user would: SDPA with everything in its mask; written out where SDPA has no such option."""
    queries, keys = q.shape[2], k.shape[2]
    gqa = k.shape[1] != q.shape[1]
    left, right = band(window, causal)
    square_causal = causal and left < 0 and queries == keys and kv_lengths is None
    unlimited = left < 0 and right < 0 and kv_lengths is None
    added = None
    if mask is not None or alibi_slopes is not None or not (square_causal or unlimited):
        added, square_causal = _added(q, k, mask, alibi_slopes, left, right, kv_lengths), False
    if softcap == 0.0 and not return_lse:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=added,
            is_causal=square_causal,
            scale=scale,
            enable_gqa=gqa,
            dropout_p=dropout_p,
        )
    if gqa:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0.0:
        s = softcap * torch.tanh(s / softcap)
    if square_causal:
        added = _added(q, k, None, None, left, right, None)
    if added is not None:
        s = s + added
    out = torch.dropout(torch.softmax(s, -1), dropout_p, True).to(v.dtype) @ v
    return (out, torch.logsumexp(s, -1)) if return_lse else out


def _added(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    left: int,
    right: int,
    kv_lengths: Tensor | None,
) -> Tensor:
    """All of it as one float mask [B or 1, H or 1, Tq, Tk] in q's dtype."""
    queries, keys = q.shape[2], k.shape[2]
    key = torch.arange(keys, device=q.device)
    length: Any = keys if kv_lengths is None else kv_lengths[:, None, None, None]
    distance = key - (torch.arange(queries, device=q.device)[:, None] + length - queries)
    hidden = (
        (key >= length).expand(distance.shape) if kv_lengths is not None else torch.zeros_like(distance) > 0
    )
    if left >= 0:
        hidden = hidden | (distance < -left)
    if right >= 0:
        hidden = hidden | (distance > right)
    added = torch.zeros(hidden.shape, dtype=torch.float32, device=q.device)
    if alibi_slopes is not None:
        added = added - alibi_slopes[..., None, None] * distance.abs()
    if mask is not None:
        added, hidden = (added, hidden | ~mask) if mask.dtype == torch.bool else (added + mask, hidden)
    added = added.masked_fill(hidden, -torch.inf).to(q.dtype)
    return added[(None,) * (4 - added.dim())]


CASES: tuple[Case, ...] = (
    Case((2, 3, 17, 17, 16)),
    Case((1, 2, 40, 40, 64), {"causal": True}),
    Case((1, 2, 320, 320, 64), {"causal": True}),
    Case((2, 2, 5, 33, 20), {"causal": True}),
    Case((1, 1, 33, 5, 8), {"causal": True}),
    Case((2, 4, 9, 12, 16), {"kv_heads": 2, "causal": True}),
    Case((2, 3, 20, 20, 16), {"mask": "bool"}),
    Case((2, 3, 20, 20, 16), {"mask": "bool", "causal": True}),
    Case((2, 3, 8, 30, 16), {"mask": "same", "scale": 0.3}),
    Case((2, 3, 20, 20, 16), {"mask": "fp32", "causal": True}),
    *(
        Case((2, 2, 19, 40, 16), {"mask": "fp32", "over": over, "kv_heads": 1})
        for over in ("bhqk", "b11k", "11qk", "1hq1", "1111")
    ),
    Case((1, 2, 1, 70, 32), {"causal": True}),
    Case((1, 2, 9, 9, 16), {"scale": -0.3}),
    Case((1, 2, 9, 9, 16), {"scale": 0.0}),
    Case((0, 2, 3, 3, 8)),
    Case((1, 2, 7, 0, 8)),
    Case((1, 2, 19, 23, 7), {"v_width": 13}),
    Case((1, 1, 20, 20, 100), {"v_width": 130, "causal": True}),
    Case((1, 1, 18, 18, 256), {"causal": True}),
    Case((2, 4, 21, 40, 16), {"alibi": "h", "causal": True}),
    Case((2, 2, 21, 21, 16), {"alibi": "bh"}),
    Case((1, 2, 50, 50, 16), {"window": 7, "causal": True}),
    Case((1, 2, 150, 150, 16), {"window": "9_x"}),
    Case((1, 2, 30, 70, 16), {"window": "3_5"}),
    Case((1, 2, 33, 33, 16), {"softcap": 5.0, "causal": True}),
    Case((1, 2, 12, 30, 16), {"softcap": 2.0, "mask": "fp32", "over": "11qk", "scale": 1.5}),
    Case((3, 2, 9, 40, 16), {"lengths": True}),
    Case((3, 4, 9, 40, 16), {"lengths": True, "kv_heads": 2, "causal": True, "window": 6, "alibi": "h"}),
    Case((2, 2, 20, 33, 16), {"dropout": 0.3}),
    Case((2, 4, 20, 33, 16), {"dropout": 0.1, "causal": True, "kv_heads": 2}),
    Case((2, 3, 20, 20, 16), {"return_lse": True}),
    Case((2, 4, 20, 33, 16), {"return_lse": True, "causal": True, "kv_heads": 1, "softcap": 4.0}),
    Case((2, 2, 33, 9, 16), {"return_lse": True, "causal": True, "dropout": 0.2, "lengths": True}),
    Case((2, 8, 1, 130, 16), {"kv_heads": 2, "lengths": True, "return_lse": True}),
    Case((1, 4, 4, 300, 16), {"kv_heads": 2, "causal": True, "window": 100, "return_lse": True}),
)
BENCH = (
    Case((2, 12, 512, 512, 64), {"causal": True}),
    Case((2, 12, 512, 512, 64), {"causal": True, "kv_heads": 4}),
)
CPU = tuple(
    Case(shape, {"causal": True} if causal else {})
    for shape in ((2, 12, 1024, 1024, 64), (1, 16, 4096, 4096, 128), (1, 2, 4, 4, 64))
    for causal in (True, False)
)
