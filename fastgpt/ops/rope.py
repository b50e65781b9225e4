"""Rotary position embedding of q and k in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt._core import validate
from fastgpt._core.autograd import apply, backward_through, double_backward_wanted
from fastgpt._core.dispatch import Backend
from fastgpt._core.library import call
from fastgpt._core.plan import planned
from fastgpt._core.registry import register
from fastgpt._core.spec import Case, Cost, Draw, Entry, OpSpec
from fastgpt.reference import rope as reference
from fastgpt.reference.attention import heads_inside


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    backend: Backend = None,
) -> tuple[Tensor, Tensor]:
    """Turns each pair (x1, x2) of features of q and k by its angle: (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        q: [B, H, T, D], floating, of any strides: a view of [B, T, H, D] or packed storage is read in place.
        k: [B, Hkv, T, D] in q's dtype.
        cos, sin: of the angles, [T, R / 2] or [B, T, R / 2], in fp32 or q's dtype; R <= D features turn, those from
            R on stay as they are. They get no gradient.
        interleaved: False: feature i and i + R / 2 are a pair (GPT-NeoX, Llama in Hugging Face's layout); True: 2i
            and 2i + 1 (GPT-J, Llama's original weights).
        backend: a name, several in order, or None for the automatic choice.

    Returns:
        (q', k') in the shapes and dtype of q and k: views of [B, T, H, D] storage, as the outputs of `attention`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv:2104.09864), section 3.2.2.
    """
    run, chosen, args = planned(SPEC, backend, (q, k, cos, sin, interleaved))
    if run is None:
        return apply(_Rope, chosen, *args)
    return run(*args)


class _Rope(torch.autograd.Function):
    """Linear in q and k: backward turns the other way and needs neither."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.backend, ctx.interleaved = backend, interleaved
        ctx.set_materialize_grads(False)
        return call("rope_fwd", backend, q, k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> Any:
        cos, sin = ctx.saved_tensors
        _, need_dq, need_dk, *_ = ctx.needs_input_grad
        dq, dk = dq if need_dq else None, dk if need_dk else None
        if double_backward_wanted():
            dq, dk = (_by_definition(ctx, dy, cos, sin) for dy in (dq, dk))
        elif dq is not None or dk is not None:
            dq, dk = call("rope_bwd", ctx.backend, cos, sin, dq, dk, ctx.interleaved)
        return None, dq if need_dq else None, dk if need_dk else None, None, None, None


def _by_definition(ctx: Any, dy: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor | None:
    """The gradient of q or k by the reference, for gradients of gradients."""
    if dy is None:
        return None
    x = torch.zeros_like(dy, requires_grad=True)

    def turn(x: Tensor) -> Tensor:
        return reference.rope(x, x[:, :0], cos, sin, interleaved=ctx.interleaved)[0]

    return backward_through(turn, (x,), dy)[0]


def _prepare(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    for name, tensor in (("q", q), ("k", k)):
        validate.floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected [B, H, T, D], got shape {tuple(tensor.shape)}")
    batch, _, length, width = q.shape
    validate.beside("k", k, (batch, k.shape[1], length, width), (q.dtype,), "q", q)
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(name, table, q)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"sin: expected shape {tuple(cos.shape)} and {cos.dtype} as cos, got {tuple(sin.shape)} and {sin.dtype}"
        )
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved: expected True or False, got {interleaved!r}")
    return q, k, cos, sin, interleaved


def _check_table(name: str, table: Any, q: Tensor) -> None:
    batch, _, length, width = q.shape
    validate.floating(name, table)
    validate.dtype(name, table, (torch.float32, q.dtype), f"q is {q.dtype}")
    validate.same_device(name, table, "q", q)
    half = table.shape[-1]
    if table.dim() not in (2, 3) or table.shape[:-1] not in ((length,), (batch, length)) or 2 * half > width:
        raise ValueError(
            f"{name}: expected [{length}, R / 2] or [{batch}, {length}, R / 2] with R <= {width},"
            f" got shape {tuple(table.shape)}"
        )
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor that needs no gradient: rope has none for it")


def _fwd_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return heads_inside(q, q.shape, q.dtype), heads_inside(k, k.shape, k.dtype)


def _bwd_fake(
    cos: Tensor, sin: Tensor, dq: Tensor | None, dk: Tensor | None, interleaved: bool
) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if dq is None else heads_inside(dq, dq.shape, dq.dtype),
        None if dk is None else heads_inside(dk, dk.shape, dk.dtype),
    )


def _make_inputs(case: Case, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """Of a case whose shape is (B, H, T, D). layout "BTHD": heads inside, as a projection gives them."""
    (batch, heads, length, width), options = case.shape, case.options
    kv_heads = options.get("k_heads", heads)

    def of(heads: int, mean: float) -> Tensor:
        if options.get("layout") == "BTHD":
            return draw.normal((batch, length, heads, width), dtype, mean=mean).transpose(1, 2)
        return draw.normal((batch, heads, length, width), dtype, mean=mean)

    half = width // (4 if options.get("turning") == "half" else 2)
    lead = (batch, length) if options.get("tables") == "each" else (length,)
    angle = draw.normal((*lead, half), torch.float32, std=3.0)
    kind = dtype if options.get("tables_dtype") == "same" else torch.float32
    return {
        "q": of(heads, 0.1),
        "k": of(kv_heads, -0.2),
        "cos": angle.cos().to(kind),
        "sin": angle.sin().to(kind),
        "interleaved": options.get("interleaved", False),
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """q and k read, q' and k' written, cos and sin read once; backward the same."""
    batch, heads, length, width = case.shape
    elements = batch * (heads + case.options.get("k_heads", heads)) * length * width
    moved = 2 * elements * dtype.itemsize + 4 * length * width
    return Cost(moved, moved, 3 * elements, 3 * elements)


def _baseline(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """As Hugging Face's models write it: x * cos + (x with its pairs turned by a right angle) * sin."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    half = cos.shape[-1]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def turned(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def rotate(x: Tensor) -> Tensor:
        part = x[..., : 2 * half]
        y = (part * cos + turned(part) * sin).to(x.dtype)
        return y if 2 * half == x.shape[-1] else torch.cat((y, x[..., 2 * half :]), -1)

    return rotate(q), rotate(k)


_CASES: tuple[Case, ...] = (  # few positions: Triton's interpreter takes them one by one
    Case((1, 3, 2, 16)),
    Case((1, 3, 2, 34), {"interleaved": True}),
    Case((2, 4, 2, 64), {"layout": "BTHD", "k_heads": 2}),
    Case((1, 4, 2, 128), {"layout": "BTHD", "k_heads": 1, "tables": "each", "interleaved": True}),
    Case((1, 2, 3, 80), {"turning": "half", "tables_dtype": "same"}),
    Case((2, 5, 2, 23), {"tables": "each"}),
    Case((2, 2, 2, 3), {"interleaved": True}),
    Case((1, 1, 1, 2)),
    Case((1, 1, 2, 1)),
    Case((2, 2, 0, 8)),
    Case((0, 2, 3, 8), {"interleaved": True}),
    Case((2, 0, 2, 8), {"k_heads": 2}),
    Case((1, 40, 2, 100), {"turning": "half", "interleaved": True, "k_heads": 5}),
)
_BENCH = (
    Case((8, 12, 1024, 64), {"layout": "BTHD"}),
    Case((4, 32, 1024, 128), {"layout": "BTHD", "k_heads": 8}),
    Case((8, 12, 1024, 64), {"layout": "BTHD", "interleaved": True}),
    Case((1, 12, 1, 64), {"layout": "BTHD"}),
)

SPEC = register(
    OpSpec(
        name="rope",
        entries={
            "fwd": Entry(
                "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
                _fwd_fake,
            ),
            "bwd": Entry(
                "(Tensor cos, Tensor sin, Tensor? dq, Tensor? dk, bool interleaved) -> (Tensor, Tensor)",
                _bwd_fake,
            ),
        },
        function=rope,
        prepare=_prepare,
        reference=reference.rope,
        condition=reference.condition,
        outputs=("q_rotated", "k_rotated"),
        gradients=("q", "k"),
        make_inputs=_make_inputs,
        cases=_CASES,
        bench_cases=_BENCH,
        cost=_cost,
        baseline=_baseline,
    )
)
