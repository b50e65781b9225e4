"""A copy of the checkout that a test may build in and break, and a kernel to put into it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Every kind of argument, and a kernel that lasts until another thread writes into its flag (5 s at most).
PROBE = """
#include <omp.h>

#include "export.h"

namespace fg::FG_LEVEL {

enum Kind : int { A, B };

void probe_types(const void* x, double* out, int64_t i64, int i32, bool flag, Kind kind, float f32,
                 double f64) {
  out[0] = x != nullptr, out[1] = static_cast<double>(i64), out[2] = i32, out[3] = flag, out[4] = kind;
  out[5] = f32, out[6] = f64;
}

void probe_wait(const volatile int* flag, int* seen) {
  const double end = omp_get_wtime() + 5.0;
  while (*flag == 0 && omp_get_wtime() < end) {
  }
  *seen = *flag;
}

void probe_nothing() {}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(probe, FG_EXPORT(probe_types), FG_EXPORT(probe_wait), FG_EXPORT(probe_nothing))
"""


def copy_tree(target: Path, ops: bool = True) -> Path:
    """Copy what a build reads to `target`; without `ops` no kernel but the probe.

    Object files come along with their times, so that what has not changed is not compiled again.
    """
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "lib.*", "bdist.*", "sanitize*")
    target.mkdir(parents=True)
    for name in ("csrc", "fastgpt", "kernels", "build"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, target / name)
    if not ops:
        for source in (*(target / "csrc" / "cpu").glob("*.cpp"), *(target / "csrc" / "cuda").glob("*.cu")):
            source.unlink()
        (target / "csrc" / "cpu" / "probe.cpp").write_text(PROBE)
    return target


def build_inplace(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python setup.py build_ext --inplace` in `tree`; stdout and stderr come together in `stdout`.

    The CUDA modules are built only for those who ask: nvcc takes its time.
    """
    environment = {"FASTGPT_CUDA": "0", "FASTGPT_EMULATE_CUDA": "0", **environment}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_python(tree: Path, code: str, **environment: str) -> str:
    """What `code` prints. -S: no site-packages, or an editable install would lend its own compiled module."""
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "kernels"), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
