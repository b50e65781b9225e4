# ruff: noqa: E501  (a table)
"""A wrong argument is one line that names it, says what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import OPS

from fastgpt import ops


def f(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


bf16, fp16, fp64, int64 = torch.bfloat16, torch.float16, torch.float64, torch.int64
RNG = torch.tensor([1, 2])

# (op, the call, exception, what the message says: name, expected, got)
WRONG: list[tuple[str, str, Callable[[], Any], type[Exception], list[str]]] = [
    ("layer_norm", "list", lambda: ops.layer_norm([1.0]), TypeError, ["x:", "tensor", "list"]),
    ("layer_norm", "integers", lambda: ops.layer_norm(f(2, 3, dtype=int64)), TypeError, ["x:", "float32", "int64"]),
    ("layer_norm", "scalar", lambda: ops.layer_norm(f()), ValueError, ["x:", "one dimension", "scalar"]),
    ("layer_norm", "weight-shape", lambda: ops.layer_norm(f(2, 3), f(4)), ValueError, ["weight:", "(3,)", "(4,)"]),
    ("layer_norm", "weight-2d", lambda: ops.layer_norm(f(2, 3), f(1, 3)), ValueError, ["weight:", "(3,)", "(1, 3)"]),
    ("layer_norm", "bias-shape", lambda: ops.layer_norm(f(2, 3), f(3), f(2)), ValueError, ["bias:", "(3,)", "(2,)"]),
    ("layer_norm", "weight-dtype", lambda: ops.layer_norm(f(2, 3), f(3, dtype=bf16)), TypeError, ["weight:", "float32", "bfloat16"]),
    ("layer_norm", "bias-not-as-weight", lambda: ops.layer_norm(f(2, 3, dtype=bf16), f(3), f(3, dtype=bf16)), TypeError, ["bias:", "weight is torch.float32", "got torch.bfloat16"]),
    ("layer_norm", "fp16-beside-bf16", lambda: ops.layer_norm(f(2, 3, dtype=bf16), f(3, dtype=fp16)), TypeError, ["weight:", "x is torch.bfloat16", "got torch.float16"]),
    ("layer_norm", "fp64-beside-fp32", lambda: ops.layer_norm(f(2, 3), f(3, dtype=fp64)), TypeError, ["weight:", "float32", "float64"]),
    ("layer_norm", "residual-shape", lambda: ops.layer_norm(f(2, 3), residual=f(3)), ValueError, ["residual:", "(2, 3)", "(3,)"]),
    ("layer_norm", "residual-dtype", lambda: ops.layer_norm(f(2, 3), residual=f(2, 3, dtype=bf16)), TypeError, ["residual:", "float32", "bfloat16"]),
    ("layer_norm", "device", lambda: ops.layer_norm(f(2, 3), f(3, device="meta")), ValueError, ["weight:", "cpu", "meta"]),
    ("layer_norm", "backend", lambda: ops.layer_norm(f(2, 3), backend="cpuu"), ValueError, ["backend:", "cpu", "'cpuu'"]),
    ("gelu", "string", lambda: ops.gelu("x"), TypeError, ["x:", "tensor", "str"]),
    ("gelu", "bool", lambda: ops.gelu(f(2, dtype=torch.bool)), TypeError, ["x:", "float32", "bool"]),
    ("gelu", "approximate", lambda: ops.gelu(f(2), approximate="erf"), ValueError, ["approximate:", "'none', 'tanh'", "'erf'"]),
    ("gelu", "bias-shape", lambda: ops.gelu(f(2, 3), f(2)), ValueError, ["bias:", "(3,)", "(2,)"]),
    ("gelu", "bias-dtype", lambda: ops.gelu(f(2, 3, dtype=bf16), f(3)), TypeError, ["bias:", "bfloat16", "float32"]),
    ("gelu", "device", lambda: ops.gelu(f(2, 3), f(3, device="meta")), ValueError, ["bias:", "cpu", "meta"]),
    ("gelu", "backend", lambda: ops.gelu(f(2), backend="tpu"), ValueError, ["backend:", "cpu", "'tpu'"]),
    ("softmax", "scalar", lambda: ops.softmax(f()), ValueError, ["x:", "one dimension"]),
    ("softmax", "causal-1d", lambda: ops.softmax(f(3), causal=True), ValueError, ["x:", "[..., Tq, Tk]", "(3,)"]),
    ("softmax", "mask-shape", lambda: ops.softmax(f(2, 3), mask=f(2, 2)), ValueError, ["mask:", "(2, 3)", "(2, 2)"]),
    ("softmax", "mask-larger", lambda: ops.softmax(f(3), mask=f(2, 3)), ValueError, ["mask:", "(3,)", "(2, 3)"]),
    ("softmax", "mask-integers", lambda: ops.softmax(f(2, 3), mask=f(2, 3, dtype=int64)), TypeError, ["mask:", "bool", "int64"]),
    ("softmax", "mask-dtype", lambda: ops.softmax(f(2, 3), mask=f(2, 3, dtype=bf16)), TypeError, ["mask:", "float32", "bfloat16"]),
    ("softmax", "mask-device", lambda: ops.softmax(f(2, 3), mask=f(2, 3, device="meta")), ValueError, ["mask:", "cpu", "meta"]),
    ("softmax", "mask-list", lambda: ops.softmax(f(2), mask=[True, False]), TypeError, ["mask:", "tensor", "list"]),
    ("softmax", "p-one", lambda: ops.softmax(f(2), dropout_p=1.0), ValueError, ["dropout_p:", "p < 1", "1.0"]),
    ("softmax", "p-negative", lambda: ops.softmax(f(2), dropout_p=-0.1), ValueError, ["dropout_p:", "0 <= p", "-0.1"]),
    ("softmax", "p-nan", lambda: ops.softmax(f(2), dropout_p=float("nan")), ValueError, ["dropout_p:", "nan"]),
    ("softmax", "rng-dtype", lambda: ops.softmax(f(2), dropout_p=0.1, rng=f(2)), ValueError, ["rng:", "int64", "(2,)"]),
    ("softmax", "rng-shape", lambda: ops.softmax(f(2), dropout_p=0.1, rng=RNG[:1]), ValueError, ["rng:", "(2,)"]),
    ("softmax", "rng-number", lambda: ops.softmax(f(2), dropout_p=0.1, rng=7), ValueError, ["rng:", "int64", "7"]),
    ("softmax", "rng-device", lambda: ops.softmax(f(2), dropout_p=0.1, rng=RNG.to("meta")), ValueError, ["rng:", "cpu", "meta"]),
    ("softmax", "backend", lambda: ops.softmax(f(2), backend=["cpu", "gpu"]), ValueError, ["backend:", "cpu", "'gpu'"]),
    ("attention", "3d", lambda: ops.attention(f(2, 3, 4), f(2, 3, 4), f(2, 3, 4)), ValueError, ["q:", "[B, H, T, D]", "(2, 3, 4)"]),
    ("attention", "heads", lambda: ops.attention(f(1, 4, 2, 8), f(1, 3, 2, 8), f(1, 3, 2, 8)), ValueError, ["k:", "divides q's 4", "3"]),
    ("attention", "width", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 2, 4), f(1, 2, 2, 8)), ValueError, ["k:", "(1, 2, 2, 8)", "(1, 2, 2, 4)"]),
    ("attention", "v-length", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 3, 8), f(1, 2, 2, 8)), ValueError, ["v:", "(1, 2, 3, 8)", "(1, 2, 2, 8)"]),
    ("attention", "dtype", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 2, 8, dtype=bf16), f(1, 2, 2, 8)), TypeError, ["k:", "float32", "bfloat16"]),
    ("attention", "device", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 2, 8), f(1, 2, 2, 8, device="meta")), ValueError, ["v:", "cpu", "meta"]),
    ("attention", "mask", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 3, 8), f(1, 2, 3, 8), mask=f(2, 2)), ValueError, ["mask:", "(1, 2, 2, 3)", "(2, 2)"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "words"), [row[2:] for row in WRONG], ids=[f"{row[0]}-{row[1]}" for row in WRONG]
)
def test_said_in_one_line(call: Callable[[], Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_every_op_is_here() -> None:
    assert {row[0] for row in WRONG} == set(OPS)
