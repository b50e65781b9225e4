"""What an op returns can be changed in place, as what PyTorch's own ops return, where backward does not need it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgpt import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: ops.linear(x, leaf(x.dtype, 30, 8), leaf(x.dtype, 30)),
    "linear_gelu": lambda x: ops.linear(x, leaf(x.dtype, 30, 8), activation="gelu"),
    "mlp": lambda x: ops.mlp(x, leaf(x.dtype, 30, 8), None, leaf(x.dtype, 8, 30), leaf(x.dtype, 8)),
    "layer_norm": lambda x: ops.layer_norm(x, leaf(x.dtype, 8), leaf(x.dtype, 8)),
    "rms_norm": lambda x: ops.rms_norm(x, leaf(x.dtype, 8)),
    "gelu": lambda x: ops.gelu(x),
    "swiglu": lambda x: ops.swiglu(x, leaf(x.dtype, *x.shape)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(10, 8), (2, 5, 8), (2, 300, 8)], ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_a_result_can_be_changed_in_place(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = leaf(dtype, *shape)
    for change in (lambda y: y.add_(1), lambda y: y.__setitem__((..., 0), 3.0), lambda y: y[0].mul_(2)):
        y = CALLS[op](x)
        change(y)
        y.sum().backward()
    assert x.grad is not None
