"""One module's class exchanged for a subclass of its own, and back.

Parameters, buffers, hooks, names and `isinstance` stay as they are: it is the same object. Nothing else of that class
is touched. Copies and pickles of the module are of the subclass too; what its class is called for (a slice of an
nn.Sequential) is of its own class.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any, TypeVar

from torch import nn

ROLES = "_fastgpt_roles"  # of a replaced block: which of its children does what
_CLASSES: dict[tuple[type[nn.Module], type], type[nn.Module]] = {}
M = TypeVar("M", bound=nn.Module)


def exchange(module: nn.Module, fused: type, roles: Any = None) -> None:
    """From now on `module` runs the `forward` of `fused`, whose `super().forward` is its own."""
    if ours(type(module)) is None or type(module).__dict__.get("_fastgpt_fused") not in (None, fused):
        module.__class__ = subclass(original(type(module)), fused)
    module.__dict__.pop(ROLES, None)
    if roles is not None:
        module.__dict__[ROLES] = roles


def restore(module: nn.Module) -> bool:
    """The module is of its own class again; whether it was not."""
    own = without(type(module))
    if own is type(module):
        return False
    module.__class__ = own
    module.__dict__.pop(ROLES, None)
    return True


def original(of: type[M]) -> type[M]:
    """The class that a module had before it was exchanged."""
    # Not by `of.__dict__`: Dynamo does not look into a class where a dict (of a cache) changes in the same graph.
    known: Any = of
    return known._fastgpt_original if getattr(of, "_fastgpt_made", None) is of else of


def ours(kind: type) -> Any:
    """Of a class and its bases the one that `exchange` made, or None: others make subclasses of ours."""
    return next((c for c in kind.__mro__ if "_fastgpt_original" in c.__dict__), None)


def without(kind: type[nn.Module]) -> type[nn.Module]:
    """The class without ours among its bases: of what parametrizations, fully_shard and their like have made of
    ours, the same made of the module's own.

    Raises:
        ValueError: one of its methods asks for its class by name (`super()`), of which there is no copy.
    """
    if ours(kind) is None:
        return kind
    if "_fastgpt_original" in kind.__dict__:
        return kind.__dict__["_fastgpt_original"]
    members = {n: v for n, v in kind.__dict__.items() if n not in ("__dict__", "__weakref__")}
    if any("__class__" in f.__code__.co_freevars for v in members.values() for f in _functions(v)):
        raise ValueError(
            f"model: expected modules whose class patch has made, got {kind.__name__}, which somebody made of one "
            "since: undo that, then unpatch"
        )
    meta: Any = type(kind)
    return meta(kind.__name__, tuple(map(without, kind.__bases__)), members)


def _functions(member: Any) -> list[types.FunctionType]:
    parts = [getattr(member, name, None) for name in ("__func__", "fget", "fset", "fdel")]
    return [f for f in (member, *parts) if isinstance(f, types.FunctionType)]


def subclass(own: type[nn.Module], fused: type) -> type[nn.Module]:
    key = own, fused
    if key not in _CLASSES:

        @functools.wraps(own.__init__)
        def made_anew(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            if type(self) is kind:
                self.__class__ = own
            own.__init__(self, *args, **kwargs)

        members = {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__init__": made_anew,
            "__reduce_ex__": _reduce,
            "__prepare_scriptable__": _refuse_script,
            "_fastgpt_original": own,
            "_fastgpt_fused": fused,
        }
        kind: Any = type(own.__name__, (fused, own), members)
        kind._fastgpt_made = kind  # of it alone, not of what others make of it
        _CLASSES[key] = kind
    return _CLASSES[key]


def _refuse_script(self: nn.Module) -> Any:
    """torch.jit.script asks before it compiles anything."""
    raise RuntimeError(
        f"torch.jit.script: expected PyTorch's own layers, got a {type(self).__name__} that patch has replaced: "
        "unpatch(model), then script it"
    )


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """To pickle as its own class says, with the two classes by name: there is none for the one made of them."""
    kind: Any = type(self)
    if "_fastgpt_original" not in kind.__dict__:  # somebody's class made of ours, as picklable as of its own
        return super(ours(kind), self).__reduce_ex__(protocol)
    own = kind._fastgpt_original
    how = own.__reduce_ex__(self, protocol)
    if isinstance(how, str):
        return how
    make, args, *rest = how
    make, *args = (own if value is kind else value for value in (make, *args))
    return _rebuilt, (kind._fastgpt_fused, self.__dict__.get(ROLES), make, tuple(args)), *rest


def _rebuilt(fused: type, roles: Any, make: Any, args: tuple[Any, ...]) -> nn.Module:
    if "transformers" in sys.modules:  # the model's configuration may name our attention
        from fastgpt.interop.attention import register

        register()
    module = make(*args)
    exchange(module, fused, roles)
    return module
