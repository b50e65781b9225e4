"""Which modules `patch` knows, and what it says of each: replaced how, or left and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fastgpt.interop import asking, attention, blocks, head, layers, transformer
from fastgpt.interop.swap import original, ours

# What a rule says of a module: nothing (it is none of its kind), why it is left, or how it is replaced.
Left = str
Replaced = tuple[type, Any, str]  # the forward's class, roles, the op
Answer = None | Left | Replaced
KINDS = (
    "layer_norm", "rms_norm", "gelu", "softmax", "mlp", "linear", "transformer", "attention", "cross_entropy",
)  # fmt: skip
WHOLE = ("mlp", "transformer")  # whose layers are not called


class Attention:
    """Stands for a view of an attention's configuration, where others name a forward."""


def judge(module: nn.Module, around: Iterable[nn.Module]) -> tuple[str, Left | Replaced] | None:
    """(kind, answer) of the first rule that has one.

    around: the models of transformers that it is in, the innermost first.
    """
    kind = type(module)
    if original(kind) is kind and ours(kind) is not None:
        fused = ours(kind)._fastgpt_fused
        return _KIND_OF[fused], (fused, None, f"as patched before, within {kind.__name__}")
    answer = _attention(module, around)
    if answer is not None:
        return "attention", _but_exchanged(answer, module)
    for name, rule in _RULES:
        answer = rule(module)
        if answer is not None:
            # Who takes a parametrization off takes the topmost class for the one that it made.
            if parametrize.is_parametrized(module):
                return name, "parametrized"
            return name, _but_exchanged(answer, *(module.modules() if name in WHOLE else (module,)))
    return None


def _but_exchanged(answer: Left | Replaced, *called: nn.Module) -> Left | Replaced:
    """Of a `forward` on a module, or of one on a class of PyTorch's that somebody put there for all modules."""
    for module in called:
        kind = next(kind for kind in original(type(module)).__mro__ if "forward" in vars(kind))
        theirs = kind.__module__.startswith(("torch.nn.", "transformers."))
        if "forward" in module.__dict__ or (theirs and vars(kind)["forward"].__module__ != kind.__module__):
            of = "its" if module is called[0] else f"its {type(module).__name__}'s"
            return f"{of} forward was exchanged for another"
    return answer


def _attention(module: nn.Module, around: Iterable[nn.Module]) -> Answer:
    """An attention of transformers that asks its configuration which function to call."""
    config = getattr(module, "config", None)
    if not hasattr(config, "_attn_implementation"):
        return None
    if asking.asking_class(type(module)) is None:
        inner = any(asking.asking_class(type(m)) for m in module.modules())
        return None if inner or not type(module).__name__.endswith("Attention") else asking.ITSELF
    if "config" not in module.__dict__:
        return "its configuration is not its own attribute"
    now = attention.whole(config)._attn_implementation
    return asking.refusal(module, around, now) or (Attention, None, "ops.attention")


def _own(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether it runs the `forward` of that class, and what that calls of its own."""
    kind, parts = original(type(module)), ("forward", "_sa_block", "_ff_block", "_mha_block")
    return all(getattr(kind, part, None) is getattr(known, part, None) for part in parts)


def _layer_norm(module: nn.Module) -> Answer:
    if not isinstance(module, nn.LayerNorm):
        return None
    if not _own(module, nn.LayerNorm):
        return "a subclass with a forward of its own"
    if len(module.normalized_shape) != 1:
        return f"over {len(module.normalized_shape)} dimensions"
    return layers.FusedLayerNorm, None, "ops.layer_norm"


def _rms_norm(module: nn.Module) -> Answer:
    kind = original(type(module))
    if isinstance(module, nn.RMSNorm):
        if not _own(module, nn.RMSNorm):
            return "a subclass with a forward of its own"
        if len(module.normalized_shape) != 1:
            return f"over {len(module.normalized_shape)} dimensions"
        return layers.FusedRMSNorm, None, "ops.rms_norm"
    if not (kind.__name__.endswith("RMSNorm") or kind.__name__ == "T5LayerNorm"):
        return None
    if not layers.is_rms_norm(module):
        return "another norm than weight * x / sqrt(mean(x^2) + variance_epsilon)"
    return layers.FusedTransformersRMSNorm, None, "ops.rms_norm"


def _gelu(module: nn.Module) -> Answer:
    kind = original(type(module))
    if isinstance(module, nn.GELU):
        if not _own(module, nn.GELU):
            return "a subclass with a forward of its own"
        return layers.FusedGELU, None, "ops.gelu"
    if "GELU" not in kind.__name__:
        return None
    if layers.approximate_of(module) is None:
        return "another function than GELU by erf or tanh"
    return layers.FusedTransformersGELU, None, "ops.gelu"


def _softmax(module: nn.Module) -> Answer:
    if not isinstance(module, nn.Softmax):
        return None
    if not _own(module, nn.Softmax):
        return "a subclass with a forward of its own"
    if module.dim is None or module.dim == 0:
        return f"dim={module.dim}, not the last"
    return layers.FusedSoftmax, None, "ops.softmax"


def _mlp(module: nn.Module) -> Answer:
    found = blocks.find_roles(module)
    if found is None or isinstance(found, str):
        return found
    op = {1: "ops.linear with its GELU", 2: "ops.mlp", 3: "ops.geglu"}[len(found.layers)]
    if len(found.layers) == 3 and blocks.is_silu(getattr(module, found.activation)):
        op = "ops.swiglu"
    return blocks.FusedBlock, found, op


def _transformer(module: nn.Module) -> Answer:
    known: dict[type[nn.Module], tuple[type, str]] = {
        nn.MultiheadAttention: (transformer.FusedMultiheadAttention, "ops.attention"),
        nn.TransformerEncoderLayer: (transformer.FusedEncoderLayer, "ops.attention, mlp, layer_norm"),
        nn.TransformerDecoderLayer: (transformer.FusedDecoderLayer, "ops.attention, mlp, layer_norm"),
    }
    for kind, (fused, op) in known.items():
        if not isinstance(module, kind):
            continue
        if not _own(module, kind):
            return "a subclass with a forward of its own"
        within = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
        whys = [transformer.refusal(m) for m in within] + [transformer.layer_refusal(module)]
        why = next((why for why in whys if why is not None), None)
        return why or (fused, None, op)
    return None


def _linear(module: nn.Module) -> Answer:
    """Quietly: a layer that multiplies as it did is none that was left."""
    if not layers.is_layer(module) or not module.weight.is_cpu:
        return None  # on a GPU PyTorch's products are the fastest that there are
    return layers.FusedLinear if isinstance(module, nn.Linear) else layers.FusedConv1D, None, "ops.linear"


_RULES: tuple[tuple[str, Callable[[nn.Module], Answer]], ...] = (
    ("layer_norm", _layer_norm),
    ("rms_norm", _rms_norm),
    ("gelu", _gelu),
    ("softmax", _softmax),
    ("transformer", _transformer),
    ("mlp", _mlp),
    ("linear", _linear),
)


_KIND_OF: dict[type, str] = {
    layers.FusedLayerNorm: "layer_norm",
    layers.FusedRMSNorm: "rms_norm",
    layers.FusedTransformersRMSNorm: "rms_norm",
    layers.FusedGELU: "gelu",
    layers.FusedTransformersGELU: "gelu",
    layers.FusedSoftmax: "softmax",
    layers.FusedLinear: "linear",
    layers.FusedConv1D: "linear",
    blocks.FusedBlock: "mlp",
    transformer.FusedMultiheadAttention: "transformer",
    transformer.FusedEncoderLayer: "transformer",
    transformer.FusedDecoderLayer: "transformer",
    head.FusedHead: "cross_entropy",
}


def head_of(model: nn.Module) -> list[tuple[nn.Module, str, Left | Replaced]]:
    """The output head of a language model of transformers."""
    ask = getattr(model, "get_output_embeddings", None)
    layer = ask() if callable(ask) else None
    if not isinstance(layer, nn.Module) or layer not in set(model.modules()):
        return []
    answer: Left | Replaced = head.FusedHead, None, "ops.linear_cross_entropy"
    if original(type(layer)) is not nn.Linear:
        answer = "its head is another layer than nn.Linear"
    elif layer.bias is not None:
        answer = "its head has a bias"
    return [(layer, "cross_entropy", _but_exchanged(answer, layer))]
