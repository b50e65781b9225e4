"""What all tests share: one thread unless a test asks for more, and settings that no test leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import fastgpt_kernels
import pytest
import torch

from fastgpt._core.registry import EMULATED

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on an emulated backend is marked as such, wherever its parameters come from."""
    emulated = {name for name, on in EMULATED.items() if on}
    for item in items:
        for value in getattr(getattr(item, "callspec", None), "params", {}).values():
            backend = getattr(value, "backend", value)  # a Variant, or a name
            if isinstance(backend, str) and backend in emulated:
                item.add_marker("interpreter")
