"""MLP blocks that `fastgpt.patch` finds by what they do, and those that do something else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from patch_helpers import DTYPES, check_same, shaken
from torch import Tensor, nn

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
    torch.testing.assert_close(patched(x), expected, rtol=1e-4, atol=1e-4)
    assert 0.2 < float((patched(x) == 0).float().mean()) < 0.4


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
