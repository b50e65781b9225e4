"""What an op declares about itself, once: its entry points, its proof and its cost.

The registry feeds one `OpSpec` to everything else: torch.library registration (`library.py`), the choice of a
backend (`dispatch.py`), the generated tests (`fastgpt.testing`) and the benchmarks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.reference.common import Condition

# Every backend there can be, in no order of preference; `orders` of an op says which is tried first.
BACKENDS = ("cpu", "triton", "cuda", "torch", "reference")

DEFAULT_ORDERS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch", "reference"),
    "cuda": ("triton", "cuda", "torch", "reference"),
}
ANY_DEVICE = ("torch", "reference")  # where an op names no order


@dataclass(frozen=True)
class Entry:
    """One function that every backend module of an op has, as torch.library needs to know it.

    schema: "(Tensor x, float eps) -> (Tensor, Tensor)". The first argument is a tensor.
    fake: the same signature; returns empty tensors of the right shape, dtype and device.

    A result that a call does not have is None; the registered op turns it into an empty tensor.
    """

    schema: str
    fake: Callable[..., Any]


class Cost(NamedTuple):
    """What one call must move and compute at the least, for "fraction of the limit" in benchmarks."""

    fwd_bytes: int
    bwd_bytes: int
    fwd_flops: int
    bwd_flops: int


class Draw:
    """Seeded random inputs, the same on every device and for every backend."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)

    def normal(
        self, shape: Sequence[int], dtype: torch.dtype, *, mean: float = 0.0, std: float = 1.0
    ) -> Tensor:
        values = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float32)
        return values.mul_(std).add_(mean).to(dtype).to(self.device)

    def bernoulli(self, shape: Sequence[int], probability: float) -> Tensor:
        """A boolean tensor, True with `probability`."""
        return (torch.rand(tuple(shape), generator=self.generator) < probability).to(self.device)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """An int64 tensor in [low, high)."""
        return torch.randint(low, high, tuple(shape), generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an op: the shape of its main input and the options that `OpSpec.make_inputs` understands.

    mixed: the case exists only for bf16 and fp16 (inputs of two dtypes).
    """

    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    mixed: bool = False

    @property
    def name(self) -> str:
        """Readable and unique within an op: "7x1600-residual-mean_1000"."""
        parts = ["x".join(map(str, self.shape))]
        for key, value in self.options.items():
            parts.append(key if value is True else f"{key}_{value}")
        return "-".join(parts)


ROWS, WIDTHS = 8192, (768, 1600, 3072, 6400, 50257)  # of row ops in GPTs; a vocabulary is the widest
_MOST_ELEMENTS = ROWS * 6400  # fewer rows as wide as a vocabulary: a case must fit in memory


def row_cases(*forms: Mapping[str, Any], widths: Sequence[int] = WIDTHS) -> tuple[Case, ...]:
    """For `OpSpec.cpu_cases`: each form of the options at every width, and 4 x 64, where the host's time is all."""
    shapes = [(min(ROWS, _MOST_ELEMENTS // n), n) for n in widths]
    return tuple(Case(shape, form) for form in forms for shape in (*shapes, (4, 64)))


@dataclass(frozen=True)
class OpSpec:
    """One op: see `fastgpt/ops/layer_norm.py` for a whole example.

    name: the stem of all its files.
    function: the public function, `function(**inputs, backend=...)`.
    prepare: public signature without `backend`; validates, applies autocast, returns the arguments of `fwd`. What it
        comes to is remembered (`plan.py`): what a tensor holds is checked by `function`, on every call.
    reference: the definition in plain PyTorch, differentiable, exact in fp64; `reference(**inputs)`.
    condition: `condition(inputs, grads)` in fp64, where inputs are the keyword arguments of `function` and
        grads the gradients of its outputs by name; returns a `Condition` per output ("y") and per gradient
        ("dx", "dweight": "d" + the name of the input). Both must be of broadcastable shape.
    outputs: names of the outputs in order; a call may return fewer (no residual: no stream).
    restart: None, or `restart(inputs, outputs)` for an op that rounds one of its outputs and computes on: equivalent
        inputs from the `intermediates` that a call returned, or None where this call has none. The intermediates
        are judged from the inputs, all else from the restart, as if the call had begun there.
    intermediates: names of those outputs.
    gradients: names of the inputs that can have a gradient.
    c: the constant of the error bound.
    make_inputs: `make_inputs(case, dtype, draw)`: the keyword arguments of `function`.
    cases, bench_cases: what tests and benchmarks run.
    cpu_cases: what the benchmark suite `cpu` runs. None: every form of the options that `bench_cases` has on
        [rows, n], as `row_cases`, and its other shapes as they are.
    independent: how many leading dimensions of the inputs have nothing to do with one another.
    cost: `cost(case, dtype)`.
    baseline: what a PyTorch user would write, `baseline(**inputs)`: differentiable, eager or compiled.
    orders: by device type, which backend is tried first.
    kernels: the op whose entries this one calls, where it has none of its own ("attention_qkv": "attention").
    rule: None, or a pure function of the prepared arguments (dtype, widths and options; never the row count):
        the backend to put first for this call, or None.
    positional, keywords: of `prepare`'s parameters how many are positional, and the names of the others.
    """

    name: str
    entries: Mapping[str, Entry]
    function: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]]
    reference: Callable[..., Any]
    condition: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Condition]]
    outputs: tuple[str, ...]
    gradients: tuple[str, ...]
    make_inputs: Callable[[Case, torch.dtype, Draw], dict[str, Any]]
    cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...]
    cost: Callable[[Case, torch.dtype], Cost]
    baseline: Callable[..., Any]
    c: float = 16.0
    restart: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Any] | None] | None = None
    intermediates: tuple[str, ...] = ()
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: DEFAULT_ORDERS)
    rule: Callable[..., str | None] | None = None
    kernels: str = ""
    cpu_cases: tuple[Case, ...] | None = None
    independent: int = 1
    positional: int = field(init=False)
    keywords: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        kinds = {name: p.kind for name, p in inspect.signature(self.prepare).parameters.items()}
        keywords = tuple(name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY)
        object.__setattr__(self, "keywords", keywords)
        object.__setattr__(self, "positional", len(kinds) - len(keywords))

    @property
    def suite_cpu(self) -> tuple[Case, ...]:
        if self.cpu_cases is not None:
            return self.cpu_cases
        forms = {repr(case.options): case.options for case in self.bench_cases if len(case.shape) == 2}
        return row_cases(*forms.values()) + tuple(case for case in self.bench_cases if len(case.shape) != 2)

    @property
    def stem(self) -> str:
        """What its entries are called after."""
        return self.kernels or self.name
