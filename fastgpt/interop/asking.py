"""How an attention of transformers asks for the function that it calls: read off its code.

    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )

That is the way of all of them; whoever does anything else with the name is left.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

ITSELF = "computes its attention itself"
_ASKING = re.compile(r"(get_interface\(|ALL_ATTENTION_FUNCTIONS\[)\s*self\.config\._attn_implementation\b")
# Comparisons whose outcome is the same for ours: with what it never replaces, and with what is only more precise.
_HARMLESS = re.compile(
    r"""_attn_implementation\s*(==|!=)\s*["'](eager|flash\w*)["']|["']flash\w*["']\s+(not\s+)?in\s+self\.config\._attn_implementation"""
)


def refusal(module: nn.Module, models: Iterable[Any], now: str | None) -> str | None:
    """Why this attention, within these models (innermost first), cannot be told to call ours, or None."""
    kind: Any = type(module)
    asking = asking_class(kind)
    if asking is None:
        return ITSELF
    if inspect.unwrap(kind.forward).__globals__ is not _asking(asking).__globals__:
        return "a subclass with a forward of its own"
    if not _asks_alone(kind):
        return "does something else by the name of its attention"
    functions, model = functions_of(asking), next(iter(models), None)
    if "sdpa" in functions._local_mapping or "fastgpt" in functions._local_mapping:
        return "has an SDPA of its own"
    if model is None:  # only a part of one was given
        around = [
            c
            for c in _asking(asking).__globals__.values()
            if isinstance(c, type) and hasattr(c, "_supports_sdpa")
        ]
        supporting = all(c._supports_sdpa for c in around if c.__module__ == asking.__module__)
    else:
        supporting = model._supports_sdpa
    if not supporting:
        return "its model does not support SDPA, whose masks ours takes"
    if now not in ("sdpa", "eager", "fastgpt"):
        return f"attn_implementation={now!r} was chosen"
    if now == "eager" and not any(_records_weights(m) for m in models):
        return 'attn_implementation="eager" was chosen, and who reads its weights cannot be known'
    if now == "eager" and eager_function(asking) is None:
        return "its eager attention cannot be told"
    if getattr(module, "sinks", None) is not None:
        return "has attention sinks"
    return None


def asking_class(kind: Any) -> Any:
    """The class among its bases that asks, or None."""
    return next((base for base in kind.__mro__ if _asking(base) is not None), None)


def functions_of(asking: type) -> Any:
    """The table of functions that it asks."""
    return _asking(asking).__globals__["ALL_ATTENTION_FUNCTIONS"]


def eager_function(asking: type) -> Callable[..., Any] | None:
    """What it calls for "eager": the one function of such a name that its code names."""
    asks = _asking(asking)
    found = [
        asks.__globals__.get(name) for name in asks.__code__.co_names if re.search("eager.*forward", name)
    ]
    return found[0] if len(found) == 1 and callable(found[0]) else None


@functools.cache
def _asking(kind: type) -> Any:
    found = [f for f in _functions(kind) if "ALL_ATTENTION_FUNCTIONS" in f.__code__.co_names]
    return found[0] if len(found) == 1 else None


@functools.cache
def _asks_alone(kind: type) -> bool:
    """Whether its code asks by the name, and does nothing else with it."""
    asked = 0
    for function in (f for base in kind.__mro__ for f in _functions(base)):
        if "_attn_implementation" not in function.__code__.co_names:
            continue
        try:
            source = re.sub("#.*", "", inspect.getsource(function))
        except OSError:
            return False
        asked += len(_ASKING.findall(source))
        if "_attn_implementation" in _HARMLESS.sub("", _ASKING.sub("", source)):
            return False
    return asked > 0


def _functions(kind: type) -> Iterator[types.FunctionType]:
    for member in vars(kind).values():
        function = inspect.unwrap(member) if callable(member) else None
        if isinstance(function, types.FunctionType):
            yield function


def _records_weights(model: Any) -> bool:
    """Whether a model's attention weights are recorded by hooks, which our attention sees."""
    recorded = getattr(model, "_can_record_outputs", None) or {}
    return any(name.endswith("attentions") for name in recorded)
