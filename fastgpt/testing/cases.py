"""`cases`: the declared cases of an op as the parameters of a pytest function, which proves a kernel on each.

    @fastgpt.testing.cases("layer_norm", dtypes=["fp32", "bf16"])
    def test_my_layer_norm(case):
        case.check(my_layer_norm)

gives test_my_layer_norm[7x1600-bf16] and its like. Nothing is to be registered with pytest.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.testing.check import check
from fastgpt.testing.inputs import DTYPE_NAMES, pairs
from fastgpt.testing.report import Report

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class OneCase:
    """A case of an op in one dtype: what a test that `cases` made gets as its argument `case`."""

    op: str
    case: Case
    dtype: str
    device: str = "cpu"
    seed: int = 0
    thorough: bool = True

    @property
    def name(self) -> str:
        """ "7x1600-bf16", as in the test's id."""
        return f"{self.case.name}-{self.dtype}"

    def check(self, implementation: Callable[..., Any]) -> Report:
        """Prove `implementation` (as `testing.check` takes it) on this case, forward and backward.

        A case with arguments that it does not take, or for which it raises NotImplementedError, is skipped.

        Raises:
            AssertionError: the report: every hazard, what it likely means, and the line that repeats this test.
        """
        __tracebackhide__ = True
        report = check(
            self.op, implementation,
            dtypes=[self.dtype], cases=[self.case], device=self.device, seed=self.seed, thorough=self.thorough,
        )  # fmt: skip
        if report.skipped and not report.failures:
            import pytest

            pytest.skip(f"not taken: {report.skipped[0][2]}")
        if not report.ok:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
            again = f"\n  or: python -m pytest {shlex.quote(test)}" if test else ""
            raise AssertionError(f"{report}{again}")
        return report


def cases(
    op: str,
    *,
    dtypes: Iterable[str | torch.dtype] | None = None,
    cases: Iterable[str | Case] | None = None,
    device: str = "cpu",
    seed: int = 0,
    thorough: bool = True,
) -> pytest.MarkDecorator:
    """A decorator for a test function with an argument `case`: one test for every case and dtype of `op`.

    Args:
        op: "layer_norm", ...
        dtypes, cases, device, seed, thorough: as of `testing.check`; by default every dtype and declared case.

    Raises:
        ImportError: pytest is not installed.
        ValueError: an unknown op, dtype or case, or none of them.
    """
    import pytest

    spec = registry.get(op)
    found = [
        OneCase(op, case, DTYPE_NAMES[dtype], device, seed, thorough)
        for case, dtype in pairs(spec.cases if cases is None else cases, dtypes, spec.cases)
    ]
    if not found:  # pytest would skip the test in silence
        raise ValueError("cases: expected at least one case and dtype, got none")
    return pytest.mark.parametrize("case", [pytest.param(one, id=one.name) for one in found])
