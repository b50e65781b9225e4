"""The feed-forward part of a transformer block: two products and the GELU between them."""

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
from fastgpt.ops.linear import check_layer, make_weight
from fastgpt.reference import mlp as reference
from fastgpt.reference.gelu import APPROXIMATE


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    backend: Backend = None,
) -> Tensor:
    """y = gelu(x @ w1.T + b1) @ w2.T + b2.

    Args:
        x: [..., k], floating.
        w1: [m, k]; w2: [n, m]; both in x's dtype, and either may be a transposed view.
        b1: [m]; b2: [n]; in x's dtype, or None.
        activation: "gelu_tanh" or "gelu" (erf).
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        y [..., n] in x's dtype. Under autocast all are cast to its dtype first.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Between forward and backward one tensor as wide as m is kept, h = x @ w1.T; the GELU is computed again.
    """
    run, chosen, args = planned(SPEC, backend, (x, w1, b1, w2, b2, activation))
    if run is None:
        return apply(_MLP, chosen, *args)
    return run(*args, False)[0]


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        activation: str,
    ) -> Tensor:
        y, h = call("mlp_fwd", backend, x, w1, b1, w2, b2, activation, True)
        ctx.save_for_backward(x, w1, b1, w2, b2, h)
        ctx.backend, ctx.activation = backend, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w1, b1, w2, b2, h = ctx.saved_tensors
        _, *needs, _ = ctx.needs_input_grad
        if double_backward_wanted():

            def layers(*inputs: Any) -> Tensor:
                return reference.mlp(*inputs, activation=ctx.activation)

            return None, *backward_through(layers, (x, w1, b1, w2, b2), dy), None
        grads = call("mlp_bwd", ctx.backend, dy, x, w1, b1, w2, h, ctx.activation, *needs)
        return None, *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


def _prepare(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu_tanh"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, str]:
    validate.floating("x", x)
    validate.choice("activation", activation, tuple(APPROXIMATE))
    for name, value in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if value is not None or name.startswith("w"):
            validate.floating(name, value)
    x, w1, b1, w2, b2 = validate.autocast(x, w1, b1, w2, b2)
    check_layer(x, x.shape[-1], w1, b1, ("w1", "b1"))
    check_layer(x, w1.shape[0], w2, b2, ("w2", "b2"))
    return x, w1, b1, w2, b2, activation


def _fwd_fake(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    h = x.new_empty((*x.shape[:-1], w1.shape[0])) if keep else None
    return x.new_empty((*x.shape[:-1], w2.shape[0])), h


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    h: Tensor,
    activation: str,
    need_dx: bool,
    need_dw1: bool,
    need_db1: bool,
    need_dw2: bool,
    need_db2: bool,
) -> tuple[Tensor | None, ...]:
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    needs = (need_dx, need_dw1, need_db1, need_dw2, need_db2)
    return tuple(x.new_empty(shape) if need else None for shape, need in zip(shapes, needs, strict=True))


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """options: m and n, the widths of h and y; bias, activation; transposed: the weights are views."""
    options, k = case.options, case.shape[-1]
    m, n, transposed = options.get("m", 6), options.get("n", 5), options.get("transposed", False)
    inputs: dict[str, Any] = {
        "x": draw.normal(case.shape, dtype),
        "w1": make_weight(draw, m, k, dtype, transposed),
        "b1": None,
        "w2": make_weight(draw, n, m, dtype, transposed),
        "b2": None,
        "activation": options.get("activation", "gelu_tanh"),
    }
    if options.get("bias", False):
        inputs["b1"], inputs["b2"] = draw.normal((m,), dtype, std=0.7), draw.normal((n,), dtype, std=0.7)
    return inputs


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """x and the weights read, y written; backward reads them, dy and h and writes dx and the weights' gradients."""
    rows, k, m, n = (
        math.prod(case.shape[:-1]),
        case.shape[-1],
        case.options["m"],
        case.options["n"],
    )
    weights, size = m * (k + n), dtype.itemsize
    fwd, bwd = rows * (k + n) + weights, rows * (2 * k + m + n) + 2 * weights
    flops = 2 * rows * weights
    return Cost(fwd * size, bwd * size, flops, 2 * flops)


def _baseline(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu_tanh"
) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=APPROXIMATE[activation]), w2, b2)


def _forms(shape: tuple[int, ...], m: int, n: int, **more: Any) -> tuple[Case, ...]:
    forms: tuple[dict[str, Any], ...] = ({}, {"bias": True}, {"bias": True, "activation": "gelu"})
    return tuple(Case(shape, {"m": m, "n": n, **form, **more}) for form in forms)


_CASES: tuple[Case, ...] = (
    *_forms((5, 33), 70, 33),
    *_forms((1, 64), 128, 64),
    *_forms((40, 96), 130, 50),
    *_forms((2, 5), 4, 3),
    *_forms((2, 4), 3, 5, transposed=True),
    *_forms((3, 40), 33, 21, transposed=True),
    *_forms((2, 3, 17), 9, 17),
    *_forms((13,), 7, 5),
    *_forms((0, 5), 4, 3),
    *_forms((3, 0), 4, 3),
    *_forms((3, 4), 0, 3),
    *_forms((3, 4), 3, 0),
    *_forms((300, 20), 24, 20),
)
_BENCH = (
    Case((2048, 768), {"m": 3072, "n": 768, "bias": True}),
    Case((1024, 1600), {"m": 6400, "n": 1600, "bias": True}),
)

SPEC = register(
    OpSpec(
        name="mlp",
        entries={
            "fwd": Entry(
                "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool keep)"
                " -> (Tensor, Tensor)",
                _fwd_fake,
            ),
            "bwd": Entry(
                "(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor h, str activation, bool need_dx,"
                " bool need_dw1, bool need_db1, bool need_dw2, bool need_db2)"
                " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=mlp,
        prepare=_prepare,
        reference=reference.mlp,
        condition=reference.condition,
        outputs=("y",),
        gradients=("x", "w1", "b1", "w2", "b2"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cpu_cases=(*_BENCH, Case((4, 64), {"m": 256, "n": 64, "bias": True})),
        cost=_cost,
        baseline=_baseline,
    )
)
