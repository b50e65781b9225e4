"""One recorded launch compiled for a GPU that is not here, and what its machine code must not contain.

Signature, constants and attributes are worked out by Triton's own launch code, so that what is compiled is what a
GPU would run. The rest is read off the assembler's log, the metadata and the machine code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from fastgpt_kernels.triton.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITCallable, compute_cache_key, create_function_from_signature

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")

# Bytes of shared memory (AMD: LDS) that one block may have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TENSOR_MEMORY_COLUMNS = 512  # Blackwell
# The matrix instructions of each arch, the full-rate ones first; the others serve tiles of fewer than 64 rows.
MATRIX = {
    "sm_80": ("HMMA",),
    "sm_90": ("HGMMA", "HMMA"),
    "sm_100": ("UTCMMA", "HMMA"),
    "gfx942": ("v_mfma",),
}
_PATTERNS = {
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",
    "UTCMMA": r"\bUTC\w*MMA\b",
    "v_mfma": r"\bv_mfma_(?!f32_\w*f32\b)",  # not the fp32 forms
}
_DOT = re.compile(r"tt\.dot .*?tensor<([\dx]+)x(\w+)> \* tensor<([\dx]+)x(\w+)>")


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


@dataclass(frozen=True)
class Specialisation:
    """What Triton would compile for a launch. key: equal for two launches that share the compiled kernel."""

    kernel: Any
    arch: str
    signature: Mapping[str, str]
    constants: Mapping[Any, Any]
    attributes: Mapping[Any, Any]
    options: Any
    key: str

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def source(self) -> ASTSource:
        return ASTSource(self.kernel, dict(self.signature), dict(self.constants), dict(self.attributes))

    @property
    def constexprs(self) -> dict[str, str]:
        names = list(self.signature)
        return {names[path[0]]: str(value) for path, value in self.constants.items() if len(path) == 1}

    def hash(self) -> str:
        """Of all that decides about the row: the kernel and what it calls, how it is compiled, this file.

        The same on every machine: of the options all but the place of Triton's own libraries.
        """
        options = sorted((key, value) for key, value in vars(self.options).items() if key != "extern_libs")
        launched = (self.arch, self.signature, self.constants, self.attributes, options)
        parts = (text_of(self.kernel), *launched, triton.__version__, Path(__file__).read_text())
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def text_of(kernel: Any) -> str:
    """The source of a kernel and of all of ours that it calls, with the constants that they name.

    Not `kernel.cache_key`: that depends on which kernels were hashed before it (a caller takes over only the
    constants of those functions that already have a hash).
    """
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        here = f"{function.fn.__module__}.{function.fn.__qualname__}"
        if here in found or here.startswith("triton."):
            continue
        found[here] = f"noinline={getattr(function, 'noinline', False)} {function.src}"
        spaces = [function.fn.__globals__]
        names = function.fn.__code__.co_names
        spaces += [vars(value) for name in names if isinstance(value := spaces[0].get(name), ModuleType)]
        for space, name in itertools.product(spaces, names):
            value = space.get(name)
            if isinstance(value, JITCallable):
                waiting.append(value)
            elif isinstance(value, triton.language.constexpr):
                found[f"{space['__name__']}.{name}"] = str(value)
    return "\n".join(f"{place}: {text}" for place, text in sorted(found.items()))


def specialise(launch: Launch, arch: str) -> Specialisation:
    """As `JITFunction.run` does before it compiles, for a GPU of `arch`."""
    kernel = launch.kernel
    backend, bind = _binder(kernel, arch)
    named = dict(launch.arguments, num_warps=launch.num_warps, num_stages=launch.num_stages)
    named |= {"debug": False, "instrumentation_mode": ""}
    arguments, specialisation, options = bind(**named)
    key = compute_cache_key({}, specialisation, options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, named, arguments, specialisation, options
    )
    return Specialisation(kernel, arch, signature, constants, attributes, parsed, key)


@functools.cache
def _binder(kernel: Any, arch: str) -> tuple[Any, Callable[..., Any]]:
    backend = make_backend(target_of(arch))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


@dataclass
class Row:
    """One compiled kernel. calls: what it was launched for; dots: the matrix products of its source.

    half: it has bf16 or fp16 tensors. matrix: instructions by name. serialized: warnings that wgmma instructions wait
    for one another.
    """

    kernel: str
    arch: str
    calls: list[str]
    constexprs: dict[str, str]
    num_warps: int
    num_stages: int
    half: bool = False
    registers: int = 0
    spills: int = 0  # bytes on NVIDIA, registers on AMD
    shared: int = 0
    tensor_memory: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    dots: list[str] = field(default_factory=list)
    serialized: int = 0
    seconds: float = 0.0
    error: str = ""
    hash: str = ""  # of the specialisation

    @property
    def title(self) -> str:
        return f"{self.kernel} {self.arch} [{self.calls[0] if self.calls else 'no call'}]"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "faults": faults(self)}


def compile_row(what: Specialisation, calls: list[str]) -> Row:
    """Compile and look; a compiler that gives up is an error in the row, not an exception."""
    row = Row(what.name, what.arch, calls, what.constexprs, what.options.num_warps, what.options.num_stages)
    started, log, messages = time.perf_counter(), io.StringIO(), list[str]()
    try:
        with _knobs(), contextlib.redirect_stdout(log), _stderr_into(messages):
            compiled = triton.compile(what.source, target_of(what.arch), what.options.__dict__)
            row.seconds = round(time.perf_counter() - started, 2)
            code = compiled.asm["amdgcn" if what.arch.startswith("gfx") else "sass"]
    except Exception as error:  # the compiler's passes fail in many ways
        first = next((line for line in "".join(messages).splitlines() if "error:" in line), "")
        said = [line for line in str(error).splitlines() if line.strip()]
        row.error = f"{type(error).__name__}: {' '.join(said[-1:])} {first}".strip()
        row.seconds = round(time.perf_counter() - started, 2)
        return row
    row.half = any(
        kind.startswith(("*bf16", "*fp16", "*kbf16", "*kfp16")) for kind in what.signature.values()
    )
    row.shared = compiled.metadata.shared
    row.tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    row.dots = dots(compiled.asm["ttir"])
    if what.arch.startswith("gfx"):
        row.registers, row.spills = _amd(code, "vgpr_count"), _amd(code, "vgpr_spill_count")
    else:
        text = log.getvalue()
        row.registers = max(_numbers(r"Used (\d+) registers", text), default=0)
        row.spills = sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", text))
        row.serialized = len(re.findall(r"wgmma\.mma_async instructions are serialized", text))
    row.matrix = {name: len(re.findall(_PATTERNS[name], code)) for name in MATRIX[what.arch]}
    return row


def dots(ttir: str) -> list[str]:
    """The matrix products of a kernel, each kind once: "bf16 128x64x32" is [128, 32] @ [32, 64], M x N x K."""
    found = []
    for line in ttir.splitlines():
        if match := _DOT.search(line):
            (m, k), n = match[1].split("x")[-2:], match[3].split("x")[-1]
            precision = re.search(r"inputPrecision = (\w+)", line)
            loose = f" {precision[1]}" if match[2] == "f32" and precision and precision[1] != "ieee" else ""
            found.append(f"{match[2]} {m}x{n}x{k}{loose}")
    return sorted(set(found))


def faults(row: Row) -> list[str]:
    """What must not be in a shipped kernel; empty if all is well."""
    if row.error:
        return [f"does not compile: {row.error}"]
    found = []
    if row.spills:
        found.append(f"spills {row.spills} {'registers' if row.arch.startswith('gfx') else 'bytes'}")
    if row.serialized:
        found.append(f"{row.serialized} serialized wgmma")
    if row.shared > SHARED_LIMIT[row.arch]:
        found.append(f"{row.shared} bytes of shared memory, {SHARED_LIMIT[row.arch]} are allowed")
    if row.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"{row.tensor_memory} columns of tensor memory, {TENSOR_MEMORY_COLUMNS} are allowed")
    half = [dot for dot in row.dots if not dot.startswith("f32")]
    if half and not any(row.matrix.values()):
        found.append(f"{half[0]} without the matrix unit")
    elif any(_fills_matrix_unit(dot, row.num_warps) for dot in half) and not row.matrix[MATRIX[row.arch][0]]:
        found.append(f"{half[0]} without {MATRIX[row.arch][0]}")
    if row.half and (wide := [dot for dot in row.dots if dot.startswith("f32")]):
        found.append(f"a product of fp32 on bf16 or fp16 tensors: {wide[0]}")
    elif loose := [dot for dot in row.dots if dot.startswith("f32") and " " in dot.removeprefix("f32 ")]:
        found.append(f"an fp32 product that is not exact: {loose[0]}")
    return found


def _fills_matrix_unit(dot: str, num_warps: int) -> bool:
    """Whether the product is of a shape that wgmma (sm_90) and tcgen05 (sm_100) take: 64 rows per 4 warps."""
    m, n, _ = map(int, dot.split()[1].split("x"))
    return m % 64 == 0 and n % 16 == 0 and num_warps in (4, 8)


@contextlib.contextmanager
def _knobs() -> Iterator[None]:
    """No compiled kernel is taken from Triton's own cache (it has no log), and ptxas' log is printed."""
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        yield


@contextlib.contextmanager
def _stderr_into(messages: list[str]) -> Iterator[None]:
    """What the compiler and the disassembler, which write to the file descriptor, have to say."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            messages.append(file.read().decode(errors="replace"))


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text)]


def _amd(code: str, name: str) -> int:
    return max(_numbers(rf"\.{name}:\s+(\d+)", code), default=0)
