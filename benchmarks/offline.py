"""`python -m benchmarks offline`: proof of the Triton kernels without a GPU.

Records what the launchers launch for the calls of `offline_calls`, compiles exactly that for every architecture, and
makes one table of registers, spills, shared memory and matrix instructions. What must not be makes it fail. The table
that is kept names each kernel by a hash of all that it is made from: what has not changed is not compiled again, and
a test sees at once whether the table is of the kernels that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import triton
from fastgpt_kernels.triton.launch import INTERPRETING

from benchmarks import offline_calls, offline_cuda
from benchmarks.offline_calls import Call
from benchmarks.offline_compile import ARCHS, Row, Specialisation, compile_row, faults, specialise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "build" / "offline"
WORKERS = 2

Job = tuple[Specialisation, list[str]]  # what to compile, and the calls that launch it


@dataclasses.dataclass
class Table:
    """What a run found. cuda: a row per CUDA C++ kernel, or None with the reason in `notes`."""

    triton: str
    rows: list[Row]
    cuda: list[offline_cuda.CudaRow] | None
    failures: list[str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "triton": self.triton,
            "failures": self.failures,
            "notes": self.notes,
            "cuda": None if self.cuda is None else [dataclasses.asdict(row) for row in self.cuda],
            "rows": [row.to_json() for row in self.rows],
        }

    def dump(self) -> str:
        """As JSON, a row a line, so that two tables can be compared."""
        head = self.to_json()
        rows = ",\n".join(json.dumps(row) for row in head.pop("rows"))
        return f'{json.dumps(head)[:-1]},\n"rows": [\n{rows}\n]}}\n'


def recorded_rows(version: str = triton.__version__) -> dict[str, Row]:
    """The rows of the table that is kept for a version of Triton, by the hash of what they are of."""
    path = RESULTS / f"offline-{version}.json"
    if not path.is_file():
        return {}
    rows = ({k: v for k, v in row.items() if k != "faults"} for row in json.loads(path.read_text())["rows"])
    return {row["hash"]: Row(**row) for row in rows}


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    if INTERPRETING:
        raise ValueError("offline: TRITON_INTERPRET is set: nothing can be compiled in the interpreter")
    whole = not (options.op or options.arch or options.quick)
    out = options.out or (RESULTS if whole else None)  # the recorded table is of everything
    calls = offline_calls.calls(options.op or (), quick=options.quick)
    known = {} if options.fresh else recorded_rows()
    table = make_table(calls, options.arch or ARCHS, options.cache, known, cuda=not options.no_cuda)
    text = markdown(table)
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        stem = out / f"offline-{table.triton}"
        stem.with_name(f"{stem.name}.json").write_text(table.dump())
        stem.with_name(f"{stem.name}.md").write_text(text)
    return 1 if table.failures else 0


def make_table(
    calls: Sequence[Call],
    archs: Sequence[str] = ARCHS,
    cache: Path | None = CACHE,
    known: Mapping[str, Row] | None = None,
    *,
    cuda: bool = True,
) -> Table:
    """Record, compile, judge. cache: where rows are kept by their hash; known: rows that need no compiling."""
    started = time.perf_counter()
    jobs, failures = record_all(calls, archs)
    rows = []
    for done, row in enumerate(compile_all(jobs, cache, known=known), 1):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"\r{done}/{len(jobs)} {row.title[:80]:80}", end="", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (row.kernel, row.calls[0], archs.index(row.arch)))
    failures += _grouped(rows)
    notes = [] if calls else ["no op has a Triton module"]
    cuda_rows: list[offline_cuda.CudaRow] | None = None
    if not cuda:
        notes.append("CUDA C++ kernels: left out")
    elif shutil.which("nvcc") is None:
        notes.append("CUDA C++ kernels: no nvcc here")
    else:
        cuda_rows = offline_cuda.compile_cuda()
        failures += offline_cuda.faults(cuda_rows)
    print(f"{len(rows)} kernels in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return Table(triton.__version__, rows, cuda_rows, failures, notes)


def _grouped(rows: Sequence[Row]) -> list[str]:
    """A line per kernel, fault and call, with the archs it is true of."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for fault in faults(row):
            found.setdefault((row.kernel, row.calls[0], fault), []).append(row.arch)
    return [f"{kernel} {', '.join(on)} [{call}]: {fault}" for (kernel, call, fault), on in found.items()]


def record_all(calls: Iterable[Call], archs: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Every kernel once for every arch, with the calls that launch it; and the calls that could not be made."""
    jobs: dict[tuple[str, Any, str], Job] = {}
    failures = []
    for call in calls:
        for arch in archs:
            try:
                found = [(launch, specialise(launch, arch)) for launch in offline_calls.record(call, arch)]
            except Exception as error:  # whatever a launcher stumbles over is a finding
                failures.append(f"{call.name} on {arch} cannot be launched: {type(error).__name__}: {error}")
                break  # the same on the others
            for launch, what in found:
                _, names = jobs.setdefault((arch, launch.kernel, what.key), (what, []))
                if call.name not in names:
                    names.append(call.name)
    return list(jobs.values()), failures


def compile_all(
    jobs: Sequence[Job],
    cache: Path | None = CACHE,
    compiler: Callable[[Specialisation, list[str]], Row] = compile_row,
    known: Mapping[str, Row] | None = None,
) -> Iterator[Row]:
    """A row for every job, those that are known or in the cache first."""
    todo: list[Job] = []
    paths: dict[int, Path] = {}
    hashes: dict[int, str] = {}
    for what, names in jobs:
        digest = what.hash()
        if known and digest in known and not known[digest].error:
            yield dataclasses.replace(known[digest], calls=names)
            continue
        path = None if cache is None else cache / f"{digest}.json"
        if path is not None and path.is_file():
            yield dataclasses.replace(Row(**json.loads(path.read_text())), calls=names)
            continue
        if path is not None:
            paths[len(todo)] = path
        hashes[len(todo)] = digest
        todo.append((what, names))
    for index, row in _in_workers(todo, compiler):
        row.hash = hashes[index]
        if index in paths and not row.error:
            paths[index].parent.mkdir(parents=True, exist_ok=True)
            part = paths[index].with_suffix(".part")  # a run cut short must not leave half a row
            part.write_text(json.dumps(dataclasses.asdict(row)))
            part.replace(paths[index])
        yield row


_jobs: Sequence[Job] = ()  # what forked workers inherit: kernels do not travel by pickle
_compiler: Callable[[Specialisation, list[str]], Row] = compile_row


def _in_workers(
    jobs: Sequence[Job], compiler: Callable[[Specialisation, list[str]], Row]
) -> Iterator[tuple[int, Row]]:
    """(index, row) as they are done. A job that takes its process down is tried once more, alone."""
    global _jobs, _compiler
    _jobs, _compiler = jobs, compiler
    missing = set(range(len(jobs)))
    with tempfile.TemporaryDirectory() as scratch, triton.knobs.cache.scope():
        triton.knobs.cache.dir = scratch  # Triton's own cache keeps neither log nor time
        with _pool(WORKERS) as pool:
            futures = {pool.submit(_work, index): index for index in missing}
            for future in as_completed(futures):
                try:
                    row = future.result()
                except BrokenProcessPool:
                    break
                missing.discard(futures[future])
                yield futures[future], row
        for index in sorted(missing):
            try:
                with _pool(1) as pool:
                    row = pool.submit(_work, index).result()
            except BrokenProcessPool:
                what, names = jobs[index]
                options = what.options
                row = Row(what.name, what.arch, names, what.constexprs, options.num_warps, options.num_stages)
                row.error = "the compiler crashed"
            yield index, row


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))


def _work(index: int) -> Row:
    return _compiler(*_jobs[index])


def markdown(table: Table) -> str:
    """The report: what is wrong first, then a line per kernel and what it was called with."""
    verdict = [f"- {failure}" for failure in table.failures] or ["Nothing is wrong."]
    lines = [
        f"# Triton kernels compiled offline, Triton {table.triton}",
        "",
        "Made by `python -m benchmarks offline`. Matrix: instructions of the matrix unit in the machine code.",
        "Products of fp32 are exact by contract (`ieee`) and do not use it. Spills are bytes on NVIDIA and",
        "registers on AMD; `+n` stands for further calls that launch the same compiled kernel.",
        "",
        *verdict,
        *(f"\n{note}" for note in table.notes),
        "",
        "| kernel | called with | arch | warps | stages | registers | spills | shared | matrix | serialized | s |",
        "|---|---|---|--:|--:|--:|--:|--:|---|--:|--:|",
        *(_line(row) for row in table.rows),
    ]
    if table.cuda is not None:
        lines += [
            "",
            "## CUDA C++ kernels",
            "",
            "| kernel | arch | registers | spill stores | spill loads | stack | shared |",
            "|---|---|--:|--:|--:|--:|--:|",
            *(
                f"| {row.kernel} | {row.arch} | {row.registers} | {row.spill_stores} | {row.spill_loads}"
                f" | {row.stack} | {row.shared} |"
                for row in table.cuda
            ),
        ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    called = row.calls[0] + (f" +{len(row.calls) - 1}" if len(row.calls) > 1 else "")
    counts = ", ".join(f"{count} {name}" for name, count in row.matrix.items() if count)
    fp32 = row.dots and all(dot.startswith("f32") for dot in row.dots)
    matrix = counts or ("fp32: exempt" if fp32 else "")
    cells = (
        row.kernel,
        called,
        row.arch,
        row.num_warps,
        row.num_stages,
        *(
            (row.error.replace("|", "/"), "", "", "", "")
            if row.error
            else (row.registers, row.spills, row.shared, matrix, row.serialized)
        ),
        row.seconds,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this one (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="a representative part, as in every run of CI")
    parser.add_argument("--fresh", action="store_true", help="take nothing from the table that is kept")
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA C++ kernels out")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="default: build/offline")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: benchmarks/results for the whole, none for a part"
    )
    return parser.parse_args(arguments)
