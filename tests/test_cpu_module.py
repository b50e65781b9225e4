"""The compiled module `_cpu`: arguments, SIMD levels, the GIL. The kernels have test_ops.py."""

from __future__ import annotations

import ctypes
import importlib.util
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import fastgpt_kernels
import pytest
from build_tree import build_inplace, copy_tree, run_python

LEVELS = ["generic", "avx2", "avx512", "avx512_bf16"]
PRINT_ISA = """
import fastgpt_kernels
cpu = fastgpt_kernels.load_cpu()
try:
    print(cpu.isa())
except ValueError as error:
    print("ValueError:", error)
"""
PROBE_WITHOUT_LEVEL = """
import fastgpt_kernels
cpu = fastgpt_kernels.load_cpu()
try:
    cpu.probe_nothing()
except ValueError as error:
    print("ValueError:", error)
cpu.set_isa("generic")
cpu.probe_nothing()
print(cpu.isa())
"""


@pytest.fixture(scope="module")
def probe_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_tree(tmp_path_factory.mktemp("probe") / "tree", ops=False)
    result = build_inplace(tree)
    assert result.returncode == 0, result.stdout
    return tree


@pytest.fixture(scope="module")
def probe(probe_tree: Path) -> ModuleType:
    """A `_cpu` whose kernels are those of build_tree.PROBE."""
    file = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_cpu", probe_tree / "kernels" / "fastgpt_kernels" / file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cpu() -> Iterator[ModuleType]:
    assert fastgpt_kernels.cpu_status() is None
    module = fastgpt_kernels.load_cpu()
    level = module.isa()
    yield module
    module.set_isa(level)


def test_every_kind_of_argument_arrives_at_every_level(probe: ModuleType) -> None:
    out = (ctypes.c_double * 7)()
    level = probe.isa()
    for isa in probe.isas():
        probe.set_isa(isa)
        probe.probe_types(0, ctypes.addressof(out), -(2**62), -7, True, 1, 0.5, 1e300)
        assert list(out) == [0.0, -(2.0**62), -7.0, 1.0, 1.0, 0.5, 1e300]
    probe.set_isa(level)
    assert probe.probe_types(ctypes.addressof(out), ctypes.addressof(out), 0, 0, 0, 0, 3, 4) is None
    assert list(out) == [1.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0]  # an int is taken for a float


def test_argument_count(probe: ModuleType) -> None:
    expected = (
        r"probe_types: expected 8 arguments, got 2: probe_types\(pointer, pointer, int, int, int, int, float"
    )
    with pytest.raises(TypeError, match=expected):
        probe.probe_types(0, 0)
    with pytest.raises(TypeError, match="probe_nothing: expected 0 arguments, got 1"):
        probe.probe_nothing(1)
    with pytest.raises(TypeError, match="no keyword arguments"):
        probe.probe_types(x=0)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, 1.5, TypeError, "argument 1: expected int (an address), got float"),
        (1, None, TypeError, "argument 2: expected int (an address), got NoneType"),
        (1, 2**64, OverflowError, "argument 2: 18446744073709551616 does not fit"),
        (2, 1.0, TypeError, "argument 3: expected int, got float"),
        (2, 2**63, OverflowError, "argument 3: 9223372036854775808 does not fit"),
        (6, "1", TypeError, "argument 7: expected float, got str"),
        (7, 10**400, OverflowError, "argument 8: "),
    ],
)
def test_argument_types(
    probe: ModuleType, position: int, value: object, error: type[Exception], message: str
) -> None:
    arguments: list[object] = [0, 0, 0, 0, False, 0, 0.0, 0.0]
    arguments[position] = value
    with pytest.raises(error) as caught:
        probe.probe_types(*arguments)
    assert message in str(caught.value)
    assert str(caught.value).startswith("probe_types: ")


def test_the_gil_is_released(probe: ModuleType) -> None:
    flag, seen = ctypes.c_int(0), ctypes.c_int(0)
    addresses = (ctypes.addressof(flag), ctypes.addressof(seen))
    thread = threading.Thread(target=probe.probe_wait, args=addresses)
    thread.start()
    time.sleep(0.05)
    flag.value = 1  # out of reach until the kernel gives up, were the GIL held
    thread.join()
    assert seen.value == 1


def test_levels_are_ascending_and_can_be_chosen(cpu: ModuleType) -> None:
    isas = cpu.isas()
    assert isas == LEVELS[: len(isas)]
    for isa in isas:
        cpu.set_isa(isa)
        assert cpu.isa() == isa


def test_levels_agree_with_torch(cpu: ModuleType) -> None:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    assert (capability != "AVX512") or "avx512" in cpu.isas()
    assert (capability not in ("AVX2", "AVX512")) or "avx2" in cpu.isas()


def test_unknown_level(cpu: ModuleType) -> None:
    before = cpu.isa()
    with pytest.raises(ValueError, match=r"set_isa: expected one of .*\(generic.*\), got 'sse9'"):
        cpu.set_isa("sse9")
    assert cpu.isa() == before


def test_every_kernel_says_its_arguments(cpu: ModuleType) -> None:
    kernels = [name for name in dir(cpu) if name.endswith(("_fwd", "_bwd"))]
    for name in kernels:
        assert getattr(cpu, name).__doc__.startswith(f"{name}(")
        with pytest.raises(TypeError, match=f"{name}: expected"):
            getattr(cpu, name)()


def test_the_environment_chooses_the_level(probe_tree: Path) -> None:
    best = run_python(probe_tree, "import fastgpt_kernels; print(fastgpt_kernels.load_cpu().isas()[-1])")
    assert run_python(probe_tree, PRINT_ISA, FASTGPT_CPU_ISA="") == best
    assert run_python(probe_tree, PRINT_ISA, FASTGPT_CPU_ISA="generic") == "generic"


def test_a_wrong_environment_is_an_error_at_first_use(probe_tree: Path) -> None:
    message = "ValueError: FASTGPT_CPU_ISA: expected one of the levels of this CPU (generic"
    assert run_python(probe_tree, PRINT_ISA, FASTGPT_CPU_ISA="sse9").startswith(message)
    lines = run_python(probe_tree, PROBE_WITHOUT_LEVEL, FASTGPT_CPU_ISA="sse9").splitlines()
    assert lines[0].startswith(message)
    assert lines[1] == "generic"  # set_isa puts it right
