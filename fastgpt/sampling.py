"""How tokens are drawn from logits: temperature, top-k and nucleus sampling (Holtzman et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DEFAULT = 200  # tokens of a continuation
_HEAD = 1024  # of the likeliest tokens, among which those that top-p keeps are looked for first


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    `temperature` 0 takes the likeliest token. `top_k` keeps the k likeliest, then `top_p` of what is left the
    likeliest that make up this probability together. A continuation ends after `max_new_tokens` (None: after 200, or
    where the model's context does), or with `stop_token`. Only ids below `vocabulary` are drawn: that of a tokenizer,
    where the model's is larger.
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_token: int | None = None
    vocabulary: int | None = None

    def check(self, vocab_size: int) -> None:
        """ValueError unless a model of that vocabulary can be asked so."""
        if self.max_new_tokens is not None and not isinstance(self.max_new_tokens, int):
            raise TypeError(f"max_new_tokens: expected an int, got {self.max_new_tokens!r}")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected at least 0, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.stop_token is not None and not 0 <= self.stop_token < vocab_size:
            raise ValueError(f"stop_token: expected an id in [0, {vocab_size}), got {self.stop_token}")
        if self.vocabulary is not None and not 1 <= self.vocabulary <= vocab_size:
            raise ValueError(f"vocabulary: expected 1 to {vocab_size}, got {self.vocabulary}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer in [-2**63, 2**63), got {self.seed}")

    def limit(self, prompt: Sequence[int], context: int) -> int:
        """How many tokens may follow a prompt, in a model that sees `context` tokens."""
        return min(_DEFAULT, context - len(prompt)) if self.max_new_tokens is None else self.max_new_tokens


def without_others(logits: Tensor, pad_idx: int | None, vocabulary: int | None) -> Tensor:
    """Logits [B, V], changed in place, so that what is never text is never drawn: padding, ids without a token."""
    if pad_idx is not None:
        logits[:, pad_idx] = -torch.inf
    if vocabulary is not None:
        logits[:, vocabulary:] = -torch.inf
    return logits


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token a row from logits [B, V]: top-k first, then top-p of what is left."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # so that no temperature makes them overflow to +inf
    fp32 = torch.finfo(torch.float32)
    scores = logits / min(max(temperature, fp32.tiny), fp32.max)
    top_p = None if top_p == 1 else top_p  # all, but for rounding
    if top_k is None and top_p is None:
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)[:, 0]
    p, ids = _likeliest(scores, top_k, top_p)
    choice = torch.multinomial(p, 1, generator=generator)  # rescales p to sum to one
    return ids.gather(1, choice)[:, 0]


def _likeliest(scores: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """(p, ids) [B, n] of the tokens that top-k and top-p leave, likeliest first; p is 0 where they do not."""
    vocab_size = scores.shape[-1]
    if top_k is not None:
        kept, ids = scores.topk(min(top_k, vocab_size), dim=-1)
        p = kept.softmax(dim=-1)
    else:
        # Sorting tens of thousands of tokens would take a third of the time of a step.
        kept, ids = scores.topk(min(_HEAD, vocab_size), dim=-1)
        p = (kept - scores.logsumexp(dim=-1, keepdim=True)).exp()
        if top_p is not None and ids.shape[-1] < vocab_size and bool((p.sum(dim=-1) < top_p).any()):
            kept, ids = scores.sort(dim=-1, descending=True)
            p = kept.softmax(dim=-1)
    if top_p is not None:
        before = p.cumsum(dim=-1) - p  # the mass ahead of each token: the first token always stays
        p = p.masked_fill(before >= top_p, 0.0)
    return p, ids
