"""Block sizes of attention's backward kernels: a rule per architecture, over which the recorded tables stand.

Compiled offline by Triton 3.7.1 for T = 4096 and D = 64, 128, 256, none of the 16-bit rules of dkdv and dq spills or
serialises wgmma, and all of them use the matrix unit. What the rules avoid, and what is left:
- sm_90, dkdv, D = 128: 64 x 128 spills 84 bytes (255 registers); 32 x 128 takes 244. A candidate all the same.
- sm_90, dkdv, D = 256: two accumulators of 64 keys, the least that wgmma takes, leave too few registers; 32 keys
  compile to HMMA instead.
- A pipelined loop and one with num_stages=1 in the same sm_90 kernel: ptxas serialises wgmma.
- Dropout on sm_90 at D = 128 spills (dkdv 388 bytes, dq 24), a boolean mask there 36: Philox and the mask's
  addresses come on top.
- dmask spills 96 bytes at D = 128, on sm_80 244 at D = 256: both operands of its queries lie in registers.
- fp32 on NVIDIA is multiply-adds, whose operands lie in registers for the whole of D: no spills up to D = 64,
  500 to 900 bytes above.
"""

from __future__ import annotations

import torch

from fastgpt_kernels.triton.attention_config import BlockConfig, configure
from fastgpt_kernels.triton.attention_tile import Options

_TENSOR_MEMORY = ("sm_100", "sm_103")  # accumulators have a memory of their own


def _blocks(m: int, n: int, num_warps: int, num_stages: int) -> BlockConfig:
    return BlockConfig(num_warps, num_stages, m, n)


def dkdv_config(options: Options, dtype: torch.dtype, arch: str) -> BlockConfig:
    return configure("attention_bwd_dkdv", options, dtype, arch, _dkdv_rule(_width(options), dtype, arch))


def dq_config(options: Options, dtype: torch.dtype, arch: str) -> BlockConfig:
    return configure("attention_bwd_dq", options, dtype, arch, _dq_rule(_width(options), dtype, arch))


def dmask_config(options: Options, dtype: torch.dtype, arch: str) -> BlockConfig:
    return configure("attention_bwd_dmask", options, dtype, arch, _dmask_rule(_width(options), dtype, arch))


def _width(options: Options) -> int:
    return max(options.D, options.DV)


def _dkdv_rule(D: int, dtype: torch.dtype, arch: str) -> BlockConfig:
    if arch == "interpreter":
        return _blocks(32, 32, 4, 1)
    if dtype == torch.float32:
        return _fp32_rule(D, arch)
    if arch.startswith("gfx"):
        return (
            _blocks(64, 64, 4, 1) if D <= 64 else _blocks(32, 64, 4, 1) if D <= 128 else _blocks(16, 32, 4, 1)
        )
    if arch in _TENSOR_MEMORY:
        return _blocks(64, 128, 8, 2) if D <= 128 else _blocks(32, 64, 8, 2)
    if arch == "sm_90":
        return (
            _blocks(64, 128, 8, 2)
            if D <= 64
            else _blocks(32, 128, 8, 3)
            if D <= 128
            else _blocks(32, 32, 8, 2)
        )
    return _blocks(32, 128, 8, 2) if D <= 64 else _blocks(64, 64, 8, 2) if D <= 128 else _blocks(32, 32, 8, 2)


def _dq_rule(D: int, dtype: torch.dtype, arch: str) -> BlockConfig:
    if arch == "interpreter":
        return _blocks(32, 32, 4, 1)
    if dtype == torch.float32:
        return _fp32_rule(D, arch)
    if arch.startswith("gfx"):
        return (
            _blocks(128, 64, 4, 1)
            if D <= 64
            else _blocks(64, 32, 4, 1)
            if D <= 128
            else _blocks(32, 16, 4, 1)
        )
    if arch in (*_TENSOR_MEMORY, "sm_90"):
        return (
            _blocks(128, 64, 8, 3)
            if D <= 64
            else _blocks(128, 64, 8, 2)
            if D <= 128
            else _blocks(64, 32, 8, 2)
        )
    return _blocks(128, 64, 8, 2) if D <= 64 else _blocks(64, 64, 8, 2) if D <= 128 else _blocks(32, 32, 8, 2)


def _dmask_rule(D: int, dtype: torch.dtype, arch: str) -> BlockConfig:
    if arch == "interpreter":
        return _blocks(32, 32, 4, 1)
    if dtype == torch.float32:
        return _fp32_rule(D, arch)
    if arch.startswith("gfx"):
        return _blocks(32, 32, 4, 1)
    if arch in (*_TENSOR_MEMORY, "sm_90") and D <= 128:
        return _blocks(64, 64, 8, 2) if D <= 64 else _blocks(64, 64, 8, 1)
    return _blocks(32, 32, 8, 2) if D <= 128 else _blocks(16, 32, 4, 1)


def _fp32_rule(D: int, arch: str) -> BlockConfig:
    if arch.startswith("gfx"):
        return _blocks(32, 32, 4, 1) if D <= 128 else _blocks(16, 16, 4, 1)
    return _blocks(32, 32, 8, 1) if D <= 64 else _blocks(16, 32, 8, 1) if D <= 128 else _blocks(16, 16, 8, 1)


def candidates(kernel: str, D: int) -> list[BlockConfig]:
    """For the tuner, 16-bit inputs; what an architecture cannot launch fails there and is left out."""
    if D > 128:
        sizes = [
            (32, 32, 8, 2),
            (32, 64, 8, 2),
            (16, 64, 8, 2),
            (64, 32, 8, 2),
            (64, 64, 8, 2),
            (128, 32, 8, 2),
        ]
    elif kernel == "attention_bwd_dkdv":
        sizes = [
            (64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (32, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2),
            (32, 64, 4, 3), (128, 128, 8, 2),
        ]  # fmt: skip
    else:
        sizes = [
            (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3),
            (128, 32, 8, 2), (128, 32, 4, 3),
        ]  # fmt: skip
    return [_blocks(*size) for size in sizes]
