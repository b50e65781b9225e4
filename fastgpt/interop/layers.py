"""Single layers of torch.nn and of transformers on our ops: forwards for `swap.exchange`."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from fastgpt import ops
from fastgpt.interop.swap import original

_HALF = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MUCH = 2**25  # multiply-adds: a third of a millisecond, an autograd Function 5 µs
# Activation modules of transformers by class name, with `approximate` of ops.gelu.
GELUS = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "FastGELUActivation": "tanh",
    "AccurateGELUActivation": "tanh",
}


class FusedLayerNorm:
    normalized_shape: tuple[int, ...]
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        if is_parametrized(self):
            return super().forward(input)  # type: ignore[misc]
        module: Any = self
        weight, bias = module.weight, module.bias
        if not (
            is_ours(input, weight, bias)
            and input.shape[-1:] == self.normalized_shape
            and (one_dtype(input, weight, bias) or _half_beside_fp32(input, weight, bias))
        ):
            return super().forward(input)  # type: ignore[misc]
        return ops.layer_norm(input, weight, bias, self.eps)


class FusedRMSNorm:
    normalized_shape: tuple[int, ...]
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        if is_parametrized(self):
            return super().forward(x)  # type: ignore[misc]
        weight: Any = self.weight  # type: ignore[attr-defined]
        measured = torch.compiler.is_compiling() and self.eps is None and x.dtype in _HALF
        if measured or not (
            is_ours(x, weight)
            and x.shape[-1:] == self.normalized_shape
            and one_dtype(x, weight)
            and x.is_contiguous()  # theirs keeps the strides of x
        ):
            return super().forward(x)  # type: ignore[misc]
        return ops.rms_norm(x, weight, default_eps(x.dtype) if self.eps is None else self.eps)


class FusedTransformersRMSNorm:
    """`LlamaRMSNorm`, `T5LayerNorm` and their like: rounded once, where theirs round before the weight as well."""

    variance_epsilon: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or is_parametrized(self):  # a residual beside x, a name of its own for x
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x, weight = args[0], self.weight  # type: ignore[attr-defined]
        # Of two dtypes theirs gives a dtype of its own making, also where autocast makes them.
        if not (
            is_ours(x, weight)
            and one_dtype(x, weight)
            and x.shape[-1:] == weight.shape
            and x.is_contiguous()
            and not torch.is_autocast_enabled(x.device.type)
        ):
            return super().forward(x)  # type: ignore[misc]
        return ops.rms_norm(x, weight, self.variance_epsilon)


class FusedGELU:
    approximate: str

    def forward(self, input: Tensor) -> Tensor:
        if not (is_ours(input) and input.is_contiguous()):  # theirs keeps the strides
            return super().forward(input)  # type: ignore[misc]
        return ops.gelu(input, approximate=self.approximate)


class FusedTransformersGELU:
    def forward(self, input: Tensor) -> Tensor:
        approximate = approximate_of(self)  # type: ignore[arg-type]
        if approximate is None or not is_ours(input) or not input.is_contiguous():
            return super().forward(input)  # type: ignore[misc]
        if torch.is_autocast_enabled(input.device.type):  # of the operations that theirs is some become fp32
            return super().forward(input)  # type: ignore[misc]
        return ops.gelu(input, approximate=approximate)


class FusedLinear:
    """Where there is much to multiply: of few rows an autograd Function of Python's takes longer than it saves."""

    def forward(self, input: Tensor) -> Tensor:
        if not _pays(self, input):
            return super().forward(input)  # type: ignore[misc]
        return ops.linear(input, *weight_and_bias(self))  # type: ignore[arg-type]


class FusedConv1D:
    def forward(self, x: Tensor) -> Tensor:
        if not _pays(self, x):
            return super().forward(x)  # type: ignore[misc]
        return ops.linear(x, *weight_and_bias(self))  # type: ignore[arg-type]


def _pays(layer: Any, x: Tensor) -> bool:
    if torch.compiler.is_compiling() or is_parametrized(layer):
        return False
    weight, bias = weight_and_bias(layer)
    return (
        is_ours(x, weight, bias)
        and x.numel() * weight.shape[0] >= MUCH
        and one_dtype(x, weight, bias)
        and x.shape[-1] == weight.shape[-1]
    )


class FusedSoftmax:
    dim: int

    def forward(self, input: Tensor) -> Tensor:
        if not is_ours(input) or self.dim not in (-1, input.dim() - 1):
            return super().forward(input)  # type: ignore[misc]
        return ops.softmax(input)


# --- whose a call is ---


def is_ours(x: Tensor, *others: Tensor | None) -> bool:
    """Whether our ops are for these: floating tensors and parameters themselves, not nested, and neither torch.func
    nor forward-mode AD nor a trace at work, nor somebody who looks at each call of PyTorch's functions
    (TorchFunctionMode). A subclass may keep something else behind its memory."""
    if not isinstance(x, Tensor):
        return False  # torch.fx's
    if not torch.compiler.is_compiling() and (
        _is_watched()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    given = [x, *(t for t in others if t is not None)]
    return x.dim() > 0 and all(is_strided(t) and t.dtype in FLOATING for t in given)


def _is_watched() -> bool:
    modes = range(torch._C._len_torch_function_stack())
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in modes)


def is_strided(t: Tensor) -> bool:
    """Whether a tensor is no more than its memory, sizes and strides."""
    kinds = _TRACED if torch.compiler.is_compiling() else _EAGER
    return type(t) in kinds and t.layout is torch.strided and not t.is_nested and not t.is_meta


_EAGER: tuple[type, ...] = (Tensor, nn.Parameter)
_TRACED = (*_EAGER, FakeTensor)


def is_parametrized(module: Any) -> bool:
    """Reading such a weight computes it, and may change it (spectral_norm): that is for one forward to do, once."""
    return "parametrizations" in module._modules


def one_dtype(x: Tensor, *others: Tensor | None) -> bool:
    return all(t is None or t.dtype == x.dtype for t in others)


def _half_beside_fp32(x: Tensor, *parameters: Tensor | None) -> bool:
    """Of mixed dtypes the pair that PyTorch's layer norm takes too, and gives x's: on a CPU."""
    return x.is_cpu and x.dtype in _HALF and all(p is None or p.dtype == torch.float32 for p in parameters)


def default_eps(dtype: torch.dtype) -> float:
    """What nn.RMSNorm adds when its eps is None: in half precision it was the dtype's own, and is fp32's now."""
    return _half_eps() if dtype in _HALF else torch.finfo(dtype).eps


@functools.cache
def _half_eps() -> float:
    small = F.rms_norm(torch.tensor([1e-3], dtype=torch.bfloat16), (1,))  # 0.94, or 0.01 with bf16's own
    return torch.finfo(torch.float32 if float(small) > 0.5 else torch.bfloat16).eps


# --- what a module is ---


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a norm of transformers does what its name says, its weight a factor: tried on small copies."""
    if not isinstance(getattr(module, "variance_epsilon", None), float) or set(module._parameters) != {
        "weight"
    }:
        return False
    return all(
        _is_rms_norm(module, shape, training, dtype)
        for shape, training in (((6,), False), ((3, 2), True))
        for dtype in (torch.float64, torch.bfloat16)  # the second for the dtype of its results
    )


@torch.inference_mode(False)
@torch.enable_grad()
def _is_rms_norm(module: nn.Module, shape: tuple[int, ...], training: bool, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (1, 6))
    weight, x = weight[0].to(dtype), (x * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]).to(dtype)
    leaves = [x.requires_grad_(), nn.Parameter(weight)]
    small: Any = copy.copy(module)
    small.__class__ = original(type(module))
    small.__dict__ = {
        **module.__dict__, "_parameters": {"weight": leaves[1]}, "training": training,
    }  # fmt: skip
    try:
        with torch.device("cpu"):
            got = small(x.view(*shape, 5))
    except Exception:  # it needs more than x
        return False
    if not isinstance(got, Tensor) or got.dtype != dtype or got.shape != (*shape, 5):
        return False
    eps: Any = module.variance_epsilon
    exact = leaves[1] * x.double() * torch.rsqrt((x.double() ** 2).mean(-1, keepdim=True) + eps)
    if dtype != torch.float64:
        return bool(torch.isclose(got.double(), exact.view_as(got), 2e-2).all())
    if not got.requires_grad or not bool(torch.isclose(got, exact.view_as(got), 1e-4).all()):
        return False
    pairs = [torch.autograd.grad(y.sum(), leaves, allow_unused=True) for y in (got, exact)]
    return all(a is not None and torch.allclose(a, b, 1e-3, 1e-6) for a, b in zip(*pairs, strict=True))


def approximate_of(module: nn.Module) -> str | None:
    """`approximate` of ops.gelu if the module is a GELU, replaced or not; else None, as of what overrides it."""
    own = original(type(module))
    for kind in own.__mro__:
        if own.forward is not getattr(kind, "forward", None):
            continue
        if kind is nn.GELU:
            return module.approximate  # type: ignore[return-value]
        if kind.__module__ == "transformers.activations" and kind.__name__ in GELUS:
            return GELUS[kind.__name__]
    return None


def is_plain(module: nn.Module, *kinds: Any) -> bool:
    """Whether a layer is one of these classes itself and does nothing beside: no hooks, no parametrization."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return original(type(module)) in kinds and not any(hooks) and "forward" not in module.__dict__


def is_layer(module: nn.Module) -> bool:
    """A Linear, or transformers' Conv1D, and no subclass."""
    kind = original(type(module))
    return kind is nn.Linear or (
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    )


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight [n, k] (of Conv1D, which keeps [k, n], a view) and the bias."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    return (weight if isinstance(layer, nn.Linear) else weight.t()), bias
