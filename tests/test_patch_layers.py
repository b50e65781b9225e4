"""Single layers under `fastgpt.patch`: whatever a call gives without it, it gives with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patch_helpers import outcome, shaken
from torch import Tensor, nn
from torch.nn.utils import prune

import fastgpt
from fastgpt import ops
from fastgpt.interop import layers
from fastgpt.interop.swap import original


class LlamaRMSNorm(nn.Module):
    """As in transformers."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class ResidualRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:  # type: ignore[override]
        return super().forward(x) if residual is None else (super().forward(x + residual), x + residual)


class SingleRMSNorm(LlamaRMSNorm):
    """Its results are fp32, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.double()).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


class NoisyRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * (2 if self.training else 1)


class ByRankRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * (1 if x.dim() == 2 else 2)


@pytest.fixture(autouse=True)
def everything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MUCH", 0)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the ops of ours that are called."""
    names = list[str]()

    def watched(name: str) -> Callable[..., Any]:
        own = getattr(ops, name)
        return lambda *args, **kwargs: (names.append(name), own(*args, **kwargs))[1]

    with monkeypatch.context() as patched:
        for name in ("layer_norm", "rms_norm", "gelu", "softmax", "linear"):
            patched.setattr(ops, name, watched(name))
        yield names


def check_agrees(module: nn.Module, call: Callable[[nn.Module], Any]) -> Any:
    """Values, dtype, shape and strides, or the same error."""
    expected = outcome(lambda: call(module))
    fastgpt.patch(module)
    got = outcome(lambda: call(module))
    fastgpt.unpatch(module)
    if isinstance(expected, type) or isinstance(got, type):
        assert got == expected
        return expected
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, expected)), strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        rough = 2.0**-6 if b.dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(a, b, rtol=rough, atol=rough, equal_nan=True)
    return expected


MADE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {  # how it is made, its argument, the op
    "LayerNorm": (lambda: nn.LayerNorm(16), "input", "layer_norm"),
    "without weights": (lambda: nn.LayerNorm(16, elementwise_affine=False), "input", "layer_norm"),
    "without bias": (lambda: nn.LayerNorm(16, bias=False), "input", "layer_norm"),
    "RMSNorm": (lambda: nn.RMSNorm(16), "x", "rms_norm"),
    "RMSNorm without weight": (lambda: nn.RMSNorm(16, elementwise_affine=False), "x", "rms_norm"),
    "LlamaRMSNorm": (lambda: LlamaRMSNorm(16), "hidden_states", "rms_norm"),
    "GELU": (lambda: nn.GELU(), "input", "gelu"),
    "tanh": (lambda: nn.GELU("tanh"), "input", "gelu"),
    "Softmax": (lambda: nn.Softmax(-1), "input", "softmax"),
    "Linear": (lambda: nn.Linear(16, 16), "input", "linear"),
    "Linear without bias": (lambda: nn.Linear(16, 16, bias=False), "input", "linear"),
}


@pytest.mark.parametrize("name", MADE)
def test_arguments_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, argument, op = MADE[name]
    module, x = shaken(made()), torch.randn(3, 5, 16)
    check_agrees(module, lambda m: m(x))
    check_agrees(module, lambda m: m(**{argument: x}))
    assert check_agrees(module, lambda m: m(y=x)) is TypeError
    assert check_agrees(module, lambda m: m(x, x)) is TypeError
    fastgpt.patch(module, strict=True)
    with counted(monkeypatch) as names:
        module(x)
    assert names == [op]


def test_arguments_of_transformers_layers_by_name() -> None:
    transformers = pytest.importorskip("transformers")
    x = torch.randn(3, 5, 16)
    check_agrees(shaken(transformers.pytorch_utils.Conv1D(24, 16)), lambda m: m(x=x))
    check_agrees(shaken(transformers.pytorch_utils.Conv1D(24, 16)), lambda m: m(x))
    for kind in ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python"):
        check_agrees(transformers.activations.ACT2FN[kind], lambda m: m(input=x))
        check_agrees(transformers.activations.ACT2FN[kind], lambda m: m(x.mT))


def test_a_norm_that_takes_a_residual_too() -> None:
    module, x, y = shaken(ResidualRMSNorm(16)), torch.randn(3, 16), torch.randn(3, 16)
    assert [e.by for e in fastgpt.patch(module).entries] == ["ops.rms_norm"]
    for call in (
        lambda m: m(x),
        lambda m: m(x=x),
        lambda m: m(x, y),
        lambda m: m(x, residual=y),
        lambda m: m(x, None),
    ):
        check_agrees(module, call)


@pytest.mark.parametrize("kind", [SingleRMSNorm, NoisyRMSNorm, ByRankRMSNorm])
def test_a_norm_that_does_something_else_at_times_is_left(kind: type[nn.Module]) -> None:
    module = shaken(kind(16))
    (left,) = fastgpt.patch(module).left
    assert "another norm than" in (left.why or "")
    assert type(module) is kind


def laid_out() -> dict[str, Tensor]:
    """[..., 16] in other layouts than row by row."""
    return {
        "transposed": torch.randn(5, 3, 16).transpose(0, 1),
        "last transposed": torch.randn(3, 16, 5).mT,
        "channels last": torch.randn(2, 3, 4, 16).to(memory_format=torch.channels_last),
        "every second": torch.randn(3, 32)[:, ::2],
        "expanded": torch.randn(1, 16).expand(4, 16),
        "scalars": torch.randn(3, 1).expand(3, 16),
        "rows apart": torch.randn(3, 40)[:, :16],
        "empty": torch.randn(0, 16),
        "one row": torch.randn(16),
    }


@pytest.mark.parametrize("layout", laid_out())
@pytest.mark.parametrize("name", MADE)
def test_layouts(name: str, layout: str) -> None:
    """A `view` behind it goes on to work."""
    torch.manual_seed(0)
    x = laid_out()[layout]
    check_agrees(shaken(MADE[name][0]()), lambda m: m(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", MADE)
def test_mixed_dtypes(name: str, given: torch.dtype, own: torch.dtype, autocast: bool) -> None:
    module, x = shaken(MADE[name][0]()).to(own), torch.randn(3, 16).to(given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check_agrees(module, lambda m: m(x))
        if getattr(module, "bias", None) is not None:
            module.bias.data = module.bias.data.to(torch.float64)  # type: ignore[union-attr, operator]
            check_agrees(module, lambda m: m(x))


@pytest.mark.parametrize("name", [name for name in MADE if "Norm" in name or "without" in name])
def test_a_width_that_is_another(name: str) -> None:
    module = shaken(MADE[name][0]())
    assert isinstance(check_agrees(module, lambda m: m(torch.ones(3, 8))), type) or "Llama" in name
    assert isinstance(check_agrees(module, lambda m: m(torch.ones(3, 1))), type) or "Llama" in name


def test_tensors_that_are_more_than_their_memory() -> None:
    x = torch.randn(4, 16)
    negative = torch.complex(x, x).conj().imag
    assert negative.is_neg()
    for made, _, _ in MADE.values():
        check_agrees(shaken(made()), lambda m: m(negative))
        check_agrees(shaken(made()), lambda m: torch.empty(m(x.to("meta")).shape).zero_())
    linear = shaken(nn.Linear(16, 16, bias=False))
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)
    check_agrees(linear, lambda m: m(x))


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrizations_come_and_go(norm: str, when: str) -> None:
    """A weight is computed once in a call: spectral_norm's goes on with each."""
    x = torch.randn(3, 16)
    calls, outs = dict[bool, int](), dict[bool, list[Tensor]]()
    for patched in (False, True):
        model = shaken(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.LayerNorm(16)))
        if patched and when == "after":
            fastgpt.patch(model)
        torch.manual_seed(1)
        getattr(nn.utils.parametrizations, norm)(model[0])
        if patched and when == "before":
            fastgpt.patch(model)
        seen = list[Any]()
        model[0].parametrizations.weight.register_forward_hook(lambda *_, seen=seen: seen.append(0))  # type: ignore[union-attr]
        outs[patched] = [model(x), model(x), model.eval()(x)]
        calls[patched] = len(seen)
        nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        outs[patched].append(model(x))
        fastgpt.unpatch(model)
        outs[patched].append(model(x))
        assert type(model[0]) is nn.Linear
    assert calls[True] == calls[False] == 3
    for got, expected in zip(outs[True], outs[False], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_parametrized_norm() -> None:
    class Softplus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(x)

    for made in (lambda: nn.LayerNorm(16), lambda: nn.RMSNorm(16), lambda: LlamaRMSNorm(16)):
        module, x = shaken(made()), torch.randn(3, 16)
        fastgpt.patch(module)
        nn.utils.parametrize.register_parametrization(module, "weight", Softplus())
        got = module(x)
        fastgpt.unpatch(module)
        torch.testing.assert_close(got, module(x))


def test_older_norms_of_weights_and_pruning() -> None:
    """They compute the weight in a hook before."""
    x = torch.randn(3, 16)
    for change in (
        lambda m: nn.utils.weight_norm(m),
        lambda m: nn.utils.spectral_norm(m),
        lambda m: prune.random_unstructured(m, "weight", amount=0.5),
    ):
        module = shaken(nn.Linear(16, 16))
        fastgpt.patch(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(module)
        module.eval()
        got = module(x)
        fastgpt.unpatch(module)
        torch.testing.assert_close(got, module(x))


def test_attributes_that_change() -> None:
    x = torch.randn(3, 4, 16)
    norm, gelu, softmax = nn.LayerNorm(16), nn.GELU(), nn.Softmax(-1)
    model = nn.ModuleList([norm, gelu, softmax])
    fastgpt.patch(model, strict=True)
    norm.eps, gelu.approximate, softmax.dim = 0.5, "tanh", 1
    got = [m(x) for m in model]
    norm.normalized_shape, norm.weight, norm.bias = (4, 16), None, None  # type: ignore[assignment]
    got.append(norm(x))
    fastgpt.unpatch(model)
    for a, b in zip(got[1:3] + got[3:], [gelu(x), softmax(x), norm(x)], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(got[0], F.layer_norm(x, (16,), eps=0.5))


def test_eps_is_measured_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.RMSNorm(16).bfloat16(), 1e-3 * torch.randn(3, 16, dtype=torch.bfloat16)
    expected = module(x)
    layers._half_eps.cache_clear()
    fastgpt.patch(module, strict=True)
    assert layers._half_eps.cache_info().currsize == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled, expected, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(module(x), expected, rtol=2e-2, atol=1e-3)
    assert layers._half_eps.cache_info().currsize == 1


def test_a_weight_of_another_class_is_seen_when_compiled() -> None:
    class Twice(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_function__(func, types, args, kwargs or {})
            return 2 * out if func is F.layer_norm else out

    module, x = shaken(nn.LayerNorm(16)), torch.randn(3, 16)
    expected = 2 * module(x)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Twice), requires_grad=False)
    fastgpt.patch(module)
    torch.testing.assert_close(module(x).as_subclass(Tensor), expected)


def test_dynamic_quantisation_looks_for_the_class_itself() -> None:
    """It finds no patched layer: a model is quantised first."""
    model, x = shaken(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))), torch.randn(3, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        expected = quantised(x)
        fastgpt.patch(quantised)
        torch.testing.assert_close(quantised(x), expected)
        assert original(type(quantised[1])) is nn.LayerNorm
        fastgpt.patch(model)
        late = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert original(type(late[0])) is nn.Linear
    torch.testing.assert_close(late(x), model(x))
