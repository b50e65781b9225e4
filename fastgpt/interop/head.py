"""The output head with the loss on it: logits that are made only when somebody looks at them.

A language model of transformers computes its logits, and its loss from them. Its head, replaced, gives a tensor that
knows how to become the logits; `cross_entropy` of it is `ops.linear_cross_entropy`, which never has them whole in
memory. Anything else that is done with it is done with the logits, from then on those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastgpt import ops
from fastgpt.interop.layers import FusedLinear, is_ours

_Untouched: Any = torch._C.DisableTorchFunctionSubclass


class FusedHead(FusedLinear):
    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        weight: Tensor = layer.weight
        wanted = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        # Whoever made another class of this one (FSDP) takes the weight away after the call.
        plain = "_fastgpt_fused" in type(self).__dict__ and type(weight) is nn.Parameter
        if not wanted or not plain or torch.compiler.is_compiling() or not is_ours(input, weight):
            return super().forward(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):  # as it is now, whenever they are made
            lower = torch.get_autocast_dtype(kind)
            input, weight = input.to(lower), weight.to(lower)
        if input.dtype != weight.dtype:
            return super().forward(input)
        return _promised((*input.shape[:-1], weight.shape[0]), input.dtype, input, weight, [])


class LazyLogits(Tensor):
    """x @ weight.T, computed on first use: not for shape, dtype, `view`, `float`, `contiguous`, cross-entropy."""

    _x: Tensor
    _weight: Tensor
    _versions: tuple[int, int]  # of both, when the logits were promised
    _made: list[Tensor]  # the logits, once they are there; of all views together, which share memory

    def logits(self) -> Tensor:
        """The tensor itself, with its graph."""
        with _Untouched():
            shape, dtype = self.shape, self.dtype
        if not self._made:
            self.check()
            # In the modes of the call that promised them, whatever is on where they are looked at.
            kind = self._x.device.type
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind, enabled=False):
                self._made.append(ops.linear(self._x, self._weight).to(dtype))
        made = self._made[0]
        # Itself where it can be: hooks and kept gradients are a tensor's own.
        return made if made.shape == shape else made.view(shape)

    def check(self) -> None:
        """RuntimeError if what the logits are made of has changed: they would be others."""
        if self._versions != (self._x._version, self._weight._version):
            raise RuntimeError(
                "logits: expected them to be looked at before their weight changes (optimizer.step), got it after; "
                'look earlier, or patch(model, exclude="cross_entropy")'
            )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyLogits):
            if func in _METADATA:
                with _Untouched():
                    return func(*args, **kwargs)
            if not first._made:  # of logits that are there somebody may have changed some
                lazy = _without_logits(func, first, args[1:], kwargs)
                if lazy is not None:
                    return lazy
        return func(*_made(args), **_made(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What passes by torch functions: better an error than numbers without a gradient.
        raise NotImplementedError(
            f"{func}: expected a tensor, got logits that are not computed: use logits.clone()"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.logits().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.logits().__deepcopy__(memo)


class _Promise(torch.autograd.Function):
    """Ties what is not computed yet to the graph, for whatever looks at that or hangs its own on it, as other
    Functions and DistributedDataParallel do. Of logits that were computed the gradient passes elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return Tensor._make_wrapper_subclass(
            LazyLogits, shape, dtype=dtype, device=x.device, requires_grad=False
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.to(x.dtype).reshape(-1, weight.shape[0])
        dx = (dy @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dweight = dy.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return dx, dweight, None, None


def _promised(
    shape: tuple[int, ...], dtype: torch.dtype, x: Tensor, weight: Tensor, made: list[Tensor]
) -> LazyLogits:
    lazy: LazyLogits = _Promise.apply(x, weight, shape, dtype)
    lazy._x, lazy._weight, lazy._made = x, weight, made
    lazy._versions = x._version, weight._version
    return lazy


_METADATA = {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.is_floating_point, Tensor.__len__,
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "requires_grad", "is_leaf", "is_meta",
            "is_sparse", "is_nested",
        )
    ),
}  # fmt: skip


def _without_logits(
    func: Any, lazy: LazyLogits, rest: tuple[Any, ...], options: dict[str, Any]
) -> Tensor | None:
    """The result of a function that needs no logits; None of others."""
    x, weight, made = lazy._x, lazy._weight, lazy._made
    with _Untouched():
        shape, dtype = tuple(lazy.shape), lazy.dtype
    lazy.check()  # also for a view, which promises anew
    if func is F.cross_entropy:
        return _cross_entropy(x, weight, len(shape), *rest, **options)
    if options:
        return None
    if func is Tensor.contiguous and not rest:
        return lazy
    if func is Tensor.float and not rest:
        return lazy if dtype == torch.float32 else _promised(shape, torch.float32, x, weight, [])
    if func in (Tensor.view, Tensor.reshape):
        new = _same_rows(shape, rest[0] if len(rest) == 1 else rest)
        return None if new is None else _promised(new, dtype, x, weight, made)
    return None


def _same_rows(shape: tuple[int, ...], wanted: Any) -> tuple[int, ...] | None:
    """The shape that a view gets; None if it does not keep the last dimension."""
    if (
        not isinstance(wanted, (tuple, list))
        or len(wanted) < 2
        or not all(isinstance(n, int) for n in wanted)
    ):
        return None
    sizes, count = list(wanted), torch.Size(shape).numel()
    if sizes.count(-1) == 1:
        known = -torch.Size(sizes).numel()
        if known <= 0 or count % known:
            return None
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 0 or torch.Size(sizes).numel() != count or sizes[-1] != shape[-1]:
        return None
    return tuple(sizes)


def _cross_entropy(
    x: Tensor,
    head: Tensor,
    dims: int,
    /,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """F.cross_entropy of rows of logits, with classes as targets and no option that needs the logits; else None."""
    if weight is not None or size_average is not None or reduce is not None or label_smoothing or dims != 2:
        return None
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.dim() != 1:
        return None
    rows = x.reshape(-1, x.shape[-1])
    return ops.linear_cross_entropy(rows, head, target, ignore_index=ignore_index, reduction=reduction)


def _made(value: Any) -> Any:
    if isinstance(value, LazyLogits):
        return value.logits()
    if type(value) in (list, tuple):
        return type(value)(_made(v) for v in value)
    if type(value) is dict:
        return {name: _made(v) for name, v in value.items()}
    return value
