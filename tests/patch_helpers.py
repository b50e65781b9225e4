"""Modules for the tests of `fastgpt.patch`, and how a patched copy is held to the module itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
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


def patched(model: Any, **options: Any) -> Any:
    """A patched copy."""
    other = copy.deepcopy(model)
    fastgpt.patch(other, **options)
    return other


def outcome(call: Callable[[], Any]) -> Any:
    """A call's result, or the class of what it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:
        return type(error)


def check_agrees(module: nn.Module, call: Callable[[nn.Module], Any]) -> Any:
    """Patched it gives what it gave: values, NaN in their places, dtype, shape, or the same error. No copy is made:
    that of a decoder layer whose activation is a module has a ReLU in its place (torch 2.13)."""
    expected = outcome(lambda: call(module))
    fastgpt.patch(module)
    got = outcome(lambda: call(module))
    fastgpt.unpatch(module)
    if isinstance(expected, type) or isinstance(got, type):
        assert got == expected
        return expected
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.is_contiguous() or not expected.is_contiguous()  # it may be viewed
    rough = 2.0**-5 if torch.bfloat16 in (got.dtype, next(module.parameters()).dtype) else 1e-4
    rough = max(rough, 2.0**-5 * torch.is_autocast_enabled("cpu"))
    torch.testing.assert_close(got, expected, rtol=rough, atol=8 * rough, equal_nan=True)
    return expected


def unseeing(kind: str) -> dict[str, Tensor]:
    """Masks for [3, 6] under which some query sees nothing."""
    padding, mask = torch.zeros(3, 6, dtype=torch.bool), torch.zeros(6, 6, dtype=torch.bool)
    padding[1], mask[2] = True, True
    split = torch.ones(6, 6, dtype=torch.bool).triu(1), torch.zeros(3, 6, dtype=torch.bool)
    split[1][2, :3] = True  # of two masks only what both leave
    return {
        "sample": {"padding": padding},
        "query": {"mask": mask},
        "added": {"mask": torch.zeros(6, 6).masked_fill(mask, -torch.inf)},
        "heads": {"mask": mask.repeat(12, 1, 1)},
        "both": {"mask": split[0], "padding": split[1]},
    }[kind]


def called(m: nn.Module, x: Tensor, mask: Any = None, padding: Any = None, causal: bool = False) -> Tensor:
    """An attention or a layer on x, of a decoder's with x as its memory."""
    if isinstance(m, nn.MultiheadAttention):
        return m(x, x, x, padding, False, mask, is_causal=causal)[0]
    if isinstance(m, nn.TransformerDecoderLayer):
        return m(x, x.clone(), mask, None, padding, tgt_is_causal=causal)
    return m(x, mask, padding, is_causal=causal)


def modules(name: str, **options: Any) -> nn.Module:
    if name == "attention":
        return shaken(nn.MultiheadAttention(32, 4, batch_first=True, **options))
    if name == "stack":
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **options)
        return shaken(nn.TransformerEncoder(layer, 2))
    kind = nn.TransformerEncoderLayer if name == "encoder" else nn.TransformerDecoderLayer
    return shaken(kind(32, 4, 48, batch_first=True, **options))


WITHOUT = {"attention": {}, **{name: {"dropout": 0.0} for name in ("encoder", "decoder", "stack")}}
