"""The harness itself: honest implementations pass, and each deliberately wrong one is rejected, in fp32 and in bf16."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.reference.philox import keep_mask
from fastgpt.testing import check
from torch import Tensor
from wrong_ops import GELU, LayerNorm, Softmax

# A few cases of each op, small and telling: the whole set is test_ops.py's.
CASES = {
    "layer_norm": ["5x33", "33x64", "9x131-weight_False-bias_False", "9x257-mean_1000.0", "6x100-eps_0.5", "6x100-residual"],
    "gelu": ["5x33", "5x33-bias", "5x33-approximate_tanh", "5x33-approximate_tanh-bias", "9x257-mean_-4.0-std_1.5"],
    "softmax": [
        "5x33", "4x130-mean_1000.0-std_30.0", "2x2x17x70-causal-scale_0.125", "2x9x4-causal-scale_0.125",
        "3x4x10x37-mask_bool-over_bhqk-scale_0.5", "3x4x10x37-mask_bool-over_1hq1-scale_0.5",
        "3x4x10x37-mask_fp32-over_11qk-scale_0.5", "2x3x20x33-dropout_0.1-causal-scale_0.2",
    ],
}  # fmt: skip
HONEST = {"layer_norm": LayerNorm(), "gelu": GELU(), "softmax": Softmax()}


def op_of(fault: type) -> str:
    return {LayerNorm: "layer_norm", GELU: "gelu", Softmax: "softmax"}[fault.__mro__[1]]


# --- LayerNorm


class DroppedTailColumn(LayerNorm):
    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        y[..., y.shape[-1] // 4 * 4 :] = 0.0
        return y.to(x.dtype)


class PaddingPollutesVariance(LayerNorm):
    """Padded to a power of two, and not masked again after centring."""

    def variance(self, s: Tensor, mean: Tensor) -> Tensor:
        n = s.shape[-1]
        padded = 2 ** math.ceil(math.log2(n))
        return super().variance(s, mean) + (padded - n) / n * mean.square()


class VarianceFromSquares(LayerNorm):
    """mean(x**2) - mean(x)**2: cancels where the mean is large."""

    def variance(self, s: Tensor, mean: Tensor) -> Tensor:
        return (s.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0.0)


class StatisticsInBF16(LayerNorm):
    def mean(self, s: Tensor) -> Tensor:
        return super().mean(s).bfloat16().float()

    def rstd(self, variance: Tensor, eps: float) -> Tensor:
        return super().rstd(variance, eps).bfloat16().float()


class UnbiasedVariance(LayerNorm):
    def variance(self, s: Tensor, mean: Tensor) -> Tensor:
        return super().variance(s, mean) * (s.shape[-1] / (s.shape[-1] - 1))


class EpsOutsideTheRoot(LayerNorm):
    def rstd(self, variance: Tensor, eps: float) -> Tensor:
        return 1.0 / (variance.sqrt() + eps)


class DbScaled(LayerNorm):
    def db(self, dy: Tensor) -> Tensor:
        return super().db(dy) * 1.02


class DxScaled(LayerNorm):
    def dx(self, wdy: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return super().dx(wdy, xhat, rstd) * 1.05


class ScaledByTheFirstGradient(LayerNorm):
    def incoming(self, dy: Tensor) -> Tensor:
        return dy * dy.flatten()[0]


class DwMissesARow(LayerNorm):
    def dw(self, dy: Tensor, xhat: Tensor) -> Tensor:
        return (dy * xhat).flatten(0, -2)[:-1].sum(0)


class DwAccumulatedInBF16(LayerNorm):
    def dw(self, dy: Tensor, xhat: Tensor) -> Tensor:
        total = torch.zeros(dy.shape[-1], dtype=torch.bfloat16)
        for row in (dy * xhat).flatten(0, -2):
            total += row.bfloat16()
        return total.float()


class DxWithoutItsMean(LayerNorm):
    def dx(self, wdy: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return rstd * (wdy - xhat * (wdy * xhat).mean(-1, keepdim=True))


class InputMutated(LayerNorm):
    """The sum is written over the residual."""

    def stream(self, x: Tensor, residual: Tensor) -> Tensor:
        total = super().stream(x, residual)
        residual.copy_(total)
        return total


class GradientMutated(LayerNorm):
    def incoming(self, dy: Tensor) -> Tensor:
        found = dy.clone()
        if dy.is_contiguous():
            dy.zero_()
        return found


class UnwrittenRow(LayerNorm):
    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        out[:-1] = y[:-1]
        return out


class Cached(LayerNorm):
    """Results kept by address and shape."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def forward(self, x: Tensor, w: Any, b: Any, eps: float, residual: Any) -> tuple[Any, ...]:
        key = x.data_ptr(), x.shape
        if key not in self.known:
            self.known[key] = super().forward(x, w, b, eps, residual)
        return tuple(None if t is None else t.clone() for t in self.known[key])


class StreamIsTheResidual(LayerNorm):
    def forward(self, x: Tensor, w: Any, b: Any, eps: float, residual: Any) -> tuple[Any, ...]:
        y, stream, *saved = super().forward(x, w, b, eps, residual)
        return y, None if stream is None else residual.clone(), *saved


class StreamGradientDropped(LayerNorm):
    def with_stream(self, ds: Tensor, dstream: Tensor) -> Tensor:
        return ds


class ResidualAfterTheNorm(LayerNorm):
    def forward(self, x: Tensor, w: Any, b: Any, eps: float, residual: Any) -> tuple[Any, ...]:
        y, stream, *saved = super().forward(x, w, b, eps, residual)
        return super().forward(x, w, b, eps, None)[0] if stream is not None else y, stream, *saved


class OutputsShareMemory(LayerNorm):
    def forward(self, x: Tensor, w: Any, b: Any, eps: float, residual: Any) -> tuple[Any, ...]:
        y, stream, s, *saved = super().forward(x, w, b, eps, residual)
        if stream is None:
            return y, stream, s, *saved
        both = torch.stack([y, stream])
        return both[0], both[1], s.clone(), *saved


class OutputIsTheInput(LayerNorm):
    """Written into the input's memory, as an in-place kernel would."""

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        return x.detach().copy_(y)


class WiderOutput(LayerNorm):
    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        return y.double()


class StochasticRounding(LayerNorm):
    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        noise = (torch.rand_like(y) - 0.5) * 2.0 ** (-23 if x.dtype == torch.float32 else -7)
        return (y * (1.0 + noise)).to(x.dtype)


class GradientReadAsContiguous(LayerNorm):
    def incoming(self, dy: Tensor) -> Tensor:
        strides = [math.prod(dy.shape[d + 1 :]) for d in range(dy.dim())]
        return dy.as_strided(dy.shape, strides, dy.storage_offset()) if dy.stride(-1) else dy


class ExpandedGradientTakenForOneRow(LayerNorm):
    def __init__(self) -> None:
        self.one_row = False

    def incoming(self, dy: Tensor) -> Tensor:
        self.one_row = dy.dim() > 1 and dy.stride(0) == 0
        return dy

    def db(self, dy: Tensor) -> Tensor:
        return dy[0].clone() if self.one_row else super().db(dy)


class RowLeak(LayerNorm):
    """The last row's statistics reach the row before it, below any error bound."""

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.to(x.dtype)
        y[0] += y[-1] * 0.0
        return y


# --- GELU


class TanhForErf(GELU):
    def gate(self, z: Tensor, approximate: str) -> Tensor:
        return super().gate(z, "tanh")


class ErfForTanh(GELU):
    def gate(self, z: Tensor, approximate: str) -> Tensor:
        return super().gate(z, "none")


class SigmoidGate(GELU):
    def gate(self, z: Tensor, approximate: str) -> Tensor:
        return torch.sigmoid(1.702 * z)


class GateInBF16(GELU):
    def gate(self, z: Tensor, approximate: str) -> Tensor:
        return super().gate(z, approximate).bfloat16().float()


class TailCutOff(GELU):
    def gate(self, z: Tensor, approximate: str) -> Tensor:
        return super().gate(z, approximate).masked_fill(z < -4.0, 0.0)


class SlopeWithoutTheBell(GELU):
    def bell(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)


class BiasForgottenInBackward(GELU):
    def backward_sum(self, x: Tensor, bias: Tensor) -> Tensor:
        return x.float()


class DbiasAveraged(GELU):
    def dbias(self, dz: Tensor) -> Tensor:
        return dz.flatten(0, -2).mean(0)


# --- softmax


class FutureTokenLeaks(Softmax):
    def triangle(self, queries: int, keys: int) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries + 1)


class CausalTopLeft(Softmax):
    def triangle(self, queries: int, keys: int) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril()


class HiddenElementsLookedAt(Softmax):
    """Hidden by adding a large negative number: a NaN there shows."""

    def hide(self, s: Tensor, seen: Tensor) -> Tensor:
        return s - 1e30 * (~seen).float()


class NoMaximum(Softmax):
    def normalise(self, s: Tensor) -> Tensor:
        return s.exp() / s.exp().sum(-1, keepdim=True)


class ProbabilitiesInBF16(Softmax):
    def normalise(self, s: Tensor) -> Tensor:
        e = (s - s.amax(-1, keepdim=True)).exp().bfloat16()
        return (e / e.sum(-1, keepdim=True)).float()


class EmptyRowsNaN(Softmax):
    def empty_rows(self, p: Tensor, seen: Tensor) -> Tensor:
        return p


class EmptyRowsUniform(Softmax):
    def empty_rows(self, p: Tensor, seen: Tensor) -> Tensor:
        return p.masked_fill(~seen.any(-1, keepdim=True), 1.0 / p.shape[-1])


class ScaleForgottenInTheGradient(Softmax):
    def dx(self, ds: Tensor, scale: float) -> Tensor:
        return ds


class GradientWithoutItsSum(Softmax):
    def ds(self, p: Tensor, g: Tensor) -> Tensor:
        return p * g


class MaskGradientNotSummed(Softmax):
    def dmask(self, ds: Tensor, shape: torch.Size) -> Tensor:
        return ds


class MaskGradientAveraged(Softmax):
    def dmask(self, ds: Tensor, shape: torch.Size) -> Tensor:
        return super().dmask(ds, shape) * (math.prod(shape) / ds.numel())


class DropoutWithoutRescaling(Softmax):
    def rescale(self, kept: Tensor, dropout_p: float) -> Tensor:
        return kept


class OtherDropoutInBackward(Softmax):
    def keep_in_backward(self, shape: torch.Size, dropout_p: float, rng: Tensor) -> Tensor:
        return keep_mask(shape, dropout_p, rng + 1)


class PhiloxOffsetIgnored(Softmax):
    def keep(self, shape: torch.Size, dropout_p: float, rng: Tensor) -> Tensor:
        return keep_mask(shape, dropout_p, rng * torch.tensor([1, 0]))


class PhiloxCountsColumnsOnly(Softmax):
    def keep(self, shape: torch.Size, dropout_p: float, rng: Tensor) -> Tensor:
        return keep_mask(shape[-1:], dropout_p, rng).expand(shape)


FAULTS = {
    DroppedTailColumn: "bound", PaddingPollutesVariance: "bound", VarianceFromSquares: "bound",
    StatisticsInBF16: "bound", UnbiasedVariance: "bound", EpsOutsideTheRoot: "bound", DbScaled: "bound",
    DxScaled: "bound", ScaledByTheFirstGradient: "bound", DwMissesARow: "bound", DwAccumulatedInBF16: "bound",
    DxWithoutItsMean: "bound", InputMutated: "input mutated", GradientMutated: "input mutated",
    UnwrittenRow: "not written", Cached: "stale", StreamIsTheResidual: "bound", StreamGradientDropped: "bound",
    ResidualAfterTheNorm: "bound", OutputsShareMemory: "alias", OutputIsTheInput: "alias", WiderOutput: "dtype",
    StochasticRounding: "not repeatable", GradientReadAsContiguous: "layout",
    ExpandedGradientTakenForOneRow: "expanded gradient", RowLeak: "leak",
    TanhForErf: "bound", ErfForTanh: "bound", SigmoidGate: "bound", GateInBF16: "bound", TailCutOff: "bound",
    SlopeWithoutTheBell: "bound", BiasForgottenInBackward: "bound", DbiasAveraged: "bound",
    FutureTokenLeaks: "leak", CausalTopLeft: "bound", HiddenElementsLookedAt: "leak", NoMaximum: "not written",
    ProbabilitiesInBF16: "bound", EmptyRowsNaN: "not written", EmptyRowsUniform: "bound",
    ScaleForgottenInTheGradient: "bound", GradientWithoutItsSum: "bound", MaskGradientNotSummed: "raised",
    MaskGradientAveraged: "bound", DropoutWithoutRescaling: "bound", OtherDropoutInBackward: "bound",
    PhiloxOffsetIgnored: "bound", PhiloxCountsColumnsOnly: "bound",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_rejected(fault: Any, dtype: str) -> None:
    op = op_of(fault)
    report = check(op, fault(), dtypes=[dtype], cases=CASES[op])
    assert not report.ok
    assert FAULTS[fault] in report.hazards, report
    assert FAULTS[fault] in str(report)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", HONEST)
def test_honest_is_accepted(op: str, dtype: str) -> None:
    report = check(op, HONEST[op], dtypes=[dtype])
    assert report.ok, report
    assert not report.skipped


def test_an_empty_check_is_not_ok() -> None:
    def takes_nothing(x: Tensor) -> Tensor:
        raise NotImplementedError("not this one")

    report = check("gelu", takes_nothing, dtypes=["fp32"], cases=["5x33"])
    assert not report.ok
    assert report.skipped


def test_cases_that_an_implementation_cannot_take_are_left_out_and_said() -> None:
    def no_bias(x: Tensor, *, approximate: str = "none") -> Tensor:
        return GELU()(x, approximate=approximate)

    report = check("gelu", no_bias, dtypes=["fp32"], cases=["5x33", "5x33-bias"])
    assert report.ok
    assert "1 of its cases not run" in str(report)


def test_a_case_of_ones_own() -> None:
    assert check("gelu", backend="torch", dtypes=["fp32"], cases=[Case((3, 11), {"bias": True})]).ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "layer_nrom"}, "op: expected one of layer_norm"),
        ({"op": "gelu", "dtypes": ["fp8"]}, "dtype: expected one of fp32"),
        ({"op": "gelu", "cases": ["5x34"]}, "case: expected one of"),
        ({"op": "gelu", "backend": "cdpu"}, "backend: expected one of"),
        ({"op": "gelu", "backend": "cpu", "implementation": GELU()}, "backend: expected None"),
    ],
)
def test_a_wrong_name_is_a_value_error(arguments: dict[str, Any], message: str) -> None:
    arguments = {"dtypes": ["fp32"], **arguments}
    with pytest.raises(ValueError, match=message):
        check(**arguments)


def test_every_op_with_planted_faults_has_honest_rows() -> None:
    for op in HONEST:
        assert registry.get(op).name == op
        assert sum(op_of(fault) == op for fault in FAULTS) >= 8
