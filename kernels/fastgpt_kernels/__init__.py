"""The kernels of fastgpt: one sub-package per backend, and the compiled modules they call.

Importing this package imports neither torch nor a compiled module: `load_cpu` and `load_cuda` do, when called.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from pathlib import Path
from types import ModuleType

__all__ = ["EMULATE_CUDA", "cpu_status", "cuda_status", "load_cpu", "load_cuda", "source_hash"]

_PACKAGE = Path(__file__).resolve().parent
_HOW_TO_BUILD = {
    "_cpu": "run `make build` or `pip install .`",
    "_cuda": "install the CUDA toolkit (nvcc), then run `make build` or `pip install .`",
    "_cuda_emulated": "run `make build` in a checkout",
}

# The CUDA kernels compiled for the host, on CPU tensors: slow, to prove them on a machine without a GPU.
EMULATE_CUDA = os.environ.get("FASTGPT_CUDA_EMULATION") == "1"


def source_hash(csrc: Path, target: str) -> str:
    """SHA-256 of the sources that the module of `target`, "cpu" or "cuda", is compiled from: names and contents.

    The build bakes it into the module (`SOURCE_HASH`): an old binary beside newer sources is noticed.
    """
    files = [p for folder in (target, "common") for p in (csrc / folder).rglob("*")]
    files = [p for p in files if p.suffix in (".cpp", ".cu", ".h")]
    bind = ("functions.h", "tables.h", *(("guard.h",) if target == "cpu" else ()))
    files += [csrc / "bind" / name for name in (f"{target}.cpp", *bind)]
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.relative_to(csrc).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def load_cpu() -> ModuleType:
    """The compiled module `fastgpt_kernels._cpu`; ImportError with the reason if it is missing or stale."""
    return _loaded("_cpu")


def load_cuda() -> ModuleType:
    """The compiled module `fastgpt_kernels._cuda`, under emulation `_cuda_emulated`; ImportError as `load_cpu`."""
    return _loaded(_cuda_name())


def cpu_status() -> str | None:
    """None if the compiled CPU kernels can be used, else the reason why not."""
    return _load("_cpu")[1]


def cuda_status() -> str | None:
    """None if the compiled CUDA kernels can be loaded, with a GPU or without, else the reason why not."""
    return _load(_cuda_name())[1]


def _cuda_name() -> str:
    return "_cuda_emulated" if EMULATE_CUDA else "_cuda"


def _loaded(name: str) -> ModuleType:
    module, reason = _load(name)
    if module is None:
        raise ImportError(f"fastgpt_kernels.{name}: {reason}")
    return module


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(f"fastgpt_kernels.{name}")
    except ModuleNotFoundError:
        return None, f"not built: {_HOW_TO_BUILD[name]}"
    except ImportError as error:
        return None, f"cannot be loaded: {error.__cause__ or error}"
    target = "cpu" if name == "_cpu" else "cuda"
    csrc = _PACKAGE.parents[1] / "csrc"  # in a checkout or editable install; site-packages has none
    if (csrc / "bind" / f"{target}.cpp").is_file() and source_hash(csrc, target) != module.SOURCE_HASH:
        return None, "stale: the sources in csrc have changed since it was compiled: run `make build`"
    return module, None
