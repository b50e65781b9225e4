"""compute-sanitizer over one small case per op and backend, forward and backward.

`run` starts the tool on this very module; as a program this module makes the calls.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import contest
from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.machine import machine as choose_machine
from benchmarks.gpu.record import Recorder
from benchmarks.suites import Budget
from fastgpt._core import registry
from fastgpt._core.spec import Case, Draw, OpSpec
from fastgpt.testing.inputs import as_tuple, dtypes_of, leaf_names

TOOLS = {"memcheck": "ERROR SUMMARY", "racecheck": "RACECHECK SUMMARY"}
DONE = "calls done:"  # then "3 of 4, 1 failed"


def run(machine: Gpu, recorder: Recorder, budget: Budget, full: bool) -> None:
    """A finding per tool: what its summary said."""
    tool_path = shutil.which("compute-sanitizer")
    if tool_path is None and not machine.dry:
        recorder.finding(
            kind="incomplete", what="sanitizer", missing=len(TOOLS), why="no compute-sanitizer on the path"
        )
        return
    for i, tool in enumerate(TOOLS):
        limit = max(budget.left / (len(TOOLS) - i), 1.0)
        command = [] if machine.dry else [str(tool_path), "--tool", tool, "--target-processes", "all"]
        command += [sys.executable, "-m", "benchmarks.gpu.sanitizer", str(0.8 * limit)]
        command += ["--dry"] if machine.dry else []
        code, said = run_limited(
            command, limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        )  # bounds: the tensors' own
        recorder.finding(kind="sanitizer", tool=tool, **verdict(tool, code, said, machine.dry))
        if machine.dry:
            return


def run_limited(
    command: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> tuple[int | None, str]:
    """(exit code, what it said) of a command; past its time all that it has started dies with it: None."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:  # a pipe would wait for the last descendant
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment),
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return code, log.read()


def verdict(tool: str, code: int | None, said: str, dry: bool) -> dict[str, Any]:
    """Clean: the tool's summary is there and says 0, and every call was completed.

    missing: how many calls time did not allow; None: nobody knows.
    """
    summary = re.findall(rf"{TOOLS[tool]}: .*", said)
    done = re.search(rf"{DONE} (\d+) of (\d+), (\d+) failed", said)
    quiet = dry or (bool(summary) and all("SUMMARY: 0 " in line for line in summary))
    ok = code == 0 and quiet and done is not None and int(done[1]) > 0 and done[3] == "0"
    missing = int(done[2]) - int(done[1]) - int(done[3]) if done else None
    words = [*(summary or ([] if dry else ["no summary"])), done[0] if done else "ended before it was done"]
    words += ["killed: its time was spent"] if code is None else []
    return {
        "ok": ok,
        "missing": missing,
        "summary": "; ".join(words),
        "log": "" if ok else said[:2000] + said[-2000:],
    }


def call_all(machine: Gpu, seconds: float) -> None:
    """The ops in turn, as many of their cases as the time allows."""
    end = time.monotonic() + seconds
    by_op = [[(spec, case, b) for case in contest.one_of_each(spec) for b in machine.backends(spec.name)]
             for spec in registry.ops()]  # fmt: skip
    jobs = [job for layer in itertools.zip_longest(*by_op) for job in layer if job is not None]
    jobs = list(machine.sizes(jobs, jobs[-1:]))
    completed = failed = 0
    for spec, case, backend in jobs:
        if time.monotonic() > end:
            break
        try:
            call(spec, case, backend, machine)
            completed += 1
        except Exception as error:
            failed += 1
            print(f"{spec.name} {backend} {case.name}: {contest.reason(error)}", flush=True)
            contest.stop_if_broken(error)
    print(f"{DONE} {completed} of {len(jobs)}, {failed} failed", flush=True)


def call(spec: OpSpec, case: Case, backend: str, machine: Gpu) -> None:
    """Forward and backward, to their end."""
    draw = Draw(0, machine.device)
    inputs = spec.make_inputs(case, dtypes_of(case)[-2], draw)  # bf16, which the check has compiled
    function = partial(spec.function, backend=backend)
    with torch.no_grad():
        outputs = as_tuple(function(**inputs))
    grads = {name: draw.normal(y.shape, y.dtype) for name, y in zip(spec.outputs, outputs, strict=False)}
    contest.once(function, inputs, leaf_names(spec, inputs), grads, spec)
    torch.cuda.synchronize()


if __name__ == "__main__":
    call_all(choose_machine("--dry" in sys.argv), float(sys.argv[1]))
