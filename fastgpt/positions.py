"""Where a token stands: sinusoids that are added, and rotations. `fastgpt.nn` has both among its modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._core.dispatch import Backend
from fastgpt._core.validate import positive


class PositionalEncoding(nn.Module):
    """Adds the sinusoidal encoding of "Attention Is All You Need", section 3.5, to x [B, T, D].

    `PE[t, 2i] = sin(t / 10000^(2i/D))`, `PE[t, 2i+1] = cos(t / 10000^(2i/D))`. Where `tokens` [B, T]
    equals `pad_idx`, nothing is added.
    """

    encoding: Tensor  # [max_seq_length, D]

    def __init__(self, embedding_dim: int, max_seq_length: int, pad_idx: int | None = None) -> None:
        super().__init__()
        self.embedding_dim = positive("embedding_dim", embedding_dim)
        self.max_seq_length = positive("max_seq_length", max_seq_length)
        self.pad_idx = pad_idx
        position = torch.arange(max_seq_length, dtype=torch.float64)[:, None]
        even = torch.arange(0, embedding_dim, 2, dtype=torch.float64)
        angle = position * torch.exp(even * (-math.log(10000.0) / embedding_dim))  # [T, ceil(D/2)]
        encoding = torch.empty(max_seq_length, embedding_dim, dtype=torch.float64)
        encoding[:, 0::2] = angle.sin()
        encoding[:, 1::2] = angle.cos()[:, : embedding_dim // 2]
        self.register_buffer("encoding", encoding.to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.embedding_dim:
            raise ValueError(f"x: expected [B, T, {self.embedding_dim}], got {tuple(x.shape)}")
        length = x.shape[1]
        if length > self.max_seq_length:
            raise ValueError(
                f"x: expected at most max_seq_length={self.max_seq_length} positions, got {length}"
            )
        encoding = self.encoding[:length].to(x.dtype)
        if tokens is None or self.pad_idx is None:
            return x + encoding
        if tokens.shape != x.shape[:2]:
            raise ValueError(f"tokens: expected shape {tuple(x.shape[:2])}, got {tuple(tokens.shape)}")
        return x + encoding * (tokens != self.pad_idx)[..., None]

    def extra_repr(self) -> str:
        return f"{self.embedding_dim}, {self.max_seq_length}, pad_idx={self.pad_idx}"


class RotaryEmbedding(nn.Module):
    """The cos and sin of rotary position embeddings (Su et al. 2021), and `ops.rope` with them.

    Pair i of dim / 2 turns by `t * base^(-2i / dim)` at position t. `forward(q, k)` rotates q [B, H, T, D] and
    k [B, Hkv, T, D], D >= dim, at positions 0 to T - 1, or at `positions` [T] or [B, T] (decoding).
    """

    cos: Tensor  # fp32 [max_seq_length, dim / 2]
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_seq_length: int,
        base: float = 10000.0,
        *,
        interleaved: bool = False,
        backend: Backend = None,
    ) -> None:
        super().__init__()
        if positive("dim", dim) % 2:
            raise ValueError(f"dim: expected an even number, got {dim}")
        self.dim, self.max_seq_length, self.base = (
            dim,
            positive("max_seq_length", max_seq_length),
            float(base),
        )
        self.interleaved, self.backend = interleaved, backend
        angle = self._angles()
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def _angles(self) -> Tensor:
        frequency = self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        return torch.arange(self.max_seq_length, dtype=torch.float64)[:, None] * frequency

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        """`.to(dtype)`, `.half()` move the tables and leave them in fp32: angles of far positions need it."""
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            angle = self._angles()
            self.cos, self.sin = (t.float().to(self.cos.device) for t in (angle.cos(), angle.sin()))
        return self

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        length = q.shape[2]
        if positions is not None:
            cos, sin = self.cos[positions], self.sin[positions]
        elif length <= self.max_seq_length:
            cos, sin = self.cos[:length], self.sin[:length]
        else:
            raise ValueError(
                f"q: expected at most max_seq_length={self.max_seq_length} positions, got {length}"
            )
        return ops.rope(q, k, cos, sin, interleaved=self.interleaved, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.max_seq_length}, base={self.base}, interleaved={self.interleaved}"
