"""Modules for the tests of `fastgpt.patch`, and how a patched copy is held to the module itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fastgpt
from fastgpt.interop import PatchReport

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of a dtype's rounding, for layers on each other; PyTorch's own results are up to 27 and 19 from fp64 here. fp32
# tells right from wrong: tanh for erf is 4,000 units of it, a token too many in sight a million.
UNITS = {torch.float32: 100.0, torch.bfloat16: 25.0}


class Model(nn.Module):
    """Something of every kind, and what must be left."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(16), nn.RMSNorm(16)
        self.mlp = nn.Sequential(
            nn.Linear(16, 40), nn.GELU(approximate="tanh"), nn.Dropout(0.1), nn.Linear(40, 16)
        )
        self.softmax = nn.Softmax(dim=-1)
        self.act = nn.GELU()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm(x))
        return self.softmax(self.head(self.act(self.rms(x))))


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters that are neither ones nor zeros."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (0.4 if p.dim() > 1 else 0.5) + (p.dim() == 1))
    return module


def results(module: nn.Module, call: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of inputs and parameters under a fixed random one."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = call(module, *leaves)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float32).to(out.dtype))
    found = {"out": out.detach()}
    found |= {f"d{i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def check_same(module: nn.Module, call: Any, inputs: list[Tensor]) -> PatchReport:
    """The patched copy beside the module itself in fp64, each result within UNITS."""
    patched = copy.deepcopy(module)
    report = fastgpt.patch(patched)
    exact_module = copy.deepcopy(module).double()
    exact = results(exact_module, call, [x.double() if x.is_floating_point() else x for x in inputs])
    got = results(patched, call, inputs)
    assert got.keys() == exact.keys()
    dtype = next(module.parameters()).dtype
    unit = torch.finfo(dtype).eps
    largest = max(float(value.norm()) for name, value in exact.items() if name != "out")
    for name, value in exact.items():
        floor = 1e-3 * largest if name != "out" else 0.0  # of gradients that are zero but for rounding
        off = float((got[name].double() - value).norm()) / (float(value.norm()) + floor)
        assert off <= UNITS[dtype] * unit, f"{name}: {off / unit:.1f} units"
        assert got[name].dtype == dtype
    return report
