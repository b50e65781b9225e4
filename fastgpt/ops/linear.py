"""A linear layer, its bias and its activation in one op."""

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
from fastgpt.reference import linear as reference
from fastgpt.reference.gelu import APPROXIMATE


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: Backend = None,
) -> Tensor:
    """y = gelu(x @ weight.T + bias), or without the gelu, as torch.nn.functional.linear.

    Args:
        x: [..., k], floating.
        weight: [n, k] in x's dtype; may be a transposed view (Hugging Face's Conv1D keeps [k, n]).
        bias: [n] in x's dtype, or None.
        activation: None, "gelu" (erf) or "gelu_tanh".
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        y [..., n] in x's dtype. Under autocast x, weight and bias are cast to its dtype first, as for PyTorch's.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Of an activation's input backward keeps h = x @ weight.T alone.
    """
    run, chosen, args = planned(SPEC, backend, (x, weight, bias, activation))
    if run is None:
        return apply(_Linear, chosen, *args)
    return run(*args, False)[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        y, h = call("linear_fwd", backend, x, weight, bias, activation, activation is not None)
        ctx.save_for_backward(x, weight, bias, h)
        ctx.backend, ctx.activation = backend, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, h = ctx.saved_tensors
        _, *needs, _ = ctx.needs_input_grad
        if double_backward_wanted():

            def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return reference.linear(x, weight, bias, activation=ctx.activation)

            return None, *backward_through(layer, (x, weight, bias), dy), None
        grads = call("linear_bwd", ctx.backend, dy, x, weight, bias, h, ctx.activation, *needs)
        return None, *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None, str | None]:
    validate.floating("x", x)
    validate.choice("activation", activation, (None, *APPROXIMATE))
    validate.floating("weight", weight)
    if bias is not None:
        validate.floating("bias", bias)
    x, weight, bias = validate.autocast(x, weight, bias)
    check_layer(x, x.shape[-1], weight, bias)
    return x, weight, bias, activation


def check_layer(
    x: Tensor, width: int, weight: Tensor, bias: Tensor | None, names: tuple[str, str] = ("weight", "bias")
) -> None:
    """ValueError or TypeError unless weight [n, width] and bias [n] are a layer of x's dtype, on its device."""
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{names[0]}: expected shape (n, {width}), got {tuple(weight.shape)}")
    validate.beside(names[0], weight, weight.shape, (x.dtype,), "x", x)
    if bias is not None:
        validate.beside(names[1], bias, weight.shape[:1], (x.dtype,), "x", x)


def _fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape) if keep and activation is not None else None


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        x.new_empty(x.shape) if need_dx else None,
        weight.new_empty(weight.shape) if need_dweight else None,
        bias.new_empty(bias.shape) if need_dbias and bias is not None else None,
    )


def make_weight(draw: Draw, n: int, k: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """[n, k], whose products with normal rows are of size 1 to 2; transposed: a view of [k, n]."""
    std = 1.5 / math.sqrt(max(k, 1))
    return draw.normal((k, n), dtype, std=std).mT if transposed else draw.normal((n, k), dtype, std=std)


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """options: n, the width of y; bias, activation; transposed: the weight is a view; mean of x."""
    options, k = case.options, case.shape[-1]
    n = options.get("n", 5)
    inputs: dict[str, Any] = {
        "x": draw.normal(case.shape, dtype, mean=options.get("mean", 0.0)),
        "weight": make_weight(draw, n, k, dtype, options.get("transposed", False)),
        "activation": options.get("activation"),
    }
    if options.get("bias", False):
        inputs["bias"] = draw.normal((n,), dtype, std=0.7)
    return inputs


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """x and weight read, y written; backward reads dy, x and weight and writes dx and dweight."""
    rows, k, n = math.prod(case.shape[:-1]), case.shape[-1], case.options.get("n", 5)
    size = dtype.itemsize * (rows * (k + n) + n * k)
    return Cost(size, 2 * size, 2 * rows * n * k, 4 * rows * n * k)


def _baseline(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if activation is None else F.gelu(y, approximate=APPROXIMATE[activation])


def _forms(shape: tuple[int, ...], n: int, **more: Any) -> tuple[Case, ...]:
    return tuple(
        Case(shape, {"n": n, **form, **more})
        for form in ({}, {"bias": True}, {"bias": True, "activation": "gelu_tanh"}, {"activation": "gelu"})
    )


_CASES: tuple[Case, ...] = (
    *(case for shape, n in (((5, 33), 70), ((1, 64), 48), ((40, 96), 130)) for case in _forms(shape, n)),
    *_forms((2, 5), 3),
    *_forms((2, 4), 3, transposed=True),
    *_forms((3, 40), 33, transposed=True),
    *_forms((2, 3, 17), 9),
    *_forms((13,), 7),
    *_forms((0, 5), 4),
    *_forms((3, 0), 4),
    *_forms((3, 4), 0),
    *_forms((1, 1), 1),
    *_forms((3, 3), 4, mean=4.0),
    *_forms((9, 40), 12, mean=4.0),
    *_forms((300, 20), 24),
)
_SHAPES = (((2048, 768), 3072), ((2048, 3072), 768), ((1024, 1600), 6400))  # GPT-2's and GPT-2 XL's products
_BENCH = tuple(
    Case(shape, {"n": n, "bias": True, **form})
    for shape, n in _SHAPES
    for form in ({}, *([{"activation": "gelu_tanh"}] if n > shape[-1] else []))
)
_ONE_ROW = (((1, 768), 50304), ((1, 4096), 4096), ((1, 1600), 6400))  # decoding: the weight is all that moves
_CPU = (
    *_BENCH,
    *(Case((rows, k), {"n": n}) for (_, k), n in _ONE_ROW for rows in (1, 8)),
    Case((4, 64), {"n": 64, "bias": True}),
)

SPEC = register(
    OpSpec(
        name="linear",
        entries={
            "fwd": Entry(
                "(Tensor x, Tensor weight, Tensor? bias, str? activation, bool keep) -> (Tensor, Tensor)",
                _fwd_fake,
            ),
            "bwd": Entry(
                "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? h, str? activation, bool need_dx,"
                " bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=linear,
        prepare=_prepare,
        reference=reference.linear,
        condition=reference.condition,
        outputs=("y",),
        gradients=("x", "weight", "bias"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cpu_cases=_CPU,
        cost=_cost,
        baseline=_baseline,
    )
)
