"""Block sizes of attention's backward kernels: a rule per architecture, over which the recorded tables stand.

None of the rules spills or serialises wgmma (Triton 3.6.0 and 3.7.1, offline), also where options come together:
dropout with a mask, a window and grouped heads; softcap with ALiBi, a window and documents. What they avoid:
- sm_90, dkdv: 64 x 128 spills 8 bytes at D = 64 with grouped heads; at D = 128 84, and 32 x 128 40 with a window too.
  Candidates all the same.
- sm_90, dkdv, D = 256: two accumulators of 64 keys, the least that wgmma takes, leave too few registers; 32 keys
  compile to HMMA instead. So they do, at any D, where a call is loaded: the counters of dropout and the addresses of
  a mask do not fit beside wgmma's operands.
- A pipelined loop and one with num_stages=1 in the same sm_90 kernel: ptxas serialises wgmma.
- fp32 on NVIDIA is multiply-adds, whose operands lie in registers: `row_products` takes them in chunks of D.
"""

from __future__ import annotations

import torch

from fastgpt_kernels.triton.attention_config import BlockConfig, configure, is_loaded
from fastgpt_kernels.triton.attention_tile import Options

Sizes = tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, num_warps, num_stages
# For D up to 64, up to 128, above; and the same where `_is_loaded`.
Rules = tuple[tuple[Sizes, Sizes, Sizes], tuple[Sizes, Sizes, Sizes]]

_DKDV: dict[str, Rules] = {
    "sm_80": (
        ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
        ((32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
    ),
    "sm_90": (
        ((32, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 2)),
        ((32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
    ),
    "sm_100": (
        ((64, 64, 8, 2), (32, 128, 8, 2), (32, 32, 8, 2)),
        ((32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 1)),
    ),
    "gfx": (
        ((32, 64, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
        ((32, 64, 4, 1), (16, 64, 4, 1), (16, 16, 4, 1)),
    ),
}
# With the loop over grouped heads, D up to 64, what is above spills.
_DKDV_GROUPED: dict[str, Sizes] = {"sm_80": (32, 32, 8, 2), "sm_90": (16, 128, 8, 2)}
_DQ: dict[str, Rules] = {
    "sm_80": (
        ((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        ((32, 32, 4, 1), (64, 32, 8, 2), (32, 16, 8, 2)),
    ),
    "sm_90": (
        ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        ((128, 32, 8, 2), (128, 32, 8, 2), (16, 32, 8, 2)),
    ),
    "sm_100": (
        ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
        ((64, 32, 8, 2), (64, 32, 8, 2), (16, 16, 8, 1)),
    ),
    "gfx": (
        ((128, 64, 4, 1), (64, 32, 4, 1), (32, 16, 4, 1)),
        ((64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 4, 1)),
    ),
}


def dkdv_config(options: Options, dtype: torch.dtype, arch: str) -> BlockConfig:
    return _configure("attention_bwd_dkdv", options, dtype, arch, _rule(_DKDV, options, dtype, arch))


def dq_config(options: Options, dtype: torch.dtype, arch: str) -> BlockConfig:
    return _configure("attention_bwd_dq", options, dtype, arch, _rule(_DQ, options, dtype, arch))


def dmask_config(options: Options, dtype: torch.dtype, arch: str) -> BlockConfig:
    return _configure("attention_bwd_dmask", options, dtype, arch, _dmask_rule(options, dtype, arch))


def _configure(
    kernel: str, options: Options, dtype: torch.dtype, arch: str, rule: BlockConfig
) -> BlockConfig:
    return configure(kernel, options, dtype, arch, rule, loaded=_is_loaded(options))


def _blocks(m: int, n: int, num_warps: int, num_stages: int) -> BlockConfig:
    return BlockConfig(num_warps, num_stages, m, n)


def _is_loaded(options: Options) -> bool:
    return is_loaded(options) or options.softcap or options.alibi


def _width(options: Options) -> int:
    return max(options.D, options.DV)


def _rule(rules: dict[str, Rules], options: Options, dtype: torch.dtype, arch: str) -> BlockConfig:
    D = _width(options)
    if arch == "interpreter":
        return _blocks(32, 32, 4, 1)
    if dtype == torch.float32:
        return _fp32_rule(D, arch, 128 if rules is _DQ else 64)
    family = "gfx" if arch.startswith("gfx") else "sm_100" if arch == "sm_103" else arch
    grouped = rules is _DKDV and options.group > 1
    # The loop over grouped heads does not fit beside tcgen05's operands.
    loaded = _is_loaded(options) or (grouped and family == "sm_100")
    if grouped and not loaded and D <= 64 and family in _DKDV_GROUPED:
        return _blocks(*_DKDV_GROUPED[family])
    sizes = rules.get(family, rules["sm_80"])[loaded]
    return _blocks(*sizes[0 if D <= 64 else 1 if D <= 128 else 2])


def _dmask_rule(options: Options, dtype: torch.dtype, arch: str) -> BlockConfig:
    D = _width(options)
    if arch == "interpreter":
        return _blocks(32, 32, 4, 1)
    if dtype == torch.float32:
        return _fp32_rule(D, arch)
    if arch.startswith("gfx"):
        return _blocks(32, 32, 4, 1)
    return _blocks(32, 32, 8, 2) if D <= 64 else _blocks(16, 32, 8, 2) if D <= 128 else _blocks(16, 16, 8, 1)


def _fp32_rule(D: int, arch: str, rows_32_to: int = 64) -> BlockConfig:
    if arch.startswith("gfx"):
        return _blocks(32, 32, 4, 1) if D <= 128 else _blocks(16, 16, 4, 1)
    return _blocks(32 if rows_32_to >= D else 16, 32, 8, 1)


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
