"""Deliberately wrong LayerNorms. `cases` and `dtypes` of a class: where alone the mistake is looked for."""

from __future__ import annotations

import math
from typing import Any

import torch
from honest_ops import LayerNorm
from torch import Tensor

RESIDUAL = ["6x100-residual", "5x1031-residual-mean_100.0", "8x96-residual-weight_False-bias_False"]


class DroppedTailColumn(LayerNorm):
    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        y[..., y.shape[-1] // 4 * 4 :] = 0.0
        return y.to(x.dtype)


class PaddingPollutesVariance(LayerNorm):
    """Padded to a power of two, and not masked again after centring."""

    def variance(self, s: Tensor, mean: Tensor) -> Tensor:
        n = s.shape[-1]
        padded = 2 ** math.ceil(math.log2(n))
        return super().variance(s, mean) + (padded - n) / n * mean.square()


class VarianceFromSquares(LayerNorm):
    """mean(x**2) - mean(x)**2: cancels where the mean is large."""

    def variance(self, s: Tensor, mean: Tensor) -> Tensor:
        return (s.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0.0)


class StatisticsInBF16(LayerNorm):
    def mean(self, s: Tensor) -> Tensor:
        return super().mean(s).bfloat16().float()

    def rstd(self, variance: Tensor, eps: float) -> Tensor:
        return super().rstd(variance, eps).bfloat16().float()


class UnbiasedVariance(LayerNorm):
    def variance(self, s: Tensor, mean: Tensor) -> Tensor:
        return super().variance(s, mean) * (s.shape[-1] / (s.shape[-1] - 1))


class EpsOutsideTheRoot(LayerNorm):
    def rstd(self, variance: Tensor, eps: float) -> Tensor:
        return 1.0 / (variance.sqrt() + eps)


class DbScaled(LayerNorm):
    def db(self, dy: Tensor) -> Tensor:
        return super().db(dy) * 1.02


class DxScaled(LayerNorm):
    def dx(self, wdy: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return super().dx(wdy, xhat, rstd) * 1.05


class ScaledByTheFirstGradient(LayerNorm):
    def incoming(self, dy: Tensor) -> Tensor:
        return dy * dy.flatten()[0]


class DwMissesARow(LayerNorm):
    def dw(self, dy: Tensor, xhat: Tensor) -> Tensor:
        return (dy * xhat).flatten(0, -2)[:-1].sum(0)


class DwAccumulatedInBF16(LayerNorm):
    def dw(self, dy: Tensor, xhat: Tensor) -> Tensor:
        total = torch.zeros(dy.shape[-1], dtype=torch.bfloat16)
        for row in (dy * xhat).flatten(0, -2):
            total += row.bfloat16()
        return total.float()


class DxWithoutItsMean(LayerNorm):
    def dx(self, wdy: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return rstd * (wdy - xhat * (wdy * xhat).mean(-1, keepdim=True))


class InputMutated(LayerNorm):
    """The sum is written over the residual."""

    def stream(self, x: Tensor, residual: Tensor) -> Tensor:
        total = super().stream(x, residual)
        residual.copy_(total)
        return total


class GradientMutated(LayerNorm):
    def incoming(self, dy: Tensor) -> Tensor:
        found = dy.clone()
        if dy.is_contiguous():
            dy.zero_()
        return found


class UnwrittenRow(LayerNorm):
    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        out[:-1] = y[:-1]
        return out


class Cached(LayerNorm):
    """Results kept by address and shape."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def forward(self, x: Tensor, w: Any, b: Any, eps: float, residual: Any) -> tuple[Any, ...]:
        key = x.data_ptr(), x.shape
        if key not in self.known:
            self.known[key] = super().forward(x, w, b, eps, residual)
        return tuple(None if t is None else t.clone() for t in self.known[key])


class StreamIsTheResidual(LayerNorm):
    def forward(self, x: Tensor, w: Any, b: Any, eps: float, residual: Any) -> tuple[Any, ...]:
        y, stream, *saved = super().forward(x, w, b, eps, residual)
        return y, None if stream is None else residual.clone(), *saved


class StreamGradientDropped(LayerNorm):
    def with_stream(self, ds: Tensor, dstream: Tensor) -> Tensor:
        return ds


class ResidualAfterTheNorm(LayerNorm):
    def forward(self, x: Tensor, w: Any, b: Any, eps: float, residual: Any) -> tuple[Any, ...]:
        y, stream, *saved = super().forward(x, w, b, eps, residual)
        return super().forward(x, w, b, eps, None)[0] if stream is not None else y, stream, *saved


class OutputsShareMemory(LayerNorm):
    def forward(self, x: Tensor, w: Any, b: Any, eps: float, residual: Any) -> tuple[Any, ...]:
        y, stream, s, *saved = super().forward(x, w, b, eps, residual)
        if stream is None:
            return y, stream, s, *saved
        both = torch.stack([y, stream])
        return both[0], both[1], s.clone(), *saved


class OutputIsTheInput(LayerNorm):
    """Written into the input's memory, as an in-place kernel would."""

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        return x.detach().copy_(y)


class WiderOutput(LayerNorm):
    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        return y.double()


class StochasticRounding(LayerNorm):
    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        noise = (torch.rand_like(y) - 0.5) * 2.0 ** (-23 if x.dtype == torch.float32 else -7)
        return (y * (1.0 + noise)).to(x.dtype)


class GradientReadAsContiguous(LayerNorm):
    def incoming(self, dy: Tensor) -> Tensor:
        strides = [math.prod(dy.shape[d + 1 :]) for d in range(dy.dim())]
        return dy.as_strided(dy.shape, strides, dy.storage_offset()) if dy.stride(-1) else dy


class ExpandedGradientTakenForOneRow(LayerNorm):
    def __init__(self) -> None:
        self.one_row = False

    def incoming(self, dy: Tensor) -> Tensor:
        self.one_row = dy.dim() > 1 and dy.stride(0) == 0
        return dy

    def db(self, dy: Tensor) -> Tensor:
        return dy[0].clone() if self.one_row else super().db(dy)


class WrittenPastTheEnd(LayerNorm):
    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        x.as_strided((1,), (1,), x.storage_offset() + x.numel()).zero_()
        return super().finish(y, x)


class OneDimensionMore(LayerNorm):
    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        return super().finish(y, x).unsqueeze(0)


class SavedTensorsFreed(LayerNorm):
    """One backward and no more."""

    def incoming(self, dy: Tensor) -> Tensor:
        if self.used:
            raise RuntimeError("the graph is gone")
        self.used = True
        return dy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.used = False
        return super().__call__(*args, **kwargs)


class OtherPathWithoutGradient(LayerNorm):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        found = super().__call__(*args, **kwargs)
        return found * 1.01 if isinstance(found, Tensor) else tuple(t * 1.01 for t in found)


class RaisesWithoutGradient(LayerNorm):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            raise RuntimeError("not without a graph")
        return super().__call__(*args, **kwargs)


class RowLeak(LayerNorm):
    """A NaN in the last row reaches the first one; no error bound would show it."""

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.to(x.dtype)
        y[0] += y[-1] * 0.0
        return y


# --- only in the residual form: nothing that the rounding of the stream could hide


class ResidualStatisticsInBF16(StatisticsInBF16):
    cases = RESIDUAL


class UnroundedStreamNormalised(LayerNorm):
    """In fp32 the sum is its own rounding, and this no mistake."""

    cases, dtypes = RESIDUAL, ("bf16",)

    def forward(self, x: Tensor, w: Any, b: Any, eps: float, residual: Any) -> tuple[Any, ...]:
        _, stream, *saved = super().forward(x, w, b, eps, residual)
        total = x.float() + residual.float()
        return super().forward(total, w, b, eps, None)[0].to(x.dtype), stream, *saved


class ResidualDsScaled(LayerNorm):
    cases = RESIDUAL

    def with_stream(self, ds: Tensor, dstream: Tensor) -> Tensor:
        return super().with_stream(ds * 1.004, dstream)


class ResidualStreamGradientScaled(LayerNorm):
    cases = RESIDUAL

    def with_stream(self, ds: Tensor, dstream: Tensor) -> Tensor:
        return super().with_stream(ds, dstream.float() * 0.996)


class ResidualRoundedTwice(LayerNorm):
    """dx is rounded before the stream's gradient is added, and the sum again."""

    cases = RESIDUAL

    def with_stream(self, ds: Tensor, dstream: Tensor) -> Tensor:
        return super().with_stream(ds.bfloat16().float(), dstream)


class ResidualDwScaled(LayerNorm):
    cases = RESIDUAL

    def dw(self, dy: Tensor, xhat: Tensor) -> Tensor:
        return super().dw(dy, xhat) * 1.003


FAULTS = {
    DroppedTailColumn: "bound", PaddingPollutesVariance: "bound", VarianceFromSquares: "bound",
    StatisticsInBF16: "bound", UnbiasedVariance: "bound", EpsOutsideTheRoot: "bound", DbScaled: "bound",
    DxScaled: "bound", ScaledByTheFirstGradient: "bound", DwMissesARow: "bound", DwAccumulatedInBF16: "bound",
    DxWithoutItsMean: "bound", InputMutated: "input mutated", GradientMutated: "input mutated",
    UnwrittenRow: "not written", Cached: "stale", StreamIsTheResidual: "bound", StreamGradientDropped: "bound",
    ResidualAfterTheNorm: "bound", OutputsShareMemory: "alias", OutputIsTheInput: "alias", WiderOutput: "dtype",
    StochasticRounding: "not repeatable", GradientReadAsContiguous: "layout",
    ExpandedGradientTakenForOneRow: "expanded gradient", RowLeak: "leak",
    WrittenPastTheEnd: "out of bounds", OneDimensionMore: "shape", SavedTensorsFreed: "raised",
    OtherPathWithoutGradient: "no-grad differs", RaisesWithoutGradient: "raised",
    ResidualStatisticsInBF16: "bound", UnroundedStreamNormalised: "bound", ResidualDsScaled: "bound",
    ResidualStreamGradientScaled: "bound", ResidualRoundedTwice: "bound", ResidualDwScaled: "bound",
}  # fmt: skip
