"""A step of decoding by csrc/cpu/decode.cpp: all blocks of a GPT-2 stack and its output head in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, get_num_threads

from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels
from fastgpt_kernels.cpu.gemm import ACTIVATIONS

_INT8 = 3  # kInt8 in decode.cpp
_BLOCK = 2**18  # numbers that are rounded at once
_APPROXIMATE = {"none": 0, "tanh": 1}
WEIGHTS = (torch.float32, torch.bfloat16, torch.int8)
CACHES = (torch.float32, torch.bfloat16)


class Packed(NamedTuple):
    """A product's weight [n, k], contiguous; scale [n] for int8; bias [n] or None; both fp32."""

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor


class Block(NamedTuple):
    ln_1: Norm
    qkv: Packed
    proj: Packed
    ln_2: Norm
    fc: Packed
    out: Packed


class Weights(NamedTuple):
    """Of a whole model; positions [length, dim] and everything that is no product's weight in fp32."""

    embedding: Packed  # the head, where that is tied
    positions: Tensor
    embedding_scale: float
    blocks: Sequence[Block]
    ln_f: Norm
    head: Packed
    heads: int
    hidden: int
    eps: float
    approximate: str


def quantized(weight: Tensor, dtype: torch.dtype) -> Packed:
    """The weight [n, k] in that dtype; for int8 each row by its largest magnitude: weight = scale * int8."""
    if dtype != torch.int8:
        return Packed(weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format))
    weight = weight.detach()
    rows, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.shape[0])
    block = max(1, _BLOCK // max(1, weight.shape[1]))  # rows that stay in the cache through all the steps
    for first in range(0, weight.shape[0], block):
        part = slice(first, first + block)
        wide = weight[part].float()
        scale[part] = wide.abs().amax(1) / 127.0
        smallest = scale[part].clamp(min=torch.finfo(torch.float32).tiny)
        rows[part] = (wide / smallest[:, None]).round_().clamp_(-127, 127)
    return Packed(rows, scale)


def table(weights: Weights) -> Tensor:
    """The addresses of the blocks' tensors, as decode.cpp reads them; the caller keeps the tensors."""
    rows = [
        [
            _at(t)
            for t in (
                *block.ln_1,
                *_flat(block.qkv),
                *_flat(block.proj),
                *block.ln_2,
                *_flat(block.fc),
                *_flat(block.out),
            )
        ]
        for block in weights.blocks
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 16)


def decode_step(
    weights: Weights,
    addresses: Tensor,
    tokens: Tensor,
    positions: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Logits [B, V] in fp32 of tokens [B], each at the place of its sequence in positions [B], all int64.

    keys, values: [layers, R, heads, length, dim / heads]; of a sequence's row, in rows [B], none twice, the place is
    written and all before it is read.
    """
    embedding, head = weights.embedding, weights.head
    batch, vocabulary = tokens.shape[0], head.weight.shape[0]
    logits = torch.empty(batch, vocabulary)
    code = _INT8 if head.weight.dtype == torch.int8 else DTYPE_CODES[head.weight.dtype]
    kernels.decode_step(
        tokens.data_ptr(), positions.data_ptr(), rows.data_ptr(), addresses.data_ptr(), embedding.weight.data_ptr(),
        _at(embedding.scale), weights.positions.data_ptr(), weights.embedding_scale, _at(weights.ln_f.weight),
        _at(weights.ln_f.bias), head.weight.data_ptr(), _at(head.scale), keys.data_ptr(), values.data_ptr(),
        logits.data_ptr(), batch, keys.shape[1], keys.shape[3], keys.shape[0], head.weight.shape[1], weights.heads,
        weights.hidden, vocabulary, weights.eps, _APPROXIMATE[weights.approximate], code,
        DTYPE_CODES[keys.dtype], get_num_threads(),
    )  # fmt: skip
    return logits


def int8_linear(x: Tensor, layer: Packed, activation: str | None = None) -> Tensor:
    """act(x @ weight.T + bias) [T, n], fp32, of x [T, k], fp32, and int8 weights: each row as a step makes it."""
    x = x.contiguous()
    y = torch.empty(x.shape[0], layer.weight.shape[0])
    kernels.int8_linear(
        x.data_ptr(), layer.weight.data_ptr(), _at(layer.scale), _at(layer.bias), y.data_ptr(), *x.shape, y.shape[1],
        ACTIVATIONS[activation], get_num_threads(),
    )  # fmt: skip
    return y


def _flat(packed: Packed) -> tuple[Tensor | None, ...]:
    return packed.weight, packed.scale, packed.bias


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
