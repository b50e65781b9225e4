"""Token embeddings, alone or with position embeddings added, in one pass; gradients without races."""

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
from fastgpt.reference import embedding as reference


def embedding(
    tokens: Tensor,
    token_weight: Tensor,
    position_weight: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    padding_idx: int | None = None,
    backend: Backend = None,
) -> Tensor:
    """out[..., t] = token_weight[tokens[..., t]] + position_weight[positions[..., t]], added in fp32, rounded once.

    Args:
        tokens: int64 [..., T], each from 0 to V - 1.
        token_weight: [V, C], floating.
        position_weight: [P, C] in token_weight's dtype, or None.
        positions: int64, broadcastable to the shape of tokens, each from 0 to P - 1; None: 0 to T - 1 along the last
            dimension.
        padding_idx: a row of token_weight (a negative one counts from the end) that gets no gradient, as in
            torch.nn.functional.embedding; the output does not change.
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        [*tokens.shape, C] in token_weight's dtype.

    Gradients are dense, summed in fp32 in the order of the tokens and rounded once: bitwise repeatable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The values of tokens and
            positions are looked at on a CPU only, and not in compiled code: on a GPU that would wait for it. What is
            out of range there reads nothing outside the weights: on the backends cpu and triton its row becomes NaN,
            and it adds to no gradient; PyTorch's own op (backend torch) raises its own error.
    """
    run, chosen, args = planned(
        SPEC, backend, (tokens, token_weight, position_weight, positions, padding_idx)
    )
    validate.between("tokens", tokens, 0, token_weight.shape[0] - 1)
    if positions is not None and position_weight is not None:
        validate.between("positions", positions, 0, position_weight.shape[0] - 1)
    if run is None:
        padding = -1 if padding_idx is None else padding_idx % token_weight.shape[0]
        return apply(_Embedding, chosen, padding, *args)
    return run(*args)


class _Embedding(torch.autograd.Function):
    """Linear in the weights, so that backward needs no more of them than their shapes."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        padding_idx: int,
        token_weight: Tensor,
        tokens: Tensor,
        position_weight: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(tokens, positions)
        ctx.backend, ctx.padding_idx = backend, padding_idx
        ctx.vocab_size = token_weight.shape[0]
        ctx.num_positions = 0 if position_weight is None else position_weight.shape[0]
        ctx.has_positions = position_weight is not None
        return call("embedding_fwd", backend, token_weight, tokens, position_weight, positions)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        tokens, positions = ctx.saved_tensors
        _, _, need_dtoken, _, need_dposition, _ = ctx.needs_input_grad
        if double_backward_wanted():
            width = dout.shape[-1]
            weights = (
                dout.new_zeros(ctx.vocab_size, width, requires_grad=need_dtoken),
                dout.new_zeros(ctx.num_positions, width, requires_grad=need_dposition)
                if ctx.has_positions
                else None,
            )
            padding_idx = None if ctx.padding_idx < 0 else ctx.padding_idx
            dtoken, dposition = backward_through(
                lambda token_weight, position_weight: reference.embedding(
                    tokens, token_weight, position_weight, positions=positions, padding_idx=padding_idx
                ),
                weights,
                dout,
            )
        else:
            dtoken, dposition = call(
                "embedding_bwd", ctx.backend, dout, tokens, positions, ctx.vocab_size, ctx.num_positions,
                ctx.padding_idx, need_dtoken, need_dposition,
            )  # fmt: skip
        return (
            None,
            None,
            dtoken if need_dtoken else None,
            None,
            dposition if need_dposition else None,
            None,
        )


def _prepare(
    tokens: Tensor,
    token_weight: Tensor,
    position_weight: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    _check_weight("token_weight", token_weight)
    vocab_size, width = token_weight.shape
    if isinstance(tokens, Tensor) and tokens.dim() == 0:
        raise ValueError("tokens: expected at least one dimension, got a scalar")
    _check_index("tokens", tokens, token_weight)
    if padding_idx is not None and (
        isinstance(padding_idx, bool)
        or not isinstance(padding_idx, int)
        or not -vocab_size <= padding_idx < vocab_size
    ):
        raise ValueError(
            f"padding_idx: expected None or a row from {-vocab_size} to {vocab_size - 1}, got {padding_idx!r}"
        )
    if position_weight is None:
        if positions is not None:
            raise ValueError("positions: expected a position_weight beside them, got None")
        return token_weight, tokens, None, None
    _check_weight("position_weight", position_weight)
    num_positions = position_weight.shape[0]
    validate.beside(
        "position_weight",
        position_weight,
        (num_positions, width),
        (token_weight.dtype,),
        "token_weight",
        token_weight,
    )
    if positions is None:
        if tokens.shape[-1] > num_positions:
            raise ValueError(
                f"tokens: expected at most {num_positions} in the last dimension (rows of position_weight),"
                f" got {tokens.shape[-1]}"
            )
        return token_weight, tokens, position_weight, None
    _check_index("positions", positions, token_weight)
    shape = positions.shape
    missing = tokens.dim() - len(shape)
    if missing < 0 or any(
        size not in (1, other) for size, other in zip(shape, tokens.shape[missing:], strict=True)
    ):
        raise ValueError(
            f"positions: expected a shape that broadcasts to {tuple(tokens.shape)}, got {tuple(shape)}"
        )
    return token_weight, tokens, position_weight, positions


def _check_weight(name: str, weight: Any) -> None:
    validate.floating(name, weight)
    if weight.dim() != 2:
        raise ValueError(f"{name}: expected [rows, C], got shape {tuple(weight.shape)}")


def _check_index(name: str, index: Any, weight: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {index.dtype}")
    validate.same_device(name, index, "token_weight", weight)


def _fwd_fake(
    token_weight: Tensor, tokens: Tensor, position_weight: Tensor | None, positions: Tensor | None
) -> Tensor:
    return token_weight.new_empty((*tokens.shape, token_weight.shape[-1]))


def _bwd_fake(
    dout: Tensor,
    tokens: Tensor,
    positions: Tensor | None,
    vocab_size: int,
    num_positions: int,
    padding_idx: int,
    need_dtoken: bool,
    need_dposition: bool,
) -> tuple[Tensor | None, Tensor | None]:
    width = dout.shape[-1]
    return (
        dout.new_empty(vocab_size, width) if need_dtoken else None,
        dout.new_empty(num_positions, width) if need_dposition else None,
    )


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """Of a case whose shape is (*tokens.shape, C)."""
    options, (*shape, width) = case.options, case.shape
    vocab_size = options.get("vocab", 37)
    tokens = draw.integers(0, max(vocab_size, 1), shape)
    if options.get("frequent"):  # nine tenths of them are one and the same
        tokens = tokens.masked_fill(draw.bernoulli(shape, 0.9), 3)
    inputs: dict[str, Any] = {
        "tokens": tokens,
        "token_weight": draw.normal((vocab_size, width), dtype, mean=options.get("mean", 0.0)),
    }
    if options.get("padding"):
        inputs["tokens"] = tokens.masked_fill(draw.bernoulli(shape, 0.3), 5)
        inputs["padding_idx"] = 5 - vocab_size
    kind = options.get("positions")
    if kind is not None:
        rows = shape[-1] + 3 if kind == "all" else 11
        inputs["position_weight"] = draw.normal((rows, width), dtype, std=0.7)
        if kind != "all":
            inputs["positions"] = draw.integers(0, rows, shape if kind == "each" else (*shape[:-1], 1))
    return inputs


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """A row read and one written for each token; the gradients' rows, used or not, are all written.

    Of the position embeddings each row once; of the token embeddings as many as there are tokens.
    """
    *shape, width = case.shape
    tokens = torch.Size(shape).numel()
    row = width * dtype.itemsize
    positions = shape[-1] + 3 if case.options.get("positions") else 0
    vocab_size = case.options.get("vocab", 37)
    return Cost(
        tokens * (2 * row + 8) + positions * row,
        tokens * (row + 8) + (vocab_size + positions) * row,
        tokens * width,
        2 * tokens * width,
    )


def _baseline(
    tokens: Tensor,
    token_weight: Tensor,
    position_weight: Tensor | None = None,
    positions: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    out = F.embedding(tokens, token_weight, padding_idx)
    if position_weight is None:
        return out
    if positions is None:
        return out + position_weight[: tokens.shape[-1]]
    return out + F.embedding(positions, position_weight)


_CASES: tuple[Case, ...] = (
    Case((7, 24)),
    Case((2, 5, 33), {"positions": "all"}),
    Case((3, 4, 70), {"positions": "each", "padding": True}),
    Case((2, 2, 3, 17), {"positions": "row"}),
    Case((1, 1), {"positions": "all"}),
    Case((4, 3, 1), {"positions": "all"}),
    Case((5, 0), {"positions": "all"}),
    Case((0, 3, 8), {"positions": "all"}),
    Case((0, 6), {"vocab": 0}),
    Case((70, 2, 33), {"positions": "all", "frequent": True, "mean": 10.0, "vocab": 9}),
    Case((2, 9, 768), {"positions": "all", "vocab": 40}),
)
_BENCH = (
    Case((8, 1024, 768), {"positions": "all", "vocab": 50257}),
    Case((8, 1024, 1600), {"positions": "all", "vocab": 50257}),
    Case((8, 1024, 768), {"vocab": 50257}),
    Case((1, 8, 768), {"positions": "all", "vocab": 1000}),
)

_CPU = (
    *_BENCH,
    *(Case((8, 1024, width), {"positions": "all", "vocab": 8000}) for width in (3072, 6400)),
)

SPEC = register(
    OpSpec(
        name="embedding",
        entries={
            # The weight comes first: its device and dtype are those of the call.
            "fwd": Entry(
                "(Tensor token_weight, Tensor tokens, Tensor? position_weight, Tensor? positions) -> Tensor",
                _fwd_fake,
            ),
            "bwd": Entry(
                "(Tensor dout, Tensor tokens, Tensor? positions, SymInt vocab_size, SymInt num_positions,"
                " int padding_idx, bool need_dtoken, bool need_dposition) -> (Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=embedding,
        prepare=_prepare,
        reference=reference.embedding,
        condition=reference.condition,
        outputs=("out",),
        gradients=("token_weight", "position_weight"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cpu_cases=_CPU,
        cost=_cost,
        baseline=_baseline,
    )
)
