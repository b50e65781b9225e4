"""The output head and its loss: cross-entropy of x @ weight.T, whose logits only ever exist in blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt._core import validate
from fastgpt._core.autograd import apply, backward_through, double_backward_wanted
from fastgpt._core.dispatch import Backend
from fastgpt._core.library import call
from fastgpt._core.plan import planned
from fastgpt._core.registry import register
from fastgpt._core.spec import Case, Cost, Draw, Entry, OpSpec
from fastgpt.ops.cross_entropy import REDUCTIONS, check_targets, check_values
from fastgpt.ops.linear import check_layer, make_weight
from fastgpt.reference import linear_cross_entropy as reference


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: Backend = None,
) -> Tensor:
    """`cross_entropy(linear(x, weight), targets)` without the logits in memory.

    Args:
        x: [..., k], floating.
        weight: [V, k] in x's dtype; may be a transposed view.
        targets: int64 [...], in [0, V), or `ignore_index` where a row does not count: its loss and gradient are 0.
        ignore_index: may be a class.
        reduction: "mean" over the targets that count (NaN if none does), "sum", or "none".
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        The loss in fp32 (fp64 for fp64 x): a scalar, or of the targets' shape for "none". Under autocast x and
        weight are cast to its dtype first.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; values of targets as in
            `cross_entropy`.

    For "mean" and "sum" forward computes the gradients too, block by block of the logits, three products in all, and
    backward scales them (Liger-Kernel's method, arXiv:2410.10989, section 3.2). A second backward through the same
    graph, "none", and fp16, whose small gradients live by the scale of the loss, compute the logits once more.
    Activation checkpointing of this op costs all of its time again and saves nothing.
    """
    run, chosen, args = planned(SPEC, backend, (x, weight, targets, ignore_index, reduction))
    check_values(targets, weight.shape[0], ignore_index)
    if run is None:
        return apply(_LinearCrossEntropy, chosen, *args)
    return run(*args, False, False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        _, need_dx, need_dweight, *_ = ctx.needs_input_grad
        now = _made_in_forward(x, reduction)
        loss, lse, count, *grads = call(
            "linear_cross_entropy_fwd",
            backend,
            x,
            weight,
            targets,
            ignore_index,
            reduction,
            now and need_dx,
            now and need_dweight,
        )
        made = [
            grad if now and need else None for grad, need in zip(grads, (need_dx, need_dweight), strict=True)
        ]
        # Backward gives the gradients away, so that none is in memory twice; a trace cannot, and saves them.
        tracing = torch.compiler.is_compiling()
        ctx.made = None if tracing else made
        ctx.save_for_backward(x, weight, targets, lse, count, *(made if tracing else (None, None)))
        ctx.backend, ctx.options = backend, (ignore_index, reduction)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        x, weight, targets, lse, count, *made = ctx.saved_tensors
        _, *needs, _, _, _ = ctx.needs_input_grad
        if double_backward_wanted():
            ignore_index, reduction = ctx.options

            def loss(x: Tensor, weight: Tensor) -> Tensor:
                return reference.linear_cross_entropy(
                    x, weight, targets, ignore_index=ignore_index, reduction=reduction
                )

            return None, *backward_through(loss, (x, weight), dloss), None, None, None
        now = _made_in_forward(x, ctx.options[1])
        if not torch.compiler.is_compiling():
            made, ctx.made = ctx.made, None
            if made is None and now:  # given away by an earlier backward
                state = (x, weight, targets, *ctx.options)
                _, _, _, *made = call("linear_cross_entropy_fwd", ctx.backend, *state, *needs)
        if made is not None and now and validate.readable(dloss) and dloss.item() == 1.0:
            grads = made
        else:
            dx, dweight = made or (None, None)
            state = (x, weight, targets, lse, count, dx, dweight, *ctx.options)
            grads = call("linear_cross_entropy_bwd", ctx.backend, dloss, *state, *needs)
        dx, dweight = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return None, dx, dweight, None, None, None


def _made_in_forward(x: Tensor, reduction: str) -> bool:
    """Whether gradients for dloss = 1 serve: not where each row has its own, nor where they would underflow."""
    return reduction != "none" and x.dtype != torch.float16


def _prepare(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> tuple[Tensor, Tensor, Tensor, int, str]:
    validate.floating("x", x)
    validate.floating("weight", weight)
    x, weight = validate.autocast(x, weight)
    check_layer(x, x.shape[-1], weight, None)
    check_targets(targets, x, "x", ignore_index)
    validate.choice("reduction", reduction, REDUCTIONS)
    return x, weight, targets, ignore_index, reduction


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=dtype)
    count = x.new_empty((), dtype=torch.float32) if reduction == "mean" else None
    dx = x.new_empty(x.shape) if need_dx else None
    dweight = weight.new_empty(weight.shape) if need_dweight else None
    return loss, x.new_empty(targets.shape, dtype=dtype), count, dx, dweight


def _bwd_fake(
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
    return (
        x.new_empty(x.shape) if need_dx else None,
        weight.new_empty(weight.shape) if need_dweight else None,
    )


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """options: n, the classes; those of the op; transposed: weight is a view; the part of targets `ignored`."""
    options, (*rows, k) = case.options, case.shape
    classes = options.get("n", 5)
    inputs: dict[str, Any] = {
        "x": draw.normal(case.shape, dtype),
        "weight": make_weight(draw, classes, k, dtype, options.get("transposed", False)),
        "targets": draw.integers(0, max(classes, 1), rows),
        **{name: options[name] for name in ("ignore_index", "reduction") if name in options},
    }
    ignored = 1.0 if classes == 0 else options.get("ignored", 0.0)
    if ignored > 0.0:
        inputs["targets"][draw.bernoulli(rows, ignored)] = options.get("ignore_index", -100)
    return inputs


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """x, weight and targets read; backward writes dx and dweight. Three products; forward is the first of them."""
    rows, k, n = math.prod(case.shape[:-1]), case.shape[-1], case.options["n"]
    size = dtype.itemsize * (rows * k + n * k)
    return Cost(size + 8 * rows, 2 * size, 2 * rows * n * k, 4 * rows * n * k)


def _baseline(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    logits = F.linear(x, weight).reshape(targets.numel(), weight.shape[0])
    loss = F.cross_entropy(
        logits.float(), targets.reshape(-1), ignore_index=ignore_index, reduction=reduction
    )
    return loss.view(targets.shape) if reduction == "none" else loss


_CASES: tuple[Case, ...] = tuple(
    Case(shape, {"n": n, **options})
    for shape, n, options in (
        ((2, 5), 4, {"reduction": "none"}),
        ((2, 5), 4, {}),
        ((3, 5), 4, {"ignored": 0.4}),
        ((3, 4), 5, {"reduction": "none", "ignored": 0.4}),
        ((3, 4), 5, {"transposed": True}),
        ((5, 33), 70, {"reduction": "none"}),
        ((40, 20), 130, {"ignored": 0.4}),
        ((2, 3, 17), 9, {"reduction": "sum", "ignored": 0.3, "ignore_index": 4}),
        ((300, 24), 50, {"ignored": 0.2}),
        ((9, 64), 257, {"transposed": True}),
        ((9, 64), 257, {"reduction": "none", "ignored": 0.3}),
        ((13,), 7, {}),
        ((0, 5), 4, {"reduction": "sum"}),
        ((0, 5), 4, {}),
        ((3, 0), 4, {"reduction": "sum"}),
        ((3, 5), 0, {"reduction": "none"}),
        ((3, 5), 1, {}),
        ((4, 20), 30, {"ignored": 1.0}),
    )
)
_BENCH = (Case((2048, 768), {"n": 50257}),)

SPEC = register(
    OpSpec(
        name="linear_cross_entropy",
        entries={
            "fwd": Entry(
                "(Tensor x, Tensor weight, Tensor targets, int ignore_index, str reduction, bool need_dx,"
                " bool need_dweight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                _fwd_fake,
            ),
            "bwd": Entry(
                "(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor lse, Tensor? count,"
                " Tensor? dx, Tensor? dweight, int ignore_index, str reduction, bool need_dx, bool need_dweight)"
                " -> (Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=linear_cross_entropy,
        prepare=_prepare,
        reference=reference.linear_cross_entropy,
        condition=reference.condition,
        outputs=("loss",),
        gradients=("x", "weight"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cpu_cases=(*_BENCH, Case((4, 64), {"n": 256})),
        cost=_cost,
        baseline=_baseline,
    )
)
