"""The road that every op takes: its declaration, its registration and the choice of a backend."""

import importlib.util
import sys
from pathlib import Path

# From a checkout that was not installed, the kernels' source root lies beside this package.
if importlib.util.find_spec("fastgpt_kernels") is None:
    _SOURCE_ROOT = Path(__file__).resolve().parents[2] / "kernels"
    if (_SOURCE_ROOT / "fastgpt_kernels").is_dir():
        sys.path.append(str(_SOURCE_ROOT))
