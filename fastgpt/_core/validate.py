"""The checks that public functions share: each raises one line saying what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt._core.guard import extremes, plain_eager

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What may stand beside an input of a dtype where the numerics contract lets the two differ.
WIDER = {
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
    torch.float64: (torch.float64,),
}


def floating(name: str, value: Any) -> None:
    """`value` is a floating-point tensor of at least one dimension."""
    if isinstance(value, Tensor) and value.dtype in WIDER and value.dim():
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating dtype ({_names(FLOATING)}), got {value.dtype}")
    if value.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")


def beside(
    name: str,
    value: Any,
    expected: Sequence[int],
    allowed: Sequence[torch.dtype],
    other_name: str,
    other: Tensor,
) -> None:
    """`value` has the expected shape, an allowed dtype and the device of `other`."""
    if (
        isinstance(value, Tensor)
        and value.shape == expected
        and value.dtype in allowed
        and value.device == other.device
    ):
        return  # the usual case at a third of the cost
    floating(name, value)
    shape(name, value, expected)
    if value.dtype not in allowed:
        dtype(name, value, allowed, f"{other_name} is {other.dtype}")
    same_device(name, value, other_name, other)


def shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    if value.shape != expected and tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(value.shape)}")


def dtype(name: str, value: Tensor, allowed: Sequence[torch.dtype], because: str) -> None:
    """`because` names the tensor and dtype that `allowed` follows from: "x is torch.bfloat16"."""
    if value.dtype not in allowed:
        raise TypeError(f"{name}: expected {_names(allowed)} ({because}), got {value.dtype}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected it on {other.device} as {other_name}, got {value.device}")


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def positive(name: str, value: Any) -> int:
    """`value`, an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    return value


def number(name: str, value: Any) -> float:
    """`value` as a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def mask(name: str, value: Any, other_name: str, other: Tensor, scores: Sequence[int]) -> None:
    """A mask for scores of the given shape: boolean, or float in `other`'s dtype or fp32 (fp64 with fp64)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    allowed = (
        (torch.bool, other.dtype)
        if other.dtype == torch.float64
        else (torch.bool, other.dtype, torch.float32)
    )
    dtype(name, value, allowed, f"{other_name} is {other.dtype}")
    same_device(name, value, other_name, other)
    sizes = (1,) * (len(scores) - value.dim()) + tuple(value.shape)
    if len(sizes) != len(scores) or any(m not in (1, s) for m, s in zip(sizes, scores, strict=True)):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(scores)}, got {tuple(value.shape)}"
        )


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """In autocast's dtype where it is on, None as it is; fp64 stays, as in PyTorch's own attention and products."""
    if not torch._C._is_any_autocast_enabled():  # half a microsecond less than with the device's name
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(
        t is not None and t.dtype == torch.float64 for t in tensors
    ):
        return tensors
    lower = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(lower) for t in tensors)


def autocast_mask(mask: Any, x: Tensor) -> Any:
    """A float mask for an x that autocast may have changed: one in its former dtype becomes fp32, which all take."""
    if isinstance(mask, Tensor) and mask.dtype in (torch.bfloat16, torch.float16) and mask.dtype != x.dtype:
        return mask.float() if torch.is_autocast_enabled(x.device.type) else mask
    return mask


def grouped_heads(heads: int, kv_heads: int) -> None:
    if heads and (not kv_heads or heads % kv_heads):
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {kv_heads}")


def integers(
    name: str,
    value: Any,
    expected: Sequence[int],
    dtypes: Sequence[torch.dtype],
    other_name: str,
    other: Tensor,
    least: int,
    most: int,
) -> None:
    """An integer tensor of that shape on `other`'s device; on a CPU also that its values lie in [least, most].

    Elsewhere looking at the values would wait for the device: there the kernels keep to the bounds themselves.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {_names(dtypes)}, got {value.dtype}")
    shape(name, value, expected)
    same_device(name, value, other_name, other)
    between(name, value, least, most)


def between(name: str, value: Tensor, least: int, most: int) -> None:
    """The values of an integer tensor lie in [least, most], where they can be looked at."""
    found = extremes(value)
    if found is not None and (found[0] < least or found[1] > most):
        raise ValueError(f"{name}: expected values from {least} to {most}, got {found[0]} to {found[1]}")


def readable(value: Tensor) -> bool:
    """Whether its values can be looked at now: a plain CPU tensor, outside of any tracing."""
    return value.is_cpu and plain_eager((value,))


def drawn_rng(x: Any, dropout_p: Any, rng: Tensor | None) -> Tensor | None:
    """`rng`, or where there is none and dropout wants it, one from torch's generator."""
    if rng is None and dropout_p and isinstance(x, Tensor):
        return torch.randint(0, 2**62, (2,), device=x.device)
    return rng


def dropout(x: Tensor, x_name: str, dropout_p: Any, rng: Tensor | None) -> tuple[float, Tensor | None]:
    """(dropout_p, rng), rng None without dropout, and where a call is only explained."""
    dropout_p = number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if dropout_p == 0.0:
        return dropout_p, None
    if rng is not None:
        if not isinstance(rng, Tensor) or rng.dtype != torch.int64 or rng.shape != (2,):
            raise ValueError(f"rng: expected an int64 tensor of shape (2,) (seed, offset), got {rng!r}")
        same_device("rng", rng, x_name, x)
    return dropout_p, rng


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
