"""Embeddings by PyTorch's aten::embedding, its gradient accumulated in fp32 or fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(
    token_weight: Tensor, tokens: Tensor, position_weight: Tensor | None, positions: Tensor | None
) -> str | None:
    """PyTorch's op takes everything that the public function lets through."""
    return None


def embedding_fwd(
    token_weight: Tensor, tokens: Tensor, position_weight: Tensor | None, positions: Tensor | None
) -> Tensor:
    """out; aten::add adds bf16 and fp16 in fp32."""
    out = torch.nn.functional.embedding(tokens, token_weight)
    if position_weight is None:
        return out
    if positions is None:
        return out + position_weight[: tokens.shape[-1]]
    return out + torch.nn.functional.embedding(positions, position_weight)


def embedding_bwd(
    dout: Tensor,
    tokens: Tensor,
    positions: Tensor | None,
    vocab_size: int,
    num_positions: int,
    padding_idx: int,
    need_dtoken: bool,
    need_dposition: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dtoken_weight, dposition_weight)."""
    # embedding_dense_backward accumulates in the gradient's dtype, on a CPU one row after another: there the sum of a
    # frequent token's thousands of rows needs more than fp32.
    wide = dout.double() if dout.is_cpu or dout.dtype == torch.float64 else dout.float()
    dtoken = dposition = None
    if need_dtoken:
        dtoken = _scattered(wide, tokens, vocab_size, padding_idx).to(dout.dtype)
    if need_dposition and positions is not None:
        dposition = _scattered(wide, positions.expand(tokens.shape), num_positions, -1).to(dout.dtype)
    elif need_dposition:
        length = tokens.shape[-1]
        dposition = dout.new_zeros(num_positions, dout.shape[-1])
        dposition[:length] = wide.sum_to_size(length, dout.shape[-1])
    return dtoken, dposition


def _scattered(dout: Tensor, index: Tensor, rows: int, padding_idx: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(dout.contiguous(), index, rows, padding_idx, False)
