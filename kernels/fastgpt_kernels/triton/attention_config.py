"""Block sizes of the attention kernels: a rule per architecture, over which the recorded tables stand.

The rules keep every kernel without spills and within the shared memory of its architecture: 227 KB on sm_90 and
sm_100, 163 KB on sm_80, 99 KB on consumer cards, 64 KB on AMD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgpt_kernels.triton import common
from fastgpt_kernels.triton.attention_tile import Options
from fastgpt_kernels.triton.common import DTYPE_NAMES


@dataclass(frozen=True)
class BlockConfig(common.LaunchConfig):
    """BLOCK_M queries (rows, in the decode form) by BLOCK_N keys."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64


def key_of(opts: Options, dtype: torch.dtype, loaded: bool) -> str:
    """What a table is asked for: "bf16-128-causal". The wider of the two head dimensions counts.

    Calls that need more registers have entries of their own ("bf16-128-causal-loaded"): the best of others spills.
    """
    form = "causal" if opts.causal else "window" if opts.left else "full"
    return f"{DTYPE_NAMES[dtype]}-{max(opts.D, opts.DV)}-{form}{'-loaded' if loaded else ''}"


def is_loaded(opts: Options) -> bool:
    """Whether a tile needs registers beyond its scores: for a mask, or the counters of dropout."""
    return opts.mask != 0 or opts.dropout


def configure(
    kernel: str, opts: Options, dtype: torch.dtype, arch: str, rule: BlockConfig, *, loaded: bool
) -> BlockConfig:  # fmt: skip
    """The configuration forced by the tuner, else the recorded one of `arch`, else `rule`."""
    return common.configured(arch, kernel, key_of(opts, dtype, loaded), rule)


def forward_config(opts: Options, dtype: torch.dtype, arch: str) -> BlockConfig:
    return configure(
        "attention_fwd", opts, dtype, arch, _forward_rule(opts, dtype, arch), loaded=is_loaded(opts)
    )


def _forward_rule(opts: Options, dtype: torch.dtype, arch: str) -> BlockConfig:
    D = max(opts.D, opts.DV)

    def blocks(m: int, n: int, num_warps: int, num_stages: int) -> BlockConfig:
        return BlockConfig(num_warps, num_stages, m, n)

    if arch == "interpreter":
        return blocks(32, 32, 4, 1)
    loaded = is_loaded(opts)  # half the keys then
    if dtype == torch.float32:  # multiply-adds without the matrix unit: registers are what is short
        return blocks(64, 16, 8, 1) if D <= 64 else blocks(32, 16, 8, 1) if D <= 128 else blocks(16, 16, 8, 1)
    if arch.startswith("gfx"):
        m = 64 if loaded else 128
        return blocks(m, 64, 4, 1) if D <= 64 else blocks(m, 32, 4, 1) if D <= 128 else blocks(64, 16, 4, 1)
    if arch in ("sm_90", "sm_100", "sm_103"):
        if (
            loaded and arch == "sm_90"
        ):  # more queries or two stages serialize the matrix instructions or spill
            return (
                blocks(64, 64, 8, 1)
                if D <= 64
                else blocks(64, 32, 8, 1)
                if D <= 128
                else blocks(32, 32, 8, 2)
            )
        if loaded:
            return blocks(64, 32, 8, 2)
        wide = 128 if arch == "sm_90" else 32
        return (
            blocks(128, wide, 8, 3)
            if D <= 64
            else blocks(128, 64, 8, 3)
            if D <= 128
            else blocks(128, 32, 8, 2)
        )
    if loaded:
        return (
            blocks(128, 32, 8, 2) if D <= 64 else blocks(64, 32, 8, 2) if D <= 128 else blocks(32, 32, 8, 2)
        )
    return blocks(128, 64, 8, 3) if D <= 64 else blocks(128, 32, 8, 2) if D <= 128 else blocks(64, 32, 8, 2)


def candidates(kernel: str, width: int) -> list[BlockConfig]:
    """What the tuner tries for bf16 and fp16."""
    if kernel == "attention_fwd":
        shapes = (
            ((128, 128), (128, 64), (64, 64), (64, 32)) if width <= 128 else ((128, 32), (64, 32), (64, 16))
        )
        return [BlockConfig(warps, stages, m, n) for m, n in shapes for warps in (4, 8) for stages in (2, 3)]
    rows = 16 if kernel == "attention_decode" else 32  # wgmma, from 64 rows, comes out serialized here
    return [BlockConfig(4, stages, rows, n) for n in (32, 64, 128) for stages in (2, 3, 4)]


def decode_config(opts: Options, rows: int, dtype: torch.dtype, arch: str) -> BlockConfig:
    """rows: queries times the heads that share keys. Two forms, so that a length seldom compiles anything."""
    kernel = "attention_decode" if rows <= 16 else "attention_decode_rows"
    rule = _decode_rule(opts, 16 if rows <= 16 else 32, dtype, arch)
    return configure(kernel, opts, dtype, arch, rule, loaded=is_loaded(opts))


def _decode_rule(opts: Options, rows: int, dtype: torch.dtype, arch: str) -> BlockConfig:
    """What counts is to have many keys under way: bandwidth is the limit."""
    D = max(opts.D, opts.DV)
    if arch == "interpreter":
        return BlockConfig(4, 1, 16, 32)
    if dtype == torch.float32:
        return BlockConfig(4, 1, 16, 32) if D <= 128 else BlockConfig(8, 1, 16, 16)
    if arch.startswith("gfx"):
        return BlockConfig(4, 1, rows, 64 if D <= 128 else 32)
    if arch == "sm_90" and rows == 16 and D == 128:
        return BlockConfig(8, 3, rows, 64)  # 4 warps spill
    if arch in ("sm_90", "sm_100", "sm_103"):
        return BlockConfig(4, 3, rows, 64 if D <= 128 else 32)
    return BlockConfig(4, 3, rows, 64 if D <= 64 else 32)
