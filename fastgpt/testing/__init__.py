"""The harness: one proof for our kernels and for a user's own.

    report = fastgpt.testing.check("layer_norm", my_layer_norm)
    print(report)
    assert report.ok

Needs torch alone.
"""

from fastgpt.testing.check import Failure, Report, Row, check

__all__ = ["Failure", "Report", "Row", "check"]
