"""Deliberately wrong RMSNorms: mistakes that LayerNorm's do not make already."""

from __future__ import annotations

import math

from honest_ops import RMSNorm
from torch import Tensor


class RootMeanSquareInBF16(RMSNorm):
    def rstd(self, mean_square: Tensor, eps: float) -> Tensor:
        return super().rstd(mean_square, eps).bfloat16().float()


class RootMeanSquareEpsOutside(RMSNorm):
    def rstd(self, mean_square: Tensor, eps: float) -> Tensor:
        return 1.0 / (mean_square.sqrt() + eps)


class RootMeanSquareCentred(RMSNorm):
    """LayerNorm's variance."""

    def mean_square(self, s: Tensor) -> Tensor:
        return s.var(-1, keepdim=True, correction=0)


class MeanOverThePaddedRow(RMSNorm):
    """The padding adds nothing to the sum, but is counted."""

    def mean_square(self, s: Tensor) -> Tensor:
        n = s.shape[-1]
        return super().mean_square(s) * (n / 2 ** math.ceil(math.log2(n)))


class WeightCentredAtOne(RMSNorm):
    """(1 + weight), as Gemma stores it."""

    def scaled(self, xhat: Tensor, w: Tensor) -> Tensor:
        return xhat * (1.0 + w)


class RoundedBeforeTheWeight(RMSNorm):
    """As in Hugging Face's Llama: normalised, rounded to the input's dtype, and only then scaled. None in fp32."""

    dtypes = ("bf16",)

    def scaled(self, xhat: Tensor, w: Tensor) -> Tensor:
        return super().scaled(xhat.bfloat16().float(), w)


class RootTakenForAConstant(RMSNorm):
    """dx without the gradient through the root."""

    def dx(self, wdy: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return rstd * wdy


class WithLayerNormsMean(RMSNorm):
    def dx(self, wdy: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return super().dx(wdy, xhat, rstd) - rstd * wdy.mean(-1, keepdim=True)


class DwMissesTheTail(RMSNorm):
    def dw(self, dy: Tensor, xhat: Tensor) -> Tensor:
        found = super().dw(dy, xhat)
        found[dy.shape[-1] // 16 * 16 :] = 0.0
        return found


class NormStreamGradientDropped(RMSNorm):
    def with_stream(self, ds: Tensor, dstream: Tensor) -> Tensor:
        return ds


FAULTS = {
    RootMeanSquareInBF16: "bound", RootMeanSquareEpsOutside: "bound", RootMeanSquareCentred: "bound",
    MeanOverThePaddedRow: "bound", WeightCentredAtOne: "bound", RoundedBeforeTheWeight: "bound",
    RootTakenForAConstant: "bound", WithLayerNormsMean: "bound", DwMissesTheTail: "bound",
    NormStreamGradientDropped: "bound",
}  # fmt: skip
