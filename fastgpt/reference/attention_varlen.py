"""Attention over packed documents, by definition: each document by itself, as `attention` has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.attention import Options, Window, attend, band, documents, spread_mask
from fastgpt.reference.attention_condition import dense
from fastgpt.reference.common import Condition


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
    """out [total, H, Dv] in q's dtype, with return_lse (out, lse [H, total])."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    numbers = (scale, *band(window, causal), softcap, dropout_p, 0, max_seqlen_q, max_seqlen_k)
    options = Options(mask, alibi_slopes, kv_lengths, rng, *numbers)
    q4, k4, v4 = (t.transpose(0, 1)[None] for t in (q, k, v))
    parts = [
        attend(q4[:, :, queries], k4[:, :, keys], v4[:, :, keys], o)
        for queries, keys, o in documents(options, cu_seqlens_q, cu_seqlens_k)
    ]
    if parts:
        out, lse = torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)
    else:  # no document: nothing, but of the inputs, so that it can be differentiated
        out, lse = attend(q4, k4, v4, options)
    out = out[0].transpose(0, 1).to(q.dtype)
    return (out, lse[0]) if return_lse else out


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """The conditions of `attention`, document by document."""
    q, k, v = (inputs[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
    scale = inputs["q"].shape[-1] ** -0.5 if inputs.get("scale") is None else inputs["scale"]
    options = Options(
        inputs.get("mask"),
        inputs.get("alibi_slopes"),
        inputs.get("kv_lengths"),
        inputs.get("rng"),
        scale,
        *band(inputs.get("window"), inputs.get("causal", False)),
        inputs.get("softcap", 0.0),
        inputs.get("dropout_p", 0.0),
        0,
        inputs["max_seqlen_q"],
        inputs["max_seqlen_k"],
    )
    dout = grads["out"].transpose(0, 1)[None] if "out" in grads else None
    dlse = grads["lse"][None] if "lse" in grads else None
    parts = []
    for queries, keys, o in documents(options, inputs["cu_seqlens_q"], inputs["cu_seqlens_k"]):
        g = None if dout is None else dout[:, :, queries]
        h = None if dlse is None else dlse[:, :, queries]
        found = dense(q[:, :, queries], k[:, :, keys], v[:, :, keys], o, g, h)
        if "dmask" in found and options.mask is not None:
            found["dmask"] = spread_mask(found["dmask"], o, options)
        parts.append(found)
    whole = {}
    for name in parts[0]:
        of_all = [found[name] for found in parts]
        if name == "dmask":
            whole[name] = Condition._make(sum(part) for part in zip(*of_all, strict=True))
        else:
            joined = (None if part[0] is None else torch.cat(part, 2) for part in zip(*of_all, strict=True))
            whole[name] = Condition._make(_unbatched(part) for part in joined)
    return whole


def _unbatched(value: Tensor | None) -> Any:
    if value is None:
        return None
    return value[0].transpose(0, 1) if value.dim() == 4 else value[0]
