"""The module `_cuda` and its emulation on the host: build, errors, headers, the emulator. Kernels: test_ops.py."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from build_tree import ROOT, build_inplace, copy_tree, run_python
from torch import Tensor

from fastgpt.reference import philox

NVCC = os.environ.get("NVCC") or shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")

PROBE = """
#include "launch.h"
#include "philox.h"
#include "reduce.h"
#include "vector.h"

namespace fg::FG_LEVEL {
namespace {

__global__ void nothing() {}

__global__ void shuffle(int* out) {
  const int lane = threadIdx.x % 32, t = threadIdx.x;
  out[3 * t] = __shfl_xor_sync(kFullMask, t, 5);
  out[3 * t + 1] = __shfl_down_sync(kFullMask, t, 3);
  out[3 * t + 2] = __shfl_sync(kFullMask, t, 31 - lane);
}

__global__ void diverge(int kind) {
  const int t = threadIdx.x;
  if (kind == 0 && t == 7) {  // a barrier that one thread of a warp misses
    __syncwarp();
  } else if (kind == 1 && t >= 32) {  // warps at two barriers
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lane_gone() {
  if (threadIdx.x < 8) return;
  __shfl_xor_sync(kFullMask, 1, 16);
}

// The first thread to run leaves its number to those that come after the barrier.
__global__ void share(int* out) {
  __shared__ int seen[1024];
  int* dynamic = shared_memory<int>();
  const int t = threadIdx.x, n = blockDim.x;
  seen[t] = t;
  dynamic[n - 1 - t] = t;
  __syncthreads();
  out[blockIdx.x * n + t] = seen[n - 1 - t] + 1000 * dynamic[t] + 1000000 * static_cast<int>(blockIdx.x);
}

template <class T>
__global__ void copy(const T* x, T* y, int64_t n) {
  constexpr int N = kVector<T>;
  for (int64_t j = threadIdx.x * N; j < n; j += blockDim.x * N) {
    float v[N];
    load(x + j, n - j, is_aligned(x), v, 1e9f);
    store(y + j, n - j, is_aligned(y), v);
  }
}

template <class T>
__global__ void convert(const float* x, T* y, float* back, int64_t n) {
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    y[j] = from_float<T>(x[j]);
    back[j] = to_float(y[j]);
  }
}

template <class Group>
__global__ void reduce(const float* x, float* out) {
  Group group;
  const float v = x[threadIdx.x];
  const TwoSums two = group.reduce(TwoSums{v, v * v}, TwoSums{0, 0}, AddTwo());
  const float largest = group.reduce(v, -INFINITY, Max());
  const float sum = group.reduce(v, 0.0f, Add());
  float* mine = out + 4 * threadIdx.x;
  mine[0] = two.a, mine[1] = two.b, mine[2] = largest, mine[3] = sum;
}

__global__ void words(const int64_t* rng, const int64_t* index, int64_t* out) {
  out[threadIdx.x] = philox(rng[0], rng[1] + index[threadIdx.x]);
}

}  // namespace

void probe_launch(int64_t grid, int block, void* stream, int device) {
  Stream(stream, device).launch(nothing, grid, block, 0);
}
void probe_shuffle(int* out, void* stream, int device) { Stream(stream, device).launch(shuffle, 1, 64, 0, out); }
void probe_diverge(int kind, void* stream, int device) { Stream(stream, device).launch(diverge, 1, 64, 0, kind); }
void probe_lane_gone(void* stream, int device) { Stream(stream, device).launch(lane_gone, 1, 32, 0); }
void probe_share(int* out, int64_t grid, int block, void* stream, int device) {
  Stream(stream, device).launch(share, grid, block, sizeof(int) * block, out);
}
void probe_copy(const void* x, void* y, int64_t n, int block, int dtype, void* stream, int device) {
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Stream(stream, device).launch(copy<T>, 1, block, 0, static_cast<const T*>(x), static_cast<T*>(y), n);
  });
}
void probe_convert(const float* x, void* y, float* back, int64_t n, int dtype, void* stream, int device) {
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Stream(stream, device).launch(convert<T>, 1, 32, 0, x, static_cast<T*>(y), back, n);
  });
}
void probe_reduce(const float* x, float* out, int block, bool warp, void* stream, int device) {
  Stream(stream, device).launch(warp ? reduce<Warp> : reduce<Block>, 1, block, 0, x, out);
}
void probe_philox(const int64_t* rng, const int64_t* index, int64_t* out, int n, void* stream, int device) {
  Stream(stream, device).launch(words, 1, n, 0, rng, index, out);
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(probe, FG_EXPORT(probe_launch), FG_EXPORT(probe_shuffle), FG_EXPORT(probe_diverge),
           FG_EXPORT(probe_lane_gone), FG_EXPORT(probe_share), FG_EXPORT(probe_copy), FG_EXPORT(probe_convert),
           FG_EXPORT(probe_reduce), FG_EXPORT(probe_philox))
"""
HERE = (0, 0)  # stream and device
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATUS = "import fastgpt_kernels; print(fastgpt_kernels.cuda_status())"


@pytest.fixture(scope="module")
def probe_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_tree(tmp_path_factory.mktemp("probe") / "tree", ops=False)
    (tree / "csrc" / "cuda" / "probe.cu").write_text(PROBE)
    result = build_inplace(tree, FASTGPT_EMULATE_CUDA="1")
    assert result.returncode == 0, result.stdout
    return tree


@pytest.fixture(scope="module")
def probe(probe_tree: Path) -> ModuleType:
    """A `_cuda_emulated` whose kernels are those of PROBE."""
    file = f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    path = probe_tree / "kernels" / "fastgpt_kernels" / file
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shuffles(probe: ModuleType) -> None:
    out = torch.empty(64, 3, dtype=torch.int32)
    probe.probe_shuffle(out.data_ptr(), *HERE)
    for t in range(64):
        lane, warp = t % 32, t - t % 32
        down = warp + lane + 3 if lane + 3 < 32 else t
        assert out[t].tolist() == [warp + (lane ^ 5), down, warp + 31 - lane]


@pytest.mark.parametrize(("grid", "block"), [(3, 1), (2, 33), (2, 1024)])
def test_shared_memory_and_barriers(probe: ModuleType, grid: int, block: int) -> None:
    out = torch.empty(grid, block, dtype=torch.int32)
    probe.probe_share(out.data_ptr(), grid, block, *HERE)
    there = torch.arange(block - 1, -1, -1, dtype=torch.int32)
    assert torch.equal(out, there * 1001 + 1_000_000 * torch.arange(grid, dtype=torch.int32)[:, None])


@pytest.mark.parametrize("kind", [0, 1])
def test_divergent_threads_are_an_error_and_not_a_hang(probe: ModuleType, kind: int) -> None:
    with pytest.raises(
        RuntimeError, match=r"^probe_diverge: divergent threads: thread \d+ waits .*probe\.cu:\d+, "
    ):
        probe.probe_diverge(kind, *HERE)
    probe.probe_diverge(2, *HERE)  # and the next launch starts afresh
    test_shared_memory_and_barriers(probe, 2, 1024)


def test_a_shuffle_from_a_lane_that_has_returned(probe: ModuleType) -> None:
    with pytest.raises(
        RuntimeError, match=r"^probe_lane_gone: thread \d+ reads from a lane that is not there"
    ):
        probe.probe_lane_gone(*HERE)


def test_a_failed_launch_names_op_and_call(probe: ModuleType) -> None:
    message = r"^probe_launch: CUDA error 9 invalid configuration argument \(cudaLaunchKernel\)$"
    with pytest.raises(RuntimeError, match=message):
        probe.probe_launch(1, 2048, *HERE)
    with pytest.raises(RuntimeError, match=r"^probe_launch: a grid of 2147483648 blocks, the limit is"):
        probe.probe_launch(2**31, 32, *HERE)
    probe.probe_launch(0, 32, *HERE)  # nothing to do


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_vectors_and_tails_of_every_length(probe: ModuleType, dtype: torch.dtype, offset: int) -> None:
    """From nothing to twice what the block takes at once; nothing outside is written."""
    block = 2
    width = 16 // dtype.itemsize
    for n in range(2 * block * width + 1):
        x = torch.randn(n + 16).to(dtype)
        y = torch.full_like(x, 7.0)
        at = offset * dtype.itemsize
        probe.probe_copy(x.data_ptr() + at, y.data_ptr() + at, n, block, CODES[dtype], *HERE)
        assert torch.equal(y[offset : offset + n], x[offset : offset + n])
        assert (y[:offset] == 7.0).all()
        assert (y[offset + n :] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_as_torch_does(probe: ModuleType, dtype: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32)
    numbers = bits.to(torch.int16).view(dtype).float()  # every number of the dtype
    exact = numbers[numbers.isfinite()].sort().values
    middles = (exact[1:].double() + exact[:-1].double()).div(2).float()  # ties, and the floats beside them
    beside = [torch.nextafter(middles, torch.tensor(s * torch.inf)) for s in (-1, 1)]
    x = torch.cat([numbers, middles, *beside, torch.tensor([65519.9, 65520.0, 3.4e38, 1e-45, torch.inf])])
    y, back = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    probe.probe_convert(x.data_ptr(), y.data_ptr(), back.data_ptr(), x.numel(), CODES[dtype], *HERE)
    want = x.to(dtype)
    nan = want.isnan()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y.view(torch.int16)[~nan], want.view(torch.int16)[~nan])
    assert torch.equal(back[~nan], want.float()[~nan])
    assert back[nan].isnan().all()


@pytest.mark.parametrize("block", [32, 64, 96, 1024])
@pytest.mark.parametrize("kind", ["warp", "block"])
def test_reductions(probe: ModuleType, block: int, kind: str) -> None:
    x = torch.randint(-50, 50, (block,)).float()  # sums are exact
    out = reduced(probe, x, kind)
    rows = x.view(-1, 32) if kind == "warp" else x[None]
    want = torch.stack([rows.sum(1), rows.square().sum(1), rows.amax(1), rows.sum(1)], 1)
    assert torch.equal(out, want.repeat_interleave(rows.shape[1], 0))
    x[block // 2] = torch.nan
    assert reduced(probe, x, kind)[block // 2].isnan().all(), "the maximum lets NaN through"


def reduced(probe: ModuleType, x: Tensor, kind: str) -> Tensor:
    out = torch.empty(x.numel(), 4)
    probe.probe_reduce(x.data_ptr(), out.data_ptr(), x.numel(), kind == "warp", *HERE)
    return out


def test_philox_is_the_references(probe: ModuleType) -> None:
    rng = torch.tensor([-(2**61) + 12345, 2**40 - 3])
    index = torch.cat([torch.arange(500), torch.arange(500) + 2**32 - 250, torch.tensor([2**62])])
    out = torch.empty_like(index)
    probe.probe_philox(rng.data_ptr(), index.data_ptr(), out.data_ptr(), index.numel(), *HERE)
    assert torch.equal(out, philox.first_words(rng[0], rng[1] + index))


def test_emulated_module_reports_no_device_and_notices_changed_sources(
    probe: ModuleType, probe_tree: Path
) -> None:
    assert probe.device_count() == 0
    assert probe.device_message() == "compiled for the host"
    assert run_python(probe_tree, STATUS, FASTGPT_CUDA_EMULATION="1") == "None"
    assert run_python(probe_tree, STATUS, FASTGPT_CUDA_EMULATION="0").startswith(
        "not built: install the CUDA"
    )
    source = probe_tree / "csrc" / "cuda" / "vector.h"
    text = source.read_text()
    source.write_text(text + "\n")
    assert run_python(probe_tree, STATUS, FASTGPT_CUDA_EMULATION="1").startswith("stale: ")
    assert run_python(probe_tree, STATUS.replace("cuda_status", "cpu_status")) == "None"
    source.write_text(text)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"FASTGPT_CUDA": "1", "NVCC": "no-such-nvcc"},
            "FASTGPT_CUDA=1 needs nvcc: install the CUDA toolkit",
        ),
        ({"FASTGPT_CUDA": "yes"}, "FASTGPT_CUDA: expected 0, 1 or auto, got 'yes'"),
        (
            {"FASTGPT_CUDA": "1", "FASTGPT_CUDA_ARCHS": "80;hopper"},
            "FASTGPT_CUDA_ARCHS: expected a list such as",
        ),
    ],
    ids=["no nvcc", "bad choice", "bad architecture"],
)
def test_what_stops_the_build(probe_tree: Path, environment: dict[str, str], message: str) -> None:
    result = build_inplace(probe_tree, **environment)
    assert result.returncode != 0
    assert message in result.stdout


def test_auto_without_nvcc_builds_the_rest(probe_tree: Path) -> None:
    result = build_inplace(probe_tree, FASTGPT_CUDA="auto", NVCC="no-such-nvcc")
    assert result.returncode == 0, result.stdout
    assert not list((probe_tree / "kernels").rglob("_cuda.*"))


@pytest.mark.parametrize(
    ("archs", "want"),
    [
        ("", "80,sm_80 90a,sm_90a 100,sm_100 100,compute_100"),
        ("8.0, 9.0a", "80,sm_80 90a,sm_90a 80,compute_80"),
        ("90a", "90a,sm_90a"),
    ],
)
def test_architectures(archs: str, want: str) -> None:
    """Machine code for each, and for newer GPUs the PTX of the last that is not bound to one generation."""
    code = """import runpy, setuptools
setuptools.setup = lambda **_: None
print(*runpy.run_path("setup.py")["cuda_archs"]())"""
    environment = {**os.environ, "FASTGPT_CUDA_ARCHS": archs}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.sub(r"-gencode=arch=compute_(\w+),code=", r"\1,", result.stdout.strip()) == want


@needs_nvcc
def test_module_for_the_gpu(probe_tree: Path) -> None:
    """It is built, imports with or without a GPU, brings its own runtime and hides it, and raises with a name."""
    result = build_inplace(probe_tree, FASTGPT_CUDA="1", FASTGPT_CUDA_ARCHS="80")
    assert result.returncode == 0, result.stdout
    code = f"{STATUS}\ncuda = fastgpt_kernels.load_cuda()\nprint(cuda.device_count(), repr(cuda.device_message()))\n"
    code += "try: cuda.probe_launch(1, 2048, 0, 0)\nexcept RuntimeError as error: print(error)"
    status, devices, error = run_python(probe_tree, code, FASTGPT_CUDA_EMULATION="0").splitlines()
    assert status == "None"
    count, message = devices.split(maxsplit=1)
    assert (int(count) > 0) == (message == "''")
    assert re.match(r"probe_launch: CUDA error \d+ .+ \(cuda\w+\)$", error)
    (library,) = (probe_tree / "kernels" / "fastgpt_kernels").glob("_cuda.*")
    if shutil.which("readelf"):
        dynamic = subprocess.run(
            ["readelf", "-dW", library], capture_output=True, text=True, check=True
        ).stdout
        assert "libcudart" not in dynamic
        symbols = subprocess.run(
            ["readelf", "-W", "--dyn-syms", library], capture_output=True, text=True, check=True
        )
        assert not re.search(r"GLOBAL\s+DEFAULT\s+\d+ cuda", symbols.stdout), (
            "torch has a CUDA runtime of its own"
        )


def test_checkout_has_the_emulated_module() -> None:
    """`make build` makes it; without it the CUDA kernels would go unproven here."""
    environment = {**os.environ, "FASTGPT_CUDA_EMULATION": "1"}
    result = subprocess.run([sys.executable, "-c", STATUS], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "None", result.stdout + result.stderr
