"""Cross-entropy of logits with integer targets: the loss without its probabilities ever in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt._core import validate
from fastgpt._core.autograd import apply, backward_through, double_backward_wanted
from fastgpt._core.dispatch import Backend
from fastgpt._core.guard import extremes
from fastgpt._core.library import call
from fastgpt._core.plan import planned
from fastgpt._core.registry import register
from fastgpt._core.spec import Case, Cost, Draw, Entry, OpSpec
from fastgpt.reference import cross_entropy as reference

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: Backend = None,
) -> Tensor:
    """The cross-entropy of softmax(logits) with the targets, in nats; as torch.nn.functional.cross_entropy.

    Args:
        logits: [..., V], floating.
        targets: int64 [...], in [0, V), or `ignore_index` where a row does not count: it is not looked at, its loss
            and its gradient are 0.
        ignore_index: may be a class.
        label_smoothing: 0 <= s <= 1: the target distribution is (1 - s) * onehot + s / V.
        reduction: "mean" over the targets that count (NaN if none does), "sum", or "none".
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        The loss in fp32 (fp64 for fp64 logits): a scalar, or of the targets' shape for "none". Its gradient, for any
        gradient of the loss, has the dtype of the logits.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The values of the targets are
            looked at on a CPU only (elsewhere that would wait for the device), and not where the call is traced:
            there one that is no class reads nothing and makes its loss and the gradient of its row NaN.

    Backward reads the logits once more, beside the one saved number a row, their log-sum-exp (in one pass: Milakov,
    Gimelshein, "Online normalizer calculation for softmax", 2018).
    """
    run, chosen, args = planned(SPEC, backend, (logits, targets, ignore_index, label_smoothing, reduction))
    check_values(targets, logits.shape[-1], ignore_index)
    if run is None:
        return apply(_CrossEntropy, chosen, *args)
    return run(*args)[0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        reduction: str,
    ) -> Tensor:
        options = (ignore_index, label_smoothing, reduction)
        loss, lse, count = call("cross_entropy_fwd", backend, logits, targets, *options)
        ctx.save_for_backward(logits, targets, lse, count)
        ctx.backend, ctx.options = backend, options
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        logits, targets, lse, count = ctx.saved_tensors
        if double_backward_wanted():
            ignore_index, label_smoothing, reduction = ctx.options

            def loss(logits: Tensor) -> Tensor:
                return reference.cross_entropy(
                    logits,
                    targets,
                    ignore_index=ignore_index,
                    label_smoothing=label_smoothing,
                    reduction=reduction,
                )

            return None, *backward_through(loss, (logits,), dloss), None, None, None, None
        dlogits = call("cross_entropy_bwd", ctx.backend, dloss, logits, targets, lse, count, *ctx.options)
        return None, dlogits, None, None, None, None


def _prepare(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, int, float, str]:
    validate.floating("logits", logits)
    check_targets(targets, logits, "logits", ignore_index)
    label_smoothing = validate.number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 <= s <= 1, got {label_smoothing}")
    validate.choice("reduction", reduction, REDUCTIONS)
    return logits, targets, ignore_index, label_smoothing, reduction


def check_targets(targets: Any, rows: Tensor, name: str, ignore_index: Any) -> None:
    """One int64 target for each of the rows, which are called `name`."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor, got {type(targets).__name__}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected torch.int64, got {targets.dtype}")
    validate.shape("targets", targets, rows.shape[:-1])
    validate.same_device("targets", targets, name, rows)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")


def check_values(targets: Tensor, classes: int, ignore_index: int) -> None:
    """ValueError for a target that is no class, where its value can be looked at."""
    found = extremes(targets)
    if found is None or (found[0] >= 0 and found[1] < classes):
        return
    wrong = targets[((targets < 0) | (targets >= classes)) & (targets != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"targets: expected values from 0 to {classes - 1} or ignore_index={ignore_index},"
            f" got {wrong[0].item()}"
        )


def _fwd_fake(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(targets.shape if reduction == "none" else (), dtype=dtype)
    count = logits.new_empty((), dtype=torch.float32) if reduction == "mean" else None
    return loss, logits.new_empty(targets.shape, dtype=dtype), count


def _bwd_fake(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    count: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """options: those of the op, mean and std of the logits, and what part of the targets is `ignored`.

    masked: the lower half of the classes is -inf, as where a vocabulary is restricted.
    """
    options, (*rows, classes) = case.options, case.shape
    logits = draw.normal(case.shape, dtype, mean=options.get("mean", 0.0), std=options.get("std", 2.0))
    lowest = classes // 2 if options.get("masked") else 0
    logits[..., :lowest] = -torch.inf
    targets = draw.integers(lowest, max(classes, 1), rows)
    inputs = {
        name: options[name]
        for name in ("ignore_index", "label_smoothing", "reduction")
        if options.get(name) is not None
    }
    ignored = 1.0 if classes == 0 else options.get("ignored", 0.0)
    if ignored > 0.0:
        targets[draw.bernoulli(rows, ignored)] = inputs.get("ignore_index", -100)
    return {"logits": logits, "targets": targets, **inputs}


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """Logits and targets read; backward reads them again and writes the gradient."""
    elements, rows = math.prod(case.shape), math.prod(case.shape[:-1])
    size = elements * dtype.itemsize
    return Cost(size + 12 * rows, 2 * size + 12 * rows, 12 * elements, 12 * elements)


def _baseline(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        targets.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss.view(targets.shape) if reduction == "none" else loss


_CASES: tuple[Case, ...] = (
    Case((5, 33), {"reduction": "none"}),
    Case((4, 3), {"ignored": 0.4}),
    Case((37, 70), {"ignored": 0.4}),
    Case((0, 5), {"reduction": "sum"}),
    Case((0, 5)),
    Case((3, 0), {"reduction": "none"}),
    Case((13, 1), {"ignored": 0.4}),
    Case((13,), {"ignored": 0.0}),
    Case((2, 3, 130), {"reduction": "sum", "label_smoothing": 0.1, "ignored": 0.3}),
    Case((9, 257), {"reduction": "none", "label_smoothing": 0.1, "ignored": 0.3, "ignore_index": 4}),
    Case((4, 100), {"ignored": 1.0}),
    Case((6, 131), {"masked": True, "std": 8.0}),
    Case((5, 64), {"mean": 1000.0, "std": 30.0, "reduction": "none"}),
    Case((300, 20), {"ignored": 0.2, "std": 0.5}),
    Case((3, 50257), {"label_smoothing": 0.3, "ignored": 0.3}),
)
_BENCH = (Case((2048, 50257)), Case((8192, 768)))

SPEC = register(
    OpSpec(
        name="cross_entropy",
        entries={
            "fwd": Entry(
                "(Tensor logits, Tensor targets, int ignore_index, float label_smoothing, str reduction)"
                " -> (Tensor, Tensor, Tensor)",
                _fwd_fake,
            ),
            "bwd": Entry(
                "(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, Tensor? count, int ignore_index,"
                " float label_smoothing, str reduction) -> Tensor",
                _bwd_fake,
            ),
        },
        function=cross_entropy,
        prepare=_prepare,
        reference=reference.cross_entropy,
        condition=reference.condition,
        outputs=("loss",),
        gradients=("logits",),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cost=_cost,
        baseline=_baseline,
    )
)
