"""Deliberately wrong implementations, each a single mistake that somebody has made, and the hazard that names it."""

from __future__ import annotations

import math
from typing import Any

import torch
from honest_ops import GELU, Attention, Softmax
from torch import Tensor
from wrong_layer_norm import FAULTS as LAYER_NORM_FAULTS

from fastgpt.reference.philox import keep_mask

# --- GELU


class TanhForErf(GELU):
    def gate(self, z: Tensor, approximate: str) -> Tensor:
        return super().gate(z, "tanh")


class ErfForTanh(GELU):
    def gate(self, z: Tensor, approximate: str) -> Tensor:
        return super().gate(z, "none")


class SigmoidGate(GELU):
    def gate(self, z: Tensor, approximate: str) -> Tensor:
        return torch.sigmoid(1.702 * z)


class GateInBF16(GELU):
    def gate(self, z: Tensor, approximate: str) -> Tensor:
        return super().gate(z, approximate).bfloat16().float()


class TailCutOff(GELU):
    def gate(self, z: Tensor, approximate: str) -> Tensor:
        return super().gate(z, approximate).masked_fill(z < -4.0, 0.0)


class SlopeWithoutTheBell(GELU):
    def bell(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)


class BiasForgottenInBackward(GELU):
    def backward_sum(self, x: Tensor, bias: Tensor) -> Tensor:
        return x.float()


class DbiasAveraged(GELU):
    def dbias(self, dz: Tensor) -> Tensor:
        return dz.flatten(0, -2).mean(0)


# --- softmax


class FutureTokenLeaks(Softmax):
    def triangle(self, queries: int, keys: int) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries + 1)


class CausalTopLeft(Softmax):
    def triangle(self, queries: int, keys: int) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril()


class HiddenElementsLookedAt(Softmax):
    """Hidden by adding a large negative number: a NaN there shows."""

    def hide(self, s: Tensor, seen: Tensor) -> Tensor:
        return s - 1e30 * (~seen).float()


class NoMaximum(Softmax):
    def normalise(self, s: Tensor) -> Tensor:
        return s.exp() / s.exp().sum(-1, keepdim=True)


class ProbabilitiesInBF16(Softmax):
    def normalise(self, s: Tensor) -> Tensor:
        e = (s - s.amax(-1, keepdim=True)).exp().bfloat16()
        return (e / e.sum(-1, keepdim=True)).float()


class EmptyRowsNaN(Softmax):
    def empty_rows(self, p: Tensor, seen: Tensor) -> Tensor:
        return p


class EmptyRowsUniform(Softmax):
    def empty_rows(self, p: Tensor, seen: Tensor) -> Tensor:
        return p.masked_fill(~seen.any(-1, keepdim=True), 1.0 / p.shape[-1])


class ScaleForgottenInTheGradient(Softmax):
    def dx(self, ds: Tensor, scale: float) -> Tensor:
        return ds


class GradientWithoutItsSum(Softmax):
    def ds(self, p: Tensor, g: Tensor) -> Tensor:
        return p * g


class MaskGradientOfTheFirstHead(Softmax):
    def dmask(self, ds: Tensor, shape: torch.Size) -> Tensor:
        for d, size in enumerate(shape):
            ds = ds.narrow(d, 0, size)
        return ds


class MaskGradientAveraged(Softmax):
    def dmask(self, ds: Tensor, shape: torch.Size) -> Tensor:
        return super().dmask(ds, shape) * (math.prod(shape) / ds.numel())


class DropoutWithoutRescaling(Softmax):
    def rescale(self, kept: Tensor, dropout_p: float) -> Tensor:
        return kept


class OtherDropoutInBackward(Softmax):
    def keep_in_backward(self, shape: torch.Size, dropout_p: float, rng: Tensor) -> Tensor:
        return keep_mask(shape, dropout_p, rng + 1)


class PhiloxOffsetIgnored(Softmax):
    def keep(self, shape: torch.Size, dropout_p: float, rng: Tensor) -> Tensor:
        return keep_mask(shape, dropout_p, rng * torch.tensor([1, 0]))


class PhiloxCountsColumnsOnly(Softmax):
    def keep(self, shape: torch.Size, dropout_p: float, rng: Tensor) -> Tensor:
        return keep_mask(shape[-1:], dropout_p, rng).expand(shape)


# --- attention


class AttentionTopLeft(Attention):
    def triangle(self, queries: int, keys: int) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril()


class AttentionSeesOneAhead(Attention):
    def triangle(self, queries: int, keys: int) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries + 1)


class HeadsInterleaved(Attention):
    """Query head h served by key head h % Hkv."""

    def per_query_head(self, kv: Tensor, heads: int) -> Tensor:
        return kv.repeat(1, heads // kv.shape[1], 1, 1)

    def sum_over_groups(self, grad: Tensor, kv_heads: int) -> Tensor:
        return grad.unflatten(1, (-1, kv_heads)).sum(1)


class GradientOfOneHeadOfTheGroup(Attention):
    def sum_over_groups(self, grad: Tensor, kv_heads: int) -> Tensor:
        return grad.unflatten(1, (kv_heads, -1))[:, :, 0]


class MaximumNotCarriedBack(Attention):
    """An online softmax that does not rescale what it had before a larger score came."""

    def normalise(self, s: Tensor) -> Tensor:
        e = (s - s.cummax(-1).values).exp().nan_to_num(nan=0.0)
        return e / e.sum(-1, keepdim=True)


class ProbabilitiesAPercentTooLarge(Attention):
    def normalise(self, s: Tensor) -> Tensor:
        return super().normalise(s) * 1.01


class ScaleForgottenInDq(Attention):
    def dq(self, ds: Tensor, k: Tensor, scale: float) -> Tensor:
        return ds @ k


class ScaleTwiceInDk(Attention):
    def dk(self, ds: Tensor, q: Tensor, scale: float) -> Tensor:
        return super().dk(ds, q, scale) * scale


class DvOfUnmaskedProbabilities(Attention):
    def p_of_dv(self, p: Tensor, s: Tensor) -> Tensor:
        return self.normalise(s)


class MaskIgnoredInBackward(Attention):
    def mask_in_backward(self, mask: Any) -> Any:
        return None


class DsWithoutItsSum(Attention):
    def ds(self, p: Tensor, dp: Tensor) -> Tensor:
        return p * dp


class MaskGradientOfTheFirstBatch(Attention):
    def dmask(self, ds: Tensor, shape: torch.Size) -> Tensor:
        return ds[0].sum_to_size(shape)


FAULTS = {
    **LAYER_NORM_FAULTS,
    TanhForErf: "bound", ErfForTanh: "bound", SigmoidGate: "bound", GateInBF16: "bound", TailCutOff: "bound",
    SlopeWithoutTheBell: "bound", BiasForgottenInBackward: "bound", DbiasAveraged: "bound",
    FutureTokenLeaks: "leak", CausalTopLeft: "bound", HiddenElementsLookedAt: "leak", NoMaximum: "not written",
    ProbabilitiesInBF16: "bound", EmptyRowsNaN: "not written", EmptyRowsUniform: "bound",
    ScaleForgottenInTheGradient: "bound", GradientWithoutItsSum: "bound", MaskGradientOfTheFirstHead: "bound",
    MaskGradientAveraged: "bound", DropoutWithoutRescaling: "bound", OtherDropoutInBackward: "bound",
    PhiloxOffsetIgnored: "bound", PhiloxCountsColumnsOnly: "bound",
    AttentionTopLeft: "bound", AttentionSeesOneAhead: "leak", HeadsInterleaved: "bound",
    GradientOfOneHeadOfTheGroup: "bound", MaximumNotCarriedBack: "bound", ProbabilitiesAPercentTooLarge: "bound",
    ScaleForgottenInDq: "bound", ScaleTwiceInDk: "bound", DvOfUnmaskedProbabilities: "bound",
    MaskIgnoredInBackward: "bound", DsWithoutItsSum: "bound", MaskGradientOfTheFirstBatch: "bound",
}  # fmt: skip
