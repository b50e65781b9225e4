"""RMSNorm, alone or with the residual addition before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from fastgpt.reference import rms_norm as reference


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    backend: Backend = None,
) -> Any:
    """Scale rows to a root mean square of one: y = s / sqrt(mean(s^2) + eps) * weight, s = x + residual.

    Args:
        x: [..., n], floating.
        weight: [n] or None, in x's dtype or (x bf16, fp16) fp32.
        eps: added to the mean square.
        residual: [..., n] in x's dtype, or fp32 for x in bf16 or fp16. With it the sum s, rounded to the
            residual's dtype, is returned too: the stream that the next layer adds to.
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        y [..., n] in x's dtype; with a residual (y, s).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467.
    """
    run, chosen, args = planned(SPEC, backend, (x, weight, eps, residual))
    if run is None:
        return apply(_RMSNorm, chosen, *args)
    y, stream, _ = run(*args)
    return y if residual is None else (y, stream)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float
    ) -> Any:
        y, stream, rstd = call("rms_norm_fwd", backend, x, weight, residual, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else stream, weight, rstd)
        ctx.backend, ctx.eps, ctx.x_dtype = backend, eps, x.dtype
        return y if residual is None else (y, stream)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None = None) -> Any:
        s, weight, rstd = ctx.saved_tensors
        _, need_x, need_w, need_residual, _ = ctx.needs_input_grad
        if dy is None:  # only the stream was used
            if dstream is None:
                return None, None, None, None, None
            return None, dstream.to(ctx.x_dtype) if need_x else None, None, dstream, None
        if double_backward_wanted():

            def normalise(s: Tensor, w: Tensor | None) -> Tensor:
                return reference.rms_norm(s, w, ctx.eps).to(ctx.x_dtype)

            dresidual, dw = backward_through(normalise, (s, weight), dy)
            if dresidual is not None and dstream is not None:
                dresidual = dresidual + dstream
            dx = None if dresidual is None else dresidual.to(ctx.x_dtype)
        else:
            needs = (need_x or need_residual, need_w)
            dx, dresidual, dw = call("rms_norm_bwd", ctx.backend, dy, dstream, s, weight, rstd, *needs)
            if s.dtype == ctx.x_dtype:
                dresidual = dx
        return (
            None,
            dx if need_x else None,
            dw if need_w else None,
            dresidual if need_residual else None,
            None,
        )


def _prepare(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    validate.floating("x", x)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        x = x.float()  # there, as PyTorch's, in fp32
        weight, residual = (None if t is None else t.float() for t in (weight, residual))
    wider = validate.WIDER[x.dtype]
    if weight is not None:
        validate.beside("weight", weight, x.shape[-1:], wider, "x", x)
    if residual is not None:
        validate.beside("residual", residual, x.shape, wider, "x", x)
    return x, weight, residual, validate.number("eps", eps)


def _fwd_fake(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix a symbolic number of rows
    stream = None if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape), stream, x.new_empty(rows, dtype=statistics)


def _bwd_fake(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, ...]:
    return (
        dy.new_empty(dy.shape) if need_dx else None,
        x.new_empty(x.shape) if need_dx and x.dtype != dy.dtype else None,
        weight.new_empty(weight.shape) if need_dw and weight is not None else None,
    )


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    options, n = case.options, case.shape[-1]
    parameters = torch.float32 if case.mixed and options.get("parameters") == "fp32" else dtype
    stream = torch.float32 if case.mixed and options.get("stream") == "fp32" else dtype
    std = options.get("std", 1.5)
    inputs: dict[str, Any] = {"x": draw.normal(case.shape, dtype, mean=options.get("mean", 0.3), std=std)}
    if options.get("weight", True):
        inputs["weight"] = draw.normal((n,), parameters, mean=1.0, std=0.3)
    if options.get("residual", False) or "stream" in options:
        inputs["residual"] = draw.normal(case.shape, stream, std=2.0)
    if "eps" in options:
        inputs["eps"] = options["eps"]
    return inputs


def _restart(inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """0 + stream: the rounded stream is what is normalised."""
    if inputs.get("residual") is None:
        return None
    return {**inputs, "x": torch.zeros_like(inputs["x"]), "residual": outputs["stream"]}


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """x (and the residual) read, y (and the stream) written; backward reads dy and x and writes dx."""
    elements = torch.Size(case.shape).numel()
    streams = 2 if case.options.get("residual") else 1
    size = elements * dtype.itemsize
    return Cost(2 * streams * size, (3 if streams == 1 else 4) * size, 4 * elements, 10 * elements)


def _baseline(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, residual: Tensor | None = None
) -> Any:
    s = x if residual is None else x + residual
    wide = (
        s if weight is None else s.to(torch.promote_types(s.dtype, weight.dtype))
    )  # one dtype, or it is not fused
    y = F.rms_norm(wide, s.shape[-1:], None if weight is None else weight.to(wide.dtype), eps).to(x.dtype)
    return y if residual is None else (y, s)


_CASES: tuple[Case, ...] = (
    *(Case((rows, n)) for rows, n in ((0, 5), (1, 1), (5, 33), (70, 768), (3, 50257))),
    Case((3, 0)),
    Case((2, 3, 5, 40)),
    Case((9, 131), {"weight": False}),
    Case((9, 257), {"mean": 1000.0}),
    Case((6, 100), {"eps": 0.5, "std": 0.1}),
    Case((5, 1031), {"residual": True, "mean": 100.0}),
    Case((8, 96), {"residual": True, "weight": False}),
    Case((6, 100), {"parameters": "fp32"}, mixed=True),
    Case((6, 100), {"stream": "fp32"}, mixed=True),
    Case((6, 333), {"parameters": "fp32", "stream": "fp32"}, mixed=True),
)
_BENCH = (Case((64, 768)), Case((8192, 768)), Case((2048, 4096), {"residual": True}))

SPEC = register(
    OpSpec(
        name="rms_norm",
        entries={
            "fwd": Entry(
                "(Tensor x, Tensor? weight, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
                _fwd_fake,
            ),
            "bwd": Entry(
                "(Tensor dy, Tensor? dstream, Tensor x, Tensor? weight, Tensor rstd, bool need_dx, bool need_dw)"
                " -> (Tensor, Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=rms_norm,
        prepare=_prepare,
        reference=reference.rms_norm,
        condition=reference.condition,
        outputs=("y", "stream"),
        gradients=("x", "weight", "residual"),
        restart=_restart,
        intermediates=("stream",),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cost=_cost,
        baseline=_baseline,
    )
)
