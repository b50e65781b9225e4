"""`fastgpt.patch` on PyTorch's own modules: the same results, the same objects, nothing that is not understood."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patch_helpers import DTYPES, Model, check_same, shaken
from torch import Tensor, nn

import fastgpt
from fastgpt.interop import KINDS, layers
from fastgpt.interop.swap import original


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(nn.LayerNorm):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_the_same(dtype: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MUCH", 0)  # so that the small ones take the way of the large
    model = shaken(Model()).to(DTYPES[dtype]).train(training)
    model.mlp[2].p = 0.0  # type: ignore[union-attr, assignment]
    report = check_same(model, lambda m, x: m(x), [torch.randn(3, 7, 16).to(DTYPES[dtype])])
    assert {e.kind: e.by for e in report.replaced} == {
        "layer_norm": "ops.layer_norm",
        "rms_norm": "ops.rms_norm",
        "mlp": "ops.mlp",
        "gelu": "ops.gelu",
        "softmax": "ops.softmax",
        "linear": "ops.linear",
    }
    assert not report.left


def test_the_module_stays_the_object_that_it_is() -> None:
    model = shaken(Model())
    before = dict(model.named_parameters()), list(model.state_dict()), dict(model.named_modules())
    report = fastgpt.patch(model)
    assert dict(model.named_parameters()).keys() == before[0].keys()
    assert all(p is before[0][name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == before[1]
    assert all(module is before[2][name] for name, module in model.named_modules())
    assert isinstance(model.norm, nn.LayerNorm)
    assert type(model.norm) is not nn.LayerNorm
    assert nn.LayerNorm(4).forward.__func__ is nn.LayerNorm.forward  # no class is touched
    again = fastgpt.patch(model)
    assert again.to_dict() == report.to_dict()
    assert fastgpt.unpatch(model) == len(report.replaced)
    assert type(model.norm) is nn.LayerNorm
    assert fastgpt.unpatch(model) == 0
    assert all(module is before[2][name] for name, module in model.named_modules())
    assert "_fastgpt_roles" not in model.mlp.__dict__


def test_copies_pickles_and_saved_models_are_patched_too() -> None:
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    report = fastgpt.patch(model)
    expected, file = model(x), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), expected)
        assert original(type(other.norm)) is nn.LayerNorm
        assert type(other.norm) is type(model.norm)
        assert other.norm.weight is not model.norm.weight
        assert fastgpt.unpatch(other) == len(report.replaced)
    assert type(model.norm) is not nn.LayerNorm


def test_an_optimizer_made_before_trains_on() -> None:
    model, x = shaken(Model()), torch.randn(8, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastgpt.patch(model)
    before = model.norm.weight.detach().clone()
    model(x)[:, 0].sum().backward()
    optimizer.step()
    assert not torch.equal(model.norm.weight, before)


def test_hooks_run_also_within_a_block_that_is_replaced() -> None:
    model, x, seen = shaken(Model()).eval(), torch.randn(4, 16), list[str]()
    expected = model(x)
    fastgpt.patch(model)
    for name in ("norm", "mlp", "mlp.0", "mlp.1", "mlp.3"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(model(x), expected)
    assert sorted(seen) == ["mlp", "mlp.0", "mlp.1", "mlp.3", "norm"]


def test_a_layer_exchanged_afterwards_is_called() -> None:
    """As adapters do it."""

    class Adapted(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.scale = layer, nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale

    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    fastgpt.patch(model)
    model.mlp[3] = Adapted(model.mlp[3])  # type: ignore[index]
    expected = model(x)
    fastgpt.unpatch(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Doubled(16), "a subclass with a forward of its own"),
        (nn.LayerNorm((3, 16)), "over 2 dimensions"),
        (nn.RMSNorm((3, 16)), "over 2 dimensions"),
        (nn.Softmax(dim=0), "dim=0, not the last"),
        (nn.MultiheadAttention(16, 2, add_bias_kv=True), "appends a key of its own"),
        (nn.MultiheadAttention(16, 2, add_zero_attn=True), "appends a key of zeros"),
        (nn.MultiheadAttention(16, 2, kdim=8), "keys or values of another width"),
    ],
)
def test_what_is_not_understood_is_left_and_listed(module: nn.Module, why: str) -> None:
    model = nn.ModuleDict({"it": module, "norm": nn.LayerNorm(8)})
    before = type(module)
    with pytest.raises(
        ValueError, match=rf"strict: expected every module .* 1 are not, the first it .*{why}"
    ):
        fastgpt.patch(model, strict=True)
    assert type(model["norm"]) is nn.LayerNorm  # nothing was changed
    report = fastgpt.patch(model)
    (left,) = report.left
    assert (left.name, left.module) == ("it", before.__name__)
    assert why in (left.why or "")
    assert type(module) is before
    assert [e.name for e in report.replaced] == ["norm"]
    assert why in str(report)


def test_a_subclass_that_changes_nothing_is_replaced() -> None:
    model = nn.Sequential(Named(16))
    fastgpt.patch(model, strict=True)
    assert isinstance(model[0], Named)
    torch.testing.assert_close(model(torch.ones(2, 16)), torch.zeros(2, 16))


def test_a_module_in_two_places_is_replaced_once_and_named_by_both() -> None:
    norm = nn.LayerNorm(16)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    (entry,) = fastgpt.patch(model).entries
    assert entry.name == "a = b.0"
    assert model["a"] is norm
    assert fastgpt.unpatch(model) == 1


def test_only_and_exclude_take_kinds_and_names() -> None:
    def replaced(**options: Any) -> set[str]:
        return {e.name for e in fastgpt.patch(Model(), **options).replaced}

    assert replaced(only="layer_norm") == {"norm"}
    assert replaced(only=["mlp", "act"]) == {"mlp", "act"}
    assert replaced(exclude="*norm") == {"rms", "mlp", "mlp.1", "act", "softmax", "head"}
    assert replaced(only="linear") == {"mlp.0", "mlp.3", "head"}
    assert replaced(only=["gelu"], exclude=["mlp.*"]) == {"act"}
    report = fastgpt.patch(Model(), strict=True, only="rms_norm")  # what nobody asked for is no fault
    assert {e.why for e in report.left} == {"not asked for"}
    with pytest.raises(ValueError, match=r"only: expected a kind \(layer_norm, .*got 'nrom'"):
        fastgpt.patch(Model(), only="nrom")
    assert set(KINDS) >= {e.kind for e in report.entries}


def test_models_that_cannot_be_patched() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got Tensor"):
        fastgpt.patch(torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not compiled yet"):
        fastgpt.patch(torch.compile(Model(), backend="eager"))  # type: ignore[arg-type]
    compiled = Model()
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match="not compiled yet"):
        fastgpt.patch(compiled)
    with torch.device("meta"), pytest.raises(ValueError, match="got them on meta"):
        fastgpt.patch(Model())
    with pytest.raises(ValueError, match="TorchScript"):
        fastgpt.patch(torch.jit.script(nn.LayerNorm(4)))


def test_softmax_over_another_dimension_at_the_call_is_pytorch_s() -> None:
    module = nn.Softmax(dim=1)
    fastgpt.patch(module, strict=True)
    for x in (torch.randn(3, 4), torch.randn(3, 4, 5)):
        torch.testing.assert_close(module(x), x.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rms_norm_s_own_eps(dtype: torch.dtype) -> None:
    module = nn.RMSNorm(8, dtype=dtype)
    x = torch.randn(3, 8, dtype=dtype) * 1e-3
    expected = module(x)
    fastgpt.patch(module, strict=True)
    torch.testing.assert_close(module(x), expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6)


# --- what others put on modules ---


def test_a_forward_of_an_instance_is_left_and_called() -> None:
    """As accelerate's hooks put it there."""
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    norm, first = model.norm, model.mlp[0]  # type: ignore[index]
    norm.forward = lambda x: 3 * F.layer_norm(x, (16,))  # type: ignore[method-assign, assignment]
    expected = model(x)
    report = fastgpt.patch(model)
    assert {e.name: e.why for e in report.left} == {"norm": "its forward was exchanged for another"}
    torch.testing.assert_close(model(x), expected)
    first.forward = lambda x: x @ torch.ones(16, 40)  # after patching, within a block
    got = model(x)
    fastgpt.unpatch(model)
    torch.testing.assert_close(got, model(x))


def test_hooks_on_all_modules_see_the_layers_of_a_block() -> None:
    model, x, seen = shaken(Model()).eval(), torch.randn(4, 16), list[nn.Module]()
    fastgpt.patch(model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        model(x)
    finally:
        handle.remove()
    assert set(seen) == set(model.modules())


def test_parametrized_layers() -> None:
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    nn.utils.parametrizations.weight_norm(model.mlp[0])  # type: ignore[index]
    nn.utils.parametrizations.spectral_norm(model.head)
    expected = model(x)
    fastgpt.patch(model)
    torch.testing.assert_close(model(x), expected)
    nn.utils.parametrizations.weight_norm(model.mlp[3])  # type: ignore[index]
    with torch.no_grad():
        model.mlp[3].parametrizations.weight.original0.mul_(2)  # type: ignore[index, union-attr]
    got = model(x)
    assert not torch.allclose(got, expected)
    fastgpt.unpatch(model)
    torch.testing.assert_close(got, model(x))


def test_weights_of_other_classes_go_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(Tensor):
        """Stands for a weight that keeps something else behind its memory."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear:
                with torch._C.DisableTorchFunctionSubclass():
                    return 2 * func(*args, **(kwargs or {}))
            return super().__torch_function__(func, types, args, kwargs or {})

    monkeypatch.setattr(layers, "MUCH", 0)
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    for layer in (model.head, model.mlp[0]):  # type: ignore[index]
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Twice), requires_grad=False)
    expected = model(x)
    fastgpt.patch(model)
    torch.testing.assert_close(model(x), expected)


def test_a_number_has_a_gelu_too() -> None:
    module = nn.GELU()
    fastgpt.patch(module, strict=True)
    torch.testing.assert_close(module(torch.tensor(1.0)), F.gelu(torch.tensor(1.0)))
