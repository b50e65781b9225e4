"""MLP blocks that `fastgpt.patch` finds by what they do, and those that do something else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patch_helpers import DTYPES, check_same, shaken
from torch import Tensor, nn
from torch.nn.utils import prune

import fastgpt
from fastgpt.interop.swap import original


class Named2(nn.Module):
    """Layers by other names, and registered in another order than that of their use."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(24, 16, bias), nn.Linear(16, 24, bias)
        self.drop, self.act, self.drop2 = nn.Dropout(0.2), nn.GELU(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.down(self.drop(self.act(self.up(x)))))


class Gated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.act(self.b(x)))  # the second is the gate


class Clipped(Named2):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-60, 60)


class Hidden(Named2):
    """With a dropout that is no module."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class Residual(Named2):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block", "by"),
    [
        (Named2(), "ops.mlp"),
        (Named2(bias=False), "ops.mlp"),
        (Gated(nn.SiLU()), "ops.swiglu"),
        (Gated(nn.GELU()), "ops.geglu"),
        (Gated(nn.GELU(approximate="tanh")), "ops.geglu"),
        (nn.Sequential(nn.Linear(16, 24), nn.GELU()), "ops.linear with its GELU"),
        (nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)), "ops.mlp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_blocks_are_found_by_what_they_do(block: nn.Module, by: str, dtype: str) -> None:
    module = shaken(copy.deepcopy(block)).to(DTYPES[dtype]).eval()
    report = check_same(module, lambda m, x: m(x), [torch.randn(5, 16).to(DTYPES[dtype])])
    assert [e.by for e in report.entries if e.kind == "mlp"] == [by]


@pytest.mark.parametrize("block", [Clipped(), Hidden(), Residual()], ids=lambda b: type(b).__name__)
def test_a_block_that_does_something_else_is_left(block: nn.Module) -> None:
    report = fastgpt.patch(block)
    assert [e.why for e in report.left] == ["does something else with its layers than an MLP"]
    assert original(type(block)) is type(block)
    assert "mlp" not in {e.kind for e in report.replaced}


def test_a_block_s_dropouts_act_where_they_did() -> None:
    """In training, by the same draws: a dropout is called as the module that it is."""
    module = shaken(Named2())
    patched, x = copy.deepcopy(module), torch.randn(64, 16)
    fastgpt.patch(patched, strict=True)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    got = patched(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got == 0, expected == 0)  # 1,024 of 0.3: within five deviations
    assert abs(float((got == 0).float().mean()) - 0.3) < 5 * (0.3 * 0.7 / 1024) ** 0.5
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    patched(leaf).square().sum().backward()
    torch.manual_seed(3)
    module(again := x.clone().requires_grad_()).square().sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-4, atol=1e-3)
    for (name, p), q in zip(patched.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-3, msg=name)


class OnlyInEvaluation(Named2):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.training else y.clamp(-0.1, 0.1)


class ByRank(Named2):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.dim() == 2 else y + y.mean(1, keepdim=True)


class WithAttribute(Named2):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("block", [OnlyInEvaluation(), ByRank()], ids=lambda b: type(b).__name__)
def test_a_block_is_tried_out_in_both_modes_and_ranks(block: nn.Module) -> None:
    assert "mlp" not in {e.kind for e in fastgpt.patch(block).replaced}


def test_a_block_whose_attributes_change_runs_its_own_forward() -> None:
    block, x = shaken(WithAttribute()).eval(), torch.randn(4, 16)
    report = fastgpt.patch(block)
    assert "mlp" in {e.kind for e in report.replaced}
    expected = 2 * block(x)
    block.scale = 2.0  # type: ignore[assignment]
    torch.testing.assert_close(block(x), expected)


class Scaled(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def test_a_gelu_that_overrides_is_none() -> None:
    layer = shaken(nn.TransformerEncoderLayer(32, 4, 48, 0.0, Scaled(), batch_first=True)).eval()
    block = shaken(nn.Sequential(nn.Linear(16, 40), Scaled(), nn.Linear(40, 16)))
    later = shaken(nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)))
    for model, x in ((layer, torch.randn(2, 5, 32)), (block, torch.randn(3, 16))):
        expected = model(x)
        fastgpt.patch(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    fastgpt.patch(later)
    later[1] = Scaled()  # type: ignore[operator]
    x = torch.randn(3, 16)
    got = later(x)
    fastgpt.unpatch(later)
    torch.testing.assert_close(got, later(x))


# --- what may change after a block was found ---


def check_own(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Patched it gives what its own forward gives now."""
    got = block(x, *args, **kwargs)
    fastgpt.unpatch(block)
    torch.testing.assert_close(got, block(x, *args, **kwargs), rtol=1e-4, atol=1e-4)


def found(block: nn.Module) -> nn.Module:
    report = fastgpt.patch(shaken(block))
    assert "mlp" in {e.kind for e in report.replaced}
    return block.eval()


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Dropout(0.5), nn.Linear(24, 16))


def test_children_that_come_and_go() -> None:
    x = torch.randn(4, 16)
    for change in (
        lambda b: b.append(nn.Tanh()),
        lambda b: b.insert(0, nn.Tanh()),
        lambda b: b.add_module("more", nn.Linear(16, 8)),
        lambda b: b.__delitem__(2),
        lambda b: b.__delitem__(3),
        lambda b: b.__setitem__(1, nn.ReLU()),
        lambda b: b.__setitem__(2, nn.Tanh()),
        lambda b: b.__setitem__(3, nn.Linear(24, 5, bias=False)),
        lambda b: nn.utils.parametrizations.weight_norm(b[0]),
        lambda b: nn.utils.parametrizations.spectral_norm(b[3]),
        lambda b: prune.random_unstructured(b[0], "weight", 0.5),
        lambda b: b[1].__setattr__("approximate", "tanh"),
        lambda b: b[0].register_forward_pre_hook(lambda m, args: (2 * args[0],)),
        lambda b: b.double(),
    ):
        block = found(sequential())
        change(block)
        check_own(block, x.to(next(block.parameters()).dtype))


def test_arguments_by_name() -> None:
    class Block(Named2):
        def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
            return scale * super().forward(hidden_states)

    x = torch.randn(4, 16)
    for args, kwargs in (((x,), {}), ((), {"hidden_states": x}), ((x, 3.0), {}), ((x,), {"scale": 3.0})):
        block = found(Block())
        got = block(*args, **kwargs)
        fastgpt.unpatch(block)
        torch.testing.assert_close(got, block(*args, **kwargs), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError):
        found(Block())()


class Cast(Named2):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class HalfOnly(Named2):
    """As some models keep fp16 from overflowing."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.clamp(-0.5, 0.5) if y.dtype == torch.bfloat16 else y


class WithTensor(Named2):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Private(Named2):
    def __init__(self) -> None:
        super().__init__()
        self._scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self._scale


@pytest.mark.parametrize("kind", [Cast, HalfOnly])
def test_a_block_that_looks_at_the_dtype_is_left(kind: type[nn.Module]) -> None:
    block, x = shaken(kind()).bfloat16().eval(), torch.randn(4, 16).bfloat16()
    expected = block(x)
    assert "mlp" not in {e.kind for e in fastgpt.patch(block).replaced}
    assert block(x).dtype == expected.dtype
    torch.testing.assert_close(block(x), expected)


def test_state_that_is_no_parameter() -> None:
    x = torch.randn(4, 16)
    block = shaken(WithTensor()).eval()
    fastgpt.patch(block)
    block.scale.mul_(2)  # in place: no other object
    check_own(block, x)
    private = found(Private())
    private._scale = 2.0  # type: ignore[assignment]
    check_own(private, x)
    hung = found(Named2())
    hung._of_somebody_else, before = 1, type(hung)  # type: ignore[assignment]
    assert type(hung) is before
    check_own(hung, x)


class Lora(nn.Module):
    """In fp32, beside layers of bf16."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.a = layer, nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.a(x.float())


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU()], ids=["silu", "gelu"])
def test_an_adapter_of_another_dtype_in_a_gated_block(act: nn.Module) -> None:
    x = torch.randn(4, 16).bfloat16()
    block = shaken(Gated(copy.deepcopy(act))).bfloat16()
    fastgpt.patch(block)
    block.a, block.c = Lora(block.a), nn.Linear(24, 16)  # type: ignore[arg-type]
    got = block(x)
    fastgpt.unpatch(block)
    torch.testing.assert_close(got, block(x), rtol=2e-2, atol=2e-2)
    plain = Gated(copy.deepcopy(act))
    shaken(plain).bfloat16()
    fastgpt.patch(plain)
    plain.a = nn.Linear(16, 1).bfloat16()  # type: ignore[assignment]  # broadcast
    got = plain(x)
    fastgpt.unpatch(plain)
    torch.testing.assert_close(got, plain(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_blocks_of_other_dtypes_are_found(dtype: torch.dtype) -> None:
    for block in (Named2(), Gated(nn.SiLU()), Gated(nn.GELU())):
        module, x = shaken(block).to(dtype).eval(), torch.randn(4, 16, dtype=dtype)
        expected = module(x)
        assert next(e.kind for e in fastgpt.patch(module).replaced) == "mlp"
        torch.testing.assert_close(module(x), expected, rtol=1e-2, atol=1e-2)


def test_rows_of_any_rank_and_layout() -> None:
    for made in (Named2, lambda: Gated(nn.SiLU())):
        for x in (torch.randn(16), torch.randn(0, 16), torch.randn(3, 16, 5).mT, torch.randn(2, 3, 4, 16)):
            block = found(made())
            got = block(x)
            fastgpt.unpatch(block)
            expected = block(x)
            assert got.stride() == expected.stride()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_in_two_places_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    dropout, layer = nn.Dropout(0.5), nn.Linear(8, 8)
    shared = nn.Sequential(nn.Linear(8, 16), nn.GELU(), dropout, nn.Linear(16, 8), dropout)
    for block in (shared, nn.Sequential(layer, nn.GELU(), layer)):
        x = torch.randn(3, 8)
        expected = block.eval()(x)
        report = fastgpt.patch(block, only="mlp")
        assert [e.by for e in report.entries if e.kind == "mlp"] == ["ops.mlp"]
        with monkeypatch.context() as patched:
            patched.setattr(nn.Linear, "forward", None)  # it is really ours
            torch.testing.assert_close(block(x), expected)
