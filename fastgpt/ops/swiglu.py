"""SwiGLU: the kernels of `geglu` with another activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastgpt._core.autograd import apply
from fastgpt._core.dispatch import Backend
from fastgpt._core.plan import planned
from fastgpt._core.registry import register
from fastgpt._core.spec import Case, OpSpec
from fastgpt.ops.geglu import SPEC as GEGLU
from fastgpt.ops.geglu import GatedUnit, cost, make_halves, prepare_halves
from fastgpt.reference import swiglu as reference


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend = None) -> Tensor:
    """y = silu(gate) * up.

    Args:
        gate: [..., n], floating.
        up: of gate's shape and dtype. The two are often halves of one projection, `gate, up = h.chunk(2, dim=-1)`:
            such rows, 2 n apart, are read in place.
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        y [..., n] in gate's dtype. The product of the two is not rounded in between.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Shazeer, "GLU variants improve Transformer" (arXiv:2002.05202).
    """
    run, chosen, args = planned(SPEC, backend, (gate, up))
    if run is None:
        return apply(GatedUnit, chosen, reference.swiglu, *args)
    return run(*args)


def _prepare(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, str]:
    prepare_halves(gate, up)
    return gate, up, "silu"


def _baseline(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


_CASES: tuple[Case, ...] = (
    *(Case(shape) for shape in ((0, 7), (3, 0), (1, 1), (7, 1), (5, 33), (2, 3, 70), (13,), (37, 1600))),
    Case((9, 257), {"std": 12.0}),
    Case((9, 257), {"mean": -40.0, "std": 12.0}),
    Case((9, 257), {"std": 1e-4}),
)
_BENCH = (Case((64, 3072)), Case((2048, 3072)), Case((8192, 3072)))

SPEC = register(
    OpSpec(
        name="swiglu",
        kernels="geglu",
        entries=GEGLU.entries,
        function=swiglu,
        prepare=_prepare,
        reference=reference.swiglu,
        condition=reference.condition,
        outputs=("y",),
        gradients=("gate", "up"),
        make_inputs=make_halves,
        cases=_CASES,
        bench_cases=_BENCH,
        cost=cost,
        baseline=_baseline,
    )
)
