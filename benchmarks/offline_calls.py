"""Which calls are compiled offline: the bench cases of every op with a Triton module, and GPT-2's shapes and options.

A call goes through the public function and its autograd Function on meta tensors, with the op's Triton launchers in
the place of the reference's, so that every launch is recorded as a model would make it. Registration of the Triton
backend is not needed: it is refused on a machine without a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from fastgpt_kernels.triton.launch import Launch, recording
from torch import Tensor

from fastgpt import ops as public
from fastgpt._core import library, registry
from fastgpt._core.spec import Case, Draw, OpSpec
from fastgpt.testing.inputs import DTYPES, as_tuple

META = torch.device("meta")
DTYPE_NAMES = ("bf16", "fp16", "fp32")


class MetaDraw(Draw):
    """Shapes and dtypes without values or memory."""

    def __init__(self) -> None:
        super().__init__(0, META)

    def normal(
        self, shape: Sequence[int], dtype: torch.dtype, *, mean: float = 0.0, std: float = 1.0
    ) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=META)

    def bernoulli(self, shape: Sequence[int], probability: float) -> Tensor:
        return torch.empty(tuple(shape), dtype=torch.bool, device=META)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        return torch.empty(tuple(shape), dtype=torch.int64, device=META)


@dataclass(frozen=True)
class Call:
    """function(**inputs) and its backward. quick: one of the few that every run of CI compiles.

    gradients: the inputs, of those that float, that want one.
    """

    op: str
    name: str
    function: Callable[..., Any]
    inputs: Callable[[], dict[str, Any]]
    gradients: tuple[str, ...]
    quick: bool = False


@dataclass(frozen=True)
class Attention:
    """One call of the attention family. shape: (B, H, Tq, Tk, D); options: of the public functions, and our own."""

    shape: tuple[int, int, int, int, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("bf16",)
    quick: bool = False


# ---- the data -------------------------------------------------------------------------------------------------

# GPT-2's four, the memory suite's, and one that is a multiple of 8 alone.
_WIDTHS = (256, 768, 1000, 1024, 1280, 1600, 4096, 8192, 16384, 50257, 131072)
_ROW_CASES: Mapping[str, tuple[Case, ...]] = {
    "layer_norm": (
        *(Case((8192, n)) for n in _WIDTHS),
        *(Case((8192, n), {"residual": True}) for n in (768, 1600, 8192, 50257)),
        Case((8192, 768), {"weight": False, "bias": False}),
        Case((8192, 768), {"bias": False}),
        Case((8192, 768), {"parameters": "fp32", "stream": "fp32"}, mixed=True),
        Case((8192, 1600), {"parameters": "fp32"}, mixed=True),
        Case((8192, 1600), {"stream": "fp32"}, mixed=True),
        Case((8192, 8192), {"parameters": "fp32", "stream": "fp32"}, mixed=True),
    ),
    "geglu": tuple(
        Case((8192, n), {"approximate": approximate}) for n in (768, 3072) for approximate in ("none", "tanh")
    ),
    "swiglu": (Case((8192, 768)), Case((8192, 3072))),
    "rope": (
        Case((2, 12, 1024, 80), {"turning": "half", "interleaved": True}),
        Case((2, 12, 1024, 256)),
    ),
    "cross_entropy": (Case((8192, 131072), {"label_smoothing": 0.1, "reduction": "none"}),),
    "gelu": tuple(
        Case((8192, n), {"approximate": approximate, **bias})
        for n in (3072, 6400, 50257)
        for approximate in ("none", "tanh")
        for bias in ({}, {"bias": True})
    ),
    "rms_norm": (
        Case((8192, 50257)),
        Case((8192, 4096), {"stream": "fp32", "parameters": "fp32"}, mixed=True),
    ),
    "softmax": (
        *(Case((4096, n)) for n in _WIDTHS),
        *(Case((2, 12, n, n), {"causal": True, "scale": 0.125}) for n in (128, 1024, 4096, 16384)),
        *(
            Case((2, 12, 1024, 1024), {"mask": mask, "over": over})
            for mask in ("bool", "same", "fp32")
            for over in ("b11k", "11qk", "bhqk")
        ),
        Case((2, 12, 1024, 1024), {"mask": "bool", "over": "b11k", "causal": True}),
        *(Case((2, 12, n, n), {"causal": True, "dropout": 0.1}) for n in (1000, 1024, 4096, 16384)),
        Case((2, 12, 64, 50257), {"mask": "fp32", "over": "b11k", "dropout": 0.1}),
    ),
}
_QUICK_ROWS = {
    "linear": (Case((2048, 768), {"n": 3072, "bias": True, "activation": "gelu_tanh"}),),
    "linear_cross_entropy": (Case((2048, 768), {"n": 50257}),),
    "mlp": (Case((2048, 768), {"m": 3072, "n": 768, "bias": True}),),
    "layer_norm": (Case((8192, 768)), Case((8192, 8192), {"residual": True})),
    "geglu": (Case((8192, 3072), {"approximate": "tanh"}),),
    "swiglu": (Case((8192, 3072)),),
    "cross_entropy": (Case((2048, 50257)),),
    "gelu": (Case((8192, 3072), {"approximate": "tanh", "bias": True}), Case((8192, 3072))),
    "embedding": (Case((8, 1024, 768), {"positions": "all", "vocab": 50257}),),
    "rms_norm": (Case((8192, 768)),),
    "rope": (Case((8, 12, 1024, 64), {"layout": "BTHD"}),),
    "softmax": (Case((2, 12, 1024, 1024), {"causal": True, "dropout": 0.1}), Case((4096, 50257))),
}

_ALL = DTYPE_NAMES
_ATTENTION: tuple[Attention, ...] = (
    *(
        Attention((8, 12, 1024, 1024, width), {"causal": causal}, _ALL, quick=causal and width in (64, 128))
        for width in (64, 80, 128, 256)
        for causal in (True, False)
    ),
    *(
        Attention((8, 12, 1024, 1024, width), options)
        for width in (64, 128)
        for options in (
            {"causal": True, "mask": "padding"},
            {"mask": "float"},
            {"mask": "float", "mask_gradient": True},
            {"causal": True, "alibi_slopes": True},
            {"causal": True, "window": (256, 0)},
            {"causal": True, "softcap": 30.0},
            {"causal": True, "dropout_p": 0.1},
            {"causal": True, "kv_lengths": True},
            {"causal": True, "kv_heads": 3},
            {"causal": True, "return_lse": True},
            {"causal": True, "packed": True},
            {"causal": True, "varlen": True},
        )
    ),
    *(  # several options at once, where registers are shortest
        Attention((8, 12, 1024, 1024, width), options)
        for width in (64, 128, 256)
        for options in (
            {"causal": True, "mask": "padding", "window": (256, 0), "dropout_p": 0.1, "kv_heads": 3},
            {"causal": True, "alibi_slopes": True, "softcap": 30.0, "varlen": True},
        )
    ),
    *(  # decode
        Attention(
            (8, 12, queries, 4096, width),
            {"causal": True, "kv_heads": heads, "kv_lengths": True, "backward": False},
            quick=(queries, heads, width) == (1, 3, 128),
        )
        for width in (64, 128)
        for queries, heads in ((1, 12), (1, 3), (16, 3))
    ),
)

# ---- what is made of it ---------------------------------------------------------------------------------------


def triton_module(op: str) -> ModuleType:
    """The Triton launchers of an op, whether or not they can run here."""
    return importlib.import_module(f"fastgpt_kernels.triton.{registry.get(op).stem}")


def calls(ops: Sequence[str] = (), *, quick: bool = False) -> list[Call]:
    """The calls of these ops, or of all that have a Triton module."""
    found: list[Call] = []
    for spec in registry.ops():
        if (ops and not {spec.name, spec.stem} & set(ops)) or not registry.is_written(spec.name, "triton"):
            continue
        found += [
            case_call(spec, case, dtype)
            for case in (*spec.bench_cases, *_ROW_CASES.get(spec.name, ()))
            for dtype in DTYPE_NAMES
            if not (case.mixed and dtype == "fp32")
        ]
        found += [case_call(spec, case, "bf16", quick=True) for case in _QUICK_ROWS.get(spec.name, ())]
        if spec.name == "attention":
            found += [attention_call(one, dtype) for one in _ATTENTION for dtype in one.dtypes]
    return [call for call in found if call.quick or not quick]


def case_call(spec: OpSpec, case: Case, dtype: str, *, quick: bool = False) -> Call:
    return Call(
        spec.name,
        f"{spec.name} {dtype} {case.name}",
        spec.function,
        lambda: spec.make_inputs(case, DTYPES[dtype], MetaDraw()),
        spec.gradients,
        quick,
    )


def attention_call(one: Attention, dtype_name: str) -> Call:
    """attention, attention_qkv (option packed) or attention_varlen (option varlen) on meta tensors."""
    batch, heads, queries, keys, width = one.shape
    options, dtype = dict(one.options), DTYPES[dtype_name]
    name = Case(one.shape, options).name
    kv_heads, mask_kind = options.pop("kv_heads", heads), options.pop("mask", None)
    gradients: tuple[str, ...] = ("q", "k", "v", "qkv") if options.pop("backward", True) else ()
    if options.pop("mask_gradient", False):
        gradients += ("mask",)
    kind = next((kind for kind in ("packed", "varlen") if options.pop(kind, False)), "plain")
    function = {"packed": "attention_qkv", "varlen": "attention_varlen", "plain": "attention"}[kind]

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    def inputs() -> dict[str, Any]:
        made = dict(options)
        if mask_kind is not None:
            made["mask"] = {
                "padding": lambda: meta(batch, 1, 1, keys, dtype=torch.bool),
                "float": lambda: meta(1, heads, queries, keys),
            }[mask_kind]()
        if "alibi_slopes" in made:
            made["alibi_slopes"] = meta(heads, dtype=torch.float32)
        if "kv_lengths" in made:
            made["kv_lengths"] = meta(batch, dtype=torch.int32)
        if "dropout_p" in made:
            made["rng"] = meta(2, dtype=torch.int64)
        if kind == "packed":
            return {"qkv": meta(batch, queries, 3 * heads * width), "num_heads": heads, **made}
        if kind == "varlen":
            offsets = meta(batch + 1, dtype=torch.int32)
            return {
                "q": meta(batch * queries, heads, width),
                **{name: meta(batch * keys, kv_heads, width) for name in "kv"},
                **{f"cu_seqlens_{name}": offsets for name in "qk"},
                "max_seqlen_q": queries,
                "max_seqlen_k": keys,
                **made,
            }
        # As a model has them: heads inside, views of one projection's output.
        return {
            "q": meta(batch, queries, heads, width).transpose(1, 2),
            **{name: meta(batch, keys, kv_heads, width).transpose(1, 2) for name in "kv"},
            **made,
        }

    return Call(
        "attention",
        f"{function} {dtype_name} {name}",
        lambda **inputs: getattr(public, function)(**inputs),
        inputs,
        gradients,
        one.quick and (dtype_name == "bf16" or (dtype_name == "fp32" and width == 64)),
    )


@contextmanager
def launchers_of(op: str) -> Iterator[None]:
    """Within the block the backend `reference` of `op` is its Triton module; also where Triton cannot run."""
    module, spec = triton_module(op), registry.get(op)
    names = [f"{spec.stem}_{suffix}" for suffix in spec.entries]
    entries = {f"{name}_reference": getattr(module, name) for name in names}
    no_autocast = mock.patch.object(
        torch, "is_autocast_enabled", return_value=False
    )  # it knows no meta device
    with mock.patch.dict(library._DIRECT, entries), no_autocast:
        yield


def record(call: Call, arch: str) -> list[Launch]:
    """Every launch of the call and of its backward, as on a device of `arch`."""
    inputs = call.inputs()
    leaves = [
        inputs[name].requires_grad_()
        for name in call.gradients
        if isinstance(inputs.get(name), Tensor) and inputs[name].is_floating_point()
    ]
    with launchers_of(call.op), recording(arch) as launches:
        outputs = [
            output
            for output in as_tuple(call.function(**inputs, backend="reference"))
            if output.requires_grad
        ]
        if outputs:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])
    return launches
