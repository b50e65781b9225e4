"""Text from a model: continuations of one tensor of prompts or of many prompts at once, and scores.

`generate` and `stream` take a tensor of prompts of one length, on any device, and see a window of the last tokens.
`Engine` takes prompts of any lengths, on the CPU, keeps keys and values, and gives each continuation as it would be
alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.decoding import CPU, Decoder, Features
from fastgpt.models.gpt import GPT, check_ids
from fastgpt.nn import evaluating
from fastgpt.sampling import Sampling as Sampling
from fastgpt.sampling import sample, without_others


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
    vocabulary: int | None = None,
) -> Tensor:
    """The tokens [B, T], int64 or int32, and up to `max_new_tokens` more, int64 [B, T + n].

    The model sees the last `max_seq_length` tokens. `temperature` 0 takes the likeliest token. With `seed`
    the same call gives the same tokens; without it torch's own generator is drawn from. Generation ends
    when every row has produced `stop_token`; a row that is done repeats it. Only ids below `vocabulary` are drawn.
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
            vocabulary=vocabulary,
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
    vocabulary: int | None = None,
) -> Iterator[Tensor]:
    """As `generate`, one int64 [B] at a time, as soon as it is drawn. The arguments are checked at once."""
    check_ids("tokens", tokens, model.config.vocab_size, next(model.parameters()).device)
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens: expected shape [B, T] with T >= 1, got {tuple(tokens.shape)}")
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, stop_token, vocabulary)
    sampling.check(model.config.vocab_size)
    if max_new_tokens is None:
        raise TypeError("max_new_tokens: expected an int, got None")
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    return _stream(model, tokens.long(), max_new_tokens, sampling, generator)


def _stream(
    model: GPT, tokens: Tensor, max_new_tokens: int, sampling: Sampling, generator: torch.Generator | None
) -> Iterator[Tensor]:
    stop = sampling.stop_token
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        tokens = tokens[:, -model.config.max_seq_length :]
        logits = without_others(_last_logits(model, tokens), model.config.pad_idx, sampling.vocabulary)
        if not bool(logits.amax(dim=-1).isfinite().all()):
            raise FloatingPointError("logits: expected finite ones, got NaN or infinity")
        token = sample(logits, sampling.temperature, sampling.top_k, sampling.top_p, generator)
        if stop is not None:
            token = torch.where(done, stop, token)
            done |= token == stop
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        yield token
        if stop is not None and done.all():
            return


@torch.no_grad()  # around one step: held across a yield it would reach into the caller's code
def _last_logits(model: GPT, tokens: Tensor) -> Tensor:
    with evaluating(model):
        return model(tokens)[:, -1].float()  # [B, V]


# --- batches of prompts ---


@dataclass
class Continuation:
    """What followed one prompt: tokens, and the natural logarithm of each one's probability as the model has it."""

    prompt: int  # which of the prompts
    sample: int  # which of its samples
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: str | None = None  # "stop" or "length"
    limit: int = field(default=0, compare=False)  # tokens, of "length"

    @property
    def said(self) -> list[int]:
        """The tokens without the one that ended them."""
        return self.tokens[:-1] if self.finished == "stop" else self.tokens


_Active = dict[int, tuple[Continuation, int, torch.Generator]]  # by row; the token that comes next into it


class Engine:
    """Continuations of prompts of any lengths, several at once, each as it would be alone.

    Args:
        model: on the CPU. Its weights are copied.
        weights: "fp32", "bf16" or "int8", as for `decoding.Decoder`.
        batch: sequences that are decoded together, 1 to 64.
    """

    def __init__(self, model: GPT, *, weights: str = "fp32", batch: int = 1) -> None:
        self.decoder = Decoder(model, weights=weights, batch=batch)
        self.config = model.config
        self.active = 0  # sequences in the last step
        self._runs = 0

    @property
    def bytes_per_token(self) -> float:
        """What the last step read for each of its tokens: the weights, once for all, and keys and values."""
        return self.decoder.bytes_per_step / max(self.active, 1)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        samples: int = 1,
        only: Sequence[tuple[int, int]] | None = None,
        features: Sequence[Features | None] | None = None,
    ) -> Iterator[Continuation]:
        """Every continuation each time that it has grown by a token (or ended without one), until all have ended.

        `samples` of each prompt, or `only` these (prompt, sample). Who sets `finished` ends a continuation.
        `features`: for each prompt what takes the place of some of its tokens, but of the last.

        A prompt takes a row when one is free and leaves it when it ends: no time goes into padding. Sample i draws
        from a generator of its own, seeded by `sampling.seed` and i alone, so that a text depends neither on the
        other prompts nor on the batch.

        Raises:
            ValueError: naming the prompt, what was expected and what came: at once, before the first token.
            FloatingPointError: the model's logits are not numbers.
            RuntimeError: another run has begun meanwhile; they would share rows.
        """
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        self.check(sampling, prompts, [f"prompt {i}" for i in range(len(prompts))])
        if only is None:
            only = [(i, j) for i in range(len(prompts)) for j in range(samples)]
        if features is not None and len(features) != len(prompts):
            raise ValueError(
                f"features: expected one for each of {len(prompts)} prompts, got {len(features)}"
            )
        return self._run(prompts, sampling, only, features or [None] * len(prompts))

    def check(self, sampling: Sampling, prompts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
        """ValueError, by the prompt's name, unless each can be continued so."""
        sampling.check(self.config.vocab_size)
        pad, most = self.config.pad_idx, self.decoder.max_length
        if pad is not None and sampling.stop_token == pad:
            raise ValueError(f"stop_token: expected another than pad_idx={pad}, which is never drawn")
        for name, prompt in zip(names, prompts, strict=True):
            if len(prompt) < 1:
                raise ValueError(f"{name}: expected at least one token, got none")
            wanted = 1 if sampling.max_new_tokens is None else sampling.max_new_tokens
            if len(prompt) + wanted > most:
                raise ValueError(
                    f"{name}: expected at most {most} tokens, the model's context, got {len(prompt)} and "
                    f"max_new_tokens={wanted}"
                )
            check_ids(name, torch.tensor(prompt), self.config.vocab_size, torch.device("cpu"))
            if pad in prompt:
                raise ValueError(f"{name}: expected none equal to pad_idx={pad}")

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        only: Sequence[tuple[int, int]],
        features: Sequence[Features | None],
    ) -> Iterator[Continuation]:
        waiting = deque(Continuation(i, j) for i, j in only)
        free, active = list(range(self.decoder.batch))[::-1], _Active()
        seed = int(torch.randint(2**62, ())) if sampling.seed is None else sampling.seed
        self._runs += 1
        this = self._runs
        while waiting or active:
            while waiting and free:
                new, row = waiting.popleft(), free.pop()
                self.decoder.reset(row)
                # Far apart, so that no sample of one seed is one of the next. Without a seed, prompts differ, too.
                apart = new.sample + (new.prompt << 20 if sampling.seed is None else 0)
                generator = torch.Generator().manual_seed((seed + apart * 0x9E3779B97F4A7C15) % 2**63)
                prompt = prompts[new.prompt]
                new.limit = sampling.limit(prompt, self.decoder.max_length)
                like = next((r for r, (of, _, _) in active.items() if of.prompt == new.prompt), None)
                active[row] = new, prompt[-1], generator
                if new.limit == 0:
                    new.finished = "length"
                    yield new
                    self._leave(this, active, free)
                elif like is not None:  # another sample of this prompt
                    self.decoder.copy(like, row, len(prompt) - 1)
                else:
                    tokens = torch.tensor(prompt[:-1], dtype=torch.int64)
                    self.decoder.append(row, tokens, features[new.prompt])
            if not active:
                continue
            rows = sorted(active)
            last = torch.tensor([active[row][1] for row in rows])
            logits = self.decoder.step(last, torch.tensor(rows))
            self.active = len(rows)
            drawn = [(active[row][0], active[row][2]) for row in rows]
            chosen, logprobs = self._draw(logits, drawn, sampling)
            for row, token, logprob in zip(rows, chosen, logprobs, strict=True):
                of, _, generator = active[row]
                active[row] = of, token, generator
                of.tokens.append(token)
                of.logprobs.append(logprob)
                if token == sampling.stop_token:
                    of.finished = "stop"
                elif len(of.tokens) == of.limit:
                    of.finished = "length"
                yield of
            self._leave(this, active, free)

    def _leave(self, run: int, active: _Active, free: list[int]) -> None:
        """What has ended leaves its row; before the next step, and after a text without tokens."""
        if self._runs != run:
            raise RuntimeError("Engine.run: expected one run at a time, got another before this one ended")
        for row in [row for row, (of, _, _) in active.items() if of.finished]:
            del active[row]
            free.append(row)
            self.decoder.reset(row)

    def _draw(
        self, logits: Tensor, drawn: list[tuple[Continuation, torch.Generator]], sampling: Sampling
    ) -> tuple[list[int], list[float]]:
        """A token for each row of logits [R, V], with the logarithm of its probability."""
        logits = without_others(logits, self.config.pad_idx, sampling.vocabulary)
        for (of, _), largest in zip(drawn, logits.amax(dim=-1).tolist(), strict=True):
            if not math.isfinite(largest):
                raise FloatingPointError(
                    f"prompt {of.prompt}: expected finite logits after {len(of.tokens)} tokens, got {largest}"
                )
        how = sampling.temperature, sampling.top_k, sampling.top_p
        if sampling.temperature == 0:
            tokens = logits.argmax(dim=-1)
        else:
            tokens = torch.cat(
                [
                    sample(row[None], *how, generator)
                    for row, (_, generator) in zip(logits, drawn, strict=True)
                ]
            )
        # Not torch.logsumexp, whose last bit depends on the number of threads.
        logprobs = -ops.cross_entropy(logits, tokens, reduction="none", backend=CPU)
        return tokens.tolist(), logprobs.tolist()


class Perplexity(NamedTuple):
    value: float
    tokens: int  # that were scored
    windows: int  # for which the model ran


@torch.no_grad()
def perplexity(
    model: GPT, tokens: Tensor, *, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """The perplexity of a text [T], T >= 2, by a sliding window.

    Args:
        tokens: int64 or int32 [T], on the model's device.
        window: tokens that the model sees at once, at most its max_seq_length, which it is when None.
        stride: how far the window moves; each token but the first is scored once, with at least window - stride
            tokens before it (but at the text's beginning). Half the window when None.

    The exponential of the mean negative log-probability in nats.
    """
    most = model.config.max_seq_length
    window = most if window is None else window
    if not 2 <= window <= most:
        raise ValueError(f"window: expected 2 to max_seq_length={most}, got {window}")
    stride = max(window // 2, 1) if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride: expected 1 to window - 1 = {window - 1}, got {stride}")
    check_ids("tokens", tokens, model.config.vocab_size, next(model.parameters()).device)
    if tokens.dim() != 1 or len(tokens) < 2:
        raise ValueError(f"tokens: expected shape [T] with T >= 2, got {tuple(tokens.shape)}")
    if model.config.pad_idx is not None and bool((tokens == model.config.pad_idx).any()):
        raise ValueError(f"tokens: expected none equal to pad_idx={model.config.pad_idx}: all are scored")
    total, scored, windows = 0.0, 1, 0  # tokens before this one are done
    with evaluating(model):
        while scored < len(tokens):
            end = min(max(scored + stride, window), len(tokens))
            begin = max(end - window, 0)
            seen = tokens[begin:end].long()
            targets = seen[1:].clone()
            targets[: scored - begin - 1] = -100  # done in the window before
            loss = float(model(seen[None, :-1], targets[None]))
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss: expected a finite one up to token {end}, got {loss}")
            total += loss * (end - scored)
            scored, windows = end, windows + 1
    mean = total / (len(tokens) - 1)
    return Perplexity(math.exp(mean) if mean < 709 else math.inf, len(tokens) - 1, windows)
