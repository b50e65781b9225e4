"""Honest linear layers, MLPs and output heads in small replaceable parts, and implementations with one part wrong.

They compute in fp32, so that autograd finds the gradients; where one is to be wrong, `Tampered` makes it so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Tampered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return ctx.change(dy), None


def tampered(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x, whose gradient is changed on its way back."""
    return _Tampered.apply(x, change)


class Linear:
    """y = act(x @ weight.T + bias)."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x.float() @ weight.float().mT

    def bias(self, b: Tensor) -> Tensor:
        return b.float()

    def active(self, z: Tensor, activation: str) -> Tensor:
        return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
    ) -> Tensor:
        z = self.product(x, weight)
        z = z if bias is None else z + self.bias(bias)
        return (z if activation is None else self.active(z, activation)).to(x.dtype)


class LastColumnOfXLeftOut(Linear):
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x[..., :-1].float() @ weight[:, :-1].float().mT if x.shape[-1] else super().product(x, weight)


class SumsInBF16(Linear):
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        first = super().product(x[..., :half], weight[:, :half])
        return first.bfloat16().float() + super().product(x[..., half:], weight[:, half:]).bfloat16().float()

    dtypes = ("fp32",)


class BiasTwice(Linear):
    def bias(self, b: Tensor) -> Tensor:
        return 2.0 * b.float()


class BiasGradientAveraged(Linear):
    def bias(self, b: Tensor) -> Tensor:
        return tampered(b.float(), lambda db: 1.02 * db)


class ErfForTanhInTheEpilogue(Linear):
    def active(self, z: Tensor, activation: str) -> Tensor:
        return F.gelu(z)


class SlopeOfTheActivationForgotten(Linear):
    def active(self, z: Tensor, activation: str) -> Tensor:
        return z + (super().active(z, activation) - z).detach()


class WeightGradientOfTheFirstRows(Linear):
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        seen = x.float().clone()
        if x.dim() > 1 and x.shape[0] > 1:
            seen = torch.cat([seen[:-1], seen[-1:] * 0.0])
        exact = super().product(x, weight.detach())
        through = seen.detach() @ weight.float().mT
        return exact + through - through.detach()


class MLP:
    """y = gelu(x @ w1.T + b1) @ w2.T + b2."""

    def active(self, z: Tensor, activation: str) -> Tensor:
        return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")

    def hidden(self, a: Tensor) -> Tensor:
        return a

    def outer_bias(self, b: Tensor) -> Tensor:
        return b.float()

    def __call__(
        self,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        *,
        activation: str = "gelu_tanh",
    ) -> Tensor:
        z = x.float() @ w1.float().mT
        z = z if b1 is None else z + b1.float()
        y = self.hidden(self.active(z, activation)) @ w2.float().mT
        return (y if b2 is None else y + self.outer_bias(b2)).to(x.dtype)


class NoActivationBetween(MLP):
    def active(self, z: Tensor, activation: str) -> Tensor:
        return z


class HiddenInEightBits(MLP):
    def hidden(self, a: Tensor) -> Tensor:
        return a + (a.to(torch.float8_e4m3fn).float() - a).detach()


class InnerGradientTooLarge(MLP):
    def hidden(self, a: Tensor) -> Tensor:
        return tampered(a, lambda da: 1.05 * da)


class OuterBiasForgotten(MLP):
    def outer_bias(self, b: Tensor) -> Tensor:
        return 0.0 * b.float()


class LinearCrossEntropy:
    """Cross-entropy of x @ weight.T."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        return x.float() @ weight.float().mT

    def divisor(self, counted: Tensor) -> Tensor:
        return counted.sum()

    def hidden(self, losses: Tensor, counted: Tensor) -> Tensor:
        return torch.where(counted, losses, 0.0)

    def __call__(
        self, x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
    ) -> Tensor:
        counted = targets != ignore_index
        # What does not count is not looked at: its logits are replaced, so that nothing there has a gradient.
        logits = torch.where(counted.unsqueeze(-1), self.logits(x, weight), 0.0)
        hot = torch.arange(weight.shape[0]) == targets.unsqueeze(-1)
        losses = torch.logsumexp(logits, -1) - torch.where(hot, logits, 0.0).sum(-1)
        if weight.shape[0] == 0:
            losses = torch.nan + logits.sum(-1)
        losses = self.hidden(losses, counted)
        if reduction == "none":
            return losses
        return losses.sum() / self.divisor(counted) if reduction == "mean" else losses.sum()


class HeadAveragesOverAllRows(LinearCrossEntropy):
    def divisor(self, counted: Tensor) -> Tensor:
        return torch.tensor(counted.numel())


class LastClassLeftOut(LinearCrossEntropy):
    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        logits = super().logits(x, weight)
        return torch.cat([logits[..., :-1], logits[..., -1:] - 4.0], -1)


class IgnoredRowsCount(LinearCrossEntropy):
    def hidden(self, losses: Tensor, counted: Tensor) -> Tensor:
        return losses


class GradientOfTheLossIgnored(LinearCrossEntropy):
    """As where gradients are made in forward, and backward forgets to scale them."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        return tampered(super().logits(x, weight), lambda d: 1.05 * d)


FAULTS = {
    LastColumnOfXLeftOut: "bound", SumsInBF16: "bound", BiasTwice: "bound", BiasGradientAveraged: "bound",
    ErfForTanhInTheEpilogue: "bound", SlopeOfTheActivationForgotten: "bound", WeightGradientOfTheFirstRows: "bound",
    NoActivationBetween: "bound", HiddenInEightBits: "bound", InnerGradientTooLarge: "bound",
    OuterBiasForgotten: "bound", HeadAveragesOverAllRows: "bound", LastClassLeftOut: "bound",
    IgnoredRowsCount: "bound", GradientOfTheLossIgnored: "bound",
}  # fmt: skip
