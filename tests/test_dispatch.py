"""Which backend runs: arguments, contexts, environment, refusals, and the guard before raw pointers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from op_cases import OPS, backends, forms, recorded, supported
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt
from fastgpt import ops
from fastgpt._core import dispatch, library, registry
from fastgpt._core.dispatch import BackendError
from fastgpt.testing.inputs import as_tuple

X = torch.randn(3, 8)


def backend_of(call: Any) -> str:
    """The backend of the one kernel that `call` runs."""
    with recorded() as calls:
        call()
    assert len(calls) == 1, calls
    return calls[0][0].rpartition("_")[2]


def test_the_order_of_precedence() -> None:
    assert backend_of(lambda: ops.gelu(X)) == "cpu"
    with fastgpt.use_backend("torch"):
        assert backend_of(lambda: ops.gelu(X)) == "torch"
        assert backend_of(lambda: ops.gelu(X, backend="reference")) == "reference"
        with fastgpt.use_backend("reference"):
            assert backend_of(lambda: ops.gelu(X)) == "reference"
        assert backend_of(lambda: ops.gelu(X)) == "torch"
    assert backend_of(lambda: ops.gelu(X)) == "cpu"


def test_a_context_ends_with_an_exception_too() -> None:
    with pytest.raises(KeyError), fastgpt.use_backend("torch"):
        raise KeyError
    assert backend_of(lambda: ops.gelu(X)) == "cpu"


def test_a_context_is_of_its_thread() -> None:
    found: list[tuple[str, ...]] = []
    with fastgpt.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(dispatch._override.names))
        thread.start()
        thread.join()
    assert found == [()]


def test_several_names_are_tried_in_their_order() -> None:
    assert backend_of(lambda: ops.softmax(X, dropout_p=0.5, backend=("torch", "reference"))) == "reference"
    assert backend_of(lambda: ops.softmax(X, backend=("torch", "reference"))) == "torch"


@pytest.mark.parametrize("op", OPS)
def test_an_explicit_choice_never_falls_back(op: str) -> None:
    spec = registry.get(op)
    inputs = spec.make_inputs(forms(op)[0], torch.float32, fastgpt._core.spec.Draw(0))
    absent = [name for name in fastgpt._core.spec.BACKENDS if name not in backends(op)]
    for name in absent:
        with pytest.raises(BackendError, match=rf"{op}: the backend asked for cannot run this call .*{name}"):
            spec.function(**inputs, backend=name)
    with pytest.raises(BackendError, match="Philox"):
        ops.softmax(X, dropout_p=0.5, backend="torch")


@pytest.mark.parametrize("op", OPS)
def test_support_is_a_reason(op: str) -> None:
    spec = registry.get(op)
    for case in forms(op):
        dtype = torch.bfloat16 if case.mixed else torch.float32
        inputs = spec.make_inputs(case, dtype, fastgpt._core.spec.Draw(0))
        assert supported(spec, "reference", inputs)
        for backend in backends(op):
            module: Any = registry.module(op, backend)
            reason = module.supports(*spec.prepare(**inputs))
            assert reason is None or (isinstance(reason, str) and reason)


def test_explain_names_every_backend_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    fastgpt.explain("softmax", X, dropout_p=0.5)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("softmax on cpu")
    assert [line.split()[0] for line in lines[1:]] == ["cpu", "torch", "reference", "triton", "cuda"]
    assert "chosen" in lines[1]
    assert "Philox" in lines[2]
    fastgpt.explain("softmax", X, backend=("torch",))
    printed = capsys.readouterr().out
    assert "asked for: torch" in printed
    assert printed.count("chosen") == 1


def test_backends_says_what_there_is() -> None:
    table = fastgpt.backends()
    assert list(table) == OPS
    for reasons in table.values():
        assert set(reasons) == set(fastgpt._core.spec.BACKENDS)
        assert reasons["reference"] is None


def test_unknown_names() -> None:
    for call in (lambda: ops.gelu(X, backend="cdpu"), lambda: fastgpt.use_backend("cdpu").__enter__()):
        with pytest.raises(ValueError, match=r"backend: expected one of cpu, .*reference, got 'cdpu'"):
            call()
    with pytest.raises(ValueError, match=r"op: expected one of .*layer_norm"):
        fastgpt.explain("layer_nrom", X)


def test_the_reference_is_never_taken_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setitem(registry._USABLE, ("gelu", "cpu"), registry._USABLE["gelu", "cpu"][-1:])
    with pytest.warns(RuntimeWarning, match="gelu runs on the slow reference path"):
        ops.gelu(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.gelu(X)  # once for an op and reason
        ops.gelu(X, backend="reference")  # asked for
    monkeypatch.setattr(dispatch, "STRICT", True)
    with pytest.raises(BackendError, match="FASTGPT_STRICT=1 forbids it"):
        ops.gelu(X)
    ops.gelu(X, backend="reference")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'gelu' is registered already"):
        registry.register(registry.get("gelu"))


ASK = """
import torch, fastgpt
from fastgpt import ops
from op_cases import recorded
try:
    with recorded() as calls:
        {call}
    print(calls[0][0])
except (fastgpt.BackendError, ValueError) as error:
    print(type(error).__name__, error)
"""


def run_with(call: str, **environment: str) -> str:
    """What a fresh Python prints that asks for the backend of a call."""
    path = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", ASK.format(call=call)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_environment_chooses() -> None:
    assert run_with("ops.gelu(torch.ones(3))", FASTGPT_BACKEND="torch") == "gelu_fwd_torch"
    dropout = "ops.softmax(torch.ones(3), dropout_p=0.5)"
    assert run_with(dropout, FASTGPT_BACKEND="torch, reference") == "softmax_fwd_reference"
    assert run_with(dropout, FASTGPT_BACKEND="torch").startswith(
        "BackendError softmax: the backend asked for"
    )


def test_an_unknown_name_in_the_environment_is_said() -> None:
    assert "expected one of cpu" in run_with("ops.gelu(torch.ones(3))", FASTGPT_BACKEND="cdpu")


def test_strict_in_the_environment() -> None:
    call = "ops.softmax(torch.ones(3, dtype=torch.float64), dropout_p=0.5)"
    assert run_with(call, FASTGPT_STRICT="1").startswith(
        "BackendError softmax runs on the slow reference path"
    )


# --- the guard: whatever is not a plain eager tensor goes through the registered op


class Subclass(torch.Tensor):
    pass


class Logging(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def never_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any direct call of a kernel from Python fails."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("a kernel was called past the dispatcher")

    for name in library._DIRECT:
        monkeypatch.setitem(library._DIRECT, name, refuse)


@pytest.mark.usefixtures("never_direct")
@pytest.mark.parametrize("op", OPS)
class TestTheGuard:
    """Each kind for every op, forward and backward, on the backend that comes first."""

    def inputs(self, op: str) -> dict[str, Any]:
        return registry.get(op).make_inputs(forms(op)[0], torch.float32, fastgpt._core.spec.Draw(0))

    def test_a_plain_call_is_direct(self, op: str) -> None:
        with pytest.raises(AssertionError, match="past the dispatcher"):
            registry.get(op).function(**self.inputs(op))

    def test_fake_tensors(self, op: str) -> None:
        spec, inputs = registry.get(op), self.inputs(op)
        expected = as_tuple(spec.reference(**inputs))[0].shape
        with FakeTensorMode() as mode:
            fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            name = spec.gradients[0]
            fakes[name].requires_grad_()
            y = as_tuple(spec.function(**fakes))[0]
            assert y.shape == expected
            (grad,) = torch.autograd.grad(y.sum(), fakes[name])
            assert grad.shape == inputs[name].shape

    def test_a_fake_tensor_outside_of_its_mode(self, op: str) -> None:
        inputs, mode = self.inputs(op), FakeTensorMode()
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        assert type(as_tuple(registry.get(op).function(**fakes))[0]).__name__ == "FakeTensor"

    def test_a_subclass(self, op: str) -> None:
        inputs = self.inputs(op)
        wrapped = {
            k: v.as_subclass(Subclass) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
        }
        registry.get(op).function(**wrapped)

    def test_a_dispatch_mode(self, op: str) -> None:
        with Logging() as log:
            registry.get(op).function(**self.inputs(op))
        first = registry.get(op).orders["cpu"]
        chosen = next(name for name in first if name in backends(op))
        assert f"fastgpt.{registry.get(op).stem}_fwd_{chosen}.default" in log.names

    def test_make_fx_tracing(self, op: str) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        inputs = self.inputs(op)
        name = registry.get(op).gradients[0]
        graph = make_fx(lambda t: registry.get(op).function(**{**inputs, name: t}))(inputs[name])
        assert f"fastgpt.{registry.get(op).stem}_fwd_" in graph.code

    @pytest.mark.parametrize("transform", ["vmap", "grad"])
    def test_functorch_is_refused_or_right(self, op: str, transform: str) -> None:
        """No raw pointer is taken: PyTorch either refuses (it says why) or gives the reference's result."""
        spec, inputs = registry.get(op), self.inputs(op)
        name = spec.gradients[0]

        def through(function: Any) -> Any:
            def run(t: torch.Tensor) -> torch.Tensor:
                return function(**{**inputs, name: t})

            if transform == "grad":
                return torch.func.grad(lambda t: run(t).square().sum())(inputs[name])
            return torch.func.vmap(run)(inputs[name].expand(2, *inputs[name].shape))

        got = None
        with contextlib.suppress(RuntimeError):  # an AssertionError of `never_direct` is none
            got = through(spec.function)
        if got is not None:
            torch.testing.assert_close(got, through(spec.reference))
