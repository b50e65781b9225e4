"""GEGLU, a gated linear unit after its projections; what it shares with SwiGLU is here."""

from __future__ import annotations

from collections.abc import Callable
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
from fastgpt.reference import geglu as reference


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none", backend: Backend = None) -> Tensor:
    """y = gelu(gate) * up.

    Args:
        gate: [..., n], floating.
        up: of gate's shape and dtype. The two are often halves of one projection, `gate, up = h.chunk(2, dim=-1)`:
            such rows, 2 n apart, are read in place.
        approximate: "none" (erf) or "tanh", as torch.nn.functional.gelu.
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        y [..., n] in gate's dtype. The product of the two is not rounded in between.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Shazeer, "GLU variants improve Transformer" (arXiv:2002.05202).
    """
    run, chosen, args = planned(SPEC, backend, (gate, up, approximate))
    if run is None:
        return apply(GatedUnit, chosen, reference.geglu, *args)
    return run(*args)


class GatedUnit(torch.autograd.Function):
    """`definition(gate, up)` is what double backward goes through."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, definition: Callable[..., Tensor], gate: Tensor, up: Tensor, activation: str
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend, ctx.definition, ctx.activation = backend, definition, activation
        return call("geglu_fwd", backend, gate, up, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        _, _, need_dgate, need_dup, _ = ctx.needs_input_grad
        if double_backward_wanted():
            approximate = reference.APPROXIMATE.get(ctx.activation)
            options = {} if approximate is None else {"approximate": approximate}

            def unit(gate: Tensor, up: Tensor) -> Tensor:
                return ctx.definition(gate, up, **options)

            return None, None, *backward_through(unit, (gate, up), dy), None
        dgate, dup = call("geglu_bwd", ctx.backend, dy, gate, up, ctx.activation, need_dgate, need_dup)
        return None, None, dgate if need_dgate else None, dup if need_dup else None, None


def prepare_halves(gate: Tensor, up: Tensor) -> None:
    """Validates the two factors."""
    validate.floating("gate", gate)
    validate.beside("up", up, gate.shape, (gate.dtype,), "gate", gate)


def _prepare(gate: Tensor, up: Tensor, *, approximate: str = "none") -> tuple[Tensor, Tensor, str]:
    prepare_halves(gate, up)
    validate.choice("approximate", approximate, ("none", "tanh"))
    return gate, up, reference.ACTIVATIONS[approximate]


def _fwd_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _bwd_fake(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor | None, Tensor | None]:
    return gate.new_empty(gate.shape) if need_dgate else None, up.new_empty(up.shape) if need_dup else None


def make_halves(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Tensor]:
    """gate and up of a case; mean and std are gate's."""
    options = case.options
    return {
        "gate": draw.normal(case.shape, dtype, mean=options.get("mean", 0.0), std=options.get("std", 2.0)),
        "up": draw.normal(case.shape, dtype, mean=0.2),
    }


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    return {**make_halves(case, dtype, draw), "approximate": case.options.get("approximate", "none")}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """gate and up read, y written; backward reads dy, gate and up and writes dgate and dup."""
    elements = torch.Size(case.shape).numel()
    return Cost(3 * elements * dtype.itemsize, 5 * elements * dtype.itemsize, 21 * elements, 33 * elements)


def _baseline(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(gate, approximate=approximate) * up


_FORMS: tuple[dict[str, Any], ...] = ({}, {"approximate": "tanh"})
_CASES: tuple[Case, ...] = (
    *(Case(shape, form) for form in _FORMS for shape in ((7, 1), (5, 33), (2, 3, 70))),
    *(Case((9, 257), {**form, "std": 12.0}) for form in _FORMS),
    *(Case((9, 257), {**form, "mean": -4.0, "std": 1.5}) for form in _FORMS),
    Case((37, 1600)),
    Case((0, 7)),
    Case((3, 0)),
    Case((13,), {"approximate": "tanh"}),
)
_BENCH = (
    *(Case((2048, 3072), form) for form in _FORMS),
    Case((64, 3072), {"approximate": "tanh"}),
    Case((8192, 3072), {"approximate": "tanh"}),
)

SPEC = register(
    OpSpec(
        name="geglu",
        entries={
            "fwd": Entry("(Tensor gate, Tensor up, str activation) -> Tensor", _fwd_fake),
            "bwd": Entry(
                "(Tensor dy, Tensor gate, Tensor up, str activation, bool need_dgate, bool need_dup)"
                " -> (Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=geglu,
        prepare=_prepare,
        reference=reference.geglu,
        condition=reference.condition,
        outputs=("y",),
        gradients=("gate", "up"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cost=cost,
        baseline=_baseline,
    )
)
