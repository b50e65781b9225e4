"""Modules on the fused ops, with the parameter names and state dicts of their torch.nn counterparts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._core.dispatch import Backend
from fastgpt._core.validate import positive
from fastgpt.ops.linear import APPROXIMATE as ACTIVATIONS  # name -> `approximate` of ops.gelu
from fastgpt.positions import PositionalEncoding, RotaryEmbedding

__all__ = [
    "GELU",
    "MLP",
    "Block",
    "CausalSelfAttention",
    "LayerNorm",
    "PositionalEncoding",
    "RMSNorm",
    "RotaryEmbedding",
    "SelfAttention",
    "Softmax",
]


def _last_dimension(normalized_shape: int | Sequence[int]) -> tuple[int]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if len(shape) != 1:
        raise ValueError(f"normalized_shape: expected one dimension (the last), got {shape}")
    return (positive("normalized_shape", shape[0]),)


def _check_width(x: Tensor, normalized_shape: tuple[int]) -> None:
    if x.shape[-1:] != normalized_shape:
        raise ValueError(f"x: expected a last dimension of {normalized_shape[0]}, got {tuple(x.shape)}")


def _probability(name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value!r}")
    return float(value)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias: no subclass or stand-in (adapters, quantisation), and no hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and not any(hooks)


def _linear(layer: nn.Linear, x: Tensor, backend: Backend) -> Tensor:
    if not _is_plain(layer):
        return layer(x)
    return ops.linear(x, layer.weight, layer.bias, backend=backend)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module is in the mode it was in, whatever happened."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension (Ba et al. 2016); loads torch.nn.LayerNorm's state dict.

    `forward(x)` gives y; `forward(x, residual)` gives `(y, stream)` with `stream = x + residual` and y
    the norm of that stream, in one pass over memory.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        backend: Backend = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape = _last_dimension(normalized_shape)
        self.eps, self.elementwise_affine, self.backend = eps, elementwise_affine, backend
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
        if elementwise_affine and bias:
            self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        _check_width(x, self.normalized_shape)
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension (Zhang, Sennrich 2019); loads torch.nn.RMSNorm's state dict.

    `forward(x)` gives y; `forward(x, residual)` gives `(y, stream)` with `stream = x + residual` and y
    the norm of that stream, in one pass over memory. eps None is torch's: the machine epsilon of fp32 (of fp64 for
    an x in it).
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        backend: Backend = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = _last_dimension(normalized_shape)
        self.eps, self.elementwise_affine, self.backend = eps, elementwise_affine, backend
        self.weight: nn.Parameter | None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(self.normalized_shape, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        _check_width(x, self.normalized_shape)
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        return ops.rms_norm(x, self.weight, eps, residual=residual, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class GELU(nn.Module):
    """GELU (Hendrycks and Gimpel 2016) of `x`, or of `x + bias`; approximate is "none" (erf) or "tanh"."""

    def __init__(self, approximate: str = "none", *, backend: Backend = None) -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f'approximate: expected "none" or "tanh", got {approximate!r}')
        self.approximate, self.backend = approximate, backend

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.gelu(x, bias, approximate=self.approximate, backend=self.backend)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Softmax(nn.Module):
    """The attention softmax over the last dimension: scale, mask, causal, and dropout while training."""

    def __init__(
        self,
        dim: int = -1,
        *,
        scale: float = 1.0,
        causal: bool = False,
        dropout_p: float = 0.0,
        backend: Backend = None,
    ) -> None:
        super().__init__()
        if dim != -1:
            raise ValueError(f"dim: expected -1 (the last dimension), got {dim!r}")
        self.scale, self.causal, self.backend = scale, causal, backend
        self.dropout_p = _probability("dropout_p", dropout_p)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        p = self.dropout_p if self.training else 0.0
        return ops.softmax(
            x, scale=self.scale, mask=mask, causal=self.causal, dropout_p=p, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale}, causal={self.causal}, dropout_p={self.dropout_p}"


class MLP(nn.Module):
    """`c_proj(gelu(c_fc(x)))` as one op, which keeps the GELU's input and not its output."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "gelu_tanh",
        bias: bool = True,
        backend: Backend = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.c_fc = nn.Linear(positive("dim", dim), positive("hidden_dim", hidden_dim), bias=bias)
        self.c_proj = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation, self.backend = activation, backend

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.c_fc.in_features,):
            raise ValueError(f"x: expected a last dimension of {self.c_fc.in_features}, got {tuple(x.shape)}")
        fc, proj = self.c_fc, self.c_proj
        if not (_is_plain(fc) and _is_plain(proj)):
            return proj(ops.gelu(fc(x), approximate=ACTIVATIONS[self.activation], backend=self.backend))
        return ops.mlp(
            x, fc.weight, fc.bias, proj.weight, proj.bias, activation=self.activation, backend=self.backend
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed projection to q, k, v: every position looks at all.

    `mask` is boolean (True = may look) or float, broadcastable to [B, H, T, T].
    `dropout` drops elements of the output, `attention_dropout` probabilities.
    """

    causal = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout: float = 0.0,
        *,
        attention_dropout: float = 0.0,
        bias: bool = True,
        backend: Backend = None,
    ) -> None:
        super().__init__()
        if positive("dim", dim) % positive("num_heads", num_heads):
            raise ValueError(f"num_heads: expected a divisor of dim={dim}, got {num_heads}")
        self.num_heads, self.backend = num_heads, backend
        self.dropout = _probability("dropout", dropout)
        self.attention_dropout = _probability("attention_dropout", attention_dropout)
        self.c_attn = nn.Linear(dim, 3 * dim, bias=bias)
        self.c_proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.c_attn.in_features:
            raise ValueError(f"x: expected [B, T, {self.c_attn.in_features}], got {tuple(x.shape)}")
        batch, length, dim = x.shape
        qkv = _linear(self.c_attn, x, self.backend)
        p = self.attention_dropout if self.training else 0.0
        out = ops.attention_qkv(
            qkv, self.num_heads, causal=self.causal, mask=mask, dropout_p=p, backend=self.backend
        )
        out = out.transpose(1, 2).reshape(batch, length, dim)
        out = _linear(self.c_proj, out, self.backend)
        return F.dropout(out, self.dropout) if self.dropout and self.training else out


class CausalSelfAttention(SelfAttention):
    """`SelfAttention` where no position sees a later one."""

    causal = True


class Block(nn.Module):
    """A pre-norm transformer block, as in GPT-2: `x += attn(ln_1(x)); x += mlp(ln_2(x))`.

    With `causal=False` every position looks at all, as in an encoder.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        hidden_dim: int | None = None,
        activation: str = "gelu_tanh",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        bias: bool = True,
        eps: float = 1e-5,
        causal: bool = True,
        backend: Backend = None,
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(dim, eps, bias=bias, backend=backend)
        self.attn = (CausalSelfAttention if causal else SelfAttention)(
            dim, num_heads, dropout, attention_dropout=attention_dropout, bias=bias, backend=backend
        )
        self.ln_2 = LayerNorm(dim, eps, bias=bias, backend=backend)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.mlp = MLP(dim, hidden_dim, activation=activation, bias=bias, backend=backend)
        self.dropout = _probability("dropout", dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        delta, stream = self.advance(None, x, mask)
        return stream + delta

    def advance(self, delta: Tensor | None, stream: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """`(delta, stream)` to `(delta, stream)`, where the block's input is `stream + delta`.

        The last branch's output is handed on unadded, so that every residual add is one op with the
        LayerNorm that follows it, across blocks too.
        """
        if delta is None:
            y = self.ln_1(stream)
        else:
            y, stream = self.ln_1(delta, stream)
        y, stream = self.ln_2(self.attn(y, mask), stream)
        delta = self.mlp(y)
        return (F.dropout(delta, self.dropout) if self.dropout and self.training else delta), stream
