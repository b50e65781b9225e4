"""The stamp of a run: what it ran on, with what, from which sources."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastgpt._core import memory

ROOT = Path(__file__).resolve().parents[1]


def stamp(device: torch.device) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": simd_level(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "cpu_mhz": cpu_field("cpu MHz"),
        "gpu_clocks": gpu_clocks() if device.type == "cuda" else None,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "allocator": "keep_large_blocks" if memory.keeps_large_blocks() else "default",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "numpy", "fastgpt")},
        **commit(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def cpu_field(name: str) -> str | None:
    """The first value of a field of /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    lines = info.read_text(errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def simd_level() -> str | None:
    """The level our C++ kernels use, or None if they are not built."""
    import fastgpt_kernels

    return None if fastgpt_kernels.cpu_status() else fastgpt_kernels.load_cpu().isa()


def gpu_clocks() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    return _output("nvidia-smi", query, "--format=csv,noheader")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The commit, and whether the sources differ from it; None outside a git checkout."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(_output("git", "-C", str(ROOT), "status", "--porcelain"))}


def cxx_compiler() -> str | None:
    """What torch.compile needs for the CPU."""
    asked = os.environ.get("CXX")
    if asked:
        return shutil.which(asked.split()[0])
    return shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
