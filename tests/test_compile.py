"""The registered ops: opcheck, torch.compile without graph breaks, the backend's name in the graph, recompilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from op_cases import OPS, backends, form_ids, form_problem, forms_on, recorded, supported
from torch._dynamo.backends.common import aot_autograd

from fastgpt._core import registry
from fastgpt._core.dispatch import BackendError
from fastgpt._core.spec import Case
from fastgpt.testing.inputs import as_tuple, problem, results
from fastgpt.testing.memory import same_bits

ON = [(op, backend) for op in OPS for backend in backends(op)]
# Every form on the backend that comes first; the others with the first form of each op.
FORMS = form_ids()
COMPILED = [
    (op, case, backend)
    for op in OPS
    for i, case in enumerate(case for o, case in FORMS if o == op)
    for backend in (backends(op) if i == 0 else backends(op)[:1])
]
# What may change while widths stay as they are: rows, batch and lengths.
ROWS: dict[str, list[Any]] = {
    "attention": [
        lambda rows: Case((rows, 2, 8, 8, 16)),
        lambda rows: Case((2, 2, rows, 2 * rows, 16), {"causal": True, "return_lse": True, "window": 5}),
        lambda rows: Case(
            (2, 4, rows, rows, 16), {"kv_heads": 2, "lengths": True, "alibi": "h", "mask": "bool"}
        ),
    ],
    "attention_qkv": [lambda rows: Case((2, rows, 2, 16), {"causal": True, "softcap": 4.0, "dropout": 0.2})],
    "attention_varlen": [lambda rows: Case((2, 16, rows, 3, 2 * rows), {"causal": True, "slack": rows})],
    "embedding": [
        lambda rows: Case((rows, 24), {"padding": True}),
        lambda rows: Case((rows, 2 * rows, 24), {"positions": "each"}),
    ],
    "rope": [lambda rows: Case((rows, 3, 2 * rows, 16), {"k_heads": 2})],
    "softmax": [lambda rows: Case((rows, 24), {"scale": 0.5})],
}
ROW_FORMS = [(op, make) for op in OPS for make in ROWS.get(op, [lambda rows: Case((rows, 24))])]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("op", "backend"), ON)
def test_opcheck(op: str, backend: str) -> None:
    """Schema, fake, and tracing with dynamic shapes of every entry, on the arguments of real calls."""
    seen: set[tuple[Any, ...]] = set()
    for case in forms_on(op, backend):
        made = form_problem(op, case)
        if not supported(made.spec, backend, made.inputs):
            continue
        with recorded() as calls:
            results(
                made,
                lambda made=made, **k: made.spec.function(**k, backend=backend),
                made.inputs,
                made.output_grads,
            )
        stem = made.spec.stem
        assert {name for name, _ in calls} == {f"{stem}_{entry}_{backend}" for entry in made.spec.entries}
        for name, args in calls:
            kind = (name, *(a if isinstance(a, (bool, str)) else type(a) for a in args))
            if kind in seen:  # one call for every combination of absent tensors and flags
                continue
            seen.add(kind)
            detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            torch.library.opcheck(getattr(torch.ops.fastgpt, name).default, detached)


@pytest.mark.parametrize(
    ("op", "case", "backend"), COMPILED, ids=[f"{op}-{backend}-{case.name}" for op, case, backend in COMPILED]
)
def test_compiled_whole_with_the_bits_of_eager(op: str, case: Case, backend: str) -> None:
    """fullgraph, forward and backward; the graphs name the backend that was asked for."""
    made = form_problem(op, case)
    if not supported(made.spec, backend, made.inputs):
        with pytest.raises(BackendError, match=r"Philox|has no softcap"):  # refused in eager mode too
            made.spec.function(**made.inputs, backend=backend)
        return
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.print_readable(print_output=False))
        return make_boxed_func(module.forward)

    function = made.spec.function

    def call(**inputs: Any) -> Any:
        return function(**inputs, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    got = results(made, compiled, made.inputs, made.output_grads)
    expected = results(made, call, made.inputs, made.output_grads)
    for name, value in expected.items():
        assert same_bits(got[name], value), name
    for way in ("fwd", "bwd"):
        assert any(f"{made.spec.stem}_{way}_{backend}" in graph for graph in graphs)


@pytest.mark.parametrize(("op", "make"), ROW_FORMS, ids=[f"{op}-{make(9).name}" for op, make in ROW_FORMS])
def test_rows_do_not_recompile(op: str, make: Any) -> None:
    """After the one compilation with dynamic rows none, for two rows or more; forward and backward."""
    spec = registry.get(op)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.function, fullgraph=True, backend=counter)
    for rows in (2, 3, 5, 9, 64):
        made = problem(spec, make(rows), torch.float32)
        results(made, compiled, made.inputs, made.output_grads)
        if rows == 3:
            after_the_dynamic_one = counter.frame_count
    assert counter.frame_count == after_the_dynamic_one <= 2


@pytest.mark.parametrize("op", [op for op in OPS if op in ("layer_norm", "softmax")])
def test_inductor(op: str) -> None:
    """The compiler that users run, around ops of ours: the neighbours are fused, ours are called."""
    made = form_problem(op, next(case for o, case in FORMS if o == op), torch.float32)

    def call(**inputs: Any) -> Any:
        inputs["x"] = inputs["x"] * 2.0
        return as_tuple(made.spec.function(**inputs))[0].relu()

    grads = dict(list(made.output_grads.items())[:1])
    got = results(made, torch.compile(call, fullgraph=True), made.inputs, grads)
    expected = results(made, call, made.inputs, grads)
    torch.testing.assert_close(got, expected)
