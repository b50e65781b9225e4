"""The Triton kernels compile for GPUs that are not here, and a kernel that must not be shipped is found out."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import wrong_kernels
from fastgpt_kernels.triton import attention_fwd, attention_tile
from fastgpt_kernels.triton.launch import INTERPRETING, launch, recording

from benchmarks import offline, offline_calls, offline_compile
from benchmarks.offline_calls import Call
from benchmarks.offline_compile import ARCHS, Row, Specialisation, compile_row, dots, faults, specialise
from fastgpt._core import registry

pytestmark = pytest.mark.skipif(INTERPRETING, reason="needs Triton's compiler")

ROOT = Path(__file__).resolve().parents[1]
WITH_TRITON = [s.name for s in registry.ops() if not s.kernels and registry.is_written(s.name, "triton")]


def compiled(kernel: Any, arch: str, dtype: torch.dtype, *, warps: int, stages: int, **sizes: int) -> Row:
    x, z = (torch.empty(1 << 20, dtype=kind, device="meta") for kind in (dtype, torch.float32))
    tensors = (x, x, z) if "y_ptr" in kernel.arg_names and "z_ptr" in kernel.arg_names else (x, x)
    with recording(arch) as launches:
        launch(kernel, (1,), *tensors, 12, num_warps=warps, num_stages=stages, **sizes)
    return compile_row(specialise(launches[0], arch), ["planted"])


@pytest.fixture(autouse=True)
def _cache_of_triton(tmp_path: Path) -> Iterator[None]:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "triton")
        yield


# ---- the shipped kernels --------------------------------------------------------------------------------------


def run_offline(out: Path, *arguments: str, python_path: str = "") -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (python_path, *sys.path)))}
    command = [sys.executable, "-m", "benchmarks", "offline", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    written = list(out.glob("offline-*.json"))
    assert written, done.stdout + done.stderr
    table = json.loads(written[0].read_text())
    assert not table["failures"], "\n".join(table["failures"])
    assert done.returncode == 0, done.stdout + done.stderr
    for op in WITH_TRITON:
        archs = {row["arch"] for row in table["rows"] if any(call.startswith(op) for call in row["calls"])}
        assert archs == set(ARCHS), f"{op}: {archs}"
    return table


def test_every_shipped_kernel_is_in_the_table_that_is_kept() -> None:
    """As it is now: each was compiled for every architecture, and nothing was wrong."""
    recorded = offline.recorded_rows()
    if not recorded:
        pytest.skip("needs Triton 3.6.0 or 3.7.1")
    jobs, failures = offline.record_all(offline_calls.calls(), ARCHS)
    assert not failures
    missing = [f"{what.name} {what.arch} [{names[0]}]" for what, names in jobs if what.hash() not in recorded]
    assert not missing, (
        f"changed since; run `python -m benchmarks offline`: {len(missing)}, e.g. {missing[0]}"
    )
    assert [fault for row in recorded.values() for fault in faults(row)] == []


def test_a_row_is_known_by_its_source_and_not_by_what_was_hashed_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = attention_fwd._attention_fwd_kernel
    text = offline_compile.text_of(kernel)
    for function in (attention_fwd.attend_range, attention_tile.scores, kernel):
        monkeypatch.setattr(function, "hash", None)
        assert function.cache_key
        assert offline_compile.text_of(kernel) == text
    monkeypatch.setattr(attention_tile, "LOG2E", triton.language.constexpr(1.0))  # three calls away
    assert offline_compile.text_of(kernel) != text


def test_a_part_of_the_shipped_kernels(tmp_path: Path) -> None:
    """Compiled anew: the table that is kept tells the truth."""
    table = run_offline(tmp_path, "--quick", "--fresh", "--no-cuda", "--cache", str(tmp_path / "cache"))
    assert table["triton"] == triton.__version__
    text = (tmp_path / f"offline-{triton.__version__}.md").read_text()
    assert "Nothing is wrong." in text
    assert text.count("\n| _") == len(table["rows"])


@pytest.mark.slow
def test_all_shipped_kernels(tmp_path: Path) -> None:
    run_offline(tmp_path, "--fresh", "--cache", str(tmp_path / "cache"))


@pytest.mark.slow
def test_all_shipped_kernels_with_the_oldest_triton(tmp_path: Path) -> None:
    site, version = tmp_path / "site", "3.6.0"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    done = subprocess.run([*install, f"triton=={version}"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs Triton {version}")
    assert run_offline(tmp_path, "--no-cuda", python_path=str(site))["triton"] == version


# ---- and what would be found ----------------------------------------------------------------------------------

BF16, FP32 = torch.bfloat16, torch.float32
TILE = {"M": 128, "N": 64, "K": 64}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_sound_kernel_passes(arch: str) -> None:
    row = compiled(wrong_kernels.matmul, arch, BF16, warps=4, stages=2, **TILE)
    assert not faults(row)
    assert row.dots == ["bf16 128x64x64"]
    unit = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA", "gfx942": "v_mfma"}[arch]
    assert row.matrix[unit] > 0
    assert row.registers > 32
    assert row.shared > 4096
    assert row.seconds > 0
    idle = dataclasses.replace(row, matrix=dict.fromkeys(row.matrix, 0))
    assert faults(idle) == ["bf16 128x64x64 without the matrix unit"]


@pytest.mark.parametrize("arch", ARCHS)
def test_exact_fp32_needs_no_matrix_unit(arch: str) -> None:
    row = compiled(wrong_kernels.matmul, arch, FP32, warps=4, stages=1, M=64, N=64, K=32)
    assert not faults(row)
    assert "fp32: exempt" in offline._line(row)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_small_tile_may_use_the_older_instruction(arch: str) -> None:
    row = compiled(wrong_kernels.matmul, arch, BF16, warps=4, stages=1, M=16, N=64, K=64)
    assert not faults(row)
    full_rate = next(iter(row.matrix))
    # The same machine code for a tile that wgmma or tcgen05 could have taken is a fault.
    large = dataclasses.replace(row, dots=["bf16 64x64x64"])
    assert bool(faults(large)) == (row.matrix[full_rate] == 0)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_spill(arch: str) -> None:
    size = 128 if arch == "gfx942" else 64  # which has twice the registers and twice the threads
    row = compiled(wrong_kernels.hoards_registers, arch, FP32, warps=1, stages=1, ROWS=size, COLS=size)
    assert len(faults(row)) == 1
    assert faults(row)[0].startswith(f"spills {row.spills} ")


@pytest.mark.parametrize("arch", ARCHS)
def test_too_much_shared_memory(arch: str) -> None:
    row = compiled(wrong_kernels.matmul, arch, BF16, warps=8, stages=4, M=256, N=128, K=128)
    assert any(f"{row.shared} bytes of shared memory" in fault for fault in faults(row))


@pytest.mark.parametrize("arch", ARCHS)
def test_bf16_multiplied_as_fp32(arch: str) -> None:
    row = compiled(wrong_kernels.upcast_matmul, arch, BF16, warps=4, stages=2, M=64, N=64, K=32)
    assert faults(row) == ["a product of fp32 on bf16 or fp16 tensors: f32 64x64x32"]


@pytest.mark.parametrize("arch", ARCHS)
def test_fp32_multiplied_in_a_lower_precision(arch: str) -> None:
    row = compiled(wrong_kernels.tf32_matmul, arch, FP32, warps=4, stages=2, M=64, N=64, K=32)
    assert faults(row) == ["an fp32 product that is not exact: f32 64x64x32 tf32"]


def test_serialized_wgmma() -> None:
    """Accumulators of 256 registers a thread leave no room for one product to overlap the next."""
    row = compiled(wrong_kernels.matmul, "sm_90", BF16, warps=4, stages=3, M=128, N=256, K=64)
    assert "1 serialized wgmma" in faults(row)


def test_what_does_not_compile() -> None:
    with recording("sm_90") as launches:
        launch(wrong_kernels.does_not_compile, (1,), torch.empty(64, device="meta"), N=16)
    row = compile_row(specialise(launches[0], "sm_90"), ["planted"])
    assert faults(row)[0].startswith("does not compile: CompilationError")


def test_products_are_read_off_the_ir() -> None:
    line = "%1 = tt.dot %a, %b, %c{} : tensor<128x32xbf16> * tensor<32x64xbf16> -> tensor<128x64xf32>"
    assert dots(line.format(", inputPrecision = tf32")) == ["bf16 128x64x32"]
    assert dots(line.format("") * 2) == ["bf16 128x64x32"]
    batched = "%1 = tt.dot %a, %b, %c : tensor<4x16x32xf32> * tensor<4x32x8xf32> -> tensor<4x16x8xf32>"
    assert dots(batched) == ["f32 16x8x32"]
    assert dots(batched.replace("%c", "%c, inputPrecision = tf32")) == ["f32 16x8x32 tf32"]


# ---- the machinery --------------------------------------------------------------------------------------------


def specialisation(kernel: Any = wrong_kernels.does_not_specialise, **options: int) -> Specialisation:
    x = torch.empty(64, 128, device="meta")
    with recording("sm_90") as launches:
        launch(kernel, (64,), x, x, 64, 128, **options)
    return specialise(launches[0], "sm_90")


def test_specialisation_is_triton_s_own() -> None:
    plain, divisible = specialisation(), specialisation(wrong_kernels.specialises)
    assert plain.signature == {"x_ptr": "*fp32", "y_ptr": "*fp32", "rows": "i32", "n": "i32"}
    assert plain.attributes.keys() - divisible.attributes.keys() == set()
    assert divisible.attributes[2,] == [["tt.divisibility", 16]]
    assert not plain.attributes.get((2,))
    x = torch.empty(4, 128, device="meta")
    with recording("sm_90") as launches:
        launch(wrong_kernels.specialises, (1,), x, None, 1, 1 << 40)
    found = specialise(launches[0], "sm_90")
    assert found.signature == {"x_ptr": "*fp32", "y_ptr": "constexpr", "rows": "constexpr", "n": "i64"}
    assert found.constants == {(1,): None, (2,): 1}


def _counted(counter: Path) -> Any:
    def compiler(what: Specialisation, calls: list[str]) -> Row:
        with counter.open("a") as file:
            file.write("x")
        return Row(what.name, what.arch, calls, {}, 4, 1, seconds=1.0)

    return compiler


def test_a_second_run_takes_rows_from_the_cache(tmp_path: Path) -> None:
    counter, cache = tmp_path / "count", tmp_path / "cache"
    jobs = [(specialisation(num_warps=warps), ["first"]) for warps in (2, 4)]
    assert len(list(offline.compile_all(jobs, cache, _counted(counter)))) == 2
    jobs = [(specialisation(num_warps=warps), ["second"]) for warps in (2, 4, 8)]
    rows = list(offline.compile_all(jobs, cache, _counted(counter)))
    assert [row.calls for row in rows] == [["second"]] * 3
    assert counter.read_text() == "xxx"


def test_what_is_known_is_not_compiled_again(tmp_path: Path) -> None:
    counter = tmp_path / "count"
    jobs = [(specialisation(num_warps=warps), ["first"]) for warps in (2, 4)]
    first = {row.hash: row for row in offline.compile_all(jobs, None, _counted(counter))}
    assert len(first) == 2
    rows = list(offline.compile_all([(jobs[0][0], ["second"])], None, _counted(counter), first))
    assert [row.calls for row in rows] == [["second"]]
    assert counter.read_text() == "xx"


def test_a_table_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("_k", "sm_90", ["gelu"], {"N": "16"}, 4, 1, registers=7, matrix={"HGMMA": 2}, hash="ab")
    monkeypatch.setattr(offline, "RESULTS", tmp_path)
    assert offline.recorded_rows("9.9") == {}
    (tmp_path / "offline-9.9.json").write_text(offline.Table("9.9", [row], None, [], []).dump())
    assert offline.recorded_rows("9.9") == {"ab": row}


def test_the_cache_sees_a_change_of_the_kernel() -> None:
    kernel = wrong_kernels.does_not_specialise
    before = specialisation(kernel).hash()
    assert specialisation(kernel).hash() == before
    assert specialisation(kernel, num_warps=8).hash() != before
    assert specialisation(wrong_kernels.specialises).hash() != before


def test_a_compiler_that_takes_its_process_down_is_a_failure_of_one_kernel() -> None:
    def compiler(what: Specialisation, calls: list[str]) -> Row:
        if what.options.num_warps == 2:
            os._exit(139)
        return Row(what.name, what.arch, calls, {}, what.options.num_warps, 1)

    jobs = [(specialisation(num_warps=warps), [str(warps)]) for warps in (1, 2, 4, 8)]
    rows = {row.calls[0]: row for row in offline.compile_all(jobs, None, compiler)}
    assert set(rows) == {"1", "2", "4", "8"}
    assert faults(rows["2"]) == ["does not compile: the compiler crashed"]
    assert not any(faults(rows[calls]) for calls in "148")


def test_a_call_that_cannot_be_launched_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: Call, arch: str) -> Any:
        raise ValueError("not today")

    monkeypatch.setattr(offline_calls, "record", refuse)
    call = Call("gelu", "gelu bf16", lambda: None, dict, ())
    table = offline.make_table([call], ["sm_90"], cache=None, cuda=False)
    assert table.failures == ["gelu bf16 on sm_90 cannot be launched: ValueError: not today"]
    assert "not today" in offline.markdown(table)


def test_failures_are_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = offline.Table("9.9", [], None, ["_k sm_90 [x]: spills 8 bytes"], [])
    monkeypatch.setattr(offline, "make_table", lambda *args, **options: table)
    assert offline.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "spills 8 bytes" in capsys.readouterr().out
    assert json.loads((tmp_path / "offline-9.9.json").read_text())["failures"] == table.failures
    table.failures.clear()
    assert offline.main(["--quick"]) == 0
    assert not list(offline.RESULTS.glob("offline-9.9*"))  # a part is not recorded as the whole
