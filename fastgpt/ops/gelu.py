"""GELU, alone or with the bias addition before it."""

from __future__ import annotations

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
from fastgpt.reference import gelu as reference


def gelu(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: Backend = None
) -> Tensor:
    """y = z * Phi(z), z = x + bias: the bias of the matrix product before it, added on the way.

    Args:
        x: [..., n], floating.
        bias: [n] in x's dtype, or None. (Under autocast it is cast to x's dtype.)
        approximate: "none" (erf) or "tanh", as torch.nn.functional.gelu.
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        y [..., n] in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Hendrycks, Gimpel, "Gaussian Error Linear Units" (2016).
    """
    run, chosen, args = planned(SPEC, backend, (x, bias, approximate))
    if run is None:
        return apply(_GELU, chosen, *args)
    return run(*args)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.backend, ctx.approximate = backend, approximate
        return call("gelu_fwd", backend, x, bias, approximate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, bias = ctx.saved_tensors
        _, need_dx, need_dbias, _ = ctx.needs_input_grad
        if double_backward_wanted():

            def activate(x: Tensor, bias: Tensor | None) -> Tensor:
                return reference.gelu(x, bias, approximate=ctx.approximate)

            return None, *backward_through(activate, (x, bias), dy), None
        dx, dbias = call("gelu_bwd", ctx.backend, dy, x, bias, ctx.approximate, need_dx, need_dbias)
        return None, dx if need_dx else None, dbias if need_dbias else None, None


def _prepare(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> tuple[Tensor, Tensor | None, str]:
    validate.floating("x", x)
    validate.choice("approximate", approximate, ("none", "tanh"))
    if bias is not None:
        validate.floating("bias", bias)
        if bias.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
            bias = bias.to(x.dtype)
        validate.beside("bias", bias, x.shape[-1:], (x.dtype,), "x", x)
    return x, bias, approximate


def _fwd_fake(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _bwd_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, need_dx: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    dbias = bias.new_empty(bias.shape) if need_dbias and bias is not None else None
    return x.new_empty(x.shape) if need_dx else None, dbias


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    options = case.options
    inputs: dict[str, Any] = {
        "x": draw.normal(case.shape, dtype, mean=options.get("mean", 0.0), std=options.get("std", 2.0)),
        "approximate": options.get("approximate", "none"),
    }
    if options.get("bias", False):
        inputs["bias"] = draw.normal(case.shape[-1:], dtype, std=0.7)
    return inputs


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """x read, y written; backward reads dy and x and writes dx."""
    elements = torch.Size(case.shape).numel()
    return Cost(2 * elements * dtype.itemsize, 3 * elements * dtype.itemsize, 20 * elements, 30 * elements)


def _baseline(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


_FORMS: tuple[dict[str, Any], ...] = ({}, {"approximate": "tanh"})
_CASES: tuple[Case, ...] = (
    *(
        Case(shape, {**form, **bias})
        for form in _FORMS
        for bias in ({}, {"bias": True})
        for shape in ((0, 7), (1, 1), (7, 1), (5, 33), (2, 3, 70), (37, 1600))
    ),
    *(Case((9, 257), {**form, "std": 12.0}) for form in _FORMS),
    *(Case((9, 257), {**form, "mean": -4.0, "std": 1.5}) for form in _FORMS),
    *(Case((9, 257), {**form, "std": 1e-4}) for form in _FORMS),
    Case((600, 24), {"bias": True}),
    Case((3, 0), {"bias": True}),
    Case((13,), {"bias": True}),
)
_BENCH = (
    *(
        Case(shape, {**form, "bias": True})
        for form in _FORMS
        for shape in ((64, 3072), (512, 3072), (2048, 3072))
    ),
    *(Case((2048, 3072), form) for form in _FORMS),
    # Past the 32 MiB where glibc maps every block afresh: what `keep_large_blocks` is for.
    Case((8192, 3072), {"approximate": "tanh", "bias": True}),
)

SPEC = register(
    OpSpec(
        name="gelu",
        entries={
            "fwd": Entry("(Tensor x, Tensor? bias, str approximate) -> Tensor", _fwd_fake),
            "bwd": Entry(
                "(Tensor dy, Tensor x, Tensor? bias, str approximate, bool need_dx, bool need_dbias)"
                " -> (Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=gelu,
        prepare=_prepare,
        reference=reference.gelu,
        condition=reference.condition,
        outputs=("y",),
        gradients=("x", "bias"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cost=_cost,
        baseline=_baseline,
    )
)
