"""Our attention as transformers' models ask for one.

An attention of transformers calls the function that its configuration names. `use` gives one such module a view of
its configuration, which names ours for as long as the configuration itself names what it did then. Everybody else
(who makes masks, saves the model, builds another) has the configuration itself, and a later choice of the user's
holds.

By name, `attn_implementation="fastgpt"`, it is the configuration that says so. Two functions are registered for
that: the attention, and what makes its mask. With the first alone transformers passes no mask, and a causal model
looks into the future.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.interop.asking import asking_class, eager_function, functions_of
from fastgpt.interop.layers import is_ours

NAME = "fastgpt"
# Tensors that models hand on to every attention, of which the masks know already.
_KNOWN = (
    "position_ids",
    "cache_position",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "num_items_in_batch",
    "token_type_ids",
)
_collector: Any = None  # where transformers says which outputs are recorded


def register() -> None:
    """Make `attn_implementation="fastgpt"` known to transformers; `patch` does. No model changes by it.

    Raises:
        ImportError: transformers is not installed, or too old to have such functions registered.
    """
    global _collector
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    # Boolean [B, 1, Tq, Tk], True where a query may look; None where `is_causal` says all.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    capturing = sys.modules.get(
        "transformers.utils.output_capturing"
    )  # older ones ask by `output_attentions`
    _collector = getattr(capturing, "_active_collector", None)


# --- one module ---


def use(module: nn.Module) -> None:
    config = whole(module.config)
    before = config._attn_implementation
    module.__dict__["config"] = config if before == NAME else view(config, before, asking_class(type(module)))


def stop(module: nn.Module) -> bool:
    """The module has its configuration itself again; whether it had not."""
    config = module.__dict__.get("config")
    if not isinstance(config, View):
        return False
    module.__dict__["config"] = whole(config)
    return True


def whole(config: Any) -> Any:
    """The configuration that a view shows."""
    return config._fastgpt_of if isinstance(config, View) else config


class View:
    """First base of a class made of a configuration's: all attributes are the configuration's, whose dictionary it
    has, but the name of the attention. Pickles of it import this file."""

    __slots__ = ("_fastgpt_of",)
    _fastgpt_of: Any
    _fastgpt_before: str  # what the configuration named
    _fastgpt_asking: type  # the class of the attention

    @property
    def _attn_implementation(self) -> Any:
        now = self._attn_implementation_internal  # type: ignore[attr-defined]
        return NAME if now == self._fastgpt_before else now

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._fastgpt_of._attn_implementation = value

    def __init_subclass__(cls) -> None:
        """Not transformers', which would make a dataclass of it."""

    def __copy__(self) -> Any:
        return copy.copy(self._fastgpt_of)

    def __deepcopy__(self, memo: Any) -> Any:
        return view(copy.deepcopy(self._fastgpt_of, memo), self._fastgpt_before, self._fastgpt_asking)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return view, (self._fastgpt_of, self._fastgpt_before, self._fastgpt_asking)


def view(config: Any, before: str, asking: Any) -> Any:
    register()
    of: Any = type(config)
    kind = _view_class(of, before, asking)
    seen = kind.__new__(kind)
    object.__setattr__(seen, "__dict__", config.__dict__)
    object.__setattr__(seen, "_fastgpt_of", config)
    return seen


@functools.cache
def _view_class(kind: Any, before: str, asking: Any) -> Any:
    members = {
        "__slots__": (),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "_fastgpt_before": before,
        "_fastgpt_asking": asking,
        "_fastgpt_functions": (functions_of(asking)["sdpa"], eager_function(asking)),
    }
    return type(kind.__name__, (View, kind), members)


# --- the function ---


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """(output [B, Tq, H, D], None) of query [B, H, Tq, D], key and value [B, Hkv, Tk, D].

    Where attention weights are wanted (`output_attentions`), which ours never has in memory, the model's eager
    function gives both. What ours does not take goes to the function that the module called before.

    Args:
        attention_mask: as for SDPA, or a model's own: boolean, or float and added.
        position_bias: added to the scores as well (T5), [1 or B, H, Tq, Tk].
        is_causal: where there is no mask: each query sees the keys up to its own place; `module.is_causal` when None.

    Raises:
        NotImplementedError: attention weights of a model that has no eager function; by name alone, attention sinks
            and other tensors that ours does not know.
    """
    before = getattr(getattr(module, "config", None), "_fastgpt_before", None)
    extra = {"is_causal": is_causal, "softcap": softcap, "position_bias": position_bias, "s_aux": s_aux}
    rest = {**{name: given for name, given in extra.items() if given is not None}, **kwargs}
    queries = query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    # Eager attention sees all where it gets no mask.
    causal = bool(queries > 1 and attention_mask is None and causal and before != "eager")

    if _weights_wanted(module, before, kwargs):
        function, mask = _functions(module)[1], attention_mask
        if function is None:
            raise NotImplementedError(
                'output_attentions: expected False, the weights are never in memory: use attn_implementation="eager"'
            )
        if before != "eager":
            mask = _added(mask, causal, query, key)
        return function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **rest)

    unknown = [n for n, given in rest.items() if isinstance(given, Tensor) and n not in _KNOWN]
    unknown = [n for n in unknown if n != "position_bias"]
    if unknown and before is None:
        name = unknown[0] if unknown[0] != "s_aux" else "s_aux (attention sinks)"
        raise NotImplementedError(
            f'{name}: expected no tensor of that name: use attn_implementation="sdpa" or "eager"'
        )
    fitting = _fitting(query, key, value, attention_mask, position_bias)
    if unknown or fitting is None:
        function = _functions(module)[1 if before == "eager" else 0]
        return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest)

    query, key, value = fitting
    if causal and key.shape[2] > queries:
        # A static cache at its beginning: what follows the queries' own keys is not yet written.
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    mask = attention_mask if position_bias is None else _biased(position_bias, attention_mask)
    out = ops.attention(
        query, key, value, causal=causal, scale=scaling, mask=mask, softcap=softcap or 0.0, dropout_p=dropout
    )
    return out.transpose(1, 2).contiguous(), None


def _functions(module: nn.Module) -> tuple[Any, Any]:
    """transformers' SDPA and eager attention, as the module would call them."""
    known = getattr(getattr(module, "config", None), "_fastgpt_functions", None)
    if known is not None:
        return known
    asking = asking_class(type(module))
    if asking is not None:
        return functions_of(asking)["sdpa"], eager_function(asking)
    from transformers import AttentionInterface

    return AttentionInterface._global_mapping["sdpa"], None


def _weights_wanted(module: nn.Module, before: str | None, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("output_attentions"):
        return True
    if before == "eager" and any(
        getattr(hook, "__name__", "") != "output_capturing_hook" for hook in module._forward_hooks.values()
    ):
        return True  # a hook of the user's, who chose eager attention, whose second result is the weights
    if _collector is None:
        return False
    # As in transformers: tracing does not take a ContextVar, but where hooks ask for it.
    if not torch.compiler.is_compiling():
        recorded = _collector.get()
    elif _collector.compiling:
        recorded = _collector.global_var
    else:
        recorded = _collector.get() if module._forward_hooks else None
    return any(name.endswith("attentions") for name in recorded or ())


def _fitting(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The three with batches of one expanded to the others', as SDPA does; None if ours takes no such tensors."""
    floats = [t for t in (mask, bias) if t is not None and t.dtype != torch.bool]
    if not is_ours(query, key, value, *floats) or (
        mask is not None and type(mask) not in (Tensor, type(query))
    ):
        return None
    if any(t.dim() != 4 for t in (query, key, value)) or key.shape[1] != value.shape[1]:
        return None
    if query.shape[1] % max(key.shape[1], 1) or key.shape[2] != value.shape[2]:
        return None
    batch = query.shape[0] if key.shape[0] == 1 else key.shape[0]
    sizes = batch, query.shape[1], query.shape[2], key.shape[2]
    for added in (mask, bias):
        if added is None:
            continue
        if added.dtype not in (torch.bool, query.dtype, torch.float32) or added.dim() != 4:
            return None
        if any(n not in (1, size) for n, size in zip(added.shape, sizes, strict=True)):
            return None
    if all(t.shape[0] == batch for t in (query, key, value)):
        return query, key, value
    if any(t.shape[0] not in (1, batch) for t in (query, key, value)):
        return None
    query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
    return query, key, value


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:  # the least number, as theirs: of a row that sees nothing no NaN
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _added(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask that eager attention adds, of the one that SDPA takes."""
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[
            None, None
        ]
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)
