"""Cross-entropy of logits = x @ weight.T with integer targets, by definition: `linear` and then `cross_entropy`.

Where x is of 16 bits, so are the logits and their gradient, each rounded once, as between the two ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference import cross_entropy as reference
from fastgpt.reference.common import Condition
from fastgpt.reference.linear import Errors, as_rows, product, product_bwd, product_conditions


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The loss in fp32 (fp64 for fp64 x): a scalar, or of the targets' shape for reduction "none"."""
    logits = product(x, weight)
    return reference.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Of the loss, dx and dweight: that of `cross_entropy`, errors of the logits, and the rounding of both sides.

    An error in a logit is an error in the loss as p and the target weigh it, and in dlogits as p does. A sum over
    rows in a few blocks rounds dweight up to `ROUNDINGS` times, and once more where it is scaled by dloss.
    """
    x, weight, targets = inputs["x"], inputs["weight"], inputs["targets"]
    options = {name: inputs[name] for name in ("ignore_index", "reduction") if name in inputs}
    logits, logits_abs = x @ weight.mT, x.abs() @ weight.abs().mT
    base = reference.condition({"logits": logits, "targets": targets, **options}, grads)
    ignored = targets == options.get("ignore_index", -100)
    p = torch.softmax(logits, -1)
    hot = (torch.arange(weight.shape[0], device=x.device) == targets.unsqueeze(-1)).to(p.dtype)
    seen = p + hot

    def in_loss(logit_error: Tensor) -> Tensor:
        rows = (seen * logit_error).sum(-1).masked_fill(ignored, 0.0)
        if options.get("reduction", "mean") == "none":
            return rows
        return rows.sum() / (1 if options.get("reduction") == "sum" else (~ignored).sum())

    found = {"loss": Condition(base["loss"].amplitude + in_loss(logits_abs), in_loss(logits.abs()))}
    dloss = grads.get("loss")
    if dloss is None:
        return found
    if options.get("reduction", "mean") == "mean":
        dloss = dloss / (~ignored).sum()
    g = dloss.expand(targets.shape).masked_fill(ignored, 0.0).unsqueeze(-1)
    dlogits = g * (p - hot)

    def in_dlogits(logit_error: Tensor) -> Tensor:
        return g.abs() * p * (logit_error + (p * logit_error).sum(-1, keepdim=True))

    errors = Errors(
        base["dlogits"].amplitude + in_dlogits(logits_abs), dlogits.abs() + in_dlogits(logits.abs())
    )
    products = product_conditions(dlogits, errors, x, weight)
    counted = torch.ones_like(dlogits).masked_fill(ignored.unsqueeze(-1), 0.0)  # of fp16 some are subnormal
    for name in ("dx", "dweight"):
        amplitude, rounded, _ = products[name]
        assert rounded is not None
        absolute = dlogits.abs() @ weight.abs() if name == "dx" else _over_rows(dlogits, x)
        flat = counted @ weight.abs() if name == "dx" else _over_rows(counted, x)
        found[name] = Condition(amplitude, rounded + (1 if name == "dx" else ROUNDINGS) * absolute, flat)
    return found


ROUNDINGS = 4  # of dweight in 16 bits before the last one; a kernel that needs more blocks sums them in fp32


def _over_rows(dlogits: Tensor, x: Tensor) -> Tensor:
    return as_rows(dlogits.abs()).mT @ as_rows(x.abs())


def supports(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> None:
    """The definition takes everything."""
    return


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss, lse, count, dx, dweight): the gradients for dloss = 1, where they are asked for (not for "none")."""
    logits = product(x, weight)
    loss, lse, count = reference.cross_entropy_fwd(logits, targets, ignore_index, 0.0, reduction)
    one, options = torch.ones_like(loss), (ignore_index, reduction, need_dx, need_dweight)
    dx, dweight = linear_cross_entropy_bwd(one, x, weight, targets, lse, count, None, None, *options)
    return loss, lse, count, dx, dweight


def scaled(grad: Tensor | None, dloss: Tensor, needed: bool) -> Tensor | None:
    """The gradient for dloss from that for 1."""
    if not needed or grad is None:
        return None
    if dloss.is_cpu:  # never rounded to 16 bits itself
        return grad * dloss.item()
    return (grad.float() * dloss).to(grad.dtype)


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    count: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    ignore_index: int,
    reduction: str,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight): those that forward made for dloss = 1, scaled, or from the logits once more."""
    if dx is not None or dweight is not None:
        return scaled(dx, dloss, need_dx), scaled(dweight, dloss, need_dweight)
    logits = product(x, weight)
    dlogits = reference.cross_entropy_bwd(dloss, logits, targets, lse, count, ignore_index, 0.0, reduction)
    dx, dweight, _ = product_bwd(dlogits, x, weight, need_dx, need_dweight, False)
    return dx, dweight
