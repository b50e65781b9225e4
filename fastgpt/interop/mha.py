"""What torch.nn.MultiheadAttention computes, on our ops, and of which calls it is known to be the same.

PyTorch has two ways to it: its layers, and in inference (nothing to be learned, nothing dropped) a fused function.
They differ for some masks, and which of them runs is for PyTorch to say: such calls are left to it. On a GPU and in
compiled code, where looking at a mask would wait for it, that is every call with a mask in inference, unless fused
functions are off (`torch.backends.mha.set_fastpath_enabled(False)`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.interop.layers import is_ours, is_plain, is_strided, one_dtype

Mask = Tensor | None


def refusal(attention: nn.MultiheadAttention) -> str | None:
    """Why this attention is none of ours, or None."""
    if not is_plain(attention, nn.MultiheadAttention):
        return "its attention is a subclass, or hooked"
    if attention.bias_k is not None or attention.bias_v is not None:
        return "appends a key of its own (add_bias_kv)"
    if attention.add_zero_attn:
        return "appends a key of zeros (add_zero_attn)"
    if not attention._qkv_same_embed_dim:
        return "keys or values of another width"
    if not is_plain(attention.out_proj, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Linear):
        return "its projection is another layer, or hooked"
    return None


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Mask,
    attn_mask: Mask,
    is_causal: bool,
) -> Tensor:
    """The output of a MultiheadAttention, in the layout of its inputs."""
    heads, p = module.num_heads, module.dropout if module.training else 0.0
    weight, bias = module.in_proj_weight, module.in_proj_bias
    batch_first = module.batch_first
    # As in PyTorch: a mask that is said to be causal is not looked at where it is the only one.
    causal = is_causal and key_padding_mask is None
    mask = None if causal else _combined(key_padding_mask, attn_mask, heads, query.dtype)
    if query is key and key is value:
        qkv = ops.linear(query, weight, bias)
        qkv = qkv if batch_first else qkv.transpose(0, 1)
        out = ops.attention_qkv(qkv.contiguous(), heads, causal=causal, mask=mask, dropout_p=p)
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        projected = []
        for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True):
            y = ops.linear(x, w, b)
            y = y if batch_first else y.transpose(0, 1)
            projected.append(y.unflatten(-1, (heads, -1)).transpose(1, 2))  # [B, H, T, D]
        out = ops.attention(*projected, causal=causal, mask=mask, dropout_p=p)
    merged = out.transpose(1, 2).flatten(2)  # [B, T, E]
    merged = merged if batch_first else merged.transpose(0, 1)
    return ops.linear(merged, module.out_proj.weight, module.out_proj.bias)


def covers(
    attention: Any, inputs: tuple[Tensor, ...], masks: tuple[Mask, Mask], is_causal: bool, alone: bool = True
) -> bool:
    """Whether `attend` gives what this attention gives. What PyTorch refuses is for PyTorch to refuse.

    alone: else whoever asks has looked at what a fused function would do.
    """
    if not isinstance(attention, nn.MultiheadAttention) or refusal(attention) is not None:
        return False
    query, key, value = inputs
    out = attention.out_proj
    parameters = attention.in_proj_weight, attention.in_proj_bias, out.weight, out.bias
    if not is_ours(*inputs, *parameters) or any(x.dim() != 3 for x in inputs):
        return False
    if not one_dtype(*inputs, *parameters) and not torch.is_autocast_enabled(query.device.type):
        return False
    at_batch, at_length = (0, 1) if attention.batch_first else (1, 0)
    batch, queries, keys = query.shape[at_batch], query.shape[at_length], key.shape[at_length]
    if key.shape != value.shape or key.shape[at_batch] != batch or not (batch and queries and keys):
        return False
    if query.shape[2] != attention.embed_dim or key.shape[2] != attention.embed_dim:
        return False
    padding, mask = masks
    if is_causal and (mask is None or (padding is None and queries != keys)):
        return False  # refused; and of other lengths causal to PyTorch from the top left on
    heads = attention.num_heads
    if padding is not None and not _is_mask(padding, query, ((batch, keys),)):
        return False
    if mask is not None and not _is_mask(mask, query, ((queries, keys), (batch * heads, queries, keys))):
        return False
    if attention.training:
        return 0.0 <= attention.dropout < 1.0
    itself = query is key and key is value  # others are never for the fused function, nor are float masks
    if not alone or not itself or any(m is not None and m.dtype != torch.bool for m in masks):
        return True
    return not may_be_fused(attention, query) or masks_agree(masks, is_causal, heads)


def _is_mask(mask: Tensor, query: Tensor, shapes: tuple[tuple[int, ...], ...]) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    dtypes = (torch.bool, query.dtype, torch.float32) if half else (torch.bool, query.dtype)
    return is_strided(mask) and mask.shape in shapes and mask.dtype in dtypes and mask.device == query.device


def may_be_fused(module: nn.Module, x: Tensor) -> bool:
    """Whether PyTorch might call its fused function: which it does where nothing is to be learned."""
    if module.training or torch.is_autocast_enabled("cuda") or not torch.backends.mha.get_fastpath_enabled():
        return False
    return not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *module.parameters()))


def masks_agree(masks: tuple[Mask, Mask], is_causal: bool, heads: int) -> bool:
    """Whether PyTorch's fused function and its layers do the same with these masks. They differ in a query that sees
    nothing (NaN or zeros), in a mask that only is said to be causal and in a float mask of other than 0 and -inf, and
    under autocast in their dtypes. That is looked for where it is cheap."""
    padding, mask = masks
    given = [m for m in masks if m is not None]
    if given and (torch.compiler.is_compiling() or not all(m.is_cpu for m in given)):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if any(m.dtype != torch.bool and bool(((m != 0) & (m != -torch.inf)).any()) for m in given):
        return False
    if mask is not None and is_causal:
        causal = torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1)
        if not bool(((mask != 0) == causal).all()):
            return False
        if padding is None:
            return True  # of which every query sees itself
    hidden = _either([m != 0 for m in _spread(padding, mask, heads)])
    return hidden is None or not bool(hidden.all(-1).any())


def _combined(padding: Mask, mask: Mask, heads: int, dtype: torch.dtype) -> Mask:
    """One mask for ops.attention from PyTorch's two, where True hides."""
    given = _spread(padding, mask, heads)
    if all(m.dtype == torch.bool for m in given):
        hidden = _either(given)
        return None if hidden is None else ~hidden
    added = [
        torch.zeros_like(m, dtype=dtype).masked_fill_(m, -torch.inf) if m.dtype == torch.bool else m
        for m in given
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _spread(padding: Mask, mask: Mask, heads: int) -> list[Tensor]:
    """The masks that there are, each broadcastable to [B, H, T, S]."""
    if padding is not None:
        padding = padding[:, None, None, :]
    if mask is not None and mask.dim() == 3:  # [B * H, T, S]
        mask = mask.unflatten(0, (-1, heads))
    return [m for m in (padding, mask) if m is not None]


def _either(hidden: list[Tensor]) -> Mask:
    return functools.reduce(torch.logical_or, hidden) if hidden else None
