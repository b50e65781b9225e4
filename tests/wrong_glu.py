"""Deliberately wrong GEGLUs and SwiGLUs. `dtypes` of a class: where alone the mistake is looked for."""

from __future__ import annotations

import torch
from honest_glu import GEGLU, SwiGLU
from torch import Tensor


class ActivationRounded(SwiGLU):
    """As in PyTorch's two steps: silu(gate) in the input's dtype, then the product."""

    dtypes = ("bf16", "fp16")

    def value(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        return super().value(z, dtype).to(dtype).float()


class ActivationOfUp(GEGLU):
    def dgate(self, dy: Tensor, z: Tensor, up: Tensor) -> Tensor:
        return dy * z * self.slope(up)


class SigmoidForPhi(GEGLU):
    def share(self, z: Tensor) -> Tensor:
        return torch.sigmoid(1.702 * z)


class GradientWithoutUp(SwiGLU):
    def dgate(self, dy: Tensor, z: Tensor, up: Tensor) -> Tensor:
        return dy * self.slope(z)


class NegativeTailCutOff(SwiGLU):
    """1 + exp(-z) is held below 2**24, as if sigma had no values under fp32's epsilon."""

    cases = ("9x257-mean_-40.0-std_12.0",)

    def share(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z).masked_fill(z < -16.0, 0.0)


class SlopeIsTheShare(SwiGLU):
    def slope(self, z: Tensor) -> Tensor:
        return self.share(z)


FAULTS = dict.fromkeys(
    (
        ActivationRounded,
        ActivationOfUp,
        SigmoidForPhi,
        GradientWithoutUp,
        NegativeTailCutOff,
        SlopeIsTheShare,
    ),
    "bound",
)
