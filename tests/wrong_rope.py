"""An honest rotary embedding in small replaceable parts, and what people get wrong in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rope:
    """y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin in fp32; backward by -sin."""

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return cos.float(), sin.float()

    def interleaves(self, interleaved: bool) -> bool:
        return interleaved

    def half(self, cos: Tensor, width: int) -> int:
        return cos.shape[-1]

    def rest(self, x: Tensor) -> Tensor:
        return x

    def backward_sin(self, sin: Tensor) -> Tensor:
        return -sin

    def k_tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return cos, sin

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        cos, sin = (t if t.dim() == 2 else t[:, None] for t in self.tables(cos, sin))
        half = self.half(cos, x.shape[-1])
        cos, sin = cos[..., :half], sin[..., :half]
        pair = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if not self.interleaves(interleaved):
            pair = (slice(0, half), slice(half, 2 * half))
        x1, x2 = x[..., pair[0]].float(), x[..., pair[1]].float()
        y = self.rest(x.float()).clone()
        y[..., pair[0]] = x1 * cos - x2 * sin
        y[..., pair[1]] = x2 * cos + x1 * sin
        return y.to(x.dtype)

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Tensor, k: Tensor) -> Any:
                return self.turn(q, cos, sin, interleaved), self.turn(
                    k, *self.k_tables(cos, sin), interleaved
                )

            @staticmethod
            def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
                back = self.backward_sin(sin)
                return self.turn(dq, cos, back, interleaved), self.turn(dk, cos, back, interleaved)

        return Function.apply(q, k)


class TablesInBF16(Rope):
    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return cos.bfloat16().float(), sin.bfloat16().float()


class HalvesForPairs(Rope):
    def interleaves(self, interleaved: bool) -> bool:
        return False


class PairsForHalves(Rope):
    def interleaves(self, interleaved: bool) -> bool:
        return True


class RestDropped(Rope):
    def rest(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class RotatedForwardAgain(Rope):
    """The gradient turned by the angle itself."""

    def backward_sin(self, sin: Tensor) -> Tensor:
        return sin


class KeysOneBehind(Rope):
    def k_tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return cos.roll(1, -2), sin.roll(1, -2)


class FirstSequenceForAll(Rope):
    cases = ("2x5x2x23-tables_each",)

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().tables(cos, sin)
        return (cos, sin) if cos.dim() == 2 else (cos[:1], sin[:1])


ROPE_FAULTS = {
    TablesInBF16: "bound", HalvesForPairs: "bound", PairsForHalves: "bound", RestDropped: "bound",
    RotatedForwardAgain: "bound", KeysOneBehind: "bound", FirstSequenceForAll: "bound",
}  # fmt: skip
ROPE_CASES = [
    "1x3x2x16", "1x3x2x34-interleaved", "1x40x2x100-turning_half-interleaved-k_heads_5", "2x5x2x23-tables_each",
]  # fmt: skip
