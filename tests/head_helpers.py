"""A head and the same one replaced, for the tests of lazy logits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.interop.head import FusedHead
from fastgpt.interop.swap import exchange


def heads(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    plain = nn.Linear(8, 30, bias=False, dtype=dtype)
    fused = copy.deepcopy(plain)
    exchange(fused, FusedHead)
    return plain, fused, torch.randn(2, 5, 8, dtype=dtype), torch.randint(30, (2, 5))


def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that a head calls."""
    called: list[str] = []
    for name in ("linear", "linear_cross_entropy"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=function, **k: (called.append(n), f(*a, **k))[1])
    return called


def loss_of(y: Tensor, t: Tensor, **options: str) -> Tensor:
    return F.cross_entropy(y.view(-1, 30), t.view(-1), **options)


def backward(loss: Tensor) -> list[Tensor]:
    loss.backward()
    return [loss]
