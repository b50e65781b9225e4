"""`fastgpt.patch` beside others who exchange classes, pickle, copy, quantise; and patching again."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from patch_helpers import Model, shaken
from torch import Tensor, nn

import fastgpt

# --- what others make of the classes, pickles and copies of their own ---


class Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def test_parametrizations_come_off_before_and_after() -> None:
    model, x = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8)), torch.randn(3, 8)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Twice())
    expected = model(x)
    first, second = fastgpt.patch(model).entries
    assert (first.why, second.by) == ("parametrized", "ops.layer_norm")
    nn.utils.parametrize.register_parametrization(model[1], "weight", Twice())
    torch.testing.assert_close(model(x), 2 * expected)
    again = fastgpt.patch(model).entries
    assert again[1].by == "as patched before, within ParametrizedLayerNorm"
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.LayerNorm
    assert fastgpt.unpatch(model) == 1
    assert fastgpt.unpatch(model) == 0
    torch.testing.assert_close(model(x), 2 * expected)
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert type(model[1]) is nn.LayerNorm
    torch.testing.assert_close(model(x), 2 * expected)


def test_a_parametrization_of_what_is_patched_comes_off() -> None:
    module, x = nn.LayerNorm(8), torch.randn(3, 8)
    fastgpt.patch(module)
    kind = type(module)
    nn.utils.parametrize.register_parametrization(module, "weight", Twice())
    doubled = copy.deepcopy(module)(x)
    nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert type(module) is kind
    torch.testing.assert_close(doubled, 2 * module(x))


def test_fully_sharded_modules_are_unpatched(tmp_path: Any) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("needs a PyTorch with fully_shard")
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    expected = model(x)
    replaced = len(fastgpt.patch(model).replaced)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for module in (model.norm, model.mlp, model):
            fsdp.fully_shard(module)
        torch.testing.assert_close(model(x), expected)
        assert fastgpt.unpatch(model) == replaced
        assert isinstance(model.norm, fsdp.FSDPModule)
        assert not any("fastgpt" in c.__module__ for m in model.modules() for c in type(m).__mro__)
        torch.testing.assert_close(model(x), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_a_class_that_cannot_be_made_anew_is_named() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    fastgpt.patch(model)
    ours: Any = type(model[0])

    class Louder(ours):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    model[0].__class__ = Louder
    with pytest.raises(ValueError, match="got Louder, which somebody made of one since"):
        fastgpt.unpatch(model)
    assert type(model[1]) is not nn.GELU  # nothing was changed
    model[0].__class__ = ours
    assert fastgpt.unpatch(model) == 2


class Counted(nn.LayerNorm):
    """Pickles what its state is by a method of its own."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.file: Any = io.StringIO()
        self.lock = (i for i in range(3))  # cannot be pickled

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in self.__dict__.items() if n != "lock"}


class Rebuilt(nn.LayerNorm):
    def __reduce__(self) -> Any:
        return self.__class__, (self.normalized_shape[0],), {"note": "kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class RebuiltBlock(nn.Sequential):
    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in self.__dict__.items() if not n.startswith("_fastgpt")}


def test_pickling_methods_of_their_own_are_used() -> None:
    block = RebuiltBlock(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model = nn.Sequential(Counted(8), Rebuilt(8), block)
    fastgpt.patch(model, strict=True)
    x = torch.randn(3, 8)
    expected = model(x)
    for other in (copy.deepcopy(model), *(pickle.loads(pickle.dumps(model, p)) for p in (2, 4))):
        torch.testing.assert_close(other(x), expected)
        assert [type(a) is type(b) for a, b in zip(other, model, strict=True)] == [True] * 3
        assert not hasattr(other[0], "lock")
        assert other[1].note == "kept"
        assert fastgpt.unpatch(other) >= 3


def test_what_the_class_is_called_for_is_not_patched() -> None:
    block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x, model = torch.randn(3, 8), nn.Sequential(block)
    expected = block[:2](x)
    fastgpt.patch(model)
    part = model[0][:2]
    assert type(part) is nn.Sequential
    torch.testing.assert_close(part(x), expected)
    assert type(type(model[0])(nn.Linear(8, 8))) is nn.Sequential


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.GELU, nn.Linear])
def test_a_forward_put_on_a_class_is_left(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all modules of PyTorch's, before: also where it is a block's layer."""
    model, x = shaken(Model()).eval(), torch.randn(4, 16)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))
    expected = model(x)
    report = fastgpt.patch(model)
    torch.testing.assert_close(model(x), expected)
    why = {e.kind: e.why for e in report.left}
    if kind is nn.LayerNorm:
        assert why == {"layer_norm": "its forward was exchanged for another"}
    else:
        assert why["mlp"] == f"its {kind.__name__}'s forward was exchanged for another"


# --- patched again, in other ways ---


def test_a_second_patch_tells_what_is_replaced_by_the_first() -> None:
    model = Model()
    first = fastgpt.patch(model, exclude="rms_norm")
    second = fastgpt.patch(model, only="rms_norm")
    assert {e.name for e in second.replaced} == {e.name for e in first.replaced} | {"rms"}
    assert fastgpt.unpatch(model) == len(second.replaced)


def test_a_module_that_is_left_by_a_second_patch_is_its_own_again() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    fastgpt.patch(model)
    model[0].forward = lambda x: 2 * x  # type: ignore[method-assign]
    assert [e.by for e in fastgpt.patch(model).entries] == [None, "ops.gelu"]
    assert type(model[0]) is nn.LayerNorm
    assert torch.equal(model[0](torch.ones(8)), 2 * torch.ones(8))


# --- quantised ---


def test_quantised_before_and_after() -> None:
    """`quantize_dynamic` asks for the very class of a layer."""
    quantize = torch.ao.quantization.quantize_dynamic
    model, x = shaken(Model()).eval(), torch.randn(4, 16)

    def quantised(m: nn.Module) -> int:
        kinds = [type(module) for module in m.modules()]
        return sum("quantized" in kind.__module__ and kind.__name__ == "Linear" for kind in kinds)

    before = quantize(copy.deepcopy(model), {nn.Linear})
    assert quantised(before) == 3
    expected = before(x)
    report = fastgpt.patch(before)
    assert not any(e.kind in ("mlp", "linear") for e in report.replaced)
    torch.testing.assert_close(before(x), expected)
    fastgpt.patch(model, only="linear")
    after = quantize(model, {nn.Linear})
    assert quantised(after) == 0
    fastgpt.unpatch(model)
    assert quantised(quantize(model, {nn.Linear})) == 3
