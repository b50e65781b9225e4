"""keep_large_blocks: what it changes, that it says whether it is in force, and that nobody calls it in secret."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, torch, fastgpt
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would hide the effect
from fastgpt._core.memory import keeps_large_blocks
if {keep}:
    assert fastgpt.keep_large_blocks()
assert keeps_large_blocks() is {keep}
x = torch.ones(4096, 4096)
for _ in range(20):  # an aligned block does not fit where its like was: the heap grows to a few of them, then rests
    torch.neg(x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.neg(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


def faults_per_call(keep: bool) -> int:
    """Minor page faults of one op with a 64 MiB output, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux with glibc")
def test_large_outputs_are_not_faulted_in_again() -> None:
    """Importing fastgpt alone changes nothing; the call does."""
    without, kept = faults_per_call(False), faults_per_call(True)
    assert without > 10_000  # 16,384 pages of 4 KiB
    assert kept < without / 10
