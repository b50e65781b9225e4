"""From the values of a public call to a kernel: validated, a backend chosen, and what that came to remembered.

Validation and choice are pure functions of what `guard.signature` sees: a second call that looks the same need not be
looked at again. Checks of what a tensor holds (`tokens`, `targets`) are no part of this: ops make them on every call.

Not remembered: a call that asks for a backend, by argument, context or environment; one under autocast, in a dual
level or not plain (`guard.py`); one whose tensors preparation replaces (views, casts); and the reference, of which
every call has to warn or raise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastgpt._core.autograd import needs_graph
from fastgpt._core.dispatch import Backend, asked_around, choose
from fastgpt._core.guard import recall, signature, watch_plans
from fastgpt._core.library import _DIRECT, call
from fastgpt._core.registry import _USABLE
from fastgpt._core.spec import OpSpec

# (how to run the forward entry on the arguments, the backend, the prepared arguments)
Planned = tuple[Callable[..., Any] | None, str, tuple[Any, ...]]


class _Plan(NamedTuple):
    """What a call came to, in the order in which csrc/bind/guard.h reads it."""

    where: tuple[str, str]  # op and device
    usable: tuple[Any, ...]  # what the backend was chosen from; a plan counts while it is still that
    entry: str | None  # of forward; None where autograd has to know of the call
    backend: str
    places: tuple[Any, ...]  # of each argument: its position among the values, or itself in a tuple of one


_MOST = 2048  # plans; a program that makes more, as lengths that grow, begins anew
_NEVER = False  # for a call that looks like one that cannot be remembered
_plans: dict[bytes, tuple[Any, ...] | bool] = {}
watch_plans(_plans, _USABLE, _DIRECT)


def planned(spec: OpSpec, backend: Backend, values: tuple[Any, ...]) -> Planned:
    """What a public function does with a call before anything is computed.

    values: of all parameters of the public function but `backend`, in its order.

    Returns:
        (run, backend, prepared arguments): `run(*arguments)` is the forward entry; None if autograd has to know.

    Raises:
        TypeError, ValueError, BackendError: as `spec.prepare` and `choose`.
    """
    found: Any = _NEVER
    if not is_compiling() and backend is None and forward_ad._current_level < 0 and not asked_around():
        found = recall(spec.name, values)
        if found:
            return found
    count = spec.positional
    args = spec.prepare(*values[:count], **dict(zip(spec.keywords, values[count:], strict=True)))
    chosen = choose(spec, args, backend)
    run = None
    if not needs_graph(args):
        run = functools.partial(call, f"{spec.stem}_fwd", chosen)
    if found is not _NEVER and chosen != "reference":
        _remember(spec, values, args, chosen, run is None)
    return run, chosen, args


def _remember(spec: OpSpec, values: tuple[Any, ...], args: tuple[Any, ...], chosen: str, graph: bool) -> None:
    key = signature(spec.name, values)
    if key is None:
        return
    if len(_plans) >= _MOST:
        _plans.clear()
    at = {id(value): place for place, value in enumerate(values) if isinstance(value, Tensor)}
    if any(isinstance(arg, Tensor) and id(arg) not in at for arg in args):
        _plans[key] = _NEVER
        return
    places = tuple(at[id(arg)] if isinstance(arg, Tensor) else (arg,) for arg in args)
    where = (spec.name, args[0].device.type)
    if where in _USABLE:
        entry = None if graph else f"{spec.stem}_fwd_{chosen}"
        _plans[key] = _Plan(where, _USABLE[where], entry, chosen, places)
