"""What all tests share: one thread unless a test asks for more, and settings that no test leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import fastgpt_kernels
import pytest
import torch

torch.set_num_threads(1)  # the shapes are small, and the machines that test are shared


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    """Threads, seed and SIMD level as they were."""
    torch.manual_seed(0)
    cpu = None if fastgpt_kernels.cpu_status() else fastgpt_kernels.load_cpu()
    level = cpu.isa() if cpu else None
    yield
    torch.set_num_threads(1)
    if cpu and cpu.isa() != level:
        cpu.set_isa(level)
