"""`fastgpt.patch(model)`: the layers of a PyTorch or transformers model on our ops, the same results.

Each module that is replaced stays the object that it is, with its parameters, hooks and place (see swap.py).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastgpt.interop import attention, blocks, head, layers, transformer
from fastgpt.interop.report import Entry, PatchReport
from fastgpt.interop.swap import exchange, original, restore

# What a rule says of a module: nothing (it is none of its kind), why it is left, or how it is replaced.
Left = str
Replaced = tuple[type, Any, str]  # the forward's class, roles, the op
Answer = None | Left | Replaced
KINDS = (
    "layer_norm", "rms_norm", "gelu", "softmax", "mlp", "linear", "transformer", "attention", "cross_entropy",
)  # fmt: skip


def patch(
    model: nn.Module,
    *,
    strict: bool = False,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> PatchReport:
    """Let the model's layers run on fastgpt's ops; the results stay within the rounding of its dtype.

    Replaced are layer and RMS norms, GELUs, softmax over the last dimension, MLP blocks, torch.nn's
    MultiheadAttention and Transformer layers, the attention of transformers' models, and their head with the
    cross-entropy on it. This one model is changed, no class and no other model; a module that overrides the `forward`
    of a class that is known is left, and so is all that is not known. `unpatch` brings their own forwards back;
    configurations of transformers stay the copies that they became, with the attention's former name.

    What then raises: attention weights that are asked for (`output_attentions`), and logits first looked at after
    `optimizer.step`. Under torch.func, forward-mode AD and traces PyTorch's own layers run; torch.func over the
    attention of transformers raises.

    Args:
        model: built, on its device. Not compiled: compile what was patched.
        strict: raise if anything of a known kind is left.
        only, exclude: kinds (see `interop.patch.KINDS`) or names of modules, with * and ?.

    Returns:
        A report of every module of a known kind: printable, and `.replaced`, `.left` as data.

    Raises:
        TypeError, ValueError: no module, a compiled one, one on the meta device, a pattern that fits nothing; with
            `strict` what was left, and then nothing is changed.
    """
    _check(model)
    names = _names(model)
    wanted, unwanted = _patterns("only", only, names), _patterns("exclude", exclude, names)
    found = _head(model)
    heads = [module for module, _, answer in found if not isinstance(answer, str)]
    found = [
        (module, *judged)
        for module in names
        if module not in heads and (judged := _judge(module)) is not None
    ] + found
    # One configuration serves many: where one attention is to stay as it is, so are those that share it.
    kept = {
        id(module.config)
        for module, kind, answer in found
        if kind == "attention"
        and (isinstance(answer, str) or not _chosen(kind, names[module], wanted, unwanted))
    }
    # The layers of a block that is taken whole are not called.
    within = {
        layer
        for module, kind, answer in found
        if kind in ("mlp", "transformer") and _chosen(kind, names[module], wanted, unwanted)
        if not isinstance(answer, str) and not (answer[1] and len(answer[1].layers) == 3)
        for layer in module.modules()
    }
    entries, work = list[Entry](), list[tuple[nn.Module, Replaced]]()
    for module, kind, answer in found:
        where = names[module]
        if kind == "linear" and module in within:
            continue
        chosen = _chosen(kind, where, wanted, unwanted)
        if chosen and kind == "attention" and not isinstance(answer, str) and id(module.config) in kept:
            answer = "shares its configuration with one that is left"
        name, own = " = ".join(where), original(type(module)).__name__
        if isinstance(answer, str):
            entries.append(Entry(name, kind, own, None, answer))
        elif not chosen:
            entries.append(Entry(name, kind, own, None, "not asked for"))
        else:
            entries.append(Entry(name, kind, own, answer[2]))
            work.append((module, answer))
    report = PatchReport(entries)
    left = [entry for entry in report.left if entry.why != "not asked for"]
    if strict and left:
        first = left[0]
        raise ValueError(
            f"strict: expected every module of a known kind to be replaced, {len(left)} are not, the first "
            f"{first.name} ({first.module}): {first.why}"
        )
    for module, (fused, roles, _) in work:
        if fused is not _Attention and original(type(module)) is type(module):
            exchange(module, fused, roles)
    attentions = [module for module, (fused, _, _) in work if fused is _Attention]
    if attentions:
        attention.use(model, attentions)
    return report


def unpatch(model: nn.Module) -> int:
    """Every module of the model runs its own `forward` again; how many did not."""
    _check(model)
    return sum(restore(module) + attention.stop(module) for module in model.modules())


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or model._compiled_call_impl is not None:
        raise ValueError(
            "model: expected one that is not compiled yet, got one that is: patch it, then compile"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: expected a torch.nn.Module in Python, got a TorchScript module")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model: expected its weights on a device, got them on meta: load them, then patch")


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Of every module all the places where it is."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _patterns(
    name: str, given: str | Iterable[str] | None, names: dict[nn.Module, list[str]]
) -> tuple[str, ...] | None:
    if given is None:
        return None
    patterns = (given,) if isinstance(given, str) else tuple(given)
    everywhere = [where for found in names.values() for where in found]
    for pattern in patterns:
        if pattern not in KINDS and not fnmatch.filter(everywhere, pattern):
            raise ValueError(
                f"{name}: expected a kind ({', '.join(KINDS)}) or names of modules, got {pattern!r}"
            )
    return patterns


def _chosen(
    kind: str, names: list[str], only: tuple[str, ...] | None, exclude: tuple[str, ...] | None
) -> bool:
    def fits(patterns: Iterable[str]) -> bool:
        return any(p == kind or any(fnmatch.fnmatchcase(name, p) for name in names) for p in patterns)

    return (only is None or fits(only)) and not fits(exclude or ())


# --- the rules ---


def _judge(module: nn.Module) -> tuple[str, Left | Replaced] | None:
    """(kind, answer) of the first rule that has one."""
    for kind, rule in _RULES:
        answer = rule(module)
        if answer is not None and "forward" in module.__dict__:
            return kind, "its forward was exchanged for another"
        if answer is not None:
            return kind, answer
    return None


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


class _Attention:
    """Stands for the change of an attention's configuration, where others name a forward."""


def _attention(module: nn.Module) -> Answer:
    """An attention of transformers that asks its configuration which function to call."""
    config = getattr(module, "config", None)
    if not hasattr(config, "_attn_implementation") or not type(module).__name__.endswith("Attention"):
        return None
    return attention.refusal(module) or (_Attention, None, "ops.attention")


_RULES: tuple[tuple[str, Callable[[nn.Module], Answer]], ...] = (
    ("layer_norm", _layer_norm),
    ("rms_norm", _rms_norm),
    ("gelu", _gelu),
    ("softmax", _softmax),
    ("transformer", _transformer),
    ("attention", _attention),
    ("mlp", _mlp),
    ("linear", _linear),
)


def _head(model: nn.Module) -> list[tuple[nn.Module, str, Left | Replaced]]:
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
    return [(layer, "cross_entropy", answer)]
