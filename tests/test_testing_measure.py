"""`fastgpt.testing.measure`: who is timed, who is not and why, and that ratios come from the same rounds."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import testing
from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.testing import example
from fastgpt.testing.measure import Measurement, Time
from fastgpt.testing.timing import Sample, Timing

SMALL: Any = {"cases": [Case((8, 48))], "dtypes": ["fp32"], "seconds": 0.01}


def _rows(found: Measurement, by: str) -> dict[str, Time]:
    return {row.pass_: row for row in found.rows if row.by == by}


def test_forward_and_both_beside_pytorch_and_our_own_choice() -> None:
    found = testing.measure("layer_norm", example.two_pass, **SMALL)
    assert found.ok
    assert [row.by for row in found.rows] == ["two_pass", "PyTorch", "fastgpt"] * 2
    own = _rows(found, "two_pass")
    assert set(own) == {"fwd", "fwd+bwd"}
    for row in found.rows:
        assert row.seconds is not None
        assert row.ratio is not None
        assert row.error is not None
        assert 0 < row.seconds.p20 <= row.seconds.median <= row.seconds.p80
        assert row.error <= 1.0
        assert row.rounds >= 5
    assert own["fwd"].ratio == (1.0, 1.0, 1.0)
    assert own["fwd"].seconds < own["fwd+bwd"].seconds  # type: ignore[operator]
    json.dumps(dataclasses.asdict(found))
    header, titles, first, *_ = str(found).splitlines()
    assert header.startswith("layer_norm by two_pass: device cpu, threads 1, torch ")
    assert titles.split()[:7] == ["case", "dtype", "pass", "by", "median", "p20", "p80"]
    assert first.split()[:4] == ["8x48", "fp32", "fwd", "two_pass"]


def test_what_is_wrong_gets_no_time_and_the_row_says_why() -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return example.two_pass(x, weight, bias) * 1.02

    def in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = example.two_pass(x, weight, bias)
        x.data.zero_()
        return y

    def refuses(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        raise NotImplementedError("not this one")

    def raises(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        raise KeyError("three\nlines")

    def narrow(x: Tensor) -> Tensor:
        return x

    def wrong_dtype(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return example.two_pass(x, weight, bias).double()

    others = [in_place, refuses, raises, narrow, wrong_dtype, example.two_pass]
    found = testing.measure("layer_norm", wrong, against=others, **SMALL)
    assert not found.ok
    said = {row.by: row.note for row in found.rows if row.seconds is None}
    assert set(said) == {"wrong", "in_place", "refuses", "raises", "narrow", "wrong_dtype"}
    assert said["wrong"].startswith("not timed: ")
    assert said["wrong"].endswith(" times its error bound")
    assert said["in_place"] == "not timed: changes x"
    assert said["refuses"] == "not taken: not this one"
    assert said["raises"].startswith("not timed: raised KeyError")
    assert said["narrow"] == "not taken: has arguments that it does not take"
    assert said["wrong_dtype"] == "not timed: inf times its error bound"
    assert "not timed: changes x" in str(found)
    right = _rows(found, "two_pass")["fwd"]
    assert right.seconds is not None
    assert right.ratio is None  # what it would be compared with has no time


def test_changed_gradients_are_changes_and_reach_nobody_else() -> None:
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            dx = dy.clone()
            dy.data.mul_(2.0)
            return dx

    def overwrites(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return InPlace.apply(example.two_pass(x, weight, bias))

    found = testing.measure("layer_norm", overwrites, against=[example.two_pass], **SMALL)
    assert _rows(found, "overwrites")["fwd"].note == "not timed: changes the gradient of y"
    assert _rows(found, "two_pass")["fwd"].seconds is not None


def test_pytorch_is_timed_outside_its_bound_and_the_row_says_so() -> None:
    """Its bf16 dbias is rounded after every row."""
    found = testing.measure("layer_norm", "fastgpt", cases=["70x768"], dtypes=["bf16"], seconds=0.01)
    row = _rows(found, "PyTorch")["fwd+bwd"]
    assert row.error is not None
    assert row.error > 1.0
    assert row.seconds is not None
    assert row.note.endswith("times its error bound")
    assert found.implementation == "fastgpt"
    assert {row.by for row in found.rows} == {"fastgpt", "PyTorch"}  # not twice


def test_backends_by_name_and_names_twice() -> None:
    found = testing.measure("gelu", "torch", against=["reference", _named("mine"), _named("mine")], **SMALL)
    assert [row.by for row in found.rows[:4]] == ["backend torch", "backend reference", "mine", "mine (2)"]
    assert found.ok
    if not registry.EMULATED["triton"]:
        found = testing.measure("gelu", "triton", against=["torch"], **SMALL)
        assert not found.ok
        assert _rows(found, "backend triton")["fwd"].note.startswith("not taken: gelu: the backend asked for")
        assert _rows(found, "backend torch")["fwd"].seconds is not None


def test_cases_without_gradients_and_of_the_benchmarks_are_known_by_name() -> None:
    found = testing.measure("layer_norm", example.two_pass, cases=["64x768"], dtypes=["fp32"], seconds=0.01)
    assert {row.case for row in found.rows} == {"64x768"}


def test_ratios_are_taken_round_by_round() -> None:
    slow = Timing(tuple(Sample(s) for s in (2.0, 20.0, 4.0)), 1)
    fast = Timing(tuple(Sample(s) for s in (1.0, 10.0, 2.0)), 1)
    assert slow.over(fast) == (2.0, 2.0, 2.0)


def _named(name: str) -> Any:
    def mine(x: Tensor, *, approximate: str = "none") -> Tensor:
        return torch.nn.functional.gelu(x, approximate=approximate)

    mine.__name__ = name
    return mine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "layer_nrom"}, "op: expected one of .*layer_norm"),
        ({"dtypes": ["fp8"]}, "dtype: expected one of fp32"),
        ({"cases": ["5x34"]}, "case: expected one of .*5x33"),
        ({"implementation": "cdpu"}, "implementation: expected a function or one of PyTorch, fastgpt, cpu"),
        ({"against": ["tensorflow"]}, "against: expected a function or one of .*got 'tensorflow'"),
        ({"against": [3]}, "against: expected a function or a name, got 3"),
        ({"against": []}, "against: expected something else than the implementation"),
    ],
)
def test_a_wrong_name_is_a_value_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        testing.measure(**{"op": "gelu", "implementation": _named("mine"), **SMALL, **arguments})
