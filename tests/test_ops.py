"""Every op, backend, dtype and case of the registry against the exact reference: ids like layer_norm-cpu-bf16-7x1600.

`check` looks at far more than the error: poison, guard bytes, aliases, layouts, repetition, leaks (`HAZARDS`).
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import (
    DEVICE,
    OPS,
    Variant,
    backends,
    check,
    forms,
    matrix,
    one_dtype,
    problem,
    recorded,
    supported,
    variants,
)

from fastgpt._core import registry
from fastgpt._core.dispatch import BackendError
from fastgpt._core.spec import Case, OpSpec
from fastgpt.testing.inputs import as_tuple, results
from fastgpt.testing.memory import same_bits

ALL = list(matrix())
MATRIX = [row for row in ALL if not row[2].left_out(*row[3:])]
# For `make test-all`: what is not in `MATRIX`, and what is, but not with every hazard.
REST = [row for row in ALL if row[2].left_out(*row[3:]) or not (row[2].thorough or row[2].emulated)]
PLAIN = [(op, variant) for op in OPS for variant in variants(op)]
# Left to PyTorch's own ways: gelu(inf), which is NaN (so in geglu, linear and mlp), and attention, whose flash kernel
# may lose a NaN.
PROPAGATING = [
    row
    for row in PLAIN
    if row[1].backend != "torch"
    or registry.get(row[0]).stem not in ("geglu", "gelu", "linear", "mlp", "attention")
]
# With these a NaN in v may or may not pass through a probability of 0: tiles that nobody sees are skipped.
HIDING = ("causal", "window", "lengths")
PLAIN_IDS = [f"{op}-{variant.name}" for op, variant in PLAIN]


@pytest.mark.parametrize(
    ("spec", "variant", "dtype", "case"), [row[1:] for row in MATRIX], ids=[row[0] for row in MATRIX]
)
def test_case(spec: OpSpec, variant: Variant, dtype: torch.dtype, case: Case) -> None:
    prove(spec, variant, dtype, case, thorough=variant.thorough)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "variant", "dtype", "case"), [row[1:] for row in REST], ids=[row[0] for row in REST]
)
def test_case_too(spec: OpSpec, variant: Variant, dtype: torch.dtype, case: Case) -> None:
    """What `test_case` leaves out, and what it proves with hazards that take turns, with all of them."""
    prove(spec, variant, dtype, case, thorough=not variant.emulated)


def prove(spec: OpSpec, variant: Variant, dtype: torch.dtype, case: Case, *, thorough: bool) -> None:
    variant.enter()
    report = check(spec.name, backend=variant.backend, dtypes=[dtype], cases=[case], thorough=thorough)
    if report.skipped:  # a refusal is part of the contract: stated, and only these two
        assert variant.backend == "torch", report
        reason = "not Philox" if "dropout" in case.options else "has no softcap"
        assert {"dropout", "softcap"} & set(case.options), report
        assert reason in report.skipped[0][2]
        return
    if not report.ok:
        pytest.fail(str(report), pytrace=False)


@pytest.mark.parametrize("op", OPS)
def test_fp64_takes_torch_or_reference(op: str) -> None:
    spec = registry.get(op)
    for case in forms(op):
        if not one_dtype(case):
            continue
        made = problem(spec, case, torch.float64)
        if "cpu" in backends(op):
            with pytest.raises(BackendError, match="float64"):
                spec.function(**made.inputs, backend="cpu")
        for backend in ("torch", "reference"):
            if supported(spec, backend, made.inputs):
                got = results(made, _on(spec, backend), made.inputs, made.output_grads)
                torch.testing.assert_close(got, made.exact, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(("op", "variant"), PLAIN, ids=PLAIN_IDS)
def test_the_backend_asked_for_is_the_one_that_runs(op: str, variant: Variant) -> None:
    spec = registry.get(op)
    made = problem(spec, forms(op)[0], torch.float32)
    with recorded() as calls:
        results(made, _on(spec, variant.backend), made.inputs, made.output_grads)
    assert [name for name, _ in calls] == [f"{spec.stem}_{way}_{variant.backend}" for way in ("fwd", "bwd")]


def test_the_simd_level_asked_for_is_the_one_that_runs() -> None:
    """Levels differ in the last bits of exp: were the switch without effect, they would not."""
    x = torch.linspace(-3, 3, 4000).reshape(2, 2000)
    seen = set()
    for variant in variants("softmax"):
        if variant.backend == "cpu":
            variant.enter()
            seen.add(fastgpt_softmax(x).numpy().tobytes())
    assert len(seen) >= min(2, sum(variant.backend == "cpu" for variant in variants("softmax")))


def fastgpt_softmax(x: torch.Tensor) -> torch.Tensor:
    return registry.get("softmax").function(x, backend="cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize(("op", "variant"), PROPAGATING, ids=[f"{op}-{v.name}" for op, v in PROPAGATING])
def test_nan_and_infinity_propagate(op: str, variant: Variant, value: float) -> None:
    """One element of each input in turn. Outputs as in the reference, to the element and the sign of infinity.

    Gradients may say NaN for infinity, and in the whole row: what is hidden there is not known in backward. Those of
    attention, from its lse, may lack a NaN where infinity makes p = exp(-inf - inf) a 0, or dropout takes p away.
    """
    variant.enter()
    spec, cases = registry.get(op), forms(op)
    if variant.emulated:  # slow: the forms share the three values
        cases = cases[0 if math.isnan(value) else 1 if value > 0 else 2 :: 3]
    for case in cases:
        dtype = torch.bfloat16 if case.mixed else torch.float32
        made = problem(spec, case, dtype)
        if not supported(spec, variant.backend, made.inputs):
            continue
        if spec.stem == "attention" and (
            set(HIDING) & set(case.options) or case.options.get("mask") == "bool"
        ):
            continue
        may_lack = spec.stem == "attention" and (math.isinf(value) or "dropout" in case.options)
        for leaf in made.leaves:
            poisoned = made.inputs[leaf].clone(memory_format=torch.contiguous_format)
            if poisoned.numel() == 0:
                continue
            poisoned.view(-1)[poisoned.numel() // 2] = value
            inputs = {**made.inputs, leaf: poisoned}
            expected = results(made, spec.reference, inputs, made.output_grads)
            got = results(made, _on(spec, variant.backend), inputs, made.output_grads)
            for name, reference in expected.items():
                place = f"{case.name} {leaf} -> {name}"
                if name in made.output_grads:
                    assert torch.equal(got[name].isnan(), reference.isnan()), place
                    infinite = reference.isinf()
                    assert torch.equal(got[name][infinite], reference[infinite]), place
                else:
                    lost, expected_lost = ~got[name].isfinite(), ~reference.isfinite()
                    assert may_lack or bool(lost[expected_lost].all()), place
                    assert not bool(lost[~expected_lost.any(-1, keepdim=True).expand(lost.shape)].any()), (
                        place
                    )


@pytest.mark.parametrize(("op", "variant"), PLAIN, ids=PLAIN_IDS)
def test_an_incoming_gradient_of_nan_stays_in_its_row(op: str, variant: Variant) -> None:
    variant.enter()
    spec = registry.get(op)
    made = problem(spec, forms(op)[0], torch.float32)
    grads = {name: dy.clone() for name, dy in made.output_grads.items()}
    for dy in grads.values():
        dy[0].fill_(torch.nan)
    got = results(made, _on(spec, variant.backend), made.inputs, grads)
    expected = results(made, spec.reference, made.inputs, grads)
    for name in expected:
        assert torch.equal(got[name].isnan(), expected[name].isnan()), name


def _shapes(op: str) -> st.SearchStrategy[Case]:
    size = st.integers(0, 70)
    if registry.get(op).stem == "attention":
        return _attention_shapes(op)
    shape = st.one_of(
        st.tuples(size, size), st.tuples(st.integers(0, 4), st.integers(1, 5), size), st.tuples(size)
    )
    options: st.SearchStrategy[dict[str, Any]]
    if op == "layer_norm":
        options = st.fixed_dictionaries(
            {"weight": st.booleans(), "bias": st.booleans(), "residual": st.booleans()}
        )
    elif op == "embedding":
        shape = st.one_of(st.tuples(size, size), st.tuples(st.integers(0, 4), st.integers(0, 9), size))
        options = st.fixed_dictionaries(
            {"vocab": st.integers(6, 40)},
            optional={"positions": st.sampled_from(["all", "each", "row"]), "padding": st.just(True)},
        )
    elif op == "rope":
        few = st.integers(0, 3)
        shape = st.tuples(few, few, st.integers(0, 9), size)
        options = st.fixed_dictionaries(
            {"interleaved": st.booleans(), "k_heads": few},
            optional={
                "layout": st.just("BTHD"),
                "turning": st.just("half"),
                "tables": st.just("each"),
                "tables_dtype": st.just("same"),
            },
        )
    elif op == "geglu":
        options = st.fixed_dictionaries({"approximate": st.sampled_from(["none", "tanh"])})
    elif op == "gelu":
        options = st.fixed_dictionaries(
            {"bias": st.booleans(), "approximate": st.sampled_from(["none", "tanh"])}
        )
    elif op == "rms_norm":
        options = st.fixed_dictionaries({"weight": st.booleans(), "residual": st.booleans()})
    elif op == "cross_entropy":
        options = st.fixed_dictionaries(
            {"reduction": st.sampled_from(["none", "mean", "sum"]), "ignored": st.sampled_from([0.0, 0.4])},
            optional={"label_smoothing": st.just(0.2), "ignore_index": st.just(1), "masked": st.just(True)},
        )
    elif op == "softmax":
        shape = st.one_of(st.tuples(size, size), st.tuples(st.integers(0, 4), st.integers(1, 5), size))
        options = st.fixed_dictionaries(
            {"causal": st.booleans(), "scale": st.sampled_from([1.0, -0.5])},
            optional={"mask": st.sampled_from(["bool", "same", "fp32"]), "dropout": st.just(0.25)},
        )
    else:
        options = st.just({})  # an op without a line of its own here still gets its shapes
    return st.builds(Case, shape, options)


def _attention_shapes(op: str) -> st.SearchStrategy[Case]:
    length, width = st.integers(0, 20), st.integers(1, 17)
    batch, heads = st.integers(0, 2), st.sampled_from([1, 2, 4])
    options: dict[str, Any] = {
        "causal": st.booleans(),
        "scale": st.sampled_from([0.4, -0.5]),
        "mask": st.sampled_from(["bool", "same", "fp32"]),
        "over": st.text("1", min_size=4, max_size=4) | st.sampled_from(["bhqk", "b11k", "1hq1", "11qk"]),
        "alibi": st.sampled_from(["h", "bh"]),
        "window": st.sampled_from(["3", "0_0", "2_x", "x_1", "5_4"]),
        "softcap": st.just(3.0),
        "lengths": st.just(True),
        "dropout": st.just(0.25),
        "return_lse": st.just(True),
    }
    if op == "attention_qkv":
        return st.builds(
            lambda b, t, h, d, o: Case((b, t, h, d), o),
            batch, length, heads, width, st.fixed_dictionaries({}, optional=options),
        )  # fmt: skip
    options["kv_heads"] = st.just(1)
    if op == "attention":
        options["v_width"] = width
        return st.builds(
            lambda b, h, q, k, d, o: Case((b, h, q, k, d), o),
            batch, heads, length, length, width, st.fixed_dictionaries({}, optional=options),
        )  # fmt: skip

    def packed(h: int, d: int, lengths: list[tuple[int, int]], other_keys: bool, o: dict[str, Any]) -> Case:
        keys = {"keys": "_".join(str(k) for _, k in lengths)} if other_keys else {}
        return Case((h, d, *(q for q, _ in lengths)), {**o, **keys})

    options["slack"] = st.integers(1, 3)
    lengths = st.lists(st.tuples(length, length), min_size=1, max_size=4)
    return st.builds(
        packed, heads, width, lengths, st.booleans(), st.fixed_dictionaries({}, optional=options)
    )


@pytest.mark.parametrize("op", OPS)
def test_any_shape(op: str) -> None:
    """Odd widths, sizes of zero and one, on the first backend in order."""
    spec = registry.get(op)

    @settings(
        max_examples=25 if DEVICE == "cpu" else 8,  # a GPU's kernels are compiled for each
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_shapes(op), st.sampled_from(["fp32", "bf16", "fp16"]))
    def run(case: Case, dtype: str) -> None:
        report = check(op, backend=spec.orders[DEVICE], dtypes=[dtype], cases=[case])
        assert not report.failures, report

    run()


# What has rows and columns, and attention, on what runs at speed: not the definitions, not an emulator.
HUGE = [
    (op, variant.backend)
    for op in OPS
    for variant in variants(op)
    if variant.level is None and not variant.emulated and variant.backend not in ("torch", "reference")
    if op not in ("attention_qkv", "attention_varlen")  # the kernels and offsets of attention
    if op not in ("cross_entropy", "embedding", "rope")  # their tests stand in tests/ops
]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "backend"), HUGE, ids=[f"{op}-{backend}" for op, backend in HUGE])
def test_more_than_2_to_the_31_elements(op: str, backend: str) -> None:
    """Offsets are 64 bits wide: the end of huge tensors is as it is alone, forward and backward."""
    names, shape = (
        (("q", "k", "v"), (2**20 + 8, 2, 16, 64))
        if op == "attention"
        else (("gate", "up") if op in ("geglu", "swiglu") else ("x",), (2**21 + 8, 1024))
    )
    needed = (
        2 * math.prod(shape) * (5 if op != "attention" else 9)
    )  # inputs, output and the gradients of both
    if _free_bytes() < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory")
    function = _on(registry.get(op), backend)

    def huge(end: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(shape, dtype=end.dtype, device=DEVICE)
        whole[-8:] = end
        return whole

    def run(inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.requires_grad_() for x in inputs]
        y = as_tuple(function(**dict(zip(names, leaves, strict=True))))[0]
        found = [y, *torch.autograd.grad(y, leaves, dy)]
        return [value[-8:].detach().clone() for value in found]

    ends = [torch.randn(8, *shape[1:], dtype=torch.bfloat16, device=DEVICE) for _ in names]
    dy = torch.randn_like(ends[0])
    alone = run([end.clone() for end in ends], dy)
    for got, expected in zip(run([huge(end) for end in ends], huge(dy)), alone, strict=True):
        assert bool(expected.any())
        assert same_bits(got, expected)


def _free_bytes() -> int:
    if DEVICE == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _on(spec: OpSpec, backend: str) -> Any:
    def run(**inputs: Any) -> Any:
        return spec.function(**inputs, backend=backend)

    return run
