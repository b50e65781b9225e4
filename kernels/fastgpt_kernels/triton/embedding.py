"""Token and position embeddings in Triton.

    out[i] = token_weight[tokens[i]] + position_weight[positions[i]]
    dweight[v] = sum of dout[i] over the i whose index is v, in their order

Backward sorts the indices, stably, and sums the rows of dout that belong to one row of dweight: no atomics, and
results repeat. A program has a tile of rows of dweight, most of which have one or two rows to add, or none. Of an
index that is very frequent (padding) that would be one long sum: the sorted order is cut in fixed chunks, and where
a whole chunk belongs to one index, chunks are summed first, by a program each, and then one adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import memory
from fastgpt_kernels.rows import rows_of
from fastgpt_kernels.triton.common import (
    DTYPE_NAMES,
    RowsConfig,
    Tunable,
    add_compensated,
    cdiv,
    configured,
    next_power_of_2,
    unsupported,
)
from fastgpt_kernels.triton.device import arch_of
from fastgpt_kernels.triton.launch import launch


def supports(
    token_weight: Tensor, tokens: Tensor, position_weight: Tensor | None, positions: Tensor | None
) -> str | None:
    """None, or the reason why not."""
    return unsupported(token_weight)


def heuristic(kernel: str, n: int, dtype: torch.dtype, arch: str) -> RowsConfig:
    """A tile of rows, each of which comes from a place of its own."""
    cols = min(next_power_of_2(n), 1024)
    if arch == "interpreter":
        rule = RowsConfig(BLOCK_ROWS=16, BLOCK_COLS=cols)  # numpy adds rows one after another
    else:
        rule = RowsConfig(
            2 if arch.startswith("gfx") else 4, 1, BLOCK_ROWS=min(max(2048 // cols, 1), 64), BLOCK_COLS=cols
        )
    return configured(arch, kernel, _key(n, dtype), rule)


def chunk_of(count: int) -> int:
    """Rows of dout in a chunk: nowhere are many more than sqrt(count) terms added one after another."""
    return min(max(next_power_of_2(int(count**0.5)) // 4, 32), 4096)


def candidates() -> list[RowsConfig]:
    """What the tuner tries, for any width."""
    return [
        RowsConfig(warps, 1, BLOCK_ROWS=r, BLOCK_COLS=c)
        for c in (256, 512, 1024)
        for r in (1, 2, 4, 8)
        for warps in (2, 4, 8)
        if r * c <= 4096
    ]


def tunables() -> Sequence[Tunable]:
    return [
        Tunable(kernel, _key(n, dtype), candidates(), _problem(kernel, n, dtype))
        for kernel in ("embedding_fwd", "embedding_bwd")
        for dtype in (torch.float32, torch.bfloat16)
        for n in (768, 1600, 4096)
    ]


def _problem(kernel: str, n: int, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        weight, places = (torch.randn(rows, n, dtype=dtype, device=device) for rows in (50304, 1024))
        # As in text, the smaller an index the more frequent it is.
        tokens = (torch.rand(16, 1024, device=device).pow(4) * 50304).long()
        if kernel == "embedding_fwd":
            return lambda: embedding_fwd(weight, tokens, places, None)
        dout = torch.randn(16, 1024, n, dtype=dtype, device=device)
        return lambda: embedding_bwd(dout, tokens, None, 50304, 1024, -1, True, True)

    return make


def _key(n: int, dtype: torch.dtype) -> str:
    return f"{DTYPE_NAMES[dtype]}-{next_power_of_2(n)}"


def embedding_fwd(
    token_weight: Tensor, tokens: Tensor, position_weight: Tensor | None, positions: Tensor | None
) -> Tensor:
    """out; NaN in the rows whose token or position is out of range."""
    rows, n = token_weight.shape
    config = heuristic("embedding_fwd", n, token_weight.dtype, arch_of(token_weight.device))
    out = memory.empty((*tokens.shape, n), token_weight.dtype, token_weight.device)
    count, length = tokens.numel(), tokens.shape[-1]
    token_weight, token_stride = rows_of(token_weight, n)
    position_rows = position_stride = 0
    if position_weight is not None:
        position_rows = position_weight.shape[0]
        position_weight, position_stride = rows_of(position_weight, n)
        positions = None if positions is None else positions.expand(tokens.shape).contiguous()
    launch(
        _embedding_fwd_kernel, (cdiv(count, config.BLOCK_ROWS) * cdiv(n, config.BLOCK_COLS),),
        token_weight, tokens.contiguous(), position_weight, positions, out,
        count, length, n, rows, token_stride, position_rows, position_stride,
        BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_COLS=config.BLOCK_COLS, num_warps=config.num_warps,
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
        dtoken = _scattered(dout_rows, stride, tokens, tokens.shape, vocab_size, padding_idx)
    if need_dposition:
        index = None if positions is None else positions.expand(tokens.shape)
        dposition = _scattered(dout_rows, stride, index, tokens.shape, num_positions, -1)
    return dtoken, dposition


def _scattered(
    dout: Tensor, stride: int, index: Tensor | None, shape: torch.Size, rows: int, left_out: int
) -> Tensor:
    """[rows, n]; index None: 0 to T - 1 along the last dimension of shape."""
    n, count = dout.shape[-1], shape.numel()
    dweight = memory.empty((rows, n), dout.dtype, dout.device)
    config = heuristic("embedding_bwd", n, dout.dtype, arch_of(dout.device))
    blocks, chunk = cdiv(n, config.BLOCK_COLS), chunk_of(count)
    chunks = count // chunk
    ordered = order = ends = None
    if index is not None:
        ordered, order = index.flatten().sort(stable=True)
        # Where each index ends; what is out of range lies before the first and after the last.
        ends = torch.searchsorted(ordered, torch.arange(-1, rows, device=dout.device), right=True)
    elif count < chunk * shape[-1]:
        chunks = 0  # each position occurs once in a sequence, and there are fewer sequences
    partials = memory.empty((max(chunks, 1), n), torch.float32, dout.device)
    args = (dout, ordered, order, ends, partials, dweight, count, shape[-1], n, rows, stride, left_out, chunk)
    options = {
        "BLOCK_ROWS": config.BLOCK_ROWS,
        "BLOCK_COLS": config.BLOCK_COLS,
        "num_warps": config.num_warps,
    }
    for kernel in (_embedding_bwd_chunks_kernel, _embedding_bwd_long_kernel):
        launch(kernel, (chunks * blocks,), *args, **options)
    launch(_embedding_bwd_kernel, (cdiv(rows, config.BLOCK_ROWS) * blocks,), *args, **options)
    return dweight


@triton.jit(do_not_specialize=["count", "length", "rows", "position_rows"])
def _embedding_fwd_kernel(
    token_weight_ptr, tokens_ptr, position_weight_ptr, positions_ptr, out_ptr,
    count, length, n, rows, token_stride, position_rows, position_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    blocks = (n + BLOCK_COLS - 1) // BLOCK_COLS
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_inside = row < count
    inside = row_inside[:, None] & (cols < n)[None, :]
    token = tl.load(tokens_ptr + row, mask=row_inside, other=0)
    known = (token >= 0) & (token < rows)
    at = (token * token_stride)[:, None] + cols[None, :]
    out = tl.load(token_weight_ptr + at, mask=inside & known[:, None], other=float("nan")).to(tl.float32)
    if position_weight_ptr is not None:
        if positions_ptr is not None:
            position = tl.load(positions_ptr + row, mask=row_inside, other=0)
        else:
            position = row % length
        known = (position >= 0) & (position < position_rows)
        at = (position * position_stride)[:, None] + cols[None, :]
        out += tl.load(position_weight_ptr + at, mask=inside & known[:, None], other=float("nan")).to(
            tl.float32
        )
    tl.store(out_ptr + (row * n)[:, None] + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


_BWD_UNSPECIALIZED = ["count", "length", "rows", "left_out", "chunk"]


@triton.jit(do_not_specialize=_BWD_UNSPECIALIZED)
def _embedding_bwd_kernel(
    dout_ptr, ordered_ptr, order_ptr, ends_ptr, partials_ptr, dweight_ptr,
    count, length, n, rows, stride, left_out, chunk,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A tile of rows of dweight; all but those that have a whole chunk."""
    blocks = (n + BLOCK_COLS - 1) // BLOCK_COLS
    v = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = cols < n
    begin, end = _segment(v, v < rows, ends_ptr, count, length)
    end = tl.where(v == left_out, begin, end)
    here = (v < rows) & ((begin + chunk - 1) // chunk >= end // chunk)
    terms = tl.where(here, end - begin, 0)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    lost = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for k in range(tl.max(terms, axis=0)):
        row = _row_at(begin + k, k < terms, order_ptr, count, length)
        mask = (k < terms)[:, None] & inside[None, :]
        value = tl.load(dout_ptr + (row * stride)[:, None] + cols[None, :], mask=mask, other=0.0)
        acc, lost = add_compensated(acc, lost, value.to(tl.float32))
    at = dweight_ptr + (v * n)[:, None] + cols[None, :]
    tl.store(at, acc.to(dweight_ptr.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit(do_not_specialize=_BWD_UNSPECIALIZED)
def _embedding_bwd_chunks_kernel(
    dout_ptr, ordered_ptr, order_ptr, ends_ptr, partials_ptr, dweight_ptr,
    count, length, n, rows, stride, left_out, chunk,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The sum of a chunk whose rows all belong to one index; nothing for the others."""
    blocks = (n + BLOCK_COLS - 1) // BLOCK_COLS
    which = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    _, _, end = _segment_at(which * chunk, ordered_ptr, ends_ptr, count, length, rows, left_out)
    if end >= (which + 1) * chunk:
        acc = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        lost = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        acc, lost = _add_rows(
            acc, lost, dout_ptr, order_ptr, which * chunk, (which + 1) * chunk, count, length, stride, cols, cols < n,
            BLOCK_ROWS,
        )  # fmt: skip
        tl.store(partials_ptr + which * n + cols, tl.sum(acc, axis=0), mask=cols < n)


@triton.jit(do_not_specialize=_BWD_UNSPECIALIZED)
def _embedding_bwd_long_kernel(
    dout_ptr, ordered_ptr, order_ptr, ends_ptr, partials_ptr, dweight_ptr,
    count, length, n, rows, stride, left_out, chunk,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A row of dweight that has whole chunks, by the program of the first: what lies before, these, the rest."""
    blocks = (n + BLOCK_COLS - 1) // BLOCK_COLS
    first = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = cols < n
    v, begin, end = _segment_at(first * chunk, ordered_ptr, ends_ptr, count, length, rows, left_out)
    if (end >= (first + 1) * chunk) & (begin > (first - 1) * chunk):
        last = end // chunk
        acc = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        lost = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        acc, lost = _add_rows(
            acc,
            lost,
            dout_ptr,
            order_ptr,
            begin,
            first * chunk,
            count,
            length,
            stride,
            cols,
            inside,
            BLOCK_ROWS,
        )
        for at in range(first, last, BLOCK_ROWS):
            which = at + tl.arange(0, BLOCK_ROWS)
            mask = (which < last)[:, None] & inside[None, :]
            value = tl.load(partials_ptr + (which * n)[:, None] + cols[None, :], mask=mask, other=0.0)
            acc, lost = add_compensated(acc, lost, value)
        acc, lost = _add_rows(
            acc, lost, dout_ptr, order_ptr, last * chunk, end, count, length, stride, cols, inside, BLOCK_ROWS
        )
        total = tl.sum(acc, axis=0)
        tl.store(dweight_ptr + v * n + cols, total.to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _segment(v, known, ends_ptr, count, length):
    """[begin, end) of index v in the sorted order; without indices that is by position, then by sequence."""
    if ends_ptr is None:
        each = count // length
        begin = tl.minimum(v, length) * each
        end = tl.minimum(v + 1, length) * each
    else:
        begin = tl.load(ends_ptr + v, mask=known, other=0)
        end = tl.load(ends_ptr + v + 1, mask=known, other=0)
    return begin, end


@triton.jit
def _segment_at(place, ordered_ptr, ends_ptr, count, length, rows, left_out):
    """(v, begin, end) of the index at a place of the sorted order; one that gets no gradient ends at 0."""
    if ordered_ptr is None:
        v = place // (count // length)
    else:
        v = tl.load(ordered_ptr + place)
    known = (v >= 0) & (v < rows) & (v != left_out)
    begin, end = _segment(v, known, ends_ptr, count, length)
    return v, begin, tl.where(known, end, 0)


@triton.jit
def _row_at(place, known, order_ptr, count, length):
    """Which row of dout is at a place of the sorted order."""
    if order_ptr is None:
        each = count // length
        row = (place % each) * length + place // each
    else:
        row = tl.load(order_ptr + place, mask=known, other=0)
    return row


@triton.jit
def _add_rows(
    acc, lost, dout_ptr, order_ptr, begin, end, count, length, stride, cols, inside, BLOCK_ROWS: tl.constexpr
):
    """acc and what its rounding lost, after the rows of dout at [begin, end) of the sorted order."""
    for at in range(begin, end, BLOCK_ROWS):
        place = at + tl.arange(0, BLOCK_ROWS)
        row = _row_at(place, place < end, order_ptr, count, length)
        mask = (place < end)[:, None] & inside[None, :]
        value = tl.load(dout_ptr + (row * stride)[:, None] + cols[None, :], mask=mask, other=0.0)
        acc, lost = add_compensated(acc, lost, value.to(tl.float32))
    return acc, lost
