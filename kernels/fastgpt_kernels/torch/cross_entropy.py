"""Cross-entropy by PyTorch's log-sum-exp: F.cross_entropy keeps all log-probabilities, this one number a row."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, reduction: str
) -> str | None:
    """None, or why not."""
    return None


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, lse, count)."""
    x, classes = _upcast(logits), logits.shape[-1]
    ignored = targets == ignore_index
    lse = torch.logsumexp(x, -1)
    lse = lse + (lse - lse)  # infinity becomes NaN, as in log_softmax
    if classes:
        at_target = x.gather(-1, targets.clamp(0, classes - 1).unsqueeze(-1)).squeeze(-1)
        losses = lse - at_target
    else:
        losses = torch.full_like(lse, torch.nan)
    if label_smoothing > 0.0 and classes:
        smooth = (lse.unsqueeze(-1) - x).mean(-1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * smooth
    losses = losses.masked_fill_((targets < 0) | (targets >= classes), torch.nan).masked_fill_(ignored, 0.0)
    if reduction == "none":
        return losses, lse, None
    if reduction == "sum":
        return losses.sum(), lse, None
    count = (~ignored).sum().float()
    return losses.sum() / count, lse, count


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
    """dlogits."""
    x, classes = _upcast(logits), logits.shape[-1]
    if reduction == "mean" and count is not None:
        dloss = dloss / count
    ignored = targets == ignore_index
    g = dloss.expand(targets.shape).masked_fill((targets < 0) | (targets >= classes), torch.nan)
    g = g.masked_fill(ignored, 0.0).unsqueeze(-1)
    dx = (x - lse.unsqueeze(-1)).exp_()
    if label_smoothing > 0.0 and classes:
        dx.sub_(label_smoothing / classes)
    dx.mul_(g)
    if classes:
        hot = targets.clamp(0, classes - 1).unsqueeze(-1)
        dx.scatter_add_(-1, hot, g * (label_smoothing - 1.0))
    # An ignored row's gradient is 0, whatever the row holds.
    return dx.masked_fill_(ignored.unsqueeze(-1), 0.0).to(logits.dtype).contiguous()


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
