"""Honest implementations of every op, in small replaceable parts: `wrong_ops` breaks one part at a time.

Those of attention are in `honest_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt.reference.philox import keep_mask


class LayerNorm:
    """y, stream and the gradients, in fp32 from inputs of any dtype."""

    def stream(self, x: Tensor, residual: Tensor) -> Tensor:
        return (x.float() + residual.float()).to(residual.dtype)

    def mean(self, s: Tensor) -> Tensor:
        return s.mean(-1, keepdim=True)

    def variance(self, s: Tensor, mean: Tensor) -> Tensor:
        return (s - mean).square().mean(-1, keepdim=True)

    def rstd(self, variance: Tensor, eps: float) -> Tensor:
        return (variance + eps).rsqrt()

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """The output from its fp32 values."""
        return y.to(x.dtype)

    def forward(self, x: Tensor, w: Any, b: Any, eps: float, residual: Any) -> tuple[Any, ...]:
        """(y, stream or None, what is normalised, mean, rstd)."""
        stream = None if residual is None else self.stream(x, residual)
        s = x if stream is None else stream
        mean = self.mean(s.float())
        rstd = self.rstd(self.variance(s.float(), mean), eps)
        y = (s.float() - mean) * rstd
        y = y if w is None else y * w.float()
        y = y if b is None else y + b.float()
        return self.finish(y, x), stream, s, mean, rstd

    def dx(self, wdy: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return rstd * (wdy - wdy.mean(-1, keepdim=True) - xhat * (wdy * xhat).mean(-1, keepdim=True))

    def with_stream(self, ds: Tensor, dstream: Tensor) -> Tensor:
        return ds + dstream.float()

    def dw(self, dy: Tensor, xhat: Tensor) -> Tensor:
        return (dy * xhat).sum_to_size(dy.shape[-1:])

    def db(self, dy: Tensor) -> Tensor:
        return dy.sum_to_size(dy.shape[-1:])

    def incoming(self, dy: Tensor) -> Tensor:
        return dy

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *,
        residual: Tensor | None = None,
    ) -> Any:
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, w: Any, b: Any, residual: Any) -> Any:
                y, stream, *saved = self.forward(x, w, b, eps, residual)
                ctx.save_for_backward(w, b, *saved)
                ctx.x_dtype = x.dtype
                return y if residual is None else (y, stream)

            @staticmethod
            def backward(ctx: Any, dy: Tensor, dstream: Any = None) -> Any:
                w, b, s, mean, rstd = ctx.saved_tensors
                g = self.incoming(dy).float()
                xhat = (s.float() - mean) * rstd
                ds = self.dx(g if w is None else g * w.float(), xhat, rstd)
                if dstream is not None:
                    ds = self.with_stream(ds, dstream)
                dw = None if w is None else self.dw(g, xhat).to(w.dtype)
                db = None if b is None else self.db(g).to(b.dtype)
                return ds.to(ctx.x_dtype), dw, db, None if dstream is None else ds.to(s.dtype)

        return Function.apply(x, weight, bias, residual)


class RMSNorm:
    """y, stream and the gradients, in fp32 from inputs of any dtype."""

    def stream(self, x: Tensor, residual: Tensor) -> Tensor:
        return (x.float() + residual.float()).to(residual.dtype)

    def mean_square(self, s: Tensor) -> Tensor:
        return s.square().mean(-1, keepdim=True)

    def rstd(self, mean_square: Tensor, eps: float) -> Tensor:
        return (mean_square + eps).rsqrt()

    def scaled(self, xhat: Tensor, w: Tensor) -> Tensor:
        return xhat * w

    def dx(self, wdy: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return rstd * (wdy - xhat * (wdy * xhat).mean(-1, keepdim=True))

    def with_stream(self, ds: Tensor, dstream: Tensor) -> Tensor:
        return ds + dstream.float()

    def dw(self, dy: Tensor, xhat: Tensor) -> Tensor:
        return (dy * xhat).sum_to_size(dy.shape[-1:])

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        eps: float = 1e-6,
        *,
        residual: Tensor | None = None,
    ) -> Any:
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, w: Any, residual: Any) -> Any:
                s = x if residual is None else self.stream(x, residual)
                rstd = self.rstd(self.mean_square(s.float()), eps)
                ctx.save_for_backward(w, s, rstd)
                ctx.x_dtype = x.dtype
                xhat = s.float() * rstd
                y = (xhat if w is None else self.scaled(xhat, w.float())).to(x.dtype)
                return y if residual is None else (y, s)

            @staticmethod
            def backward(ctx: Any, dy: Tensor, dstream: Any = None) -> Any:
                w, s, rstd = ctx.saved_tensors
                g = dy.float()
                xhat = s.float() * rstd
                ds = self.dx(g if w is None else g * w.float(), xhat, rstd)
                if dstream is not None:
                    ds = self.with_stream(ds, dstream)
                dw = None if w is None else self.dw(g, xhat).to(w.dtype)
                return ds.to(ctx.x_dtype), dw, None if dstream is None else ds.to(s.dtype)

        return Function.apply(x, weight, residual)


class GELU:
    """y = z * gate(z), z = x + bias."""

    def gate(self, z: Tensor, approximate: str) -> Tensor:
        if approximate == "tanh":
            return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))
        return 0.5 * torch.erfc(-z * math.sqrt(0.5))

    def slope(self, z: Tensor, approximate: str) -> Tensor:
        if approximate == "tanh":
            t = torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))
            inner = math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * z * z)
            return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
        return self.gate(z, approximate) + z * self.bell(z)

    def bell(self, z: Tensor) -> Tensor:
        return torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)

    def backward_sum(self, x: Tensor, bias: Tensor) -> Tensor:
        return x.float() + bias.float()

    def dbias(self, dz: Tensor) -> Tensor:
        return dz.sum_to_size(dz.shape[-1:])

    def __call__(self, x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, bias: Any) -> Tensor:
                ctx.save_for_backward(x, bias)
                z = x.float() if bias is None else x.float() + bias.float()
                return (z * self.gate(z, approximate)).to(x.dtype)

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> Any:
                x, bias = ctx.saved_tensors
                z = x.float() if bias is None else self.backward_sum(x, bias)
                dz = dy.float() * self.slope(z, approximate)
                return dz.to(x.dtype), None if bias is None else self.dbias(dz).to(bias.dtype)

        return Function.apply(x, bias)


class Softmax:
    """The attention softmax."""

    def triangle(self, queries: int, keys: int) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    def hide(self, s: Tensor, seen: Tensor) -> Tensor:
        return s.masked_fill(~seen, -torch.inf)

    def normalise(self, s: Tensor) -> Tensor:
        return torch.softmax(s, -1)

    def empty_rows(self, p: Tensor, seen: Tensor) -> Tensor:
        return p.masked_fill(~seen.any(-1, keepdim=True), 0.0)

    def keep(self, shape: torch.Size, dropout_p: float, rng: Tensor) -> Tensor:
        return keep_mask(shape, dropout_p, rng)

    def keep_in_backward(self, shape: torch.Size, dropout_p: float, rng: Tensor) -> Tensor:
        return self.keep(shape, dropout_p, rng)

    def rescale(self, kept: Tensor, dropout_p: float) -> Tensor:
        return kept / (1.0 - dropout_p)

    def ds(self, p: Tensor, g: Tensor) -> Tensor:
        return p * (g - (p * g).sum(-1, keepdim=True))

    def dx(self, ds: Tensor, scale: float) -> Tensor:
        return ds * scale

    def dmask(self, ds: Tensor, shape: torch.Size) -> Tensor:
        return ds.sum_to_size(shape)

    def probabilities(self, x: Tensor, scale: float, mask: Any, causal: bool) -> Tensor:
        s = x.float() * scale
        seen = None
        if mask is not None and mask.dtype == torch.bool:
            seen = mask.expand(x.shape)
        elif mask is not None:
            s = s + mask.float()
        if causal:
            triangle = self.triangle(*x.shape[-2:])
            seen = triangle.expand(x.shape) if seen is None else seen & triangle
        if seen is None:
            return self.normalise(s)
        return self.empty_rows(self.normalise(self.hide(s, seen)), seen)

    def __call__(
        self,
        x: Tensor,
        *,
        scale: float = 1.0,
        mask: Tensor | None = None,
        causal: bool = False,
        dropout_p: float = 0.0,
        rng: Tensor | None = None,
    ) -> Tensor:
        def drop(t: Tensor, keep: Callable[..., Tensor]) -> Tensor:
            return (
                self.rescale(torch.where(keep(x.shape, dropout_p, rng), t, 0.0), dropout_p)
                if dropout_p
                else t
            )

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, mask: Any) -> Tensor:
                p = self.probabilities(x, scale, mask, causal)
                ctx.save_for_backward(p, mask)
                return drop(p, self.keep).to(x.dtype)

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> Any:
                p, mask = ctx.saved_tensors
                ds = self.ds(p, drop(dy.float(), self.keep_in_backward))
                needs = ctx.needs_input_grad[1]
                return self.dx(ds, scale).to(x.dtype), self.dmask(ds, mask.shape).to(
                    mask.dtype
                ) if needs else None

        return Function.apply(x, mask)
