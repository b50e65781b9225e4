"""Keeping freed memory in the process: the cure for page faults on every large output.

glibc maps every block above a threshold afresh (128 KiB at first, growing with what is freed to 32 MiB) and gives it
back when it is freed, so that each large output of a CPU op is faulted in page by page again. That can cost more
than the op itself: `python -m benchmarks --allocator both --op gelu` measures it.
"""

from __future__ import annotations

import ctypes
import sys

# mallopt(3): parameters and values
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER_TRIM, _NO_MAPPING = -1, 0

_kept = False


def keep_large_blocks() -> bool:
    """Tell glibc's malloc to keep large freed blocks for the next allocation, for this whole process.

    Faster for everything on the CPU that makes tensors above 32 MiB, PyTorch's own ops included; the price is that
    memory once used is not given back to the system before the process ends, and that a few blocks of each large
    size are kept (an aligned block rarely fits exactly where the last one was). Off unless called (the command
    line calls it); it cannot be undone. Memory of tensors freed before the call is not affected.

    Returns:
        True if it is in force; False where the C library is not glibc.
    """
    global _kept
    if not _kept and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None and _is_glibc():
            _kept = bool(mallopt(_M_MMAP_MAX, _NO_MAPPING)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))
    return _kept


def keeps_large_blocks() -> bool:
    """Whether `keep_large_blocks` is in force."""
    return _kept


def _is_glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
