"""`fastgpt.patch(model)`: the layers of a PyTorch or transformers model on our ops, the same results.

Each module that is replaced stays the object that it is, with its parameters, hooks and place (see swap.py).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastgpt.interop import attention
from fastgpt.interop.report import Entry, PatchReport
from fastgpt.interop.rules import KINDS, WHOLE, Attention, Replaced, head_of, judge
from fastgpt.interop.swap import exchange, original, ours, restore, without


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
    cross-entropy on it. This one model is changed, no class, no configuration and no other model; a module that
    overrides the `forward` of a class that is known is left, and so is all that is not known. What an earlier call
    replaced stays so. `unpatch` brings their own forwards back.

    Of an attention of transformers, the function that its configuration names is replaced: name another
    (`set_attn_implementation`), and that one runs. Where attention weights are wanted (`output_attentions`), its
    model's eager attention does. Logits first looked at after `optimizer.step` raise. Under torch.func,
    forward-mode AD, traces and modes that watch PyTorch's functions, PyTorch's own layers run; torch.jit.script
    refuses what is replaced. Of a `forward` that somebody puts on a whole class afterwards, nothing is known.
    Quantise before: `torch.ao.quantization.quantize_dynamic` asks for the very class of a layer, and passes by
    those that are replaced.

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
    around = _models_around(model)
    found = head_of(model)
    heads = [module for module, _, answer in found if not isinstance(answer, str)]
    found = [
        (module, *judged)
        for module in names
        if module not in heads and (judged := judge(module, around[module])) is not None
    ] + found
    within = {
        layer
        for module, kind, answer in found
        if kind in WHOLE and _chosen(kind, names[module], wanted, unwanted)
        if not isinstance(answer, str) and not (answer[1] and len(answer[1].layers) == 3)
        for layer in module.modules()
    }
    entries, work = list[Entry](), list[tuple[nn.Module, Replaced | None]]()
    for module, kind, answer in found:
        where = names[module]
        if kind == "linear" and module in within:
            continue
        name, own = " = ".join(where), original(type(module)).__name__
        if isinstance(answer, str):
            entries.append(Entry(name, kind, own, None, answer))
            work.append((module, None))
        elif not _chosen(kind, where, wanted, unwanted) and not _is_patched(module):
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
    for module, how in work:
        if how is None:  # what was left has to be as it was, whatever it was when it was patched before
            restore(module)
            attention.stop(module)
        elif how[0] is Attention:
            attention.use(module)
        else:
            exchange(module, *how[:2])
    return report


def unpatch(model: nn.Module) -> int:
    """Every module of the model runs its own `forward` again; how many did not.

    Raises:
        ValueError: a class was made of a replaced module's since that cannot be made anew without ours; then nothing
            is changed.
    """
    _check(model)
    for module in model.modules():
        without(type(module))
    return sum(restore(module) + attention.stop(module) for module in model.modules())


def _is_patched(module: nn.Module) -> bool:
    return ours(type(module)) is not None or isinstance(module.__dict__.get("config"), attention.View)


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


def _models_around(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Of every module the models of transformers that it is in, the innermost first."""
    models: dict[nn.Module, list[nn.Module]] = {}

    def walk(module: nn.Module, around: list[nn.Module]) -> None:
        around = [module, *around] if hasattr(type(module), "_supports_sdpa") else around
        if module not in models:
            models[module] = around
            for child in module.children():
                walk(child, around)

    walk(model, [])
    return models


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
