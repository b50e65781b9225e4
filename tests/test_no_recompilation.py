"""A new batch size, number of rows or sequence length asks Triton for no new compilation.

Read off recorded launches with Triton's own specialisation code: within one dtype, width and set of options, every
kernel has one specialisation key however many rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
import torch
import wrong_kernels
from fastgpt_kernels.triton.launch import INTERPRETING, Launch, launch, recording

from benchmarks.offline_calls import Attention, Call, attention_call, case_call, record
from benchmarks.offline_compile import specialise
from fastgpt._core import registry
from fastgpt._core.spec import Case

pytestmark = pytest.mark.skipif(INTERPRETING, reason="needs Triton's compiler")

SIZES = (1, 2, 15, 16, 17, 64, 1000, 4096)
FEW = 16  # query tokens up to which attention decodes, with blocks that may depend on their number
ARCHS = ("sm_90", "gfx942")
AT_MOST = (
    2**29
)  # elements: for AMD, Triton compiles once more for tensors of 2 GiB, whose offsets need 64 bits

# (op, name, the cases whose kernels must be the same ones)
Family = tuple[str, Callable[[int], Iterable[tuple[int, ...]]], dict[str, object]]
_FAMILIES: tuple[Family, ...] = (
    *(
        (op, lambda size, n=n: [(size, n), (2, size, n)], options)
        for op, widths, forms in (
            ("layer_norm", (768, 1000, 50257), ({}, {"residual": True}, {"weight": False, "bias": False})),
            ("geglu", (3072, 1000), ({}, {"approximate": "tanh"})),
            ("swiglu", (3072, 1000), ({},)),
            ("cross_entropy", (1000, 50257), ({}, {"reduction": "none", "label_smoothing": 0.1})),
            ("gelu", (3072, 1000), ({}, {"bias": True}, {"approximate": "tanh", "bias": True})),
            ("embedding", (768, 1000), ({"positions": "all"}, {"positions": "each", "padding": True})),
            ("rms_norm", (768, 50257), ({}, {"residual": True})),
            ("softmax", (768, 1000, 50257), ({}, {"scale": 0.5})),
        )
        for n in widths
        for options in forms
    ),
    *(
        ("rope", lambda size, n=n: [(size, 12, 64, n), (2, 12, size, n)], options)
        for n in (64, 80)
        for options in ({}, {"layout": "BTHD", "interleaved": True, "tables": "each", "turning": "half"})
    ),
    *(
        ("softmax", lambda size, n=n: [(2, 12, size, n), (size, 3, 5, n), (3, size, 7, n)], options)
        for n in (128, 1000, 50257)
        for options in (
            {"causal": True},
            {"dropout": 0.1},
            *(
                {"mask": mask, "over": over}
                for mask in ("bool", "fp32")
                for over in ("bhqk", "b11k", "11qk", "1hq1")
            ),
            {"mask": "same", "over": "b11k", "causal": True, "dropout": 0.1},
        )
    ),
)
_ATTENTION: tuple[dict[str, object], ...] = (
    {},
    {"causal": True},
    {"mask": "padding", "causal": True},
    {"mask": "float"},
    {"mask": "float", "mask_gradient": True},
    {"causal": True, "alibi_slopes": True},
    {"causal": True, "window": (256, 0)},
    {"causal": True, "dropout_p": 0.1},
    {"causal": True, "kv_lengths": True, "kv_heads": 3},
    {"causal": True, "return_lse": True},
    {"causal": True, "packed": True},
    {"causal": True, "varlen": True},
)


def _families() -> list[object]:
    found = []
    for op, shapes, options in _FAMILIES:
        if not registry.is_written(op, "triton"):
            continue
        width = next(iter(shapes(1)))[-1]
        for dtype in ("bf16", "fp32"):
            # Where the inputs have one row, a mask that is broadcast over rows cannot be told from one that is not.
            calls = [
                case_call(registry.get(op), Case(shape, options), dtype)
                for size in SIZES
                if size > 1 or "mask" not in options
                for shape in shapes(size)
                if math.prod(shape) < AT_MOST
            ]
            name = "-".join([op, dtype, Case((width, len(shapes(1)[0])), options).name])
            found.append(pytest.param(calls, id=name))
    if not registry.is_written("attention", "triton"):
        return found
    for options in _ATTENTION:
        for width in (64, 80):
            sizes = [size for size in SIZES if size > 1 or "mask" not in options]
            many = [size for size in sizes if size > FEW]
            for queries in ([size] for size in sizes if size <= FEW):
                name = Case((width,), options).name + f"-{queries[0]}_queries"
                found.append(pytest.param(_attention_calls(options, width, queries, sizes), id=name))
            name = Case((width,), options).name + "-many_queries"
            found.append(pytest.param(_attention_calls(options, width, many, sizes), id=name))
    return found


def _attention_calls(
    options: Mapping[str, object], width: int, queries: Sequence[int], keys: Sequence[int]
) -> list[Call]:
    """Every batch size, and every length of keys with every one of queries, where they may differ."""
    return [
        attention_call(Attention((batch, 12, q, k, width), options), "bf16")
        for batch in (1, 3, 16)
        if batch > 1 or "mask" not in options
        for q in queries
        for k in ((q,) if "packed" in options else keys)
    ]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("calls", _families())
def test_rows_and_lengths_ask_for_no_compilation(calls: list[Call], arch: str) -> None:
    assert not _recompiled([(call.name, record(call, arch)) for call in calls], arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_that_specialises_on_its_rows_is_found_out(arch: str) -> None:
    assert not _recompiled(_launched(wrong_kernels.does_not_specialise, arch), arch)
    found = _recompiled(_launched(wrong_kernels.specialises, arch), arch)
    assert [line.split(":")[0] for line in found] == ["specialises"]
    assert "rows 2" in found[0]
    assert "rows 16" in found[0]


def _launched(kernel: object, arch: str) -> list[tuple[str, list[Launch]]]:
    found = []
    for rows in SIZES:
        x = torch.empty(rows, 768, device="meta")
        with recording(arch) as launches:
            launch(kernel, (rows,), x, x, rows, 768)
        found.append((f"rows {rows}", launches))
    return found


def _recompiled(recorded: list[tuple[str, list[Launch]]], arch: str) -> list[str]:
    """A line per kernel that has different keys in different calls, with the first call that has each."""
    kernels: dict[str, dict[frozenset[str], str]] = {}
    for name, launches in recorded:
        keys: dict[str, set[str]] = {}
        for one in launches:
            keys.setdefault(one.kernel.fn.__name__, set()).add(specialise(one, arch).key)
        for kernel, found in keys.items():
            kernels.setdefault(kernel, {}).setdefault(frozenset(found), name)
    assert kernels, "nothing was launched"
    return [
        f"{kernel}: {'; '.join(f'{name} has {sorted(keys)}' for keys, name in variants.items())}"
        for kernel, variants in kernels.items()
        if len(variants) > 1
    ]
