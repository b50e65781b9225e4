"""Every CUDA kernel compiles for every architecture without spills, and what would be wrong is noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import offline_cuda
from benchmarks.offline_cuda import CudaRow, compile_cuda, faults, parse_ptxas, readable

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

SPILLING = """
namespace fg { namespace {
template <class T, int kCount>
__global__ void __launch_bounds__(1024) greedy(const T* x, T* y) {
  T kept[kCount], sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += kept[i] = x[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[i * 1024 + threadIdx.x] = kept[i] * sum;
}
}  // namespace
int launch(const float* x, float* y) {
  greedy<float, 100><<<1, 1024>>>(x, y);
  return cudaGetLastError();
}
}  // namespace fg
"""
SHARING = """
__global__ void hoards(const float* x, float* y) {
  __shared__ float kept[KIB * 256];
  for (int i = threadIdx.x; i < KIB * 256; i += 256) kept[i] = x[i];
  __syncthreads();
  y[threadIdx.x] = kept[KIB * 256 - 1 - threadIdx.x];
}
"""
LOCAL = """
__global__ void picks(const float* x, const int* at, float* y) {
  float kept[32] = {};
  for (int i = 0; i < 64; ++i) kept[at[i] % 32] += x[i];
  y[threadIdx.x] = kept[threadIdx.x % 32];
}
"""


@needs_nvcc
def test_no_kernel_spills() -> None:
    rows = compile_cuda()
    assert faults(rows) == []
    sources = sorted(path.stem for path in (offline_cuda.ROOT / "csrc" / "cuda").glob("*.cu"))
    for arch in offline_cuda.ARCHS:
        kernels = [row.kernel for row in rows if row.arch == arch]
        assert kernels, f"no kernels for {arch}"
        assert len(kernels) == len(set(kernels)), "names that stand for two kernels each"
        for source in sources:
            assert any(name.startswith(source) for name in kernels), f"{source}.cu: no kernel for {arch}"
    assert all(0 < row.registers <= 255 for row in rows)


@needs_nvcc
def test_a_kernel_that_spills_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "greedy.cu"
    source.write_text(SPILLING)
    (row,) = compile_cuda(["sm_90a"], [source])
    assert (row.kernel, row.arch) == ("greedy<fp32, 100>", "sm_90a")
    assert row.registers == 64  # all that 1024 threads leave each
    assert row.spill_stores > 0
    (fault,) = faults([row])
    assert "greedy<fp32, 100> on sm_90a: spills" in fault


@needs_nvcc
def test_a_kernel_with_too_much_shared_memory_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "hoards.cu"
    source.write_text(SHARING.replace("KIB", "44"))
    (row,) = compile_cuda(["sm_80"], [source])
    assert row.shared == 44 * 1024
    (fault,) = faults([row])
    assert "hoards on sm_80: 45056 bytes of shared memory" in fault
    source.write_text(SHARING.replace("KIB", "64"))
    with pytest.raises(
        RuntimeError, match=r"(?s)hoards\.cu does not compile for sm_80.*too much shared data"
    ):
        compile_cuda(["sm_80"], [source])


@needs_nvcc
def test_an_array_in_local_memory_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "picks.cu"
    source.write_text(LOCAL)
    (fault,) = faults(compile_cuda(["sm_80"], [source]))
    assert "picks on sm_80: keeps 128 bytes in local memory" in fault


@needs_nvcc
def test_a_file_without_kernels_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "nothing.cu"
    source.write_text("int nothing() { return 0; }\n")
    with pytest.raises(RuntimeError, match="no kernel"):
        compile_cuda(["sm_80"], [source])


def test_each_fault_has_its_line() -> None:
    clean = CudaRow("k", "sm_80", 40, 0, 0, 0, offline_cuda.MAX_SHARED)
    assert faults([clean]) == []
    spills = CudaRow("k", "sm_80", 255, 8, 16, 24, offline_cuda.MAX_SHARED + 1)
    assert len(faults([clean, spills])) == 2  # the spill and the shared memory
    assert len(faults([CudaRow("k", "sm_80", 40, 0, 4, 0, 0)])) == 1


def test_the_log_of_ptxas_is_read() -> None:
    log = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z2k2v' for 'sm_80'
ptxas info    : Function properties for _Z2k2v
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for _Z6helperv
    16 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 1.452 ms
ptxas info    : Compiling entry function '_Z2k1v' for 'sm_80'
ptxas info    : Function properties for _Z2k1v
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 360 bytes cmem[0]
"""
    assert parse_ptxas(log) == [
        CudaRow("_Z2k1v", "sm_80", 12, 0, 0, 0, 0),
        CudaRow("_Z2k2v", "sm_80", 64, 5, 14, 16, 256),
    ]


@pytest.mark.parametrize(
    ("demangled", "expected"),
    [
        ("k(float const*, int)", "k"),
        (
            "void fg::_GLOBAL__N__00e848e1_4_a_cu_51bb8ceb::k<float, 32, true>(float const*)",
            "k<fp32, 32, true>",
        ),
        ("void fg::<unnamed>::k<__half, (int)4, (bool)1>(const T1 *, T1 *)", "k<fp16, 4, 1>"),
        ("void fg::(anonymous namespace)::k<fg::Block<__nv_bfloat16, 8> >(fg::Rows)", "k<Block<bf16, 8> >"),
    ],
)
def test_names_are_readable(demangled: str, expected: str) -> None:
    assert readable(demangled) == expected
