"""Token and position embeddings by csrc/cpu/embedding.cpp."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from fastgpt_kernels import memory
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported
from fastgpt_kernels.rows import rows_of


def supports(
    token_weight: Tensor, tokens: Tensor, position_weight: Tensor | None, positions: Tensor | None
) -> str | None:
    """None, or the reason why not."""
    return unsupported(token_weight)


def embedding_fwd(
    token_weight: Tensor, tokens: Tensor, position_weight: Tensor | None, positions: Tensor | None
) -> Tensor:
    """out; NaN in the rows whose token or position is out of range."""
    rows, n = token_weight.shape
    shape, dtype = tokens.shape, token_weight.dtype
    token_weight, token_stride = rows_of(token_weight, n)
    position_rows = position_at = position_stride = positions_at = 0
    if position_weight is not None:
        position_rows = position_weight.shape[0]
        position_weight, position_stride = rows_of(position_weight, n)
        position_at = position_weight.data_ptr()
        if positions is not None:
            positions = positions.expand(shape).contiguous()
            positions_at = positions.data_ptr()
    tokens = tokens.contiguous()
    out = memory.new(token_weight, *shape, n)
    kernels.embedding_fwd(
        token_weight.data_ptr(), tokens.data_ptr(), position_at, positions_at, out.data_ptr(), tokens.numel(),
        shape[-1], n, rows, token_stride, position_rows, position_stride, DTYPE_CODES[dtype], get_num_threads(),
    )  # fmt: skip
    return out


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
    dout_rows, stride = rows_of(dout, dout.shape[-1])
    dtoken = dposition = None
    if need_dtoken:
        dtoken = _scattered(dout_rows, stride, tokens.contiguous(), tokens.shape, vocab_size, padding_idx)
    if need_dposition:
        index = None if positions is None else positions.expand(tokens.shape).contiguous()
        dposition = _scattered(dout_rows, stride, index, tokens.shape, num_positions, -1)
    return dtoken, dposition


def _scattered(
    dout: Tensor, stride: int, index: Tensor | None, shape: torch.Size, rows: int, left_out: int
) -> Tensor:
    """[rows, n]; index None: 0 to T - 1 along the last dimension of shape."""
    n = dout.shape[-1]
    dweight = memory.new(dout, rows, n)
    kernels.embedding_bwd(
        dout.data_ptr(), 0 if index is None else index.data_ptr(), dweight.data_ptr(), shape.numel(), shape[-1], n,
        rows, stride, left_out, DTYPE_CODES[dout.dtype], get_num_threads(),
    )  # fmt: skip
    return dweight
