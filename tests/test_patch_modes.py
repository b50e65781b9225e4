"""`fastgpt.patch` under what looks at a model's calls: compiling, tracing, modes, transforms; and derivatives of
derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patch_helpers import Model, shaken
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastgpt


def test_compiles_whole_and_exports() -> None:
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    expected = model(x)
    fastgpt.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)


def test_autocast_checkpointing_and_inference_mode() -> None:
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    patched = copy.deepcopy(model)
    fastgpt.patch(patched)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = model(x), patched(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    with torch.inference_mode():
        torch.testing.assert_close(patched(x), model(x))
    leaf = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(patched, leaf, use_reentrant=False).sum().backward()
    again = x.clone().requires_grad_()
    patched(again).sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad)


def test_torch_func_and_forward_mode_go_to_pytorch() -> None:
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    parameters = dict(model.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (x,))[:, 0].sum()

    expected = torch.func.grad(loss)(parameters)
    derivative = torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
    fastgpt.patch(model)
    got = torch.func.grad(loss)(parameters)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.func.jvp(model, (x,), (torch.ones_like(x),))[1], derivative)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x), rtol=1e-4, atol=1e-6)


class Within(nn.Module):
    """torch.fx takes the inputs of a model apart, not those of what is in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(8),
    "rms_norm": lambda: nn.RMSNorm(8),
    "gelu": nn.GELU,
    "softmax": lambda: nn.Softmax(-1),
    "linear": lambda: nn.Linear(8, 8),
    "mlp": lambda: Within(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 8))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_symbolic_traces(name: str) -> None:
    model, x = shaken(LAYERS[name]()).eval(), torch.randn(4, 8)
    expected = model(x)
    fastgpt.patch(model, strict=True)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_scripting_is_refused(name: str) -> None:
    model, x = shaken(LAYERS[name]()).eval(), torch.randn(4, 8)
    expected = model(x)
    fastgpt.patch(model)
    with pytest.raises(RuntimeError, match=r"that patch has replaced: unpatch"):
        torch.jit.script(model)
    fastgpt.unpatch(model)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


class Negated(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return -out if func in (F.layer_norm, F.rms_norm, F.gelu, F.softmax, F.linear) else out


@pytest.mark.parametrize("name", LAYERS)
def test_modes_see_pytorch_s_functions(name: str) -> None:
    model, x = shaken(LAYERS[name]()).eval(), torch.randn(4, 8)
    with Negated():
        expected = model(x)
    fastgpt.patch(model)
    with Negated():
        torch.testing.assert_close(model(x), expected)


def test_a_default_device_is_no_mode_that_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.LayerNorm(8), torch.randn(4, 8)
    fastgpt.patch(model)
    monkeypatch.setattr(F, "layer_norm", None)
    with torch.device("cpu"):
        model(x)


class Again(nn.Module):
    """The same weights twice: what is given to the second was made of them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.inner(x))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_gradients(name: str) -> None:
    model, found = shaken(Again(LAYERS[name]())).eval(), list[list[Tensor]]()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    for module in (model, copy.deepcopy(model)):
        if found:
            fastgpt.patch(module, strict=True)
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        loss = module(leaves[0]).square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        norm = sum((grad.square().sum() for grad in first), torch.zeros(()))
        found.append([*first, *torch.autograd.grad(norm, leaves)])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
