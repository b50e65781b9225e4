"""The harness itself: honest implementations pass, deliberately wrong ones are rejected, in fp32 and in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from honest_attention import Attention, AttentionQKV, AttentionVarlen
from honest_glu import GEGLU, SwiGLU
from honest_ops import GELU, LayerNorm, RMSNorm, Softmax
from torch import Tensor
from wrong_cross_entropy import CrossEntropy
from wrong_embedding import EMBEDDING_CASES, Embedding
from wrong_linear import MLP, Linear, LinearCrossEntropy
from wrong_ops import FAULTS
from wrong_rope import ROPE_CASES, Rope

from fastgpt._core.spec import Case
from fastgpt.testing import check
from fastgpt.testing.report import HAZARDS

# A few cases of each op, small and telling: the whole set is test_ops.py's.
CASES = {
    "layer_norm": [
        "5x33", "33x64", "9x131-weight_False-bias_False", "9x257-mean_1000.0", "6x100-eps_0.5", "6x100-residual",
    ],
    "geglu": ["5x33", "5x33-approximate_tanh"],
    "swiglu": ["5x33", "9x257-mean_-40.0-std_12.0"],
    "cross_entropy": [
        "5x33-reduction_none", "37x70-ignored_0.4", "2x3x130-reduction_sum-label_smoothing_0.1-ignored_0.3",
        "9x257-reduction_none-label_smoothing_0.1-ignored_0.3-ignore_index_4",
        "5x64-mean_1000.0-std_30.0-reduction_none",
    ],
    "gelu": ["5x33", "5x33-bias", "5x33-approximate_tanh", "5x33-approximate_tanh-bias", "9x257-mean_-4.0-std_1.5"],
    "rms_norm": [
        "5x33", "9x131-weight_False", "9x257-mean_1000.0", "6x100-eps_0.5-std_0.1", "8x96-residual-weight_False",
    ],
    "softmax": [
        "5x33", "4x130-mean_1000.0-std_30.0", "2x2x17x70-causal-scale_0.125", "2x9x4-causal-scale_0.125",
        "3x4x10x37-mask_bool-over_bhqk-scale_0.5", "3x4x10x37-mask_bool-over_1hq1-scale_0.5",
        "3x4x10x37-mask_fp32-over_11qk-scale_0.5", "2x3x20x33-dropout_0.1-causal-scale_0.2",
    ],
    "embedding": EMBEDDING_CASES,
    "rope": ROPE_CASES,
    "attention": ["2x3x17x17x16", "1x2x40x40x64-causal"],
}  # fmt: skip
HONEST = {
    "layer_norm": LayerNorm(),
    "geglu": GEGLU(),
    "cross_entropy": CrossEntropy(),
    "embedding": Embedding(),
    "gelu": GELU(),
    "rms_norm": RMSNorm(),
    "rope": Rope(),
    "linear": Linear(),
    "linear_cross_entropy": LinearCrossEntropy(),
    "mlp": MLP(),
    "softmax": Softmax(),
    "attention": Attention(),
    "attention_qkv": AttentionQKV(),
    "attention_varlen": AttentionVarlen(),
    "swiglu": SwiGLU(),
}


PLANTED = [(fault, dtype) for fault in FAULTS for dtype in getattr(fault, "dtypes", ("fp32", "bf16"))]


@pytest.mark.parametrize(
    ("fault", "dtype"), PLANTED, ids=[f"{fault.__name__}-{dtype}" for fault, dtype in PLANTED]
)
def test_rejected(fault: Any, dtype: str) -> None:
    (op,) = (op for op, honest in HONEST.items() if issubclass(fault, type(honest)))
    report = check(op, fault(), dtypes=[dtype], cases=getattr(fault, "cases", CASES.get(op)))
    assert not report.ok
    assert FAULTS[fault] in report.hazards, report
    assert FAULTS[fault] in str(report)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", HONEST)
def test_honest_is_accepted(op: str, dtype: str) -> None:
    report = check(op, HONEST[op], dtypes=[dtype])
    assert report.ok, report
    assert not report.skipped


def test_what_follows_the_stream_is_judged_from_the_stream_that_was_returned() -> None:
    class OneUlpUp(LayerNorm):
        def stream(self, x: Tensor, residual: Tensor) -> Tensor:
            total = super().stream(x, residual)
            return torch.nextafter(total, torch.full_like(total, torch.inf))

    report = check("layer_norm", OneUlpUp(), dtypes=["fp32"], cases=["5x1031-residual-mean_100.0"])
    assert report.ok, report
    (y,) = (row.kernel.ratio for row in report.rows if row.output == "y")
    assert y < 0.2  # from the inputs it would be a shift of every element


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
        ({"op": "layer_nrom"}, "op: expected one of .*layer_norm"),
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


def test_every_hazard_has_a_fault_that_shows_it() -> None:
    assert set(FAULTS.values()) == set(HAZARDS)
