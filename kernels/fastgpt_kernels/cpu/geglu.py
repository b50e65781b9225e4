"""Gated linear units by csrc/cpu/geglu.cpp."""

from __future__ import annotations

from torch import Tensor, get_num_threads

from fastgpt_kernels import memory
from fastgpt_kernels.cpu.common import DTYPE_CODES, kernels, unsupported
from fastgpt_kernels.rows import rows_of

# enum Activation in csrc/cpu/geglu.cpp
_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2}


def supports(gate: Tensor, up: Tensor, activation: str) -> str | None:
    """None, or the reason why not."""
    return unsupported(gate)


def geglu_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    n, y = gate.shape[-1], memory.empty_like(gate)
    gate, gate_stride = rows_of(gate, n)
    up, up_stride = rows_of(up, n)
    kernels.geglu_fwd(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel(), n, gate_stride, up_stride,
        DTYPE_CODES[y.dtype], _ACTIVATIONS[activation], get_num_threads(),
    )  # fmt: skip
    return y


def geglu_bwd(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dgate, dup)."""
    n, dgate_at, dup_at = gate.shape[-1], 0, 0
    dgate = dup = None
    if need_dgate:
        dgate = memory.empty_like(gate)
        dgate_at = dgate.data_ptr()
    if need_dup:
        dup = memory.empty_like(up)
        dup_at = dup.data_ptr()
    dy, dy_stride = rows_of(dy, n)
    gate, gate_stride = rows_of(gate, n)
    up, up_stride = rows_of(up, n)
    kernels.geglu_bwd(
        dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate_at, dup_at, gate.numel(), n, dy_stride, gate_stride,
        up_stride, DTYPE_CODES[gate.dtype], _ACTIVATIONS[activation], get_num_threads(),
    )  # fmt: skip
    return dgate, dup
