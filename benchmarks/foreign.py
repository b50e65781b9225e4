"""Kernels that nobody here wrote, under the signatures of our ops, for `fastgpt check --implementation`.

    TRITON_INTERPRET=1 fastgpt check --op softmax --implementation benchmarks.foreign:liger_softmax
    fastgpt check --op softmax --implementation benchmarks.foreign:pytorch_softmax

liger_<op>: the Triton kernels of Liger-Kernel (`pip install --no-deps liger-kernel`), by its autograd Functions and
with their defaults, on CPU tensors in Triton's interpreter or on a GPU. pytorch_<op>, for every op: what a PyTorch
user would write (`baseline` of the SPEC). An adapter passes arguments on; it computes, copies and repairs nothing,
and raises NotImplementedError for what the kernel has no argument for. `python -m benchmarks foreign` runs them all.

Liger is made to run without a GPU from outside, in `_interpreted`; nothing of its code is changed or stands here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from fastgpt._core import registry

LIGER = {  # function: op
    "liger_layer_norm": "layer_norm",
    "liger_rms_norm": "rms_norm",
    "liger_rms_norm_gemma": "rms_norm",
    "liger_softmax": "softmax",
    "liger_geglu": "geglu",
    "liger_swiglu": "swiglu",
    "liger_cross_entropy": "cross_entropy",
}


def liger_layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if weight is None or bias is None:
        raise NotImplementedError("weight and bias: it needs both")
    return _liger("layer_norm", x).LigerLayerNormFunction.apply(x, weight, bias, eps)


def liger_rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Any:
    """casting_mode "llama": x̂ is rounded to x's dtype before the weight, as in Hugging Face's Llama."""
    if residual is None:
        return _liger("rms_norm", x).LigerRMSNormFunction.apply(x, weight, eps)
    _same_dtype(x, weight, residual)
    return _liger("fused_add_rms_norm", x).LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps)


def liger_rms_norm_gemma(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Any:
    """casting_mode "gemma", all of it in fp32, and in_place=False, which leaves the incoming gradient alone."""
    settings = (0.0, "gemma", False)  # the offset of the weight, casting_mode, in_place
    if residual is None:
        return _liger("rms_norm", x).LigerRMSNormFunction.apply(x, weight, eps, *settings)
    _same_dtype(x, weight, residual)
    function = _liger("fused_add_rms_norm", x).LigerFusedAddRMSNormFunction
    return function.apply(x, residual, weight, eps, *settings)


def liger_softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    if scale != 1.0 or mask is not None or causal or dropout_p:
        raise NotImplementedError("scale, mask, causal and dropout_p: it has none")
    return _liger("softmax", x).LigerSoftmaxFunction.apply(x)


def liger_geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        raise NotImplementedError("approximate: it has tanh alone")
    return _liger("geglu", gate).LigerGELUMulFunction.apply(gate, up)


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _liger("swiglu", gate).LigerSiLUMulFunction.apply(gate, up)


def liger_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1]) if logits.dim() != 2 else logits
    loss, *_ = _liger("cross_entropy", logits).LigerCrossEntropyFunction.apply(
        rows, targets.reshape(-1), None, ignore_index, 0.0, label_smoothing, reduction
    )
    return loss.view(targets.shape) if reduction == "none" else loss


def __getattr__(name: str) -> Callable[..., Any]:
    op = name.removeprefix("pytorch_")
    if op == name or op not in {spec.name for spec in registry.ops()}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = registry.get(op).baseline
    return _named(function, name)


@functools.cache
def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function` under a name that this module answers to, so that a failure can be repeated by it."""

    @functools.wraps(function)
    def named(**call: Any) -> Any:
        if call.get("dropout_p"):
            raise NotImplementedError("dropout_p: PyTorch draws other numbers")
        return function(**call)

    named.__name__ = named.__qualname__ = name
    named.__module__ = __name__
    return named


def _same_dtype(x: Tensor, weight: Tensor | None, residual: Tensor) -> None:
    if weight is None or residual.dtype != x.dtype:
        raise NotImplementedError("residual: it needs a weight, and a residual in x's dtype")


def missing() -> str | None:
    """Why Liger's kernels cannot be run, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install --no-deps liger-kernel"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def _liger_module(name: str, interpreted: bool) -> ModuleType:
    reason = missing()
    if reason is not None:
        raise ModuleNotFoundError(reason)
    module = importlib.import_module(f"liger_kernel.ops.{name}")
    if interpreted:
        _interpreted(module)
    return module


def _liger(name: str, x: Tensor) -> ModuleType:
    """The module of Liger's ops, fit for x's device. (Its package would choose vendors' kernels instead.)"""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not x.is_cuda and not interpreted:
        raise RuntimeError("Liger's kernels on CPU tensors need TRITON_INTERPRET=1")
    return _liger_module(name, interpreted)


def _interpreted(module: ModuleType) -> None:
    """What Triton's interpreter lacks to run a module of Liger's as a GPU would, in this process.

    bf16 arithmetic, as for our own kernels; sums of bf16, here in fp32 and rounded once, which is kinder than a GPU,
    where every addition rounds; floats among the arguments, which are fp32 tensors in a compiled kernel; and
    functions of NVIDIA's libdevice, stubs there, here numpy's, at least as accurate.
    """
    import numpy as np
    import triton.language as tl
    from fastgpt_kernels.triton.interpreter import fix_bfloat16, hasten
    from triton.runtime import interpreter
    from triton.runtime.interpreter import ReduceOps, TensorHandle

    fix_bfloat16()
    hasten()
    functions: dict[str, Callable[[Any], Any]] = {"tanh": np.tanh, "rsqrt": lambda x: 1.0 / np.sqrt(x)}
    for name in functions.keys() & vars(module).keys():

        def device_function(x: Any, function: Callable[[Any], Any] = functions[name]) -> Any:
            if x.dtype.scalar != tl.float32:
                raise TypeError(f"libdevice: expected float32, got {x.dtype}")
            values = np.asarray(function(x.handle.data), dtype=np.float32)
            return tl.tensor(TensorHandle(values, x.handle.dtype), x.type)

        setattr(module, name, device_function)
    if getattr(interpreter, "fastgpt_foreign", False):
        return
    convert, total = interpreter._implicit_cvt, ReduceOps.sum

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    def summed(self: Any, input: Any) -> Any:
        if input.dtype.scalar != tl.bfloat16:
            return total(self, input)
        return total(self, input.to(tl.float32)).to(tl.bfloat16)

    interpreter._implicit_cvt, ReduceOps.sum = converted, summed
    interpreter.fastgpt_foreign = True
