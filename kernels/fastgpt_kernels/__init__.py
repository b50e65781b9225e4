"""The kernels of fastgpt: one sub-package per backend, and the compiled modules they call.

Importing this package imports neither torch nor a compiled module: `load_cpu` does, when it is called.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from pathlib import Path
from types import ModuleType

__all__ = ["cpu_status", "load_cpu", "source_hash"]

_PACKAGE = Path(__file__).resolve().parent


def source_hash(csrc: Path) -> str:
    """SHA-256 of the sources `_cpu` is compiled from: names and contents, in a fixed order.

    The build bakes it into the module (`_cpu.SOURCE_HASH`): an old binary beside newer sources is noticed.
    """
    files = [p for p in (csrc / "cpu").rglob("*") if p.suffix in (".cpp", ".h")]
    files += [csrc / "bind" / "cpu.cpp", csrc / "bind" / "tables.h"]
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.relative_to(csrc).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def load_cpu() -> ModuleType:
    """The compiled module `fastgpt_kernels._cpu`; ImportError with the reason if it is missing or stale."""
    module, reason = _load_cpu()
    if module is None:
        raise ImportError(f"fastgpt_kernels._cpu: {reason}")
    return module


def cpu_status() -> str | None:
    """None if the compiled CPU kernels can be used, else the reason why not."""
    return _load_cpu()[1]


@functools.cache
def _load_cpu() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("fastgpt_kernels._cpu")
    except ModuleNotFoundError:
        return None, "not built: run `make build` or `pip install .`"
    except ImportError as error:
        return None, f"cannot be loaded: {error.__cause__ or error}"
    csrc = _PACKAGE.parents[1] / "csrc"  # in a checkout or editable install; site-packages has none
    if (csrc / "bind" / "cpu.cpp").is_file() and source_hash(csrc) != module.SOURCE_HASH:
        return None, "stale: the sources in csrc have changed since it was compiled: run `make build`"
    return module, None
