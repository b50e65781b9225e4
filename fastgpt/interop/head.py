"""The output head with the loss on it: logits that are made only when somebody looks at them.

A language model of transformers computes its logits, and its loss from them. Its head, replaced, gives a tensor that
knows how to become the logits; `cross_entropy` of it is `ops.linear_cross_entropy`, which never has them whole in
memory, and anything else that is done with it is done with the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops


class FusedHead:
    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        weight: Tensor = layer.weight
        wanted = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        plain = type(input) is Tensor and type(weight) is nn.Parameter
        if not wanted or not plain or torch.compiler.is_compiling():
            return super().forward(input)  # type: ignore[misc]
        kind = input.device.type
        if torch.is_autocast_enabled(kind):  # as it is now, whenever they are made
            lower = torch.get_autocast_dtype(kind)
            input, weight = input.to(lower), weight.to(lower)
        if input.dtype != weight.dtype:
            return super().forward(input)  # type: ignore[misc]
        return LazyLogits.of(input, weight)


class LazyLogits(Tensor):
    """x @ weight.T, computed on the first use but for shape, dtype and device, `view`, `float` and cross-entropy."""

    _x: Tensor
    _weight: Tensor
    _made: list[Tensor]  # the logits [..., V], once they are there; shared by all views

    @classmethod
    def of(cls, x: Tensor, weight: Tensor) -> LazyLogits:
        shape = (*x.shape[:-1], weight.shape[0])
        return cls._like(shape, x.dtype, x, weight, [])

    @classmethod
    def _like(
        cls, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor, weight: Tensor, made: list[Tensor]
    ) -> LazyLogits:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=x.device, requires_grad=False)
        self._x, self._weight, self._made = x, weight, made
        return self

    def logits(self) -> Tensor:
        """The tensor itself, with its graph."""
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype = self.shape, self.dtype
        if not self._made:
            self._made.append(ops.linear(self._x, self._weight))
        return self._made[0].reshape(shape).to(dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyLogits):
            if func in _METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func is Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
                return True
            if func in _VIEWS and not kwargs:
                kept = first._viewed(args[1] if len(args) == 2 else args[1:])
                if kept is not None:
                    return kept
            if func in (Tensor.float, Tensor.contiguous) and len(args) == 1 and not kwargs:
                return first._in(torch.float32) if func is Tensor.float else first
            if func is F.cross_entropy:
                loss = _cross_entropy(*args, **kwargs)
                if loss is not None:
                    return loss
        return func(*_made(args), **_made(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached by what passes by torch functions: better an error than numbers without a gradient.
        raise NotImplementedError(
            f"{func}: expected a tensor, got logits that are not computed: use logits.clone()"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.logits().__reduce_ex__(protocol)

    def _viewed(self, shape: Any) -> LazyLogits | None:
        """Rows in another arrangement; None if the last dimension is not kept."""
        with torch._C.DisableTorchFunctionSubclass():
            dtype, width = self.dtype, Tensor.size(self, -1)
            rows = self._x.shape[:-1]
        if not isinstance(shape, (tuple, list, torch.Size)):
            shape = (shape,)
        if len(shape) < 2 or shape[-1] not in (width, -1) or not all(isinstance(n, int) for n in shape):
            return None
        count = rows.numel()
        lead = list(shape[:-1])
        if shape[-1] == -1:
            if -1 in lead:
                return None
        elif lead.count(-1) == 1:
            known = -torch.Size(lead).numel()
            if known == 0 or count % known:
                return None
            lead[lead.index(-1)] = count // known
        if torch.Size(lead).numel() != count:
            return None
        return self._like((*lead, width), dtype, self._x, self._weight, self._made)

    def _in(self, dtype: torch.dtype) -> LazyLogits:
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(self.shape)
        return self._like(shape, dtype, self._x, self._weight, self._made)


_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "names", "is_leaf")
    if hasattr(Tensor, name)
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.ndimension}
_VIEWS = (Tensor.view, Tensor.reshape)


def _cross_entropy(
    logits: LazyLogits,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """The loss without the logits; None where they are needed."""
    with torch._C.DisableTorchFunctionSubclass():
        dims = logits.dim()
    if weight is not None or size_average is not None or reduce is not None or label_smoothing or dims != 2:
        return None
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.dim() != 1:
        return None
    x = logits._x.reshape(-1, logits._x.shape[-1])
    return ops.linear_cross_entropy(x, logits._weight, target, ignore_index=ignore_index, reduction=reduction)


def _made(value: Any) -> Any:
    if isinstance(value, LazyLogits):
        return value.logits()
    if type(value) in (list, tuple):
        return type(value)(_made(v) for v in value)
    if type(value) is dict:
        return {name: _made(v) for name, v in value.items()}
    return value
