"""An honest embedding in small replaceable parts, and what people get wrong in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Embedding:
    """out = token_weight[tokens] + position_weight[positions]; gradients by index_add in fp32."""

    def places(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        return (torch.arange(tokens.shape[-1]) if positions is None else positions).expand(tokens.shape)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a.float() + b.float()

    def kept(self, dout: Tensor, tokens: Tensor, padding_idx: int | None, vocab_size: int) -> Tensor:
        if padding_idx is None:
            return dout
        return dout.masked_fill((tokens == padding_idx % vocab_size)[..., None], 0.0)

    def scatter(self, dout: Tensor, index: Tensor, rows: int) -> Tensor:
        total = torch.zeros(rows, dout.shape[-1], dtype=torch.float64)
        return total.index_add(0, index.flatten(), dout.double().flatten(0, -2))

    def position_gradient(self, dout: Tensor, places: Tensor, rows: int) -> Tensor:
        return self.scatter(dout, places, rows)

    def __call__(
        self,
        tokens: Tensor,
        token_weight: Tensor,
        position_weight: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        padding_idx: int | None = None,
    ) -> Tensor:
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, tw: Tensor, pw: Any) -> Tensor:
                ctx.rows = tw.shape[0], 0 if pw is None else pw.shape[0]
                if pw is None:
                    return tw[tokens]
                return self.add(tw[tokens], pw[self.places(tokens, positions)]).to(tw.dtype)

            @staticmethod
            def backward(ctx: Any, dout: Tensor) -> Any:
                vocab_size, num_positions = ctx.rows
                kept = self.kept(dout, tokens, padding_idx, vocab_size)
                dtoken = self.scatter(kept, tokens, vocab_size).to(dout.dtype)
                if position_weight is None:
                    return dtoken, None
                places = self.places(tokens, positions)
                return dtoken, self.position_gradient(dout, places, num_positions).to(dout.dtype)

        return Function.apply(token_weight, position_weight)


class AddedInBF16(Embedding):
    """Rounded to 8 bits before the sum."""

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return (0.3 * a + 0.7 * b).bfloat16() + (0.7 * a + 0.3 * b).bfloat16()


class PositionsBackwards(Embedding):
    def places(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        places = super().places(tokens, positions)
        return places.flip(-1) if positions is None else places


class LastOccurrenceWins(Embedding):
    """A store where there should be an addition: the race of a careless scatter."""

    def scatter(self, dout: Tensor, index: Tensor, rows: int) -> Tensor:
        total = torch.zeros(rows, dout.shape[-1], dtype=torch.float64)
        for i, row in zip(index.flatten().tolist(), dout.double().flatten(0, -2), strict=True):
            total[i] = row
        return total


class ScatterInBF16(Embedding):
    def scatter(self, dout: Tensor, index: Tensor, rows: int) -> Tensor:
        total = torch.zeros(rows, dout.shape[-1], dtype=torch.bfloat16)
        for i, row in zip(index.flatten().tolist(), dout.bfloat16().flatten(0, -2), strict=True):
            total[i] += row
        return total


class UnusedRowsUnwritten(Embedding):
    def scatter(self, dout: Tensor, index: Tensor, rows: int) -> Tensor:
        unused = ~torch.isin(torch.arange(rows), index)
        return super().scatter(dout, index, rows).masked_fill(unused[:, None], torch.nan)


class PaddingGetsAGradient(Embedding):
    cases = ("3x4x70-positions_each-padding",)

    def kept(self, dout: Tensor, tokens: Tensor, padding_idx: int | None, vocab_size: int) -> Tensor:
        return dout


class NegativePaddingIgnored(Embedding):
    cases = ("3x4x70-positions_each-padding",)

    def kept(self, dout: Tensor, tokens: Tensor, padding_idx: int | None, vocab_size: int) -> Tensor:
        return dout.masked_fill((tokens == padding_idx)[..., None], 0.0)


class PositionGradientOfTheFirstSequence(Embedding):
    def position_gradient(self, dout: Tensor, places: Tensor, rows: int) -> Tensor:
        return self.scatter(dout[:1], places[:1], rows)


EMBEDDING_FAULTS = {
    AddedInBF16: "bound", PositionsBackwards: "bound", LastOccurrenceWins: "bound", ScatterInBF16: "bound",
    UnusedRowsUnwritten: "not written", PaddingGetsAGradient: "bound", NegativePaddingIgnored: "bound",
    PositionGradientOfTheFirstSequence: "bound",
}  # fmt: skip
EMBEDDING_CASES = [
    "2x5x33-positions_all",
    "70x2x33-positions_all-frequent-mean_10.0-vocab_9",
    "2x2x3x17-positions_row",
]
