"""The output head with the loss on it: logits that are made only when somebody looks at them.

A language model of transformers computes its logits, and its loss from them. Its head, replaced, gives a
tensor whose numbers are not there yet; `cross_entropy` of it is `ops.linear_cross_entropy`, which never has
them whole in memory.

To autograd they are an ordinary tensor that came of `_Promise`: views, casts, hooks and changes in place are
its own, above `__torch_dispatch__`, which makes the numbers for whatever asks. The loss passes by them only
where the graph shows nothing but views and casts between, and nobody waits for their gradient.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

from fastgpt import ops
from fastgpt.interop.layers import FusedLinear, is_ours
from fastgpt.interop.swap import original

_Untouched: Any = torch._C.DisableTorchFunctionSubclass
_aten = torch.ops.aten
_T: Any = Tensor


class FusedHead(FusedLinear):
    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        weight: Tensor = layer.weight
        wanted = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        # FSDP and ZeRO fill the same weight anew for each call, and take it away after.
        lent = getattr(self, "_is_fsdp_managed_module", False) or hasattr(weight, "ds_id")
        plain = original(type(layer)) is nn.Linear and type(weight) is nn.Parameter and not lent
        if not wanted or not plain or torch.compiler.is_compiling() or not is_ours(input, weight):
            return super().forward(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):  # as it is now, whenever they are made
            lower = torch.get_autocast_dtype(kind)
            input, weight = (t if t.dtype == torch.float64 else t.to(lower) for t in (input, weight))
        if input.dtype != weight.dtype or input.device != weight.device:
            return super().forward(input)
        return _Promise.apply(input, weight, _Call(input, weight))


class _Call:
    """One call of the head: what its logits are made of."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        # Who needs a gradient is settled now, as it is for a product.
        self.x, self.weight = (t if t.requires_grad else t.detach() for t in (x, weight))
        self.watch = _Watch()
        self.state = self._state()
        # Through `.data`, and from kernels, weights change without a new version: numbers of every row tell.
        self.sample = self._sample().clone()

    def _state(self) -> tuple[int, ...]:
        return self.x._version, self.weight._version, self.weight.data_ptr()

    def _sample(self) -> Tensor:
        return self.weight.detach()[:, :: max(1, self.weight.shape[1] // 2)]

    def check(self, waiting: bool) -> None:
        """RuntimeError if what the logits are made of has changed: they would be others. Who looks at numbers
        waits for the device anyway, a loss does not."""
        near = waiting or self.weight.is_cpu
        if self.state != self._state() or (near and not torch.equal(self.sample, self._sample())):
            raise RuntimeError(
                "logits: expected them to be looked at before their weight changes (optimizer.step), got it "
                'after; look earlier, or patch(model, exclude="cross_entropy")'
            )


class _Watch:
    """Whether somebody waits for the gradient of a call's logits. Graph nodes keep this, not their call."""

    def __init__(self) -> None:
        self.asked, self.tensors = False, list[weakref.ref[LazyLogits]]()

    def __bool__(self) -> bool:
        with _Untouched():  # backward(inputs=...) keeps a gradient without asking us
            return self.asked or any((t := ref()) is not None and t.retains_grad for ref in self.tensors)


class _Memory:
    """The numbers that a promise and its views share, once somebody has looked."""

    def __init__(self, call: _Call, parent: _Memory | None = None) -> None:
        self.call, self.parent = call, parent
        self.numbers: Tensor | None = None
        self.copies = list[weakref.ref[_Memory]]()  # in fp32
        if parent is not None:
            parent.copies.append(weakref.ref(self))

    def look(self) -> Tensor:
        if self.numbers is None and self.parent is not None:
            self.parent.look()
        if self.numbers is None:
            # In the modes of the call that promised them, whatever is on where they are looked at.
            kind = self.call.x.device.type
            plain = torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False)
            with _disable_current_modes(), plain[0], plain[1], plain[2]:
                self.call.check(waiting=True)
                self.numbers = ops.linear(self.call.x.detach(), self.call.weight.detach())
                for copy in (ref() for ref in self.copies):
                    if copy is not None:  # as the logits are before anybody changes them
                        copy.numbers = self.numbers.float()
        return self.numbers


class LazyLogits(Tensor):
    """x @ weight.T, computed on first use: not for shape, dtype, views of rows, `float`, cross-entropy."""

    _memory: _Memory

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and isinstance(args[0], LazyLogits):
            loss = _loss(*args, **kwargs)
            if loss is not None:
                return loss
        if func in _WATCHING:
            for lazy in tree_iter((args, kwargs)):
                if isinstance(lazy, LazyLogits):
                    lazy._memory.call.watch.asked = True
        if func == _T.data.__set__ and isinstance(args[0], LazyLogits):
            raise _refusal("data")
        if func is Tensor.untyped_storage:
            return args[0]._memory.look().untyped_storage()
        with _Untouched():
            if _of_itself(func, args[0] if args else None):
                return func(*args, **kwargs)
            # The rest may reach for the memory: it gets a plain tensor there, in the graph a view of this one.
            with torch.inference_mode(False), torch.enable_grad():
                args, kwargs = tree_map_only(LazyLogits, _aten.alias, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in func.tags:  # the shape of this one is not that of the numbers
            raise _refusal(func)
        if args and isinstance(args[0], LazyLogits):
            lazy = _without_numbers(func, args[0], args[1:], kwargs)
            if lazy is not None:
                return lazy
        given: dict[int, tuple[Tensor, Tensor]] = {}

        def numbers(lazy: LazyLogits) -> Tensor:
            there = lazy._memory.look().view(lazy.shape)
            given[id(there)] = there, lazy
            return there

        args, kwargs = tree_map_only(LazyLogits, numbers, (args, kwargs))
        # What is changed in place is also what comes back.
        return tree_map(lambda out: given[id(out)][1] if id(out) in given else out, func(*args, **kwargs))


def _refusal(what: Any) -> RuntimeError:
    return RuntimeError(
        f"{what}: expected a tensor, got logits that are computed on first use: use logits.clone()"
    )


def _lazy(shape: Any, dtype: torch.dtype, memory: _Memory) -> LazyLogits:
    lazy: Any = Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=memory.call.x.device)
    lazy._memory = memory
    memory.call.watch.tensors.append(weakref.ref(lazy))
    return lazy


def _without_numbers(func: Any, lazy: LazyLogits, rest: Any, options: dict[str, Any]) -> LazyLogits | None:
    """The result of an operator that needs none; None of others, and where they are there already."""
    memory, shape, dtype = lazy._memory, lazy.shape, lazy.dtype
    if memory.numbers is not None:
        return None
    if func is _aten.detach.default:  # to be saved for backward; who asks for `detach` gets the numbers
        return _lazy(shape, dtype, memory)
    if func is _aten._to_copy.default and dtype.itemsize == 2 and options == {"dtype": torch.float32}:
        return _lazy(shape, torch.float32, _Memory(memory.call, memory))
    if func in (_aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default):
        new = torch.empty(shape, device="meta").view(rest[0]).shape
        if len(new) > 1 and new[-1] == shape[-1]:
            return _lazy(new, dtype, memory)
    return None


class _Promise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.watch = call.watch
        return _lazy((*x.shape[:-1], weight.shape[0]), x.dtype, _Memory(call))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:  # the gradient of the loss has gone past
            return None, None, None
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, weight.shape[0])
        dx = (rows @ weight).view(x.shape) if need_dx else None
        dweight = rows.t() @ x.reshape(rows.shape[0], x.shape[-1]) if need_dweight else None
        return dx, dweight, None


class _Tie(torch.autograd.Function):
    """The loss, and in the graph the logits beside it: whoever waits for their gradient still gets it."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, logits: Tensor, call: _Call, target: Tensor, dtype: torch.dtype, options: Any
    ) -> Tensor:
        ctx.save_for_backward(call.x, call.weight, target)
        ctx.set_materialize_grads(False)
        with _Untouched():
            ctx.dtypes = loss.dtype, logits.dtype, dtype
        ctx.watch, ctx.options = call.watch, options
        return loss.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None) -> Any:
        inner, of, outer = ctx.dtypes
        if dloss is None:
            return (None,) * 6
        if not ctx.watch and ctx.needs_input_grad[0]:
            return dloss.to(inner), *(None,) * 5
        x, weight, target = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x, weight).view(target.shape[0], weight.shape[0]).to(of)
            loss = F.cross_entropy(logits.to(outer), target, **ctx.options)
            (dlogits,) = torch.autograd.grad(loss, logits, dloss, create_graph=again)
        return None, dlogits, *(None,) * 4


def _loss(
    logits: LazyLogits,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """F.cross_entropy of rows of logits, with classes as targets and no option that needs them; else None."""
    memory, call = logits._memory, logits._memory.call
    with _Untouched():
        shape, dtype, wanted, node = logits.shape, logits.dtype, logits.requires_grad, logits.grad_fn
    if weight is not None or size_average is not None or reduce is not None or label_smoothing:
        return None
    if type(target) is not Tensor or target.dtype != torch.int64 or target.dim() != 1 or len(shape) != 2:
        return None
    if memory.numbers is not None or call.watch or not (wanted and torch.is_grad_enabled()):
        return None
    if torch.compiler.is_compiling() or not is_ours(call.x, call.weight):
        return None
    while node is not None and node.name() in _PASSED:
        node = node.next_functions[0][0]
    if getattr(node, "watch", None) is not call.watch:  # something else is on the way to the head
        return None
    call.check(waiting=False)
    kind = call.x.device.type
    options = {"ignore_index": ignore_index, "reduction": reduction}
    with torch.autocast(kind, enabled=False):
        rows = call.x.reshape(shape[0], call.x.shape[-1])
        loss = ops.linear_cross_entropy(rows, call.weight, target, **options)  # type: ignore[arg-type]
    if torch.is_autocast_enabled(kind):  # which dtype a loss has then is PyTorch's to say
        one = torch.zeros(1, 1, dtype=dtype, device=call.x.device)
        dtype = F.cross_entropy(one, target.new_zeros(1)).dtype
    return _Tie.apply(loss, logits, call, target, dtype, options)


_PASSED = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0"}
# Whoever calls one of these waits for a gradient, or may.
_WATCHING = {
    _T.register_hook, _T.register_post_accumulate_grad_hook, _T.retain_grad, _T.grad_fn.__get__, _T.backward,
    _T._backward_hooks.__get__, _T._backward_hooks.__set__, torch.autograd.grad, torch.autograd.backward,
}  # fmt: skip
# What tells of a tensor, and what may need no numbers: that is seen in __torch_dispatch__.
_WITHOUT = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size",
    "get_device", "sparse_dim", "dense_dim", "_is_view", "__len__", "__hash__", "__set__", "__get__", "__setitem__",
    "view", "reshape", "flatten", "contiguous", "float", "to",
}  # fmt: skip
_WITH = {_T.data.__get__, _T.__cuda_array_interface__.__get__, _T.is_shared, _T.is_set_to, _T.share_memory_}


def _of_itself(func: Any, first: Any) -> bool:
    """Whether a function is for this very tensor, not for its memory: tells of it, changes or keeps it."""
    name = getattr(func, "__name__", "")
    changes = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    listed = func in _WATCHING or name in _WITHOUT or name.startswith("is_")
    return func not in _WITH and (listed or (changes and isinstance(first, LazyLogits)))
