"""What a part runs on: the GPU, or in a rehearsal the CPU in its place. Suites ask here for all that differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import buffers, limits
from fastgpt._core import registry
from fastgpt._core.spec import Draw
from fastgpt.testing.timing import MIN_ROUNDS, Clock, CudaClock

OURS = ("triton", "cuda")


class Gpu:
    """The current CUDA device."""

    dry = False
    rounds = MIN_ROUNDS  # of a timing, at least

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("torch sees no GPU here (--dry rehearses without one)")
        self.device = torch.device("cuda", torch.cuda.current_device())

    @property
    def clock(self) -> Clock:
        return CudaClock(self.device)

    def draw(self, seed: int) -> Draw:
        return DeviceDraw(seed, self.device)

    def limits(self, seconds: float = 2.0) -> limits.Limits:
        return limits.LimitMeter(self.device).measure(seconds)

    def backends(self, op: str) -> list[str]:
        """Our GPU backends that have a kernel for `op` here."""
        found = (name for name in OURS if isinstance(registry.module(op, name), ModuleType))
        return [name for name in found if registry.runs_on(name, self.device.type)]

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    def forget_compiled(self) -> None:
        """Before each contest: past a few shapes of one function torch.compile quietly runs it eagerly."""
        torch._dynamo.reset()

    def sdpa(self, backend: str) -> AbstractContextManager[None]:
        """Only this backend ("FLASH_ATTENTION") of PyTorch's scaled_dot_product_attention."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, backend))

    def flex(self, length: int, causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """FlexAttention, compiled for this length."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key

        mask = (
            create_block_mask(visible, None, None, length, length, device=str(self.device))
            if causal
            else None
        )
        compiled = self.compile(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    def graphed(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`step` captured in a CUDA graph, after warm-up runs of its own; a replay's result outlives the next."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fixed = step()

        def replay() -> Tensor:
            graph.replay()
            return fixed.clone()

        return replay

    def peak_bytes(self, call: Callable[[], object]) -> int:
        return buffers.peak_bytes(call, self.device)

    def sizes(self, real: Sequence[Any], rehearsed: Sequence[Any]) -> Sequence[Any]:
        """What a suite runs over: the first, in a rehearsal the second."""
        return real


class Rehearsal(Gpu):
    """The same on CPU tensors: Triton in its interpreter, CUDA C++ compiled for the host, torch.cuda faked."""

    dry = True
    rounds = 1

    def __init__(self) -> None:
        from benchmarks.gpu import fake_cuda

        fake_cuda.install()
        limits.COPY_MIB["cpu"], limits.SQUARES["cpu"] = 4, (64, 128)
        self.device = torch.device("cpu")

    def limits(self, seconds: float = 2.0) -> limits.Limits:
        return super().limits(0.0)

    def backends(self, op: str) -> list[str]:
        # Something runs in any case, so that the suites are rehearsed before the kernels are there.
        return super().backends(op) or ["torch"]

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def forget_compiled(self) -> None:
        pass

    def sdpa(self, backend: str) -> AbstractContextManager[None]:
        super().sdpa(backend)
        return nullcontext()

    def flex(self, length: int, causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        super().flex(length, causal)  # it has no backward on the CPU
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def graphed(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        super().graphed(step)
        return step

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return 0  # on the CPU torch's profiler counts it, and takes a second to import

    def sizes(self, real: Sequence[Any], rehearsed: Sequence[Any]) -> Sequence[Any]:
        return rehearsed


class DeviceDraw(Draw):
    """Drawn on the device: the large inputs would take the host longer than all that is measured with them."""

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed, device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(
        self, shape: Sequence[int], dtype: torch.dtype, *, mean: float = 0.0, std: float = 1.0
    ) -> Tensor:
        made = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float32, device=self.device)
        return made.mul_(std).add_(mean).to(dtype)

    def bernoulli(self, shape: Sequence[int], probability: float) -> Tensor:
        return torch.rand(tuple(shape), generator=self.generator, device=self.device) < probability

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(low, high, tuple(shape), generator=self.generator, device=self.device)


def machine(dry: bool) -> Gpu:
    return Rehearsal() if dry else Gpu()
