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


def i(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def attend(q: Any = None, **options: Any) -> Any:
    """attention of q [2, 4, 3, 8] and k, v [2, 2, 5, 8]."""
    q = f(2, 4, 3, 8) if q is None else q
    k = f(2, 2, 5, 8, dtype=getattr(q, "dtype", torch.float32))
    return ops.attention(q, k, k, **options)


def attend_qkv(*shape: int, num_heads: Any = 2, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return ops.attention_qkv(f(*(shape or (2, 5, 24)), dtype=dtype), num_heads, **options)


def attend_varlen(
    cu_q: Any = None,
    cu_k: Any = None,
    max_q: Any = 4,
    max_k: Any = 3,
    q: Any = None,
    v: Any = None,
    **options: Any,
) -> Any:
    """attention_varlen of 6 queries of 4 heads and 5 keys of 2 in two documents."""
    cu_q, cu_k = i(0, 4, 6) if cu_q is None else cu_q, i(0, 2, 5) if cu_k is None else cu_k
    q, k, v = f(6, 4, 8) if q is None else q, f(5, 2, 8), f(5, 2, 8) if v is None else v
    return ops.attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options)


IDS = torch.arange(3)


def embed(tokens: Any = IDS, position_weight: Any = 0, **options: Any) -> Any:
    """embedding of 9 rows of 4, and 5 positions."""
    places = f(5, 4) if isinstance(position_weight, int) else position_weight
    return ops.embedding(tokens, f(9, 4), places, **options)


def rotate(q: Any = None, k: Any = None, cos: Any = None, sin: Any = None, **options: Any) -> Any:
    """rope of q [2, 4, 3, 8] and k [2, 2, 3, 8]."""
    q, k = f(2, 4, 3, 8) if q is None else q, f(2, 2, 3, 8) if k is None else k
    return ops.rope(q, k, f(3, 4) if cos is None else cos, f(3, 4) if sin is None else sin, **options)


SLOPES = "alibi_slopes:"
WINDOW = ["window:", "a number of keys >= 1", "(left, right)"]

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
    ("geglu", "list", lambda: ops.geglu([1.0], f(1)), TypeError, ["gate:", "tensor", "list"]),
    ("geglu", "integers", lambda: ops.geglu(f(2, dtype=int64), f(2)), TypeError, ["gate:", "float32", "int64"]),
    ("geglu", "up-none", lambda: ops.geglu(f(2), None), TypeError, ["up:", "tensor", "NoneType"]),
    ("geglu", "up-shape", lambda: ops.geglu(f(2, 3), f(3)), ValueError, ["up:", "(2, 3)", "(3,)"]),
    ("geglu", "up-dtype", lambda: ops.geglu(f(2, dtype=bf16), f(2)), TypeError, ["up:", "gate is torch.bfloat16", "got torch.float32"]),
    ("geglu", "up-device", lambda: ops.geglu(f(2), f(2, device="meta")), ValueError, ["up:", "cpu", "meta"]),
    ("geglu", "approximate", lambda: ops.geglu(f(2), f(2), approximate="erf"), ValueError, ["approximate:", "'none', 'tanh'", "'erf'"]),
    ("geglu", "backend", lambda: ops.geglu(f(2), f(2), backend="tpu"), ValueError, ["backend:", "cpu", "'tpu'"]),
    ("gelu", "string", lambda: ops.gelu("x"), TypeError, ["x:", "tensor", "str"]),
    ("gelu", "bool", lambda: ops.gelu(f(2, dtype=torch.bool)), TypeError, ["x:", "float32", "bool"]),
    ("gelu", "approximate", lambda: ops.gelu(f(2), approximate="erf"), ValueError, ["approximate:", "'none', 'tanh'", "'erf'"]),
    ("gelu", "bias-shape", lambda: ops.gelu(f(2, 3), f(2)), ValueError, ["bias:", "(3,)", "(2,)"]),
    ("gelu", "bias-dtype", lambda: ops.gelu(f(2, 3, dtype=bf16), f(3)), TypeError, ["bias:", "bfloat16", "float32"]),
    ("gelu", "device", lambda: ops.gelu(f(2, 3), f(3, device="meta")), ValueError, ["bias:", "cpu", "meta"]),
    ("gelu", "backend", lambda: ops.gelu(f(2), backend="tpu"), ValueError, ["backend:", "cpu", "'tpu'"]),
    ("rms_norm", "list", lambda: ops.rms_norm([1.0]), TypeError, ["x:", "tensor", "list"]),
    ("rms_norm", "integers", lambda: ops.rms_norm(f(2, 3, dtype=int64)), TypeError, ["x:", "float32", "int64"]),
    ("rms_norm", "scalar", lambda: ops.rms_norm(f()), ValueError, ["x:", "one dimension", "scalar"]),
    ("rms_norm", "weight-shape", lambda: ops.rms_norm(f(2, 3), f(4)), ValueError, ["weight:", "(3,)", "(4,)"]),
    ("rms_norm", "weight-dtype", lambda: ops.rms_norm(f(2, 3), f(3, dtype=bf16)), TypeError, ["weight:", "float32", "bfloat16"]),
    ("rms_norm", "fp16-beside-bf16", lambda: ops.rms_norm(f(2, 3, dtype=bf16), f(3, dtype=fp16)), TypeError, ["weight:", "x is torch.bfloat16", "got torch.float16"]),
    ("rms_norm", "eps", lambda: ops.rms_norm(f(2, 3), f(3), None), TypeError, ["eps:", "number", "None"]),
    ("rms_norm", "residual-shape", lambda: ops.rms_norm(f(2, 3), residual=f(3)), ValueError, ["residual:", "(2, 3)", "(3,)"]),
    ("rms_norm", "residual-dtype", lambda: ops.rms_norm(f(2, 3), residual=f(2, 3, dtype=bf16)), TypeError, ["residual:", "float32", "bfloat16"]),
    ("rms_norm", "device", lambda: ops.rms_norm(f(2, 3), f(3, device="meta")), ValueError, ["weight:", "cpu", "meta"]),
    ("rms_norm", "backend", lambda: ops.rms_norm(f(2, 3), backend="cpuu"), ValueError, ["backend:", "cpu", "'cpuu'"]),
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
    ("swiglu", "scalar", lambda: ops.swiglu(f(), f()), ValueError, ["gate:", "one dimension", "scalar"]),
    ("swiglu", "up-shape", lambda: ops.swiglu(f(2, 3), f(2, 1)), ValueError, ["up:", "(2, 3)", "(2, 1)"]),
    ("swiglu", "up-dtype", lambda: ops.swiglu(f(2), f(2, dtype=fp64)), TypeError, ["up:", "float32", "float64"]),
    ("swiglu", "backend", lambda: ops.swiglu(f(2), f(2), backend="cpuu"), ValueError, ["backend:", "cpu", "'cpuu'"]),
    ("cross_entropy", "list", lambda: ops.cross_entropy([1.0], i(0)), TypeError, ["logits:", "tensor", "list"]),
    ("cross_entropy", "integers", lambda: ops.cross_entropy(i(1, 2), torch.tensor(0)), TypeError, ["logits:", "float32", "int32"]),
    ("cross_entropy", "scalar", lambda: ops.cross_entropy(f(), torch.tensor(0)), ValueError, ["logits:", "dimension", "scalar"]),
    ("cross_entropy", "targets-list", lambda: ops.cross_entropy(f(1, 3), [0]), TypeError, ["targets:", "tensor", "list"]),
    ("cross_entropy", "targets-int32", lambda: ops.cross_entropy(f(1, 3), i(0)), TypeError, ["targets:", "int64", "int32"]),
    ("cross_entropy", "probabilities", lambda: ops.cross_entropy(f(2, 3), f(2, 3)), TypeError, ["targets:", "int64", "float32"]),
    ("cross_entropy", "shape", lambda: ops.cross_entropy(f(2, 3), i(0, 1, 2, dtype=int64)), ValueError, ["targets:", "(2,)", "(3,)"]),
    ("cross_entropy", "classes-second", lambda: ops.cross_entropy(f(2, 3, 4), f(2, 4, dtype=int64)), ValueError, ["targets:", "(2, 3)", "(2, 4)"]),
    ("cross_entropy", "device", lambda: ops.cross_entropy(f(2, 3), f(2, dtype=int64, device="meta")), ValueError, ["targets:", "cpu", "meta"]),
    ("cross_entropy", "too-large", lambda: ops.cross_entropy(f(2, 3), i(0, 3, dtype=int64)), ValueError, ["targets:", "0 to 2", "ignore_index=-100", "got 3"]),
    ("cross_entropy", "negative", lambda: ops.cross_entropy(f(2, 3), i(-1, -100, dtype=int64)), ValueError, ["targets:", "0 to 2", "got -1"]),
    ("cross_entropy", "other-ignored", lambda: ops.cross_entropy(f(2, 3), i(-1, -100, dtype=int64), ignore_index=-1), ValueError, ["targets:", "ignore_index=-1", "got -100"]),
    ("cross_entropy", "ignore-index", lambda: ops.cross_entropy(f(1, 3), i(0, dtype=int64), ignore_index=None), TypeError, ["ignore_index:", "integer", "None"]),
    ("cross_entropy", "smoothing", lambda: ops.cross_entropy(f(1, 3), i(0, dtype=int64), label_smoothing=1.5), ValueError, ["label_smoothing:", "0 <= s <= 1", "1.5"]),
    ("cross_entropy", "smoothing-string", lambda: ops.cross_entropy(f(1, 3), i(0, dtype=int64), label_smoothing="0"), TypeError, ["label_smoothing:", "number", "'0'"]),
    ("cross_entropy", "reduction", lambda: ops.cross_entropy(f(1, 3), i(0, dtype=int64), reduction="average"), ValueError, ["reduction:", "'mean'", "'average'"]),
    ("cross_entropy", "backend", lambda: ops.cross_entropy(f(1, 3), i(0, dtype=int64), backend="gpu"), ValueError, ["backend:", "cpu", "'gpu'"]),
    ("linear", "list", lambda: ops.linear([1.0], f(2, 1)), TypeError, ["x:", "tensor", "list"]),
    ("linear", "weight-width", lambda: ops.linear(f(2, 3), f(5, 4)), ValueError, ["weight:", "(n, 3)", "(5, 4)"]),
    ("linear", "weight-1d", lambda: ops.linear(f(2, 3), f(3)), ValueError, ["weight:", "(n, 3)", "(3,)"]),
    ("linear", "weight-dtype", lambda: ops.linear(f(2, 3), f(5, 3, dtype=bf16)), TypeError, ["weight:", "float32", "bfloat16"]),
    ("linear", "weight-device", lambda: ops.linear(f(2, 3), f(5, 3, device="meta")), ValueError, ["weight:", "cpu", "meta"]),
    ("linear", "bias-shape", lambda: ops.linear(f(2, 3), f(5, 3), f(3)), ValueError, ["bias:", "(5,)", "(3,)"]),
    ("linear", "bias-dtype", lambda: ops.linear(f(2, 3), f(5, 3), f(5, dtype=fp64)), TypeError, ["bias:", "float32", "float64"]),
    ("linear", "activation", lambda: ops.linear(f(2, 3), f(5, 3), activation="relu"), ValueError, ["activation:", "'gelu'", "'relu'"]),
    ("linear", "backend", lambda: ops.linear(f(2, 3), f(5, 3), backend="gpu"), ValueError, ["backend:", "cpu", "'gpu'"]),
    ("mlp", "list", lambda: ops.mlp([1.0], f(2, 1), None, f(1, 2), None), TypeError, ["x:", "tensor", "list"]),
    ("mlp", "no-weight", lambda: ops.mlp(f(2, 3), None, None, f(1, 2), None), TypeError, ["w1:", "tensor", "NoneType"]),
    ("mlp", "w1", lambda: ops.mlp(f(2, 3), f(4, 2), None, f(1, 4), None), ValueError, ["w1:", "(n, 3)", "(4, 2)"]),
    ("mlp", "w2", lambda: ops.mlp(f(2, 3), f(4, 3), None, f(1, 3), None), ValueError, ["w2:", "(n, 4)", "(1, 3)"]),
    ("mlp", "b1", lambda: ops.mlp(f(2, 3), f(4, 3), f(3), f(1, 4), None), ValueError, ["b1:", "(4,)", "(3,)"]),
    ("mlp", "b2-dtype", lambda: ops.mlp(f(2, 3), f(4, 3), None, f(1, 4), f(1, dtype=bf16)), TypeError, ["b2:", "float32", "bfloat16"]),
    ("mlp", "activation", lambda: ops.mlp(f(2, 3), f(4, 3), None, f(1, 4), None, activation=None), ValueError, ["activation:", "'gelu_tanh'", "None"]),
    ("mlp", "backend", lambda: ops.mlp(f(2, 3), f(4, 3), None, f(1, 4), None, backend="gpu"), ValueError, ["backend:", "cpu", "'gpu'"]),
    ("linear_cross_entropy", "list", lambda: ops.linear_cross_entropy([1.0], f(2, 1), i(0)), TypeError, ["x:", "tensor", "list"]),
    ("linear_cross_entropy", "weight", lambda: ops.linear_cross_entropy(f(2, 3), f(5, 4), i(0, 1, dtype=int64)), ValueError, ["weight:", "(n, 3)", "(5, 4)"]),
    ("linear_cross_entropy", "targets-int32", lambda: ops.linear_cross_entropy(f(1, 3), f(5, 3), i(0)), TypeError, ["targets:", "int64", "int32"]),
    ("linear_cross_entropy", "targets-shape", lambda: ops.linear_cross_entropy(f(2, 3), f(5, 3), i(0, dtype=int64)), ValueError, ["targets:", "(2,)", "(1,)"]),
    ("linear_cross_entropy", "too-large", lambda: ops.linear_cross_entropy(f(2, 3), f(5, 3), i(0, 5, dtype=int64)), ValueError, ["targets:", "0 to 4", "got 5"]),
    ("linear_cross_entropy", "ignore-index", lambda: ops.linear_cross_entropy(f(1, 3), f(5, 3), i(0, dtype=int64), ignore_index=1.5), TypeError, ["ignore_index:", "integer", "1.5"]),
    ("linear_cross_entropy", "reduction", lambda: ops.linear_cross_entropy(f(1, 3), f(5, 3), i(0, dtype=int64), reduction="average"), ValueError, ["reduction:", "'mean'", "'average'"]),
    ("linear_cross_entropy", "backend", lambda: ops.linear_cross_entropy(f(1, 3), f(5, 3), i(0, dtype=int64), backend="gpu"), ValueError, ["backend:", "cpu", "'gpu'"]),
    ("attention", "3d", lambda: ops.attention(f(2, 3, 4), f(2, 3, 4), f(2, 3, 4)), ValueError, ["q:", "[B, H, T, D]", "(2, 3, 4)"]),
    ("attention", "heads", lambda: ops.attention(f(1, 4, 2, 8), f(1, 3, 2, 8), f(1, 3, 2, 8)), ValueError, ["k:", "divides q's 4", "3"]),
    ("attention", "width", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 2, 4), f(1, 2, 2, 8)), ValueError, ["k:", "(1, 2, 2, 8)", "(1, 2, 2, 4)"]),
    ("attention", "v-length", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 3, 8), f(1, 2, 2, 8)), ValueError, ["v:", "(1, 2, 3, 8)", "(1, 2, 2, 8)"]),
    ("attention", "dtype", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 2, 8, dtype=bf16), f(1, 2, 2, 8)), TypeError, ["k:", "float32", "bfloat16"]),
    ("attention", "device", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 2, 8), f(1, 2, 2, 8, device="meta")), ValueError, ["v:", "cpu", "meta"]),
    ("attention", "mask", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 3, 8), f(1, 2, 3, 8), mask=f(2, 2)), ValueError, ["mask:", "(1, 2, 2, 3)", "(2, 2)"]),
    ("attention", "list", lambda: attend([1.0]), TypeError, ["q:", "tensor", "list"]),
    ("attention", "integers", lambda: attend(f(2, 4, 3, 8, dtype=int64)), TypeError, ["q:", "float32", "int64"]),
    ("attention", "k-3d", lambda: ops.attention(f(1, 2, 2, 8), f(2, 2, 8), f(1, 2, 2, 8)), ValueError, ["k:", "[B, H, T, D]", "(2, 2, 8)"]),
    ("attention", "batch", lambda: attend(f(3, 4, 3, 8)), ValueError, ["k:", "(3, 2, 5, 8)", "(2, 2, 5, 8)"]),
    ("attention", "no-kv-heads", lambda: ops.attention(f(1, 2, 2, 8), f(1, 0, 2, 8), f(1, 0, 2, 8)), ValueError, ["k:", "divides q's 2", "0"]),
    ("attention", "v-heads", lambda: ops.attention(f(1, 2, 2, 8), f(1, 2, 2, 8), f(1, 1, 2, 8)), ValueError, ["v:", "(1, 2, 2, 8)", "(1, 1, 2, 8)"]),
    ("attention", "scale", lambda: attend(scale="1"), TypeError, ["scale:", "number", "'1'"]),
    ("attention", "scale-tensor", lambda: attend(scale=torch.ones(())), TypeError, ["scale:", "number", "tensor(1.)"]),
    ("attention", "mask-dtype", lambda: attend(mask=f(3, 5, dtype=fp16)), TypeError, ["mask:", "bool", "float32", "float16"]),
    ("attention", "mask-fp32-beside-fp64", lambda: attend(f(2, 4, 3, 8, dtype=fp64), mask=f(3, 5)), TypeError, ["mask:", "float64", "float32"]),
    ("attention", "mask-5d", lambda: attend(mask=f(1, 2, 4, 3, 5)), ValueError, ["mask:", "(2, 4, 3, 5)", "(1, 2, 4, 3, 5)"]),
    ("attention", "mask-of-kv-heads", lambda: attend(mask=f(2, 2, 3, 5)), ValueError, ["mask:", "(2, 4, 3, 5)", "(2, 2, 3, 5)"]),
    ("attention", "mask-device", lambda: attend(mask=f(3, 5, device="meta")), ValueError, ["mask:", "cpu", "meta"]),
    ("attention", "slopes-list", lambda: attend(alibi_slopes=[0.5] * 4), TypeError, [SLOPES, "tensor", "list"]),
    ("attention", "slopes-number", lambda: attend(alibi_slopes=0.5), TypeError, [SLOPES, "tensor", "float"]),
    ("attention", "slopes-integers", lambda: attend(alibi_slopes=i(1, 2, 3, 4)), TypeError, [SLOPES, "float32", "int32"]),
    ("attention", "slopes-dtype", lambda: attend(f(2, 4, 3, 8, dtype=bf16), alibi_slopes=f(4, dtype=bf16)), TypeError, [SLOPES, "float32", "got torch.bfloat16"]),
    ("attention", "slopes-fp64", lambda: attend(alibi_slopes=f(4, dtype=fp64)), TypeError, [SLOPES, "float32", "got torch.float64"]),
    ("attention", "slopes-of-kv-heads", lambda: attend(alibi_slopes=f(2)), ValueError, [SLOPES, "(4,)", "(2, 4)", "got (2,)"]),
    ("attention", "slopes-broadcast", lambda: attend(alibi_slopes=f(1, 4)), ValueError, [SLOPES, "(2, 4)", "got (1, 4)"]),
    ("attention", "slopes-4d", lambda: attend(alibi_slopes=f(2, 4, 1, 1)), ValueError, [SLOPES, "(2, 4)", "got (2, 4, 1, 1)"]),
    ("attention", "slopes-device", lambda: attend(alibi_slopes=f(4, device="meta")), ValueError, [SLOPES, "cpu", "meta"]),
    ("attention", "slopes-gradient", lambda: attend(alibi_slopes=f(4).requires_grad_()), ValueError, [SLOPES, "no gradient", "mask"]),
    ("attention", "window-zero", lambda: attend(window=0), ValueError, [*WINDOW, "got 0"]),
    ("attention", "window-negative", lambda: attend(window=-3), ValueError, [*WINDOW, "got -3"]),
    ("attention", "window-bool", lambda: attend(window=True), ValueError, [*WINDOW, "got True"]),
    ("attention", "window-float", lambda: attend(window=4.0), ValueError, [*WINDOW, "got 4.0"]),
    ("attention", "window-string", lambda: attend(window="3"), ValueError, [*WINDOW, "got '3'"]),
    ("attention", "window-list", lambda: attend(window=[1, 2]), ValueError, [*WINDOW, "got [1, 2]"]),
    ("attention", "window-one-side", lambda: attend(window=(3,)), ValueError, [*WINDOW, "got (3,)"]),
    ("attention", "window-no-side", lambda: attend(window=()), ValueError, [*WINDOW, "got ()"]),
    ("attention", "window-three-sides", lambda: attend(window=(1, 2, 3)), ValueError, [*WINDOW, "got (1, 2, 3)"]),
    ("attention", "window-left", lambda: attend(window=(-1, 2)), ValueError, [*WINDOW, "got (-1, 2)"]),
    ("attention", "window-right", lambda: attend(window=(None, -2)), ValueError, [*WINDOW, "got (None, -2)"]),
    ("attention", "window-right-bool", lambda: attend(window=(1, False)), ValueError, [*WINDOW, "got (1, False)"]),
    ("attention", "softcap-negative", lambda: attend(softcap=-1.0), ValueError, ["softcap:", "positive", "-1.0"]),
    ("attention", "softcap-inf", lambda: attend(softcap=float("inf")), ValueError, ["softcap:", "positive", "inf"]),
    ("attention", "softcap-nan", lambda: attend(softcap=float("nan")), ValueError, ["softcap:", "positive", "nan"]),
    ("attention", "softcap-none", lambda: attend(softcap=None), TypeError, ["softcap:", "number", "None"]),
    ("attention", "softcap-bool", lambda: attend(softcap=True), TypeError, ["softcap:", "number", "True"]),
    ("attention", "lengths-list", lambda: attend(kv_lengths=[5, 5]), TypeError, ["kv_lengths:", "tensor", "list"]),
    ("attention", "lengths-floats", lambda: attend(kv_lengths=f(2)), TypeError, ["kv_lengths:", "int32 or torch.int64", "float32"]),
    ("attention", "lengths-int16", lambda: attend(kv_lengths=i(5, 5, dtype=torch.int16)), TypeError, ["kv_lengths:", "int32 or torch.int64", "int16"]),
    ("attention", "lengths-shape", lambda: attend(kv_lengths=i(5, 5, 5)), ValueError, ["kv_lengths:", "(2,)", "(3,)"]),
    ("attention", "lengths-one", lambda: attend(kv_lengths=i(5)), ValueError, ["kv_lengths:", "(2,)", "(1,)"]),
    ("attention", "lengths-scalar", lambda: attend(kv_lengths=torch.tensor(5)), ValueError, ["kv_lengths:", "(2,)", "()"]),
    ("attention", "lengths-too-long", lambda: attend(kv_lengths=i(3, 6)), ValueError, ["kv_lengths:", "from 0 to 5", "3 to 6"]),
    ("attention", "lengths-negative", lambda: attend(kv_lengths=i(3, -1, dtype=int64)), ValueError, ["kv_lengths:", "from 0 to 5", "-1 to 3"]),
    ("attention", "lengths-device", lambda: attend(kv_lengths=i(5, 5).to("meta")), ValueError, ["kv_lengths:", "cpu", "meta"]),
    ("attention", "p-one", lambda: attend(dropout_p=1.0), ValueError, ["dropout_p:", "p < 1", "1.0"]),
    ("attention", "p-negative", lambda: attend(dropout_p=-0.1), ValueError, ["dropout_p:", "0 <= p", "-0.1"]),
    ("attention", "p-string", lambda: attend(dropout_p="0.1"), TypeError, ["dropout_p:", "number", "'0.1'"]),
    ("attention", "rng-dtype", lambda: attend(dropout_p=0.1, rng=i(1, 2)), ValueError, ["rng:", "int64", "(2,)"]),
    ("attention", "rng-shape", lambda: attend(dropout_p=0.1, rng=RNG[None]), ValueError, ["rng:", "int64", "(2,)"]),
    ("attention", "rng-device", lambda: attend(dropout_p=0.1, rng=RNG.to("meta")), ValueError, ["rng:", "cpu", "meta"]),
    ("attention", "backend", lambda: attend(backend="gpu"), ValueError, ["backend:", "cpu", "'gpu'"]),
    ("attention_qkv", "number", lambda: ops.attention_qkv(3, 2), TypeError, ["qkv:", "tensor", "int"]),
    ("attention_qkv", "integers", lambda: attend_qkv(dtype=int64), TypeError, ["qkv:", "float32", "int64"]),
    ("attention_qkv", "2d", lambda: attend_qkv(5, 24), ValueError, ["qkv:", "[B, T, 3 * 2 * D]", "(5, 24)"]),
    ("attention_qkv", "4d", lambda: attend_qkv(2, 5, 3, 24), ValueError, ["qkv:", "[B, T, 3 * 2 * D]", "(2, 5, 3, 24)"]),
    ("attention_qkv", "width", lambda: attend_qkv(2, 5, 28), ValueError, ["qkv:", "[B, T, 3 * 2 * D]", "(2, 5, 28)"]),
    ("attention_qkv", "heads-zero", lambda: attend_qkv(num_heads=0), ValueError, ["num_heads:", ">= 1", "got 0"]),
    ("attention_qkv", "heads-negative", lambda: attend_qkv(num_heads=-2), ValueError, ["num_heads:", ">= 1", "got -2"]),
    ("attention_qkv", "heads-bool", lambda: attend_qkv(num_heads=True), ValueError, ["num_heads:", ">= 1", "got True"]),
    ("attention_qkv", "heads-float", lambda: attend_qkv(num_heads=2.0), ValueError, ["num_heads:", ">= 1", "got 2.0"]),
    ("attention_qkv", "mask", lambda: attend_qkv(mask=f(4, 5)), ValueError, ["mask:", "(2, 2, 5, 5)", "(4, 5)"]),
    ("attention_qkv", "slopes", lambda: attend_qkv(alibi_slopes=f(5)), ValueError, [SLOPES, "(2,)", "(2, 2)", "got (5,)"]),
    ("attention_qkv", "window", lambda: attend_qkv(window=(1, -1)), ValueError, [*WINDOW, "got (1, -1)"]),
    ("attention_qkv", "softcap", lambda: attend_qkv(softcap=-2), ValueError, ["softcap:", "positive", "-2.0"]),
    ("attention_qkv", "lengths", lambda: attend_qkv(kv_lengths=i(6, 0)), ValueError, ["kv_lengths:", "from 0 to 5", "0 to 6"]),
    ("attention_qkv", "p", lambda: attend_qkv(dropout_p=1), ValueError, ["dropout_p:", "p < 1", "1.0"]),
    ("attention_qkv", "rng", lambda: attend_qkv(dropout_p=0.5, rng=7), ValueError, ["rng:", "int64", "7"]),
    ("attention_qkv", "backend", lambda: attend_qkv(backend=""), ValueError, ["backend:", "cpu", "''"]),
    ("attention_varlen", "list", lambda: attend_varlen(q=[1.0]), TypeError, ["q:", "tensor", "list"]),
    ("attention_varlen", "4d", lambda: attend_varlen(q=f(1, 6, 4, 8)), ValueError, ["q:", "[total, H, D]", "(1, 6, 4, 8)"]),
    ("attention_varlen", "heads", lambda: attend_varlen(q=f(6, 3, 8)), ValueError, ["k:", "divides q's 3", "2"]),
    ("attention_varlen", "width", lambda: attend_varlen(q=f(6, 4, 4)), ValueError, ["k:", "(5, 2, 4)", "(5, 2, 8)"]),
    ("attention_varlen", "v-length", lambda: attend_varlen(v=f(4, 2, 8)), ValueError, ["v:", "(5, 2, 8)", "(4, 2, 8)"]),
    ("attention_varlen", "v-dtype", lambda: attend_varlen(v=f(5, 2, 8, dtype=bf16)), TypeError, ["v:", "float32", "bfloat16"]),
    ("attention_varlen", "v-device", lambda: attend_varlen(v=f(5, 2, 8, device="meta")), ValueError, ["v:", "cpu", "meta"]),
    ("attention_varlen", "ends-list", lambda: attend_varlen([0, 4, 6]), TypeError, ["cu_seqlens_q:", "tensor", "list"]),
    ("attention_varlen", "ends-k-list", lambda: attend_varlen(cu_k=[0, 2, 5]), TypeError, ["cu_seqlens_k:", "tensor", "list"]),
    ("attention_varlen", "ends-int64", lambda: attend_varlen(i(0, 4, 6, dtype=int64)), TypeError, ["cu_seqlens_q:", "int32", "int64"]),
    ("attention_varlen", "ends-2d", lambda: attend_varlen(i(0, 4, 6)[None]), ValueError, ["cu_seqlens_q:", "(3,)", "(1, 3)"]),
    ("attention_varlen", "ends-none", lambda: attend_varlen(i()), ValueError, ["cu_seqlens_q:", "(1,)", "(0,)"]),
    ("attention_varlen", "ends-of-k", lambda: attend_varlen(cu_k=i(0, 2, 3, 5)), ValueError, ["cu_seqlens_k:", "(3,)", "(4,)"]),
    ("attention_varlen", "ends-first", lambda: attend_varlen(i(1, 4, 6)), ValueError, ["cu_seqlens_q:", "from 0 to 6", "[1, 4, 6]"]),
    ("attention_varlen", "ends-last", lambda: attend_varlen(i(0, 4, 5)), ValueError, ["cu_seqlens_q:", "from 0 to 6", "[0, 4, 5]"]),
    ("attention_varlen", "ends-beyond", lambda: attend_varlen(cu_k=i(0, 2, 6)), ValueError, ["cu_seqlens_k:", "from 0 to 5", "0 to 6"]),
    ("attention_varlen", "ends-decrease", lambda: attend_varlen(i(0, 3, 2, 6), i(0, 1, 2, 5)), ValueError, ["cu_seqlens_q:", "non-decreasing", "[0, 3, 2, 6]"]),
    ("attention_varlen", "ends-negative", lambda: attend_varlen(i(0, -1, 6)), ValueError, ["cu_seqlens_q:", "from 0 to 6", "-1"]),
    ("attention_varlen", "ends-device", lambda: attend_varlen(i(0, 4, 6).to("meta")), ValueError, ["cu_seqlens_q:", "cpu", "meta"]),
    ("attention_varlen", "no-documents", lambda: attend_varlen(i(0), i(0)), ValueError, ["cu_seqlens_q:", "from 0 to 6", "[0]"]),
    ("attention_varlen", "longest-q", lambda: attend_varlen(max_q=3), ValueError, ["max_seqlen_q:", "at least the longest document, 4", "got 3"]),
    ("attention_varlen", "longest-k", lambda: attend_varlen(max_k=2), ValueError, ["max_seqlen_k:", "at least the longest document, 3", "got 2"]),
    ("attention_varlen", "longest-negative", lambda: attend_varlen(max_q=-1), ValueError, ["max_seqlen_q:", ">= 0", "got -1"]),
    ("attention_varlen", "longest-float", lambda: attend_varlen(max_k=3.0), ValueError, ["max_seqlen_k:", "integer", "got 3.0"]),
    ("attention_varlen", "longest-bool", lambda: attend_varlen(max_k=True), ValueError, ["max_seqlen_k:", "integer", "got True"]),
    ("attention_varlen", "longest-tensor", lambda: attend_varlen(max_q=torch.tensor(4)), ValueError, ["max_seqlen_q:", "integer", "tensor(4)"]),
    ("attention_varlen", "mask", lambda: attend_varlen(mask=f(6, 5)), ValueError, ["mask:", "(2, 4, 4, 3)", "(6, 5)"]),
    ("attention_varlen", "slopes", lambda: attend_varlen(alibi_slopes=f(6, 4)), ValueError, [SLOPES, "(2, 4)", "got (6, 4)"]),
    ("attention_varlen", "window", lambda: attend_varlen(window=0), ValueError, [*WINDOW, "got 0"]),
    ("attention_varlen", "softcap", lambda: attend_varlen(softcap="30"), TypeError, ["softcap:", "number", "'30'"]),
    ("attention_varlen", "lengths", lambda: attend_varlen(kv_lengths=i(2, 4)), ValueError, ["kv_lengths:", "from 0 to 3", "2 to 4"]),
    ("attention_varlen", "lengths-of-document", lambda: attend_varlen(kv_lengths=i(3, 3)), ValueError, ["kv_lengths:", "keys of each document, [2, 3]", "[3, 3]"]),
    ("attention_varlen", "lengths-shape", lambda: attend_varlen(kv_lengths=i(2)), ValueError, ["kv_lengths:", "(2,)", "(1,)"]),
    ("attention_varlen", "p", lambda: attend_varlen(dropout_p=float("nan")), ValueError, ["dropout_p:", "nan"]),
    ("attention_varlen", "rng", lambda: attend_varlen(dropout_p=0.5, rng=f(2)), ValueError, ["rng:", "int64", "(2,)"]),
    ("attention_varlen", "backend", lambda: attend_varlen(backend=["cpu", "cudnn"]), ValueError, ["backend:", "cpu", "'cudnn'"]),
    ("embedding", "list", lambda: embed([1]), TypeError, ["tokens:", "tensor", "list"]),
    ("embedding", "int32", lambda: embed(i(1, 2)), TypeError, ["tokens:", "int64", "int32"]),
    ("embedding", "floats", lambda: embed(f(2)), TypeError, ["tokens:", "int64", "float32"]),
    ("embedding", "scalar", lambda: embed(torch.tensor(3)), ValueError, ["tokens:", "one dimension", "scalar"]),
    ("embedding", "beyond", lambda: embed(IDS + 7), ValueError, ["tokens:", "from 0 to 8", "7 to 9"]),
    ("embedding", "negative", lambda: embed(IDS - 1), ValueError, ["tokens:", "from 0 to 8", "-1 to 1"]),
    ("embedding", "device", lambda: embed(IDS.to("meta")), ValueError, ["tokens:", "cpu", "meta"]),
    ("embedding", "weight-list", lambda: ops.embedding(IDS, [1.0]), TypeError, ["token_weight:", "tensor", "list"]),
    ("embedding", "weight-1d", lambda: ops.embedding(IDS, f(9)), ValueError, ["token_weight:", "[rows, C]", "(9,)"]),
    ("embedding", "weight-int", lambda: ops.embedding(IDS, f(9, 4, dtype=int64)), TypeError, ["token_weight:", "float32", "int64"]),
    ("embedding", "no-vocabulary", lambda: ops.embedding(IDS, f(0, 4)), ValueError, ["tokens:", "from 0 to -1", "0 to 2"]),
    ("embedding", "position-width", lambda: embed(position_weight=f(5, 3)), ValueError, ["position_weight:", "(5, 4)", "(5, 3)"]),
    ("embedding", "position-dtype", lambda: embed(position_weight=f(5, 4, dtype=bf16)), TypeError, ["position_weight:", "float32", "bfloat16"]),
    ("embedding", "too-long", lambda: embed(position_weight=f(2, 4)), ValueError, ["tokens:", "at most 2", "got 3"]),
    ("embedding", "positions-alone", lambda: embed(position_weight=None, positions=IDS), ValueError, ["positions:", "position_weight", "None"]),
    ("embedding", "positions-shape", lambda: embed(positions=IDS[:2]), ValueError, ["positions:", "broadcasts to (3,)", "(2,)"]),
    ("embedding", "positions-2d", lambda: embed(positions=IDS[None]), ValueError, ["positions:", "broadcasts to (3,)", "(1, 3)"]),
    ("embedding", "positions-int32", lambda: embed(positions=i(0, 1, 2)), TypeError, ["positions:", "int64", "int32"]),
    ("embedding", "positions-beyond", lambda: embed(positions=IDS + 3), ValueError, ["positions:", "from 0 to 4", "3 to 5"]),
    ("embedding", "padding", lambda: embed(padding_idx=9), ValueError, ["padding_idx:", "from -9 to 8", "got 9"]),
    ("embedding", "padding-float", lambda: embed(padding_idx=1.0), ValueError, ["padding_idx:", "got 1.0"]),
    ("embedding", "padding-bool", lambda: embed(padding_idx=True), ValueError, ["padding_idx:", "got True"]),
    ("embedding", "backend", lambda: embed(backend="gpu"), ValueError, ["backend:", "cpu", "'gpu'"]),
    ("rope", "list", lambda: rotate([1.0]), TypeError, ["q:", "tensor", "list"]),
    ("rope", "3d", lambda: rotate(f(2, 3, 8)), ValueError, ["q:", "[B, H, T, D]", "(2, 3, 8)"]),
    ("rope", "integers", lambda: rotate(f(2, 4, 3, 8, dtype=int64)), TypeError, ["q:", "float32", "int64"]),
    ("rope", "k-length", lambda: rotate(k=f(2, 2, 4, 8)), ValueError, ["k:", "(2, 2, 3, 8)", "(2, 2, 4, 8)"]),
    ("rope", "k-dtype", lambda: rotate(k=f(2, 2, 3, 8, dtype=bf16)), TypeError, ["k:", "float32", "bfloat16"]),
    ("rope", "k-device", lambda: rotate(k=f(2, 2, 3, 8, device="meta")), ValueError, ["k:", "cpu", "meta"]),
    ("rope", "cos-wide", lambda: rotate(cos=f(3, 5)), ValueError, ["cos:", "R <= 8", "(3, 5)"]),
    ("rope", "cos-length", lambda: rotate(cos=f(4, 4)), ValueError, ["cos:", "[3, R / 2]", "[2, 3, R / 2]", "(4, 4)"]),
    ("rope", "cos-4d", lambda: rotate(cos=f(2, 1, 3, 4)), ValueError, ["cos:", "[3, R / 2]", "(2, 1, 3, 4)"]),
    ("rope", "cos-dtype", lambda: rotate(cos=f(3, 4, dtype=bf16)), TypeError, ["cos:", "float32", "bfloat16"]),
    ("rope", "cos-gradient", lambda: rotate(cos=f(3, 4).requires_grad_()), ValueError, ["cos:", "no gradient"]),
    ("rope", "sin-gradient", lambda: rotate(sin=f(3, 4).requires_grad_()), ValueError, ["sin:", "no gradient"]),
    ("rope", "sin-list", lambda: rotate(sin=[0.0]), TypeError, ["sin:", "tensor", "list"]),
    ("rope", "sin-shape", lambda: rotate(sin=f(3, 3)), ValueError, ["sin:", "(3, 4)", "(3, 3)"]),
    ("rope", "sin-device", lambda: rotate(sin=f(3, 4, device="meta")), ValueError, ["sin:", "cpu", "meta"]),
    ("rope", "interleaved", lambda: rotate(interleaved=1), TypeError, ["interleaved:", "True or False", "1"]),
    ("rope", "backend", lambda: rotate(backend=["gpu"]), ValueError, ["backend:", "cpu", "'gpu'"]),
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
