"""Cross-entropy of logits with integer targets, by definition.

    log_p = log_softmax(logits)                                  # over the last dimension, of V classes
    loss = -(1 - s) * log_p[target] - s * mean(log_p)            # s: label smoothing

Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7.
A row whose target is `ignore_index` is not looked at: its loss is 0, and so is its gradient, whatever it holds.
Mean: over the targets that count; NaN if none does. A target that is no class gives NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.common import Condition, upcast


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The loss in fp32 (fp64 for fp64 logits): a scalar, or of the targets' shape for reduction "none"."""
    ignored = targets == ignore_index
    log_p = torch.log_softmax(_counted(logits, ignored), -1)
    losses = -torch.where(_hot(logits, targets), log_p, 0.0).sum(-1)
    if label_smoothing > 0.0:
        smooth = -log_p.sum(-1) / max(logits.shape[-1], 1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * smooth
    losses = losses.masked_fill(_no_class(logits, targets), torch.nan).masked_fill(ignored, 0.0)
    return _reduced(losses, ignored, reduction)


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Amplitudes of the loss and of dlogits.

    An exponential's rounding is relative to its argument, that of the sum to the mean argument; lse is rounded to
    fp32 itself, which every p of backward inherits.
    """
    logits, targets = inputs["logits"], inputs["targets"]
    ignore_index, reduction = inputs.get("ignore_index", -100), inputs.get("reduction", "mean")
    smoothing, classes = inputs.get("label_smoothing", 0.0), max(logits.shape[-1], 1)
    ignored = targets == ignore_index
    x, hot = _counted(logits, ignored), _hot(logits, targets)
    top = x.amax(-1, keepdim=True) if logits.shape[-1] else x.sum(-1, keepdim=True)
    lse, p = torch.logsumexp(x, -1, keepdim=True), torch.softmax(x, -1)
    depth, x_abs = _finite(top - x), _finite(x.abs())
    lse_error = _finite(lse.abs()) + _finite(top.abs()) + 1.0 + _finite(p * depth).sum(-1, keepdim=True)
    one = (1.0 - smoothing) * hot
    rows = lse_error.squeeze(-1) + ((one + smoothing / classes) * x_abs).sum(-1)
    rows = rows.masked_fill(ignored, 0.0)
    found = {"loss": Condition(_reduced(rows, ignored, reduction))}
    dloss = grads.get("loss")
    if dloss is None:
        return found
    if reduction == "mean":
        dloss = dloss / (~ignored).sum()
    g = dloss.expand(targets.shape).abs().masked_fill(ignored, 0.0).unsqueeze(-1)
    found["dlogits"] = Condition(g * (p * (1.0 + lse_error + depth) + one + smoothing / classes))
    return found


def supports(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, reduction: str
) -> None:
    """The definition takes everything."""
    return


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, lse, count): lse of the targets' shape, count the number of targets that count, for the mean."""
    ignored = targets == ignore_index
    loss = cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    lse = torch.logsumexp(_counted(logits, ignored), -1)
    lse = lse + (lse - lse)  # NaN for an infinite one, as log_softmax has it
    return loss, lse, (~ignored).sum().float() if reduction == "mean" else None


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    count: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """dlogits = g * (p - (1 - s) * onehot - s / V), p = exp(logits - lse), g = dloss (/ count for the mean)."""
    if reduction == "mean":
        assert count is not None
        dloss = dloss / count
    ignored = targets == ignore_index
    g = dloss.expand(targets.shape).masked_fill(_no_class(logits, targets), torch.nan)
    g = g.masked_fill(ignored, 0.0).unsqueeze(-1)
    p = torch.exp(_counted(logits, ignored) - lse.unsqueeze(-1))
    wanted = (1.0 - label_smoothing) * _hot(logits, targets).to(p.dtype)
    wanted = wanted + label_smoothing / max(logits.shape[-1], 1)
    dlogits = (g * (p - wanted)).masked_fill(ignored.unsqueeze(-1), 0.0)
    return dlogits.to(logits.dtype, memory_format=torch.contiguous_format)


def _counted(logits: Tensor, ignored: Tensor) -> Tensor:
    """The logits in the dtype that is computed in, zero where ignored: nothing there can enter a result."""
    return upcast(logits).masked_fill(ignored.unsqueeze(-1), 0.0)


def _hot(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.arange(logits.shape[-1], device=logits.device) == targets.unsqueeze(-1)


def _no_class(logits: Tensor, targets: Tensor) -> Tensor:
    return (targets < 0) | (targets >= logits.shape[-1])


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _reduced(losses: Tensor, ignored: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / (~ignored).sum() if reduction == "mean" else losses.sum()
