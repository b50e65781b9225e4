"""One module's class exchanged for a subclass of its own, and back.

Parameters, buffers, hooks, names and `isinstance` stay as they are: it is the same object. Nothing else of that class
is touched. Copies and pickles of the module are of the subclass too.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from torch import nn

ROLES = "_fastgpt_roles"  # of a replaced block: which of its children does what
_CLASSES: dict[tuple[type[nn.Module], type], type[nn.Module]] = {}
M = TypeVar("M", bound=nn.Module)


def exchange(module: nn.Module, fused: type, roles: Any = None) -> None:
    """From now on `module` runs the `forward` of `fused`, whose `super().forward` is its own."""
    module.__class__ = subclass(type(module), fused)
    if roles is not None:
        module.__dict__[ROLES] = roles


def restore(module: nn.Module) -> bool:
    """The module is of its own class again; whether it was not."""
    own = original(type(module))
    if own is type(module):
        return False
    module.__class__ = own
    module.__dict__.pop(ROLES, None)
    return True


def original(of: type[M]) -> type[M]:
    """The class that a module had before it was exchanged."""
    return of.__dict__.get("_fastgpt_original", of)


def subclass(own: type[nn.Module], fused: type) -> type[nn.Module]:
    key = own, fused
    if key not in _CLASSES:
        members = {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__reduce_ex__": _reduce,
            "_fastgpt_original": own,
            "_fastgpt_fused": fused,
        }
        _CLASSES[key] = type(own.__name__, (fused, own), members)
    return _CLASSES[key]


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """To pickle the two classes by name: there is no name for the one made of them."""
    kind: Any = type(self)
    return _rebuilt, (kind._fastgpt_original, kind._fastgpt_fused), self.__dict__


def _rebuilt(own: type[nn.Module], fused: type) -> nn.Module:
    if "transformers" in sys.modules:  # the model's configuration may name our attention
        from fastgpt.interop.attention import register

        register()
    kind = subclass(own, fused)
    return kind.__new__(kind)
