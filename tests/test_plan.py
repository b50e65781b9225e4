"""What is remembered of a call, and what is not: the second call that looks the same gives what the first gave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import fastgpt_kernels
import pytest
import torch
from op_cases import OPS, form_ids, form_problem, recorded
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt
from fastgpt import ops
from fastgpt._core import guard, plan, registry
from fastgpt.testing.inputs import as_tuple
from fastgpt.testing.memory import same_bits

X, Y = torch.randn(3, 8), torch.randn(3, 8)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ops whose backend was chosen anew within the test, which begins with nothing remembered."""
    plan._plans.clear()
    chosen: list[str] = []

    def choose(spec: Any, *args: Any) -> str:
        chosen.append(spec.name)
        return original(spec, *args)

    original = plan.choose
    monkeypatch.setattr(plan, "choose", choose)
    yield chosen
    plan._plans.clear()


@pytest.mark.parametrize(("op", "case"), form_ids(), ids=lambda value: getattr(value, "name", value))
def test_a_second_call_gives_the_same(op: str, case: Any) -> None:
    plan._plans.clear()
    inputs = form_problem(op, case).inputs
    first, *others = (as_tuple(registry.get(op).function(**inputs)) for _ in range(3))
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("attention_qkv", "attention_varlen")])
def test_a_second_call_is_not_prepared_again(op: str, prepared: list[str]) -> None:
    spec = registry.get(op)
    inputs = spec.make_inputs(spec.cases[1], torch.float32, fastgpt._core.spec.Draw(0))
    for _ in range(3):
        spec.function(**inputs)
    assert prepared == [op]


def test_every_tensor_takes_its_place(prepared: list[str]) -> None:
    """The tensors of a remembered call are those of the new one, also where one stood in two places."""
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    expected = [ops.attention(*t, backend="cpu") for t in ((q, q, v), (q, k, v), (k, q, q))]
    for _ in range(2):
        found = [ops.attention(*t) for t in ((q, q, v), (q, k, v), (k, q, q))]
        assert all(map(same_bits, found, expected))
    assert same_bits(ops.attention(k, k, q), ops.attention(k, k, q, backend="cpu"))


def test_what_a_tensor_holds_is_looked_at_every_time() -> None:
    weight, logits, q = torch.randn(5, 8), torch.randn(2, 5), torch.randn(1, 2, 4, 8)
    calls: tuple[tuple[Callable[[torch.Tensor], Any], torch.Tensor], ...] = (
        (lambda t: ops.embedding(t, weight), torch.tensor([1, 4])),
        (lambda t: ops.embedding(torch.tensor([1, 4]), weight, weight, positions=t), torch.tensor([1, 4])),
        (lambda t: ops.cross_entropy(logits, t), torch.tensor([1, 4])),
        (lambda t: ops.attention(q, q, q, kv_lengths=t), torch.tensor([4])),
    )
    for call, good in calls:
        call(good)
        call(good)
        for bad in (good + 1, good - 10):
            with pytest.raises(ValueError, match="expected values from 0 to 4"):
                call(bad)


@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_extremes(count: int, dtype: torch.dtype) -> None:
    values = torch.randint(-1000, 1000, (2, count, 2), dtype=dtype)
    for some in (values, values[..., 0], values.transpose(0, 1), values[0, :1, 0]):
        assert guard.extremes(some) == (int(some.min()), int(some.max()))
    assert guard.extremes(values[:0]) is None


def test_options_that_are_equal_are_not_the_same() -> None:
    for _ in range(2):
        ops.layer_norm(X, eps=1.0)
        ops.layer_norm(X, eps=1)
        with pytest.raises(TypeError, match="eps: expected a number, got True"):
            ops.layer_norm(X, eps=True)
    signatures = [guard.signature("op", (X, value)) for value in (0, 0.0, -0.0, False, None, "", "0")]
    assert len(set(signatures)) == len(signatures)


def test_what_a_signature_tells_apart() -> None:
    different = (X, X.double(), X[:2], X[:, :4], X.t().contiguous().t(), X[0], X.clone().requires_grad_())
    assert len({guard.signature("op", (x,)) for x in different}) == len(different)
    assert guard.signature("op", (X, Y)) == guard.signature("op", (Y, X)) != guard.signature("op", (X, X))
    assert guard.signature("op", (X,)) != guard.signature("other", (X,))
    leaf = X.clone().requires_grad_()
    with torch.no_grad():
        assert guard.signature("op", (leaf,)) == guard.signature("op", (X,))
    assert guard.signature("op", (torch.nn.Parameter(X),)) == guard.signature("op", (leaf,))


def test_what_has_no_signature() -> None:
    for value in (
        X.to_sparse(),
        X.to_sparse_csr(),
        X.to_mkldnn(),
        X.to("meta"),
        (1, 2),
        2**64,
        "s" * 2000,
        X.numpy(),
    ):
        assert guard.signature("op", (value,)) is None
    with torch.autocast("cpu"):
        assert guard.signature("op", (X,)) is None


def test_other_choices_come_first(prepared: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def names(**options: Any) -> list[str]:
        with recorded() as calls:
            ops.gelu(X, **options)
        return [name for name, _ in calls]

    assert names() == names() == ["gelu_fwd_cpu"]
    assert names(backend="torch") == ["gelu_fwd_torch"]
    with fastgpt.use_backend("torch"):
        assert names() == ["gelu_fwd_torch"]
    with monkeypatch.context() as patch:
        patch.setitem(registry._USABLE, ("gelu", "cpu"), registry._USABLE["gelu", "cpu"][1:])
        assert names() == names() == ["gelu_fwd_torch"]
    assert names() == ["gelu_fwd_cpu"]


def test_a_dual_level_is_not_forgotten() -> None:
    ops.gelu(X)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        ops.gelu(forward_ad.make_dual(X, Y))


def test_autocast_is_not_forgotten() -> None:
    q = torch.randn(1, 2, 4, 8)
    assert ops.attention(q, q, q).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.attention(q, q, q).dtype == torch.bfloat16
    assert ops.attention(q, q, q).dtype == torch.float32


def test_a_gradient_is_not_forgotten() -> None:
    leaf = X.clone().requires_grad_()
    for _ in range(2):
        assert not ops.gelu(X).requires_grad
        assert ops.gelu(leaf).requires_grad
        with torch.no_grad():
            assert not ops.gelu(leaf).requires_grad


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MOST", 10)
    for length in range(1, 40):
        ops.gelu(torch.ones(length))
        assert len(plan._plans) <= 10


def test_threads_share_it() -> None:
    """Many signatures from many threads while they are forgotten again: each call gets its own result."""
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(300):
            x = torch.full((1 + (seed + i) % 17, 4), float(seed))
            if not same_bits(ops.gelu(x), ops.gelu(x, backend="cpu")):
                wrong.append(i)
            if i % 50 == 0:
                plan._plans.clear()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- the compiled guard is the one written in Python


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


CONJUGATE = torch.view_as_complex(torch.randn(3, 2)).conj()


@pytest.mark.skipif(fastgpt_kernels.cpu_status() is not None, reason="needs fastgpt_kernels._cpu")
@pytest.mark.parametrize("mode", [nullcontext, Mode, torch.no_grad, torch.inference_mode])
def test_the_compiled_guard_agrees(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    values = (
        X, torch.nn.Parameter(X), X.as_subclass(Subclass), CONJUGATE, CONJUGATE.imag, torch._efficientzerotensor(3),
        X.to_sparse(), None, True, 1, 1.0, "a", (1,), [X], torch.float32, object(),
    )  # fmt: skip
    with mode():
        for value in values:
            assert guard._is_plain((X, value)) == guard._is_plain_python((X, value)), value
    found: list[tuple[bool, bool]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        found.append((guard._is_plain((x,)), guard._is_plain_python((x,))))
        return x + 1

    torch.func.vmap(look)(X)
    torch.func.grad(lambda x: look(x).sum())(X)
    torch.jit.trace(look, X, check_trace=False)
    assert found == [(False, False)] * 3
