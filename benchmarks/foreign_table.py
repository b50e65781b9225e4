"""`python -m benchmarks foreign`: the harness on kernels that nobody here wrote, as one table.

Liger-Kernel's Triton ops and PyTorch's own, every declared case that they take, error against bound, passes and
failures alike, and for every failure the line that repeats it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from benchmarks import environment, foreign
from benchmarks.foreign_read import LIGER_VERSION, READ
from fastgpt._core import registry
from fastgpt.testing import Report, check
from fastgpt.testing.report import HAZARDS, repro

DTYPES = ("fp32", "bf16", "fp16")
# Of a case for a kernel in the interpreter, which runs a program per row and takes milliseconds for each.
ROWS_AT_MOST = 100


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks foreign", description=__doc__)
    parser.add_argument("--op", action="append", choices=[spec.name for spec in registry.ops()])
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cpu: in Triton's interpreter"
    )
    parser.add_argument(
        "--out", type=Path, default=environment.ROOT / "benchmarks" / "results", metavar="DIR"
    )
    options = parser.parse_args(arguments)
    reason = foreign.missing()
    if reason is not None:
        raise ValueError(reason)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    torch.set_num_threads(1)  # the cases are small: threads cost more than they give
    started, reports = time.perf_counter(), []
    for name, op in functions(options.op):
        reports.append(one(name, op, options.dtype or DTYPES, options.device))
        print("\n".join(lines_of(reports[-1])), flush=True)
    version = importlib.metadata.version("liger-kernel")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"foreign-{version}.md"
    path.write_text(markdown(reports, version, options.device, time.perf_counter() - started))
    print(f"{path}, after {time.perf_counter() - started:.0f} s")
    return 0


def functions(ops: Iterable[str] | None) -> Iterator[tuple[str, str]]:
    """(name in `foreign`, op)."""
    wanted = [spec.name for spec in registry.ops()] if ops is None else list(ops)
    yield from ((name, op) for name, op in foreign.LIGER.items() if op in wanted)
    yield from ((f"pytorch_{op}", op) for op in wanted)


def one(name: str, op: str, dtypes: Iterable[str], device: str) -> Report:
    spec = registry.get(op)
    interpreted = name in foreign.LIGER and device == "cpu"
    cases = [case for case in spec.cases if not interpreted or math.prod(case.shape[:-1]) <= ROWS_AT_MOST]
    return check(
        op, getattr(foreign, name), dtypes=dtypes, cases=cases, device=device, thorough=not interpreted
    )


HEADER = """\
# The harness on foreign kernels

Liger-Kernel {version} ({where}) and PyTorch {torch}'s own ops on the {device}, by `fastgpt.testing.check`. Triton
{triton}, Python {python}, one thread, {seconds:.0f} s. Made by `python -m benchmarks foreign`, after
`pip install --no-deps liger-kernel`. The adapters are in `benchmarks/foreign.py`.

- *error / bound*: the largest error of any element of any output or gradient, over the error that fp32 arithmetic
  with one rounding at the store may make there; above 1 is outside. *PyTorch there*: of its own op on that case.
- *cases*: declared cases of the op that were checked; in brackets those that the kernel has no argument for. For
  kernels in the interpreter those of at most {rows} rows, and of layouts, leaks and repetitions one each in turn.
- *result*: the hazards, and how many cases ran into each.
- Liger's kernels get arguments passed on, nothing else: nothing is copied for them and no result is repaired.
- In the interpreter bf16 is made right first (`fastgpt_kernels/triton/interpreter.py`): widened before arithmetic,
  rounded to the nearest even after it, as a GPU does. Floats are fp32 arguments, as when compiled; libdevice's
  `rsqrt` and `tanh`, stubs there, are numpy's; sums of bf16 are fp32 and rounded once, which is kinder than a GPU.
  What it cannot show: races, compilers' mistakes, approximate instructions, and (it counts one multiprocessor)
  partial sums over many.
- The harness asks for more than a bound: unchanged inputs, a second backward, layouts, repeatability. Some of what
  fails is meant by its authors, or another definition: *read* says so, after a look at the sources.
"""


def markdown(reports: list[Report], version: str, device: str, seconds: float) -> str:
    where = "its Triton kernels in Triton's interpreter" if device == "cpu" else torch.cuda.get_device_name()
    text = HEADER.format(
        version=version, where=where, torch=torch.__version__, device=device.upper(),
        triton=importlib.metadata.version("triton"), python=platform.python_version(), seconds=seconds,
        rows=ROWS_AT_MOST,
    )  # fmt: skip
    titles = ("op", "implementation", "dtype", "cases", "error / bound", "where", "PyTorch there", "result")
    rows = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    rows += [line for report in reports for line in lines_of(report)]
    failures = [text for report in reports for text in failures_of(report, version)]
    return "\n\n".join([text.rstrip(), "\n".join(rows), "## Failures", *failures]) + "\n"


def lines_of(report: Report) -> Iterator[str]:
    """A line per dtype."""
    skipped = {skip[:2] for skip in report.skipped}
    checked = {row[:2] for row in report.rows} | {failure[:2] for failure in report.failures}
    for dtype in dict.fromkeys(dtype for _, dtype in sorted(checked, key=lambda call: DTYPES.index(call[1]))):
        rows = [row for row in report.rows if row.dtype == dtype]
        counts = {
            hazard: sum(f.dtype == dtype for f in failures) for hazard, failures in report.telling.items()
        }
        hazards = [f"{hazard} {count}" for hazard, count in counts.items() if count]
        ratio = where = pytorch = "-"
        if rows:
            worst = max(rows, key=lambda row: row.kernel.ratio)
            ratio, where = f"{worst.kernel.ratio:.3g}", f"{worst.output}, {worst.case}"
            pytorch = "-" if worst.pytorch is None else f"{worst.pytorch.ratio:.3g}"
        taken, left = (sum(name == dtype for _, name in calls) for calls in (checked, skipped))
        result = f"**{', '.join(hazards)}**" if hazards else "pass"
        cells = (report.op, report.implementation, dtype, f"{taken} ({left})", ratio, where, pytorch, result)
        yield f"| {' | '.join(cells)} |"


def failures_of(report: Report, version: str) -> Iterator[str]:
    """A paragraph per hazard: how often, the first, what it was found to be, and the line that repeats it."""
    for hazard, failures in report.telling.items():
        first, pattern = failures[0], report.pattern(hazard)
        counts = ", ".join(
            f"{sum(f.dtype == dtype for f in failures)} in {dtype}"
            for dtype in dict.fromkeys(failure.dtype for failure in failures)
        )
        command = repro(report, first)
        if report.implementation not in foreign.LIGER:  # it is no kernel of Triton's
            command = command.removeprefix("TRITON_INTERPRET=1 ")
        said = "; ".join(filter(None, (first.detail, first.meaning)))
        yield (
            f"**{report.implementation}: {hazard}** ({HAZARDS[hazard]})\n\n"
            f"- cases: {counts}{f'; {pattern}' if pattern else ''}\n"
            f"- {first.case} {first.dtype}: {said}\n"
            f"- read: {read(report, hazard, version)}\n\n"
            f"```sh\n{command}\n```"
        )


def read(report: Report, hazard: str, version: str) -> str:
    """What a look into the sources found behind a failure."""
    if report.implementation in foreign.LIGER and version != LIGER_VERSION:
        return f"not yet, of this version (the sources of {LIGER_VERSION} were)"
    return READ.get((report.implementation, hazard), "not yet")
