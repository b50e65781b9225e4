"""torch.nn's MultiheadAttention and its Transformer layers as wholes.

In evaluation nn.TransformerEncoderLayer calls one fused function and none of its children: a layer is replaced whole,
or a replaced child would never run. What a forward here does not cover goes to PyTorch's own: attention weights that
are asked for, nested tensors, unbatched inputs, children that were exchanged or hooked.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastgpt import ops
from fastgpt.interop.blocks import does_nothing
from fastgpt.interop.layers import is_ours, is_plain

Mask = Tensor | None


def refusal(module: nn.MultiheadAttention) -> str | None:
    """Why this attention is none of ours, or None."""
    if module.bias_k is not None or module.bias_v is not None:
        return "appends a key of its own (add_bias_kv)"
    if module.add_zero_attn:
        return "appends a key of zeros (add_zero_attn)"
    if not module._qkv_same_embed_dim:
        return "keys or values of another width"
    if not _plain_attention(module):
        return "its projection is another layer, or hooked"
    return None


class FusedMultiheadAttention:
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Mask = None,
        need_weights: bool = True,
        attn_mask: Mask = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        module: Any = self
        masks = key_padding_mask, attn_mask
        if need_weights or not _covers(module, (query, key, value), masks, is_causal):
            return super().forward(  # type: ignore[misc]
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return attend(module, query, key, value, key_padding_mask, attn_mask, is_causal), None


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
    causal = is_causal and key_padding_mask is None and query.shape == key.shape
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


class FusedEncoderLayer:
    def forward(
        self, src: Tensor, src_mask: Mask = None, src_key_padding_mask: Mask = None, is_causal: bool = False
    ) -> Tensor:
        layer: Any = self
        masks = src_key_padding_mask, src_mask
        if not (_covers(layer.self_attn, (src, src, src), masks, is_causal) and _plain_layer(layer)):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)  # type: ignore[misc]

        def attention(x: Tensor) -> Tensor:
            return layer.dropout1(attend(layer.self_attn, x, x, x, src_key_padding_mask, src_mask, is_causal))

        if layer.norm_first:
            x = src + attention(_normed(layer.norm1, src))
            return x + layer.dropout2(_feed_forward(layer, _normed(layer.norm2, x)))
        x = _normed(layer.norm1, src + attention(src))
        return _normed(layer.norm2, x + layer.dropout2(_feed_forward(layer, x)))


class FusedDecoderLayer:
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Mask = None,
        memory_mask: Mask = None,
        tgt_key_padding_mask: Mask = None,
        memory_key_padding_mask: Mask = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        layer: Any = self
        if not (
            _covers(layer.self_attn, (tgt, tgt, tgt), (tgt_key_padding_mask, tgt_mask), tgt_is_causal)
            and _covers(
                layer.multihead_attn,
                (tgt, memory, memory),
                (memory_key_padding_mask, memory_mask),
                memory_is_causal,
            )
            and _plain_layer(layer)
        ):
            return super().forward(  # type: ignore[misc]
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal,
            )  # fmt: skip

        def own(x: Tensor) -> Tensor:
            return layer.dropout1(
                attend(layer.self_attn, x, x, x, tgt_key_padding_mask, tgt_mask, tgt_is_causal)
            )

        def other(x: Tensor) -> Tensor:
            attended = attend(
                layer.multihead_attn,
                x,
                memory,
                memory,
                memory_key_padding_mask,
                memory_mask,
                memory_is_causal,
            )
            return layer.dropout2(attended)

        if layer.norm_first:
            x = tgt + own(_normed(layer.norm1, tgt))
            x = x + other(_normed(layer.norm2, x))
            return x + layer.dropout3(_feed_forward(layer, _normed(layer.norm3, x)))
        x = _normed(layer.norm1, tgt + own(tgt))
        x = _normed(layer.norm2, x + other(x))
        return _normed(layer.norm3, x + layer.dropout3(_feed_forward(layer, x)))


def _normed(norm: Any, x: Tensor) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    first, second, dropout = layer.linear1, layer.linear2, layer.dropout
    activation = gelu_of(layer.activation)
    if activation is None:
        hidden = dropout(layer.activation(ops.linear(x, first.weight, first.bias)))
    elif not does_nothing([dropout]):
        hidden = dropout(ops.linear(x, first.weight, first.bias, activation=activation))
    else:
        return ops.mlp(x, first.weight, first.bias, second.weight, second.bias, activation=activation)
    return ops.linear(hidden, second.weight, second.bias)


def gelu_of(activation: Any) -> str | None:
    """The name of a layer's activation for ops.linear; None if it is no GELU."""
    if activation is F.gelu:
        return "gelu"
    if isinstance(activation, nn.GELU) and is_plain(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return None


def _covers(attention: Any, inputs: tuple[Tensor, ...], masks: tuple[Mask, Mask], is_causal: bool) -> bool:
    """Whether `attend` is for these inputs."""
    padding, mask = masks
    return (
        isinstance(attention, nn.MultiheadAttention)
        and is_ours(*inputs, *attention.parameters())
        and all(x.dim() == 3 for x in inputs)
        and refusal(attention) is None
        and not (is_causal and mask is None)  # which PyTorch refuses
        and all(m is None or m.dtype == torch.bool or m.is_floating_point() for m in masks)
        and (padding is None or padding.dim() == 2)
    )


def _plain_attention(attention: Any) -> bool:
    linear = nn.modules.linear.NonDynamicallyQuantizableLinear
    return is_plain(attention, nn.MultiheadAttention) and is_plain(attention.out_proj, linear, nn.Linear)


def _plain_layer(layer: Any) -> bool:
    """Whether the children that a forward here does not call do nothing but what it does in their place."""
    norms = [module for name, module in layer._modules.items() if name.startswith("norm")]
    return (
        not _has_any_global_hook()
        and is_ours(*layer.parameters())
        and all(is_plain(linear, nn.Linear) for linear in (layer.linear1, layer.linear2))
        and all(is_plain(norm, nn.LayerNorm) for norm in norms)
    )


def _combined(padding: Mask, mask: Mask, heads: int, dtype: torch.dtype) -> Mask:
    """One mask for ops.attention from PyTorch's two, where True hides."""
    if padding is not None:
        padding = padding[:, None, None, :]  # [B, 1, 1, S]
    if mask is not None and mask.dim() == 3:  # [B * H, T, S]
        mask = mask.unflatten(0, (-1, heads))
    given = [m for m in (padding, mask) if m is not None]
    if not given:
        return None
    if all(m.dtype == torch.bool for m in given):
        hidden = given[0] if len(given) == 1 else given[0] | given[1]
        return ~hidden
    added = [
        torch.zeros_like(m, dtype=dtype).masked_fill_(m, -torch.inf) if m.dtype == torch.bool else m.to(dtype)
        for m in given
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
