"""The guard before raw pointers: whether a call is an ordinary eager one; and what identifies such a call.

Both are asked of the compiled module where there is one, at half of what the questions cost from Python.
"""

from __future__ import annotations

from typing import Any

import fastgpt_kernels
import torch
from torch.compiler import is_compiling

# Exact types only: a subclass (FakeTensor, DTensor, FunctionalTensor, ...) may hold no memory of its own.
_TENSOR_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_PLAIN_TYPES = _TENSOR_TYPES | {type(None), bool, int, float, str}

# What can stand between a call and the memory of its tensors, and the answer that says it does not.
_MODES = (
    (torch._C._len_torch_dispatch_stack, 0),
    (torch._C._get_tracing_state, None),
    (torch._C._functorch.peek_interpreter_stack, None),
)

_FEW = 4096  # values that are compared in less time than a call of aminmax takes
_COMPILED = None if fastgpt_kernels.cpu_status() else fastgpt_kernels.load_cpu()


def plain_eager(args: tuple[Any, ...]) -> bool:
    """True if nothing but an ordinary eager call could be going on, so that raw pointers are safe to take."""
    return not is_compiling() and _is_plain(args)


def _is_plain_python(args: tuple[Any, ...]) -> bool:
    for function, quiet in _MODES:
        if function() is not quiet:
            return False
    if not _PLAIN_TYPES.issuperset(map(type, args)):
        return False
    for arg in args:  # noqa: SIM110 (a generator costs half a microsecond)
        # Memory that does not hold what the tensor says.
        if type(arg) in _TENSOR_TYPES and (arg.is_neg() or arg._is_zerotensor()):
            return False
    return True


def extremes(value: torch.Tensor) -> tuple[int, int] | None:
    """The least and the largest value of an integer tensor; None where it is empty, or cannot be looked at now.

    That takes a plain CPU tensor, outside of any tracing.
    """
    if not value.is_cpu or not plain_eager((value,)):
        return None
    count = value.numel()
    if count == 0:
        return None
    if count <= _FEW and _COMPILED is not None and value.dtype is torch.int64 and value.is_contiguous():
        return _COMPILED.extremes(value.data_ptr(), count)
    low, high = value.aminmax()
    return int(low.item()), int(high.item())


def _nothing(*values: Any) -> Any:
    return None


# signature(op, values): bytes that are equal for calls that look the same: dtype, shape, strides, device and need of
# a gradient of each tensor, which tensors are one, and all other values. None where a call is not plain, or under
# autocast. recall(op, values): what `plan.py` remembers for it, looked up in the dicts given to watch_plans.
if _COMPILED is None:
    _is_plain, signature, recall, watch_plans = _is_plain_python, _nothing, _nothing, _nothing
else:
    _any_autocast = torch._C._is_any_autocast_enabled
    _COMPILED.watch(
        torch.Tensor, torch.nn.Parameter, torch.is_grad_enabled, _any_autocast, torch.strided, _MODES
    )
    _is_plain, signature, recall = _COMPILED.is_plain, _COMPILED.signature, _COMPILED.recall
    watch_plans = _COMPILED.watch_plans
