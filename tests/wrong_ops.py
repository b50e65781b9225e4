"""Deliberately wrong implementations, each a single mistake that somebody has made, and the hazard that names it."""

from __future__ import annotations

import math

import torch
from honest_ops import GELU, Softmax
from torch import Tensor
from wrong_attention import ATTENTION_FAULTS
from wrong_cross_entropy import FAULTS as CROSS_ENTROPY_FAULTS
from wrong_embedding import EMBEDDING_FAULTS
from wrong_glu import FAULTS as GLU_FAULTS
from wrong_layer_norm import FAULTS as LAYER_NORM_FAULTS
from wrong_linear import FAULTS as LINEAR_FAULTS
from wrong_rms_norm import FAULTS as RMS_NORM_FAULTS
from wrong_rope import ROPE_FAULTS

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


FAULTS = {
    **LAYER_NORM_FAULTS,
    **ATTENTION_FAULTS,
    **CROSS_ENTROPY_FAULTS,
    **GLU_FAULTS,
    **EMBEDDING_FAULTS,
    **LINEAR_FAULTS,
    **RMS_NORM_FAULTS,
    **ROPE_FAULTS,
    TanhForErf: "bound", ErfForTanh: "bound", SigmoidGate: "bound", GateInBF16: "bound", TailCutOff: "bound",
    SlopeWithoutTheBell: "bound", BiasForgottenInBackward: "bound", DbiasAveraged: "bound",
    FutureTokenLeaks: "leak", CausalTopLeft: "bound", HiddenElementsLookedAt: "leak", NoMaximum: "not written",
    ProbabilitiesInBF16: "bound", EmptyRowsNaN: "not written", EmptyRowsUniform: "bound",
    ScaleForgottenInTheGradient: "bound", GradientWithoutItsSum: "bound", MaskGradientOfTheFirstHead: "bound",
    MaskGradientAveraged: "bound", DropoutWithoutRescaling: "bound", OtherDropoutInBackward: "bound",
    PhiloxOffsetIgnored: "bound", PhiloxCountsColumnsOnly: "bound",
}  # fmt: skip
