"""Sampling from a model: temperature, top-k and nucleus (top-p, Holtzman et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgpt.models.gpt import GPT, check_ids
from fastgpt.nn import evaluating


def generate(
    model: GPT,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
) -> Tensor:
    """The tokens [B, T], int64 or int32, and up to `max_new_tokens` more, int64 [B, T + n].

    The model sees the last `max_seq_length` tokens. `temperature` 0 takes the likeliest token. With `seed`
    the same call gives the same tokens; without it torch's own generator is drawn from. Generation ends
    when every row has produced `stop_token`; a row that is done repeats it.
    """
    new = list(
        stream(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_token=stop_token,
        )
    )
    return torch.cat([tokens.long(), *(token[:, None] for token in new)], dim=1)


def stream(
    model: GPT,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """As `generate`, one int64 [B] at a time, as soon as it is drawn. The arguments are checked at once."""
    check_ids("tokens", tokens, model.config.vocab_size, next(model.parameters()).device)
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens: expected shape [B, T] with T >= 1, got {tuple(tokens.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected at least 0, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if stop_token is not None and not 0 <= stop_token < model.config.vocab_size:
        raise ValueError(f"stop_token: expected an id in [0, {model.config.vocab_size}), got {stop_token}")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an integer in [-2**63, 2**63), got {seed}")
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    return _stream(model, tokens.long(), max_new_tokens, temperature, top_k, top_p, generator, stop_token)


def _stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    stop_token: int | None,
) -> Iterator[Tensor]:
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        tokens = tokens[:, -model.config.max_seq_length :]
        logits = _last_logits(model, tokens)
        token = sample(logits, temperature, top_k, top_p, generator)
        if stop_token is not None:
            token = torch.where(done, stop_token, token)
            done |= token == stop_token
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        yield token
        if stop_token is not None and done.all():
            return


@torch.no_grad()  # around one step: held across a yield it would reach into the caller's code
def _last_logits(model: GPT, tokens: Tensor) -> Tensor:
    with evaluating(model):
        logits = model(tokens)[:, -1].float()  # [B, V]
    if model.config.pad_idx is not None:
        logits[:, model.config.pad_idx] = -torch.inf  # padding is never text
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
    temperature = min(max(temperature, fp32.tiny), fp32.max)
    scores, ids = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        scores[:, top_k:] = -torch.inf
    p = scores.softmax(dim=-1)
    if top_p is not None:
        before = p.cumsum(dim=-1) - p  # the mass ahead of each token: the first token always stays
        p = p.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(p, 1, generator=generator)  # rescales p to sum to one
    return ids.gather(1, choice)[:, 0]
