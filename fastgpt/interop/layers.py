"""Single layers of torch.nn and of transformers on our ops: forwards for `swap.exchange`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgpt import ops
from fastgpt.interop.swap import original

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
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        if not is_ours(input, self.weight, self.bias):
            return super().forward(input)  # type: ignore[misc]
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class FusedRMSNorm:
    weight: Tensor | None
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        if not is_ours(x, self.weight):
            return super().forward(x)  # type: ignore[misc]
        return ops.rms_norm(x, self.weight, default_eps(x.dtype) if self.eps is None else self.eps)


class FusedTransformersRMSNorm:
    """`LlamaRMSNorm`, `T5LayerNorm` and their like: rounded once, where theirs round before the weight as well."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Of two dtypes theirs gives a dtype of its own making.
        if not is_ours(hidden_states, self.weight) or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)  # type: ignore[misc]
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FusedGELU:
    approximate: str

    def forward(self, input: Tensor) -> Tensor:
        if not is_ours(input):
            return super().forward(input)  # type: ignore[misc]
        return ops.gelu(input, approximate=self.approximate)


class FusedTransformersGELU:
    def forward(self, input: Tensor) -> Tensor:
        approximate = approximate_of(self)  # type: ignore[arg-type]
        if approximate is None or not is_ours(input):
            return super().forward(input)  # type: ignore[misc]
        return ops.gelu(input, approximate=approximate)


class FusedLinear:
    """Where there is much to multiply: of few rows an autograd Function of Python's takes longer than it saves."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        weight, bias = weight_and_bias(module)
        much = x.numel() * weight.shape[0] >= MUCH and x.dtype == weight.dtype
        if not much or torch.compiler.is_compiling() or not is_ours(x, weight, bias):
            return super().forward(x)  # type: ignore[misc]
        return ops.linear(x, weight, bias)


class FusedSoftmax:
    dim: int

    def forward(self, input: Tensor) -> Tensor:
        if self.dim not in (-1, input.dim() - 1) or not is_ours(input):
            return super().forward(input)  # type: ignore[misc]
        return ops.softmax(input)


def is_ours(x: Tensor, *others: Tensor | None) -> bool:
    """Whether our ops are for these: floating tensors and parameters themselves, not nested, and neither torch.func
    nor forward-mode AD nor a trace at work. A subclass may keep something else behind its memory."""
    if torch.compiler.is_compiling():
        return x.is_floating_point() and x.dim() > 0
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    given = [x, *(t for t in others if t is not None)]
    return x.dim() > 0 and all(
        type(t) in (Tensor, nn.Parameter) and t.is_floating_point() and not t.is_nested for t in given
    )


def default_eps(dtype: torch.dtype) -> float:
    """What nn.RMSNorm adds when its eps is None: in half precision it was the dtype's own, and is fp32's now."""
    return _HALF_EPS if dtype in (torch.bfloat16, torch.float16) else torch.finfo(dtype).eps


def _half_eps() -> float:
    small = F.rms_norm(torch.tensor([1e-3], dtype=torch.bfloat16), (1,))  # 0.94, or 0.01 with bf16's own
    return torch.finfo(torch.float32 if float(small) > 0.5 else torch.bfloat16).eps


_HALF_EPS = _half_eps()


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a norm of transformers does what its name says, its weight a factor: tried on a small copy."""
    if not isinstance(getattr(module, "variance_epsilon", None), float) or set(module._parameters) != {
        "weight"
    }:
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5,), (6, 5)))
    x = x * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    small: Any = copy.copy(module)
    small.__class__ = original(type(module))
    small.__dict__ = {**module.__dict__, "_parameters": {"weight": nn.Parameter(weight)}}
    try:
        with torch.no_grad():
            got = small(x)
    except Exception:  # it needs more than x
        return False
    eps: Any = module.variance_epsilon
    exact = weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return (
        isinstance(got, Tensor)
        and got.shape == x.shape
        and bool(torch.isclose(got.double(), exact, 1e-4).all())
    )


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
