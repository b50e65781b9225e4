"""Our attention as transformers' models ask for one: `attn_implementation="fastgpt"`.

Which function an attention calls stands in its configuration, which it shares with what makes the masks.

Two functions are registered under that name: the attention, and what makes its mask. With the first alone
transformers passes no mask, and a causal model looks into the future.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops

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
_BEFORE = "_fastgpt_attention"  # of a patched module: the name that its configuration had


def register() -> None:
    """Make `attn_implementation="fastgpt"` known to transformers; `patch` does. No model changes by it.

    Raises:
        ImportError: transformers is not installed, or too old to have such functions registered.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    # Boolean [B, 1, Tq, Tk], True where a query may look; None where `is_causal` says all.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def refusal(module: nn.Module) -> str | None:
    """Why this attention cannot be told to call ours, or None."""
    functions = getattr(sys.modules.get(type(module).__module__), "ALL_ATTENTION_FUNCTIONS", None)
    now = module.config._attn_implementation  # type: ignore[union-attr]
    if functions is None:
        return "computes its attention itself"
    models = vars(sys.modules[type(module).__module__]).values()
    if not any(isinstance(kind, type) and getattr(kind, "_supports_sdpa", False) for kind in models):
        return "its model does not support SDPA, whose masks ours takes"
    if now not in ("sdpa", "eager", NAME):
        return f"attn_implementation={now!r} was chosen"
    if getattr(module, "sinks", None) is not None:
        return "has attention sinks"
    if _asks_for_names(type(module).__module__):
        return "its model does something else by the name of its attention"
    return None


@functools.cache
def _asks_for_names(module: str) -> bool:
    """Whether the source compares the name with others than "eager" (as sparse attention does)."""
    source = inspect.getsource(sys.modules[module])
    asked = re.findall(r"_attn_implementation\s*(?:==|!=|not in|in)\s*(.+)", source)
    return any(not re.match(r"""["']eager["']\s*(:|$|\)|and|or)""", right.strip()) for right in asked)


def use(model: nn.Module, attentions: Iterable[nn.Module]) -> None:
    """These modules, and all of the model that share their configurations, get copies that name ours."""
    register()
    old: dict[int, Any] = {id(module.config): module.config for module in attentions}
    new = {key: copy.deepcopy(config) for key, config in old.items()}
    for config in new.values():
        config._attn_implementation_internal = NAME  # not the configurations within it, as the property would
    for module in model.modules():
        key = id(module.__dict__.get("config"))
        if key in new and _BEFORE not in module.__dict__:
            module.__dict__[_BEFORE] = old[key]._attn_implementation
            module.__dict__["config"] = new[key]


def stop(module: nn.Module) -> bool:
    """The module's configuration names again what it named before `use`; whether it did not."""
    before = module.__dict__.pop(_BEFORE, None)
    if before is None:
        return False
    module.config._attn_implementation_internal = before  # type: ignore[union-attr]
    return True


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
) -> tuple[Tensor, None]:
    """(output [B, Tq, H, D], None) of query [B, H, Tq, D], key and value [B, Hkv, Tk, D].

    Args:
        attention_mask: as for SDPA, or a model's own: boolean, or float and added.
        position_bias: added to the scores as well (T5), [1 or B, H, Tq, Tk].
        is_causal: where there is no mask: each query sees the keys up to its own place; `module.is_causal` when None.

    Raises:
        NotImplementedError: attention sinks; attention weights, which are never whole in memory.
    """
    if s_aux is not None:
        raise NotImplementedError('s_aux: expected none (attention sinks): use attn_implementation="eager"')
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            'output_attentions: expected False, the weights are never in memory: use attn_implementation="eager"'
        )
    unknown = [n for n, value in kwargs.items() if isinstance(value, Tensor) and n not in _KNOWN]
    if unknown:
        raise NotImplementedError(
            f'{unknown[0]}: expected no tensor of that name: use attn_implementation="sdpa" or "eager"'
        )
    queries = query.shape[2]
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(queries > 1 and attention_mask is None and is_causal)
    if causal and key.shape[2] > queries:
        # A static cache at its beginning: what follows the queries' own keys is not yet written.
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    mask = attention_mask if attention_mask is None else attention_mask[..., : key.shape[2]]
    if position_bias is not None:
        mask = _biased(position_bias, mask)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype, torch.float32):
        mask = mask.to(query.dtype)
    out = ops.attention(
        query, key, value, causal=causal, scale=scaling, mask=mask, softcap=softcap or 0.0, dropout_p=dropout
    )
    return out.transpose(1, 2).contiguous(), None


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -torch.inf)
    return bias + mask
