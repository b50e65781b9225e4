"""An honest cross-entropy in small replaceable parts, and implementations with one part wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CrossEntropy:
    """The loss by its log-sum-exp, the gradient by the probabilities, both in fp32."""

    def lse(self, x: Tensor) -> Tensor:
        return torch.logsumexp(x, -1, keepdim=True)

    def counted(self, targets: Tensor, ignore_index: int) -> Tensor:
        return targets != ignore_index

    def smoothed(self, losses: Tensor, spread: Tensor, s: float) -> Tensor:
        return (1.0 - s) * losses + s * spread

    def divisor(self, counted: Tensor) -> Tensor:
        return counted.sum()

    def uncounted(self, dx: Tensor, counted: Tensor) -> Tensor:
        """The gradient with its ignored rows."""
        return dx.masked_fill(~counted, 0.0)

    def row_gradients(self, dloss: Tensor, shape: torch.Size) -> Tensor:
        return dloss.expand(shape).unsqueeze(-1)

    def one(self, s: float) -> float:
        """What the target's own gradient has less than the others'."""
        return 1.0 - s

    def probabilities(self, x: Tensor, lse: Tensor) -> Tensor:
        return torch.exp(x - lse)

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        s, classes = label_smoothing, logits.shape[-1]
        counted = self.counted(targets, ignore_index).unsqueeze(-1)
        hot = torch.arange(classes) == targets.unsqueeze(-1)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, logits: Tensor) -> Tensor:
                x = torch.where(counted, logits.float(), 0.0)
                lse = self.lse(x)
                losses = (lse - torch.where(hot, x, 0.0).sum(-1, keepdim=True)).squeeze(-1)
                if s:
                    losses = self.smoothed(losses, (lse - x).mean(-1), s)
                losses = torch.where(counted.squeeze(-1), losses, 0.0)
                ctx.save_for_backward(logits, lse)
                if reduction == "none":
                    return losses
                return losses.sum() / self.divisor(counted) if reduction == "mean" else losses.sum()

            @staticmethod
            def backward(ctx: Any, dloss: Tensor) -> Any:
                logits, lse = ctx.saved_tensors
                if reduction == "mean":
                    dloss = dloss / self.divisor(counted)
                wanted = self.one(s) * hot + s / max(classes, 1)
                dx = self.row_gradients(dloss, targets.shape) * (self.probabilities(logits, lse) - wanted)
                return self.uncounted(dx, counted).to(logits.dtype)

        return Function.apply(logits)


class MeanOverAllRows(CrossEntropy):
    def divisor(self, counted: Tensor) -> Tensor:
        return torch.tensor(counted.numel())


class UniformGradient(CrossEntropy):
    """The gradient of the loss taken for one number, that of the first row."""

    def row_gradients(self, dloss: Tensor, shape: torch.Size) -> Tensor:
        return dloss.reshape(-1)[:1].expand(shape).unsqueeze(-1) if shape.numel() else dloss.unsqueeze(-1)


class IgnoredRowsHaveGradients(CrossEntropy):
    def uncounted(self, dx: Tensor, counted: Tensor) -> Tensor:
        return dx


class IgnoredRowsTimesZero(CrossEntropy):
    """0 * NaN is NaN: what a padded row holds shows."""

    def uncounted(self, dx: Tensor, counted: Tensor) -> Tensor:
        return dx * counted


class IgnoreIndexIsMinus100(CrossEntropy):
    def counted(self, targets: Tensor, ignore_index: int) -> Tensor:
        return targets != -100


class SmoothingForgottenAtTheTarget(CrossEntropy):
    def one(self, s: float) -> float:
        return 1.0


class SmoothingOverTheOthers(CrossEntropy):
    """s spread over the V - 1 other classes: another definition than PyTorch's."""

    def smoothed(self, losses: Tensor, spread: Tensor, s: float) -> Tensor:
        return (1.0 - s) * losses + s * spread * 1.01


class LogSumExpInBF16(CrossEntropy):
    def lse(self, x: Tensor) -> Tensor:
        return torch.logsumexp(x, -1, keepdim=True).bfloat16().float()


class ExponentialsWithoutMaximum(CrossEntropy):
    def lse(self, x: Tensor) -> Tensor:
        return x.exp().sum(-1, keepdim=True).log()


class ProbabilitiesInBF16(CrossEntropy):
    def probabilities(self, x: Tensor, lse: Tensor) -> Tensor:
        return torch.exp(x - lse).bfloat16().float()


FAULTS = {
    MeanOverAllRows: "bound", UniformGradient: "bound", IgnoredRowsHaveGradients: "bound",
    IgnoredRowsTimesZero: "leak", IgnoreIndexIsMinus100: "bound", SmoothingForgottenAtTheTarget: "bound",
    SmoothingOverTheOthers: "bound", LogSumExpInBF16: "bound", ExponentialsWithoutMaximum: "bound",
    ProbabilitiesInBF16: "bound",
}  # fmt: skip
