"""The harness: one proof for our kernels and for a user's own, and one clock.

    print(fastgpt.testing.check("layer_norm", my_layer_norm))         # every declared case, forward and backward
    print(fastgpt.testing.measure("layer_norm", my_layer_norm))       # beside PyTorch's and ours, checked first

    @fastgpt.testing.cases("layer_norm", dtypes=["fp32", "bf16"])     # a pytest for every case
    def test_my_layer_norm(case):
        case.check(my_layer_norm)

`python -m fastgpt.testing.example` shows a bug that the usual test does not see. Needs torch alone (`cases`: pytest).
"""

from fastgpt.testing.cases import OneCase, cases
from fastgpt.testing.check import Failure, Report, Row, check
from fastgpt.testing.measure import Measurement, Time, measure

__all__ = ["Failure", "Measurement", "OneCase", "Report", "Row", "Time", "cases", "check", "measure"]
