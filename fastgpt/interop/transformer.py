"""torch.nn's MultiheadAttention and its Transformer layers as wholes.

In inference nn.TransformerEncoderLayer calls one fused function and none of its children: a layer is replaced whole,
or a replaced child would never run. What a forward here does not cover goes to PyTorch's own: attention weights that
are asked for, nested tensors, unbatched inputs, children that were exchanged or hooked, and calls on which PyTorch's
fused function and its layers do not agree.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastgpt import ops
from fastgpt.interop.blocks import does_nothing
from fastgpt.interop.layers import is_ours, is_plain, one_dtype
from fastgpt.interop.mha import Mask, attend, covers, masks_agree, may_be_fused
from fastgpt.interop.mha import refusal as refusal


def layer_refusal(layer: Any) -> str | None:
    """Why the children that a forward here does not call do something else than it does in their place, or None."""
    for name, child in layer._modules.items():
        kind: type[nn.Module] = nn.LayerNorm if name.startswith("norm") else nn.Linear
        if not name.startswith(("norm", "linear")):
            continue
        if child is None or not is_plain(child, kind):
            return f"its {name} is another layer than nn.{kind.__name__}, or hooked"
        if kind is nn.LayerNorm and child.normalized_shape != (layer.self_attn.embed_dim,):
            return f"its {name} is of another width"
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
        if need_weights or not covers(module, (query, key, value), masks, is_causal):
            return super().forward(  # type: ignore[misc]
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return attend(module, query, key, value, key_padding_mask, attn_mask, is_causal), None


class FusedEncoderLayer:
    def forward(
        self, src: Tensor, src_mask: Mask = None, src_key_padding_mask: Mask = None, is_causal: bool = False
    ) -> Tensor:
        layer: Any = self
        masks, fused = (src_key_padding_mask, src_mask), may_be_fused(layer, src)
        if not (
            covers(layer.self_attn, (src, src, src), masks, is_causal, alone=not fused)
            and _plain_layer(layer, src)
            and (not fused or _fused_agrees(layer, masks, is_causal))
        ):
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
            covers(layer.self_attn, (tgt, tgt, tgt), (tgt_key_padding_mask, tgt_mask), tgt_is_causal)
            and covers(
                layer.multihead_attn,
                (tgt, memory, memory),
                (memory_key_padding_mask, memory_mask),
                memory_is_causal,
            )
            and _plain_layer(layer, tgt)
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


def _plain_layer(layer: Any, x: Tensor) -> bool:
    if _has_any_global_hook() or layer_refusal(layer) is not None:
        return False
    within = (child for name, child in layer._modules.items() if name.startswith(("norm", "linear")))
    parameters = [p for child in within for p in child._parameters.values()]
    if one_dtype(x, *parameters):
        return is_ours(x, *parameters)
    single = all(p is None or p.dtype == torch.float32 for p in parameters)
    return single and torch.is_autocast_enabled(x.device.type) and is_ours(x, *parameters)


def _fused_agrees(layer: Any, masks: tuple[Mask, Mask], is_causal: bool) -> bool:
    """Whether an encoder layer's fused function does what its children would. It goes by what the activation was
    when the layer was made, of any GELU by erf, and past the modes of its children."""
    number, activation = layer.activation_relu_or_gelu, layer.activation
    if number == 1:
        as_made = activation is F.relu or (isinstance(activation, nn.ReLU) and is_plain(activation, nn.ReLU))
    else:
        as_made = number == 0 or gelu_of(activation) == "gelu"
    silent = does_nothing([layer.dropout, layer.dropout1, layer.dropout2]) and not layer.self_attn.training
    return as_made and silent and masks_agree(masks, is_causal, layer.self_attn.num_heads)
