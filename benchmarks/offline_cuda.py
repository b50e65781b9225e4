"""Every CUDA kernel compiled for every architecture without a GPU: registers, spills, shared memory.

`compile_cuda` asks ptxas what it made of each kernel of csrc/cuda/*.cu, `faults` says what is wrong with it.
The table that is kept is `python -m benchmarks offline`'s.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("sm_80", "sm_90a", "sm_100")
# Static shared memory of one block. ptxas itself refuses more than 48 KiB; below that what counts is how many
# blocks an SM holds, since these kernels hide latency by blocks: four must fit in the 164 KiB of an sm_80 SM,
# of which the driver takes 1 KiB a block.
MAX_SHARED = 164 * 1024 // 4 - 1024
FLAGS = (
    "-std=c++17",
    "-O3",
    "-DFG_LEVEL=cuda",
    "--cubin",
    "-Xptxas",
    "-v",
)  # setup.py's, but for device code alone
COMPILERS_AT_ONCE = 2

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class CudaRow:
    """One kernel on one architecture; memory in bytes, per thread but for `shared`, which is static and per block."""

    kernel: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


def compile_cuda(
    archs: Sequence[str] = ARCHS, sources: Sequence[Path] | None = None, flags: Sequence[str] = FLAGS
) -> list[CudaRow]:
    """A row for each kernel and architecture, in the order of files, architectures, kernels.

    Raises:
        RuntimeError: nvcc is missing or does not compile a file; with its messages.
    """
    if shutil.which("nvcc") is None:
        raise RuntimeError("no nvcc on PATH: CUDA kernels are compiled with the CUDA toolkit")
    if sources is None:
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(source, arch) for source in sources for arch in archs]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(COMPILERS_AT_ONCE) as pool:
        tables = pool.map(lambda job: _compile(job[0], job[1], flags, Path(scratch)), jobs)
        return [row for table in tables for row in table]


def faults(rows: Sequence[CudaRow]) -> list[str]:
    """What no kernel may do, one line for each that does."""
    found = []
    for row in rows:
        where = f"{row.kernel} on {row.arch}"
        if row.spill_stores or row.spill_loads:
            found.append(
                f"{where}: spills {row.spill_stores} bytes out and {row.spill_loads} back "
                f"at {row.registers} registers"
            )
        elif row.stack:  # an array indexed by what is not known at compile time: local memory all the same
            found.append(f"{where}: keeps {row.stack} bytes in local memory")
        if row.shared > MAX_SHARED:
            found.append(f"{where}: {row.shared} bytes of shared memory, more than {MAX_SHARED}")
    return found


def parse_ptxas(log: str) -> list[CudaRow]:
    """Rows with mangled names from the log of `ptxas -v`, sorted by name.

    A function that was not inlined has a line of its own under the entry that calls it: its stack and spills
    are counted to that entry.
    """
    rows: list[CudaRow] = []
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            rows.append(CudaRow(entry[1], entry[2], 0, 0, 0, 0, 0))
        elif not rows:
            continue
        elif memory := _STACK.search(line):
            stack, stores, loads = map(int, memory.groups())
            row = rows[-1]
            rows[-1] = replace(
                row,
                stack=max(row.stack, stack),
                spill_stores=row.spill_stores + stores,
                spill_loads=row.spill_loads + loads,
            )
        elif used := _USED.search(line):
            shared = _SHARED.search(line)
            rows[-1] = replace(rows[-1], registers=int(used[1]), shared=int(shared[1]) if shared else 0)
    return sorted(rows, key=lambda row: row.kernel)


def readable(demangled: str) -> str:
    """`void fg::(unnamed)::k<(int)4, __nv_bfloat16>(…)` as `k<4, bf16>`."""
    name = re.sub(r"(?:\w+::|\(anonymous namespace\)::|<unnamed>::)+", "", demangled)
    name = re.sub(r"\((?:int|bool|long|unsigned int|unsigned long)\)", "", name)  # before literals
    name = name.removeprefix("void ")
    depth = 0
    for at, letter in enumerate(name):  # the parameters begin at the first bracket outside <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:at]
            break
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace("float", "fp32")


def _compile(source: Path, arch: str, flags: Sequence[str], scratch: Path) -> list[CudaRow]:
    output = scratch / f"{source.stem}.{arch}.cubin"
    target = f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}"
    command = ["nvcc", *flags, target, str(source), "-o", str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stdout}")
    rows = parse_ptxas(done.stdout)
    if not rows:
        raise RuntimeError(f"{source.name} for {arch}: ptxas told of no kernel:\n{done.stdout}")
    names = [readable(name) for name in _demangle([row.kernel for row in rows])]
    return [replace(row, kernel=_within(source, name)) for row, name in zip(rows, names, strict=True)]


def _within(source: Path, name: str) -> str:
    """The name, after its file's if that is not how it begins: a header's kernel is compiled into several files."""
    return name if name.startswith(source.stem) else f"{source.stem}: {name}"


def _demangle(names: Sequence[str]) -> list[str]:
    """By the CUDA toolkit's cu++filt, else by binutils'; as they are where neither is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return list(names)
    return subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
