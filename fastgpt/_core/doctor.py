"""What this machine has, what is built, and which backend each op can take: the text of `fastgpt doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from fastgpt._core import registry
from fastgpt._core.dispatch import backends, check_environment
from fastgpt._core.memory import keeps_large_blocks
from fastgpt._core.spec import BACKENDS

_PACKAGES = ("fastgpt", "torch", "triton", "tokenizers", "safetensors", "tyro", "matplotlib", "tqdm")


def report() -> str:
    """Everything a bug report needs, as plain text; ValueError if a setting is not what it can be."""
    check_environment()
    sections = (
        ("machine", _machine()),
        ("packages", [f"{name:<12} {_version(name)}" for name in _PACKAGES]),
        ("compiled", _compiled()),
        ("memory", _memory()),
        ("settings", [f"{name} = {os.environ.get(name, '(unset)')}" for name in _SETTINGS]),
        ("ops and backends", _ops()),
    )
    return "\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections)


def support_table() -> str:
    """Which backend exists for which op, as Markdown: the table in the README, the same on every machine."""
    lines = [
        "| op | " + " | ".join(f"`{name}`" for name in BACKENDS) + " |",
        "|---" * (len(BACKENDS) + 1) + "|",
    ]
    for spec in registry.ops():
        cells = (_cell(name) if registry.is_written(spec.name, name) else "–" for name in BACKENDS)
        lines.append(f"| `{spec.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(backend: str) -> str:
    return "not yet run on a GPU" if backend in _GPU_BACKENDS and backend not in _RUN_ON_A_GPU else "yes"


_GPU_BACKENDS = ("triton", "cuda")
_RUN_ON_A_GPU: tuple[str, ...] = ()  # a name is added together with the results of `make gpu` that show it


_SETTINGS = (
    "FASTGPT_BACKEND",
    "FASTGPT_STRICT",
    "FASTGPT_CPU_ISA",
    "TRITON_INTERPRET",
    "FASTGPT_CUDA_EMULATION",
)


def _machine() -> list[str]:
    lines = [
        f"python       {platform.python_version()} on {platform.platform()}",
        f"cpu          {_cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        lines += [f"gpu {i}        {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        lines.append("gpu          none that torch can use")
    lines.append(f"compiler     c++: {shutil.which('g++') or 'none'}, nvcc: {shutil.which('nvcc') or 'none'}")
    return lines


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiled() -> list[str]:
    import fastgpt_kernels

    reason = fastgpt_kernels.cpu_status()
    if reason is None:
        cpu = fastgpt_kernels.load_cpu()
        reason = f"SIMD level {cpu.isa()} in use; this CPU runs {', '.join(cpu.isas())}"
    lines = [f"_cpu         {reason}"]
    reason = fastgpt_kernels.cuda_status()
    if reason is None:
        cuda = fastgpt_kernels.load_cuda()
        count = cuda.device_count()
        reason = f"{count} GPUs" if count else f"no GPU: {cuda.device_message()}"
    return [*lines, f"_cuda        {reason}"]


def _memory() -> list[str]:
    if keeps_large_blocks():
        return ["large freed blocks are kept in this process (fastgpt.keep_large_blocks)"]
    return [
        "large freed blocks go back to the system: every large CPU output is page-faulted in again.",
        "fastgpt.keep_large_blocks() keeps them (the fastgpt commands call it; your own program may)",
    ]


def _ops() -> list[str]:
    lines = []
    for op, table in backends().items():
        able = [name for name in BACKENDS if table[name] is None]
        lines.append(f"{op:<17}{', '.join(able)}")
        lines += [f"{'':<17}  {name}: {table[name]}" for name in BACKENDS if table[name] is not None]
    return lines
