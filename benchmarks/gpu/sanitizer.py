"""compute-sanitizer over one small case per op and backend, forward and backward.

`run` starts the tool on this very module; as a program this module makes the calls.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial

import torch

from benchmarks.gpu import contest
from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.machine import machine as choose_machine
from benchmarks.gpu.record import Recorder
from benchmarks.suites import Budget
from fastgpt._core import registry
from fastgpt._core.spec import Case, Draw, OpSpec
from fastgpt.testing.inputs import as_tuple, dtypes_of, leaf_names

TOOLS = ("memcheck", "racecheck")
DONE = "ended well"


def run(machine: Gpu, recorder: Recorder, budget: Budget, full: bool) -> None:
    """A finding per tool: what its summary said."""
    tool_path = shutil.which("compute-sanitizer")
    if tool_path is None and not machine.dry:
        recorder.not_run("sanitizer", "no compute-sanitizer on the path")
        return
    for i, tool in enumerate(TOOLS):
        limit = max(budget.left / (len(TOOLS) - i), 1.0)
        command = [] if machine.dry else [str(tool_path), "--tool", tool, "--target-processes", "all"]
        command += [sys.executable, "-m", "benchmarks.gpu.sanitizer", str(0.6 * limit)]
        command += ["--dry"] if machine.dry else []
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # bounds are the tensors' own
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, env=environment, check=False
            )
        except subprocess.TimeoutExpired as error:
            said = error.stdout if isinstance(error.stdout, str) else (error.stdout or b"").decode()
            recorder.finding(
                kind="sanitizer", tool=tool, ok=False, summary=f"over {limit:.0f} s", log=said[-2000:]
            )
            continue
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout + done.stderr)
        ran = re.findall(f"{DONE}.*", done.stdout)
        clean = done.returncode == 0 and bool(ran) and all("SUMMARY: 0 " in line for line in summary)
        recorder.finding(
            kind="sanitizer", tool=tool, ok=clean, summary="; ".join([*summary, *ran]),
            log="" if clean else (done.stdout + done.stderr)[:4000],
        )  # fmt: skip
        if machine.dry:
            return


def call_all(machine: Gpu, seconds: float) -> None:
    """The ops in turn, as many of their cases as the time allows."""
    end = time.monotonic() + seconds
    by_op = [[(spec, case, b) for case in _one_of_each(spec) for b in machine.backends(spec.name)]
             for spec in registry.ops()]  # fmt: skip
    jobs = [job for layer in itertools.zip_longest(*by_op) for job in layer if job is not None]
    jobs = list(machine.sizes(jobs, jobs[-1:]))
    ran = 0
    for spec, case, backend in jobs:
        if time.monotonic() > end:
            break
        ran += 1
        dtype = dtypes_of(case)[-2]  # bf16, which the check has compiled
        draw = Draw(0, machine.device)
        inputs = spec.make_inputs(case, dtype, draw)
        function = partial(spec.function, backend=backend)
        try:
            with torch.no_grad():
                outputs = as_tuple(function(**inputs))
            pairs = zip(spec.outputs, outputs, strict=False)
            grads = {name: draw.normal(y.shape, y.dtype) for name, y in pairs}
            contest.once(function, inputs, leaf_names(spec, inputs), grads, spec)
        except Exception as error:  # a refusal; a fault is the sanitizer's to tell
            print(f"{spec.name} {backend} {case.name}: {contest.reason(error)}", flush=True)
            contest.stop_if_broken(error)
    torch.cuda.synchronize()
    print(f"{DONE}: {ran} of {len(jobs)} cases")


def _one_of_each(spec: OpSpec) -> list[Case]:
    """The smallest case of every set of options that is not trivially small."""
    found: dict[tuple[str, ...], Case] = {}
    for case in spec.cases:
        key, size = tuple(sorted(case.options)), torch.Size(case.shape).numel()
        if size > 20 and (key not in found or size < torch.Size(found[key].shape).numel()):
            found[key] = case
    return list(found.values())


if __name__ == "__main__":
    call_all(choose_machine("--dry" in sys.argv), float(sys.argv[1]))
