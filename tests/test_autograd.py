"""What autograd asks of every op: partial gradients, checkpointing, double backward, autocast, no-grad."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from op_cases import OPS, backends, form_ids, form_problem, forms_on, one_dtype, supported
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.testing.inputs import as_tuple, problem, results
from fastgpt.testing.memory import same_bits

FORMS = form_ids()
FP64_FORMS = [(op, case) for op, case in FORMS if one_dtype(case)]
FORM_IDS = [f"{op}-{case.name}" for op, case in FORMS]
ON = [(op, backend) for op in OPS for backend in backends(op)]


def small_problem(op: str, case: Case, dtype: torch.dtype) -> Any:
    """The form in a handful of elements, for gradcheck."""
    limits = {2: (3, 5), 3: (2, 3, 4), 4: (2, 2, 3, 4), 5: (1, 2, 3, 4, 3)}[len(case.shape)]
    shape = tuple(min(size, limit) for size, limit in zip(case.shape, limits, strict=True))
    options = {**case.options, "mean": 0.0}
    options.pop("padding", None)  # a row that has no gradient, though the output depends on it
    if "kv_heads" in options:
        shape = (4, *shape[1:]) if op == "attention_varlen" else (1, 4, 3, 4, 3)
    if (
        "keys" in options
    ):  # of each document: no query without a key, whose lse of -inf has no finite difference
        options["keys"] = "4_3_5"
    return problem(registry.get(op), Case(shape, options, case.mixed), dtype)


def split(made: Any) -> tuple[list[Tensor], Any]:
    """(leaves that require grad, function of the leaves for a given implementation)."""
    leaves = [made.inputs[name].detach().clone().requires_grad_() for name in made.leaves]

    def bind(function: Any, **options: Any) -> Any:
        def run(*values: Tensor) -> Any:
            return function(**{**made.inputs, **dict(zip(made.leaves, values, strict=True))}, **options)

        return run

    return leaves, bind


@pytest.mark.parametrize(("op", "case"), FP64_FORMS, ids=[f"{op}-{case.name}" for op, case in FP64_FORMS])
def test_gradcheck_of_the_reference(op: str, case: Case) -> None:
    made = small_problem(op, case, torch.float64)
    leaves, bind = split(made)
    assert torch.autograd.gradcheck(bind(made.spec.reference), leaves, fast_mode=True)


@pytest.mark.parametrize(("op", "case"), FP64_FORMS, ids=[f"{op}-{case.name}" for op, case in FP64_FORMS])
def test_double_backward_is_right_or_refused(op: str, case: Case) -> None:
    """In fp64 on the torch backend, or the reference: second derivatives against finite differences."""
    made = small_problem(op, case, torch.float64)
    leaves, bind = split(made)
    backend = "torch" if supported(made.spec, "torch", made.inputs) else "reference"
    if "dropout" in case.options and op == "softmax":
        out = bind(made.spec.function, backend=backend)(*leaves)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return
    assert torch.autograd.gradgradcheck(bind(made.spec.function, backend=backend), leaves, fast_mode=True)


@pytest.mark.parametrize(("op", "backend"), ON)
def test_double_backward_on_every_backend(op: str, backend: str) -> None:
    """The same second derivatives as the reference's, in fp32."""
    made = form_problem(op, next(case for o, case in FORMS if o == op), torch.float32)
    found = []
    for function, options in ((made.spec.function, {"backend": backend}), (made.spec.reference, {})):
        leaves, bind = split(made)
        outputs = as_tuple(bind(function, **options)(*leaves))
        # Of the incoming gradients too: all that the gradient of a linear op depends on.
        incoming = [dy.clone().requires_grad_() for dy in made.output_grads.values()]
        first = torch.autograd.grad(outputs, leaves, incoming, create_graph=True)
        norm = sum((grad.float().square().sum() for grad in first), torch.zeros(()))
        found.append(torch.autograd.grad(norm, [*leaves, *incoming], allow_unused=True))
    for got, expected in zip(*found, strict=True):
        if expected is None:
            assert got is None or not bool(got.any())
        else:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("op", OPS)
def test_double_backward_of_inputs_made_of_one_another(op: str) -> None:
    """As where a weight is tied to another layer's: what an input was made of is not for the op to go back to."""
    made = form_problem(op, next(case for o, case in FORMS if o == op), torch.float32)
    found = []
    for function in (made.spec.function, made.spec.reference):
        leaves, bind = split(made)
        values = list[Tensor]()
        for leaf in leaves:
            values.append(leaf * (1.0 + (values[-1] if values else leaf).square().mean()))
        outputs = as_tuple(bind(function)(*values))
        first = torch.autograd.grad(outputs, leaves, list(made.output_grads.values()), create_graph=True)
        norm = sum((grad.float().square().sum() for grad in first), torch.zeros(()))
        found.append([*first, *torch.autograd.grad(norm, leaves, allow_unused=True)])
    for got, expected in zip(*found, strict=True):
        if expected is None:
            assert got is None or not bool(got.any())
        else:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("op", "backend"), ON)
def test_partial_gradients_have_the_same_bits(op: str, backend: str) -> None:
    """Only some inputs require grad: each alone gives what it gives among all."""
    for case in forms_on(op, backend):
        made = form_problem(op, case)
        if not supported(made.spec, backend, made.inputs):
            continue
        run = functools.partial(made.spec.function, backend=backend)
        whole = results(made, run, made.inputs, made.output_grads)
        for name in made.leaves:
            leaf = made.inputs[name].detach().clone().requires_grad_()
            outputs = as_tuple(run(**{**made.inputs, name: leaf}))
            depends = [
                (y, dy) for y, dy in zip(outputs, made.output_grads.values(), strict=True) if y.requires_grad
            ]
            (grad,) = torch.autograd.grad([y for y, _ in depends], leaf, [dy for _, dy in depends])
            assert grad.dtype == leaf.dtype
            if backend == "cpu":
                assert same_bits(grad, whole[f"d{name}"]), f"{case.name} {name}"
            assert made.compare({**whole, f"d{name}": grad})[f"d{name}"].ok, f"{case.name} {name}"


@pytest.mark.parametrize("op", OPS)
def test_one_output_of_two(op: str) -> None:
    """With several outputs, a loss that uses only one of them."""
    for o, case in FORMS:
        if o != op:
            continue
        made = form_problem(op, case)
        if len(made.output_grads) == 1:
            continue
        for i, dy in enumerate(made.output_grads.values()):
            leaves, bind = split(made)
            got = torch.autograd.grad(bind(made.spec.function)(*leaves)[i], leaves, dy, allow_unused=True)
            leaves, bind = split(made)
            expected = torch.autograd.grad(
                bind(made.spec.reference)(*leaves)[i], leaves, dy, allow_unused=True
            )
            for leaf, *grads in zip(leaves, got, expected, strict=True):
                g, e = (torch.zeros_like(leaf) if grad is None else grad for grad in grads)
                torch.testing.assert_close(g.float(), e.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize(("op", "backend"), ON)
def test_activation_checkpointing_has_the_same_bits(op: str, backend: str, use_reentrant: bool) -> None:
    for case in forms_on(op, backend):
        made = form_problem(op, case)
        if not supported(made.spec, backend, made.inputs):
            continue
        leaves, bind = split(made)
        run = bind(made.spec.function, backend=backend)
        grads = list(made.output_grads.values())
        plain = torch.autograd.grad(as_tuple(run(*leaves)), leaves, grads)
        outputs = as_tuple(checkpoint(run, *leaves, use_reentrant=use_reentrant))
        torch.autograd.backward(outputs, grads)
        for leaf, expected in zip(leaves, plain, strict=True):
            assert leaf.grad is not None
            assert same_bits(leaf.grad, expected), case.name


@pytest.mark.parametrize(("op", "backend"), ON)
def test_without_gradients_nothing_is_saved(op: str, backend: str) -> None:
    made = form_problem(op, next(case for o, case in FORMS if o == op), torch.float32)
    saved: list[Tensor] = []
    leaves, bind = split(made)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert not any(
                y.requires_grad for y in as_tuple(bind(made.spec.function, backend=backend)(*leaves))
            )
        assert not saved
        plain = bind(made.spec.function, backend=backend)(*(leaf.detach() for leaf in leaves))
        assert all(y.grad_fn is None for y in as_tuple(plain))
        assert not saved
        bind(made.spec.function, backend=backend)(*leaves)
        assert saved


@pytest.mark.parametrize("op", OPS)
def test_the_same_tensor_twice(op: str) -> None:
    """Wherever two inputs have one shape, one tensor may stand for both; its gradient is the sum."""
    for o, case in FORMS:
        made = form_problem(op, case) if o == op else None
        if made is None:
            continue
        first, *rest = made.leaves
        twins = [n for n in rest if made.inputs[n].shape == made.inputs[first].shape]
        twins = [n for n in twins if made.inputs[n].dtype == made.inputs[first].dtype]
        if not twins:
            continue
        leaf = made.inputs[first].detach().clone().requires_grad_()
        shared = {**made.inputs, first: leaf, **dict.fromkeys(twins, leaf)}
        (got,) = torch.autograd.grad(
            as_tuple(made.spec.function(**shared)), leaf, list(made.output_grads.values())
        )
        apart = {name: leaf.detach().clone().requires_grad_() for name in (first, *twins)}
        outputs = as_tuple(made.spec.function(**{**made.inputs, **apart}))
        parts = torch.autograd.grad(outputs, list(apart.values()), list(made.output_grads.values()))
        torch.testing.assert_close(got, sum(parts[1:], parts[0]))


@pytest.mark.parametrize("op", OPS)
def test_autocast_gives_the_dtype_that_pytorch_gives(op: str) -> None:
    """On the CPU: norms, GELU and softmax follow their input, attention goes to bf16."""
    made = form_problem(op, next(case for o, case in FORMS if o == op), torch.float32)
    leaves, bind = split(made)
    with torch.autocast("cpu", torch.bfloat16):
        expected = as_tuple(made.spec.baseline(**made.inputs))
        got = as_tuple(bind(made.spec.function)(*leaves))
    assert [y.dtype for y in got] == [y.dtype for y in expected]
    grads = torch.autograd.grad(got, leaves, [torch.ones_like(y) for y in got])
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("op", OPS)
def test_gradients_accumulate(op: str) -> None:
    """Two backwards into .grad: twice the gradient, and the first is not overwritten."""
    made = form_problem(op, next(case for o, case in FORMS if o == op), torch.float32)
    leaves, bind = split(made)
    outputs = as_tuple(bind(made.spec.function)(*leaves))
    grads = list(made.output_grads.values())
    torch.autograd.backward(outputs, grads, retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    torch.autograd.backward(outputs, grads)
    for leaf, expected in zip(leaves, once, strict=True):
        assert leaf.grad is not None
        assert same_bits(leaf.grad, 2 * expected)


def test_autocast_takes_a_mask_that_had_the_dtype_of_q() -> None:
    """q, k and v become bf16; a mask in their former dtype is added all the same, and has its gradient in it."""
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float16) for _ in range(3))
    mask = torch.randn(5, 5, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(q, k, v, mask=mask)
    (dmask,) = torch.autograd.grad(out.float().square().sum(), mask)
    assert (out.dtype, dmask.dtype) == (torch.bfloat16, torch.float16)
    expected = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask=mask.float())
    assert torch.equal(out, expected)
    with pytest.raises(TypeError, match="mask"):  # without autocast nothing is changed silently
        ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask=mask)
