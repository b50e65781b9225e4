"""The attention softmax: scale, masks, causality and dropout in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt._core import validate
from fastgpt._core.autograd import apply, double_backward_wanted
from fastgpt._core.dispatch import Backend
from fastgpt._core.library import call
from fastgpt._core.plan import planned
from fastgpt._core.registry import register
from fastgpt._core.spec import Case, Cost, Draw, Entry, OpSpec, row_cases
from fastgpt.reference import softmax as reference


def softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    backend: Backend = None,
) -> Tensor:
    """Softmax of scale * x + mask over the last dimension.

    Args:
        x: [..., n], floating; [..., Tq, Tk] when causal.
        scale: multiplies x.
        mask: broadcastable to x. Boolean: True = may look. Float (x's dtype or fp32): added to the scores;
            differentiable. Read by its strides, never expanded.
        causal: query q sees the keys k <= q + Tk - Tq (the last query sees every key).
        dropout_p: probability, 0 <= p < 1, that a result is zeroed; the rest is divided by 1 - p.
        rng: int64 tensor (seed, offset) on x's device: Philox 4x32-10 with the element's index plus offset as
            its counter. Drawn from torch's generator when None.
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        y in x's shape and dtype. A row with everything excluded by a boolean mask or causality is zero, and so
        are its gradients; -inf in x or in a float mask behaves as in torch.softmax.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    rng = validate.drawn_rng(x, dropout_p, rng)
    run, chosen, args = planned(SPEC, backend, (x, scale, mask, causal, dropout_p, rng))
    if run is None:
        return apply(_Softmax, chosen, *args)
    return run(*args)[0]


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        scale: float,
        mask: Tensor | None,
        causal: bool,
        dropout_p: float,
        rng: Tensor | None,
    ) -> Tensor:
        y, p = call("softmax_fwd", backend, x, scale, mask, causal, dropout_p, rng)
        # Backward needs the probabilities and, for a float mask's gradient, the mask's shape and dtype.
        ctx.save_for_backward(y if dropout_p == 0.0 else p, mask if ctx.needs_input_grad[3] else None, rng)
        ctx.backend, ctx.options = backend, (scale, causal, dropout_p)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        p, mask, rng = ctx.saved_tensors
        scale, causal, dropout_p = ctx.options
        need_dx, need_dmask = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        needs = (need_dx, need_dmask)
        if double_backward_wanted():
            if dropout_p > 0.0:
                raise RuntimeError("softmax: double backward is not supported with dropout")
            # p is this Function's own output, so that plain tensor operations on it can be differentiated.
            dx, dmask = reference.softmax_bwd(dy, p, scale, mask, causal, 0.0, None, *needs)
        else:
            dx, dmask = call("softmax_bwd", ctx.backend, dy, p, scale, mask, causal, dropout_p, rng, *needs)
        return None, dx if need_dx else None, None, dmask if need_dmask else None, None, None, None


def _prepare(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, float, Tensor | None, bool, float, Tensor | None]:
    validate.floating("x", x)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        x = x.float()  # there, as PyTorch's, in fp32
        mask = validate.autocast_mask(mask, x)
    if causal and x.dim() < 2:
        raise ValueError(f"x: expected [..., Tq, Tk] for causal, got shape {tuple(x.shape)}")
    if mask is not None:
        validate.mask("mask", mask, "x", x, x.shape)
    dropout_p, rng = validate.dropout(x, "x", dropout_p, rng)
    return x, validate.number("scale", scale), mask, bool(causal), dropout_p, rng


def _fwd_fake(
    x: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float, rng: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return x.new_empty(x.shape), x.new_empty(x.shape) if dropout_p > 0.0 else None


def _bwd_fake(
    dy: Tensor,
    p: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    rng: Tensor | None,
    need_dx: bool,
    need_dmask: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dmask = mask.new_empty(mask.shape) if need_dmask and mask is not None else None
    return dy.new_empty(dy.shape) if need_dx else None, dmask


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    options, shape = case.options, case.shape
    inputs: dict[str, Any] = {
        "x": draw.normal(shape, dtype, mean=options.get("mean", 0.0), std=options.get("std", 2.0)),
        "scale": options.get("scale", 1.0),
        "causal": options.get("causal", False),
    }
    kind, pattern = options.get("mask"), options.get("over", "all")
    if kind is not None:
        mask_shape = (
            tuple(1 if letter == "1" else size for letter, size in zip(pattern, shape, strict=True))
            if pattern != "all"
            else shape
        )
        if kind == "bool":
            inputs["mask"] = draw.bernoulli(mask_shape, 0.7)
        else:
            inputs["mask"] = draw.normal(mask_shape, torch.float32 if kind == "fp32" else dtype)
    if "dropout" in options:
        inputs["dropout_p"] = options["dropout"]
        inputs["rng"] = draw.integers(0, 2**62, (2,))
    return inputs


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """x read, y written; backward reads dy and y and writes dx. Causal: half is not read, all is written."""
    elements = torch.Size(case.shape).numel()
    read = elements
    if case.options.get("causal"):
        queries, keys = case.shape[-2:]
        seen = sum(min(max(q + 1 + keys - queries, 0), keys) for q in range(queries))
        read = elements // max(queries * keys, 1) * seen
    size = dtype.itemsize
    return Cost((read + elements) * size, (2 * read + elements) * size, 12 * read, 5 * read)


def _baseline(
    x: Tensor,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    if scale != 1.0:
        x = x * scale
    if mask is not None:
        x = x.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else x + mask
    if causal:
        queries, keys = x.shape[-2:]
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
        x = x.masked_fill(~triangle, float("-inf"))
    y = torch.softmax(x, -1)
    return torch.dropout(y, dropout_p, True) if dropout_p > 0.0 else y


def _over(shape: tuple[int, ...], kind: str, *patterns: str, **options: Any) -> tuple[Case, ...]:
    """A case per pattern: "b11k" keeps the first and last dimension of the mask and broadcasts the others."""
    return tuple(Case(shape, {"mask": kind, "over": pattern, **options}) for pattern in patterns)


_CASES: tuple[Case, ...] = (
    *(
        Case(shape)
        for shape in ((0, 5), (1, 1), (7, 1), (5, 33), (9, 257), (2, 3, 70), (3, 50257), (13,), (3, 0))
    ),
    Case((5, 100), {"scale": -0.7, "std": 5.0}),
    Case((4, 130), {"mean": 1000.0, "std": 30.0}),
    *(
        Case(shape, {"causal": True, "scale": 0.125})
        for shape in ((1, 1), (33, 33), (2, 2, 17, 70), (3, 1, 64), (2, 9, 4), (2, 130, 130))
    ),
    *(
        case
        for kind in ("bool", "same", "fp32")
        for case in _over((3, 4, 10, 37), kind, "bhqk", "b11k", "11qk", "1hq1", "1111", scale=0.5)
    ),
    *_over((2, 3, 9, 70), "bool", "b11k", causal=True),
    *_over((2, 3, 9, 70), "fp32", "11qk", causal=True),
    *_over((6, 40), "bool", "all"),
    Case((40, 70), {"dropout": 0.3}),
    Case((2, 3, 20, 33), {"dropout": 0.1, "causal": True, "scale": 0.2}),
    *_over((2, 3, 20, 33), "fp32", "1hqk", dropout=0.5),
)
_BENCH = (
    *(Case((24, length, length)) for length in (128, 512)),
    *(Case((24, length, length), {"causal": True, "scale": 0.125}) for length in (128, 512)),
    Case((128, 50257)),
    Case((4, 12, 256, 256), {"mask": "bool", "over": "b11k"}),
)
_CPU = (
    *row_cases({}),
    # About as many rows, of scores of sequences as long as those rows are wide.
    *(
        Case(shape, {"causal": True, "scale": 0.125})
        for shape in ((11, 768, 768), (5, 1600, 1600), (3, 3072, 3072), (1, 6400, 6400), (1, 4, 64))
    ),
)

SPEC = register(
    OpSpec(
        name="softmax",
        entries={
            "fwd": Entry(
                "(Tensor x, float scale, Tensor? mask, bool causal, float dropout_p, Tensor? rng)"
                " -> (Tensor, Tensor)",
                _fwd_fake,
            ),
            "bwd": Entry(
                "(Tensor dy, Tensor p, float scale, Tensor? mask, bool causal, float dropout_p, Tensor? rng,"
                " bool need_dx, bool need_dmask) -> (Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=softmax,
        prepare=_prepare,
        reference=reference.softmax,
        condition=reference.condition,
        outputs=("y",),
        gradients=("x", "mask"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cpu_cases=_CPU,
        cost=_cost,
        baseline=_baseline,
    )
)
