"""Honest GEGLU and SwiGLU, in small replaceable parts: `wrong_glu` breaks one part at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class GatedUnit:
    """y = z * share(z) * up."""

    def share(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def slope(self, z: Tensor) -> Tensor:
        """d(z * share(z)) / dz."""
        raise NotImplementedError

    def value(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        return z * self.share(z)

    def dgate(self, dy: Tensor, z: Tensor, up: Tensor) -> Tensor:
        return dy * up * self.slope(z)

    def dup(self, dy: Tensor, z: Tensor, up: Tensor) -> Tensor:
        return dy * (z * self.share(z))

    def apply(self, gate: Tensor, up: Tensor) -> Tensor:
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
                ctx.save_for_backward(gate, up)
                return (self.value(gate.float(), gate.dtype) * up.float()).to(gate.dtype)

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> Any:
                gate, up = ctx.saved_tensors
                wide = dy.float(), gate.float(), up.float()
                return self.dgate(*wide).to(gate.dtype), self.dup(*wide).to(up.dtype)

        return Function.apply(gate, up)


class SwiGLU(GatedUnit):
    """share: sigma(z)."""

    def share(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def slope(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z) * (1.0 + z * torch.sigmoid(-z))

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.apply(gate, up)


class GEGLU(GatedUnit):
    """share: Phi(z)."""

    approximate = "none"

    def share(self, z: Tensor) -> Tensor:
        if self.approximate == "tanh":
            return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))
        return 0.5 * torch.erfc(-z * math.sqrt(0.5))

    def slope(self, z: Tensor) -> Tensor:
        if self.approximate == "tanh":
            t = 2.0 * self.share(z) - 1.0
            inner = math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * z * z)
            return self.share(z) + 0.5 * z * (1.0 - t * t) * inner
        return self.share(z) + z * torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)

    def __call__(self, gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
        self.approximate = approximate
        return self.apply(gate, up)
