"""What weights in bf16 and int8 save, and what they cost: their bytes, and the perplexity with them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fastgpt.decoding import WEIGHTS, rounded
from fastgpt.generate import perplexity
from fastgpt.models.gpt import GPT
from fastgpt.tasks.text import text_tokens
from fastgpt.train.tokenizer import Tokenizer

_TAIL = 20_000  # tokens of the default text, its end


def table(model: GPT, tokenizer: Tokenizer, text: Sequence[Path] | None) -> str:
    """A line for each kind of weights; with `text` (none: the default one's tail) its perplexity, else without.

    Rounded are the weights that a step of decoding reads: of all products, and the token embedding.
    """
    tokens = None if text is None else text_tokens(tokenizer, text)
    if tokens is not None and not text:
        tokens = tokens[-_TAIL:]
    lines = [
        f"{'weights':8} {'MB':>8}" + ("" if tokens is None else f" {'perplexity':>12} {'beside fp32':>12}")
    ]
    base = None
    for name, dtype in WEIGHTS.items():
        kept = copy.deepcopy(model).float().eval()
        size = 0
        for module in kept.modules():
            for parameter in module.parameters(recurse=False):
                if not (parameter.dim() == 2 and (isinstance(module, nn.Linear) or module is kept.wte)):
                    size += parameter.nbytes
                    continue
                packed = rounded(parameter, dtype)
                size += sum(t.nbytes for t in packed if t is not None)
                wide = packed.weight.float()
                with torch.no_grad():
                    parameter.copy_(wide if packed.scale is None else wide * packed.scale[:, None])
        line = f"{name:8} {size / 1e6:8.1f}"
        if tokens is not None:
            value = perplexity(kept, tokens).value
            base = value if base is None else base
            line += f" {value:12.4f} {value / base - 1:+12.2%}"
        lines.append(line)
    return "\n".join(lines)
