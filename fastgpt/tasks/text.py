"""Continuing texts: one as a stream, or a file of prompts, and the perplexity of a text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.decoding import Features
from fastgpt.generate import Continuation, Engine, Sampling, stream
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.tasks.jsonl import Fields, Job, text_field
from fastgpt.train.data import read_text
from fastgpt.train.tokenizer import Tokenizer

_RESULT = ("sample", "text", "tokens", "logprob", "finished")  # fields of a line of results
REPLACEMENT = "\ufffd"  # what a character of several bytes looks like while it is under way


class Text:
    """The text of a growing continuation, up to the first of the stop strings; special tokens can be among them."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("stop: expected texts, got an empty one")
        special = {word: tokenizer.special_id(word) for word in stop}  # which the text itself never shows
        self.stop = [word for word in stop if special[word] is None]
        self.stop_tokens = {token for token in special.values() if token is not None}
        self.tokenizer, self.prompt = tokenizer, list(prompt)
        self.before = len(tokenizer.decode(self.prompt))  # a token's text may depend on the one before it
        self.shown, self.stopped = 0, False

    def of(self, tokens: Sequence[int]) -> str:
        end = next((i for i, token in enumerate(tokens) if token in self.stop_tokens), None)
        self.stopped = end is not None
        text = self.tokenizer.decode([*self.prompt, *tokens[:end]])[self.before :]
        ends = [at for at in (text.find(word) for word in self.stop) if at >= 0]
        if ends:
            self.stopped, text = True, text[: min(ends)]
        return text

    def more(self, tokens: Sequence[int], last: bool) -> str:
        """What can be shown beyond what was: nothing that may yet turn out to be part of a stop string."""
        text = self.of(tokens)
        if not (last or self.stopped):
            text = text.rstrip(REPLACEMENT)
            held = max((len(word) - 1 for word in self.stop), default=0)
            text = text[: max(len(text) - held, self.shown)]
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new


class Speed(NamedTuple):
    """Tokens in a second, and the share of the memory's bandwidth that reading the weights took."""

    tokens: int
    seconds: float
    read: int  # bytes
    bandwidth: float  # bytes a second, measured

    def __str__(self) -> str:
        rate, share = self.tokens / self.seconds, self.read / self.seconds / self.bandwidth
        return (
            f"{self.tokens} tokens in {self.seconds:.1f} s: {rate:.1f} tokens/s, {share:.2f} of the memory's "
            f"bandwidth ({self.bandwidth / 1e9:.0f} GB/s read)"
        )


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that the device reads from its memory: the best of three times through 256 MiB."""
    data = torch.ones(2**26, device=device)
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        float(data.amax())  # waits for the device
        best = min(best, time.perf_counter() - started)
    return data.nbytes / best


class Timer:
    """Adds up what decoding takes: tokens, time, and the bytes that its steps read."""

    def __init__(self, decodes: Engine | GPT) -> None:
        self.decodes, self.device = decodes, torch.device("cpu")
        if isinstance(decodes, GPT):
            self.device = decodes.wte.weight.device
        self.restart()

    def restart(self) -> None:
        self.tokens, self.read, self.started = 0, 0.0, time.perf_counter()

    def add(self) -> None:
        """One token more."""
        self.tokens += 1
        self.read += bytes_of(self.decodes) if isinstance(self.decodes, GPT) else self.decodes.bytes_per_token

    def speed(self) -> Speed:
        seconds = time.perf_counter() - self.started
        return Speed(self.tokens, seconds, int(self.read), read_bandwidth(self.device))


def bytes_of(model: GPT) -> int:
    return sum(p.nbytes for p in model.parameters())


def encode(tokenizer: Tokenizer, prompt: str, where: str = "prompt") -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError(f"{where}: expected some text, got an empty prompt")
    return ids


def within(tokenizer: Tokenizer, sampling: Sampling, config: GPTConfig) -> Sampling:
    """`sampling` of the tokenizer's tokens only; a model's vocabulary is often rounded up."""
    return replace(sampling, vocabulary=min(tokenizer.vocab_size, config.vocab_size))


def stream_text(
    engine: Engine, tokenizer: Tokenizer, prompt: str, sampling: Sampling, stop: Sequence[str] = ()
) -> Iterator[str]:
    """What follows the prompt, piece by piece as it is made."""
    ids = encode(tokenizer, prompt)
    text = Text(tokenizer, ids, stop)
    for grown in engine.run([ids], within(tokenizer, sampling, engine.config)):
        yield text.more(grown.said, grown.finished is not None)
        if text.stopped:
            return


def stream_uncached(
    model: GPT, tokenizer: Tokenizer, prompt: str, sampling: Sampling, stop: Sequence[str] = ()
) -> Iterator[str]:
    """As `stream_text`, on any device and by any backend, the whole text through the model for each token."""
    ids = encode(tokenizer, prompt)
    text, tokens = Text(tokenizer, ids, stop), list[int]()
    start = torch.tensor([ids], device=model.wte.weight.device)
    limit, context = sampling.limit(ids, model.config.max_seq_length), model.config.max_seq_length
    if sampling.max_new_tokens is None and limit < 1:
        raise ValueError(f"prompt: expected fewer than {context} tokens, the model's context, got {len(ids)}")
    sampling = within(tokenizer, replace(sampling, max_new_tokens=limit), model.config)
    for token in stream(model, start, **vars(sampling)):
        tokens.append(int(token))
        ended = tokens[-1] == sampling.stop_token
        last = ended or len(tokens) == limit
        yield text.more(tokens[:-1] if ended else tokens, last)
        if text.stopped:
            return


def ended(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    only: Sequence[tuple[int, int]] | None = None,
    stop: Sequence[str] = (),
    timer: Timer | None = None,
    features: Sequence[Features | None] | None = None,
) -> Iterator[tuple[Continuation, str]]:
    """Each continuation when it has ended, with its text; `only` and `features` as for `Engine.run`."""
    texts = dict[tuple[int, int], Text]()
    sampling = within(tokenizer, sampling, engine.config)
    for grown in engine.run(prompts, sampling, only=only, features=features):
        if timer is not None:
            timer.add()
        key = grown.prompt, grown.sample
        if key not in texts:
            texts[key] = Text(tokenizer, prompts[grown.prompt], stop)
        made = texts[key].of(grown.said) if stop or grown.finished else ""
        if texts[key].stopped:
            grown.finished = "stop"
        if grown.finished is not None:
            del texts[key]
            yield grown, made


class Continued(NamedTuple):
    """How many texts were written, how fast (None: there were all already), and what was left out, in words."""

    texts: int
    speed: Speed | None
    left_out: str


def continue_file(
    engine: Engine,
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    sampling: Sampling,
    *,
    samples: int = 1,
    stop: Sequence[str] = (),
    progress: bool = True,
) -> Continued:
    """Continue every prompt of a JSONL file into another.

    A line of `source` is an object with a "prompt"; a line of `target` the same object with "line" (counted from 1),
    "sample", "text", "tokens", "logprob" (of all tokens together, in nats) and "finished" ("stop", "length"), or of a
    bad line `{"line": n, "error": "..."}`. Lines are written whole, as texts are done; a run that was cut short goes
    on where it ended, if it is called with the same model and options.

    Raises:
        OSError, ValueError: about the files or the options, before anything is made.
    """
    check_options(engine, tokenizer, sampling)

    def ids(fields: Fields, where: str) -> list[int]:
        return fitting(engine, tokenizer, text_field(fields, "prompt", where, blank=True), sampling, where)

    job = Job(source, target, ids, _RESULT, samples)
    timer = Timer(engine)
    with job.writing(progress) as write:
        prompts = [line.value for line in job.lines]
        made = ended(engine, tokenizer, prompts, sampling, only=job.wanted, stop=stop, timer=timer)
        for grown, words in made:
            result = {
                "sample": grown.sample, "text": words, "tokens": len(grown.tokens),
                "logprob": round(sum(grown.logprobs), 6), "finished": grown.finished,
            }  # fmt: skip
            write((grown.prompt, grown.sample), result)
    return Continued(len(job.wanted), timer.speed() if job.wanted else None, job.report())


def check_options(engine: Engine, tokenizer: Tokenizer, sampling: Sampling) -> None:
    """ValueError unless some prompt could be continued so."""
    engine.check(within(tokenizer, sampling, engine.config), [], [])


def fitting(engine: Engine, tokenizer: Tokenizer, prompt: str, sampling: Sampling, where: str) -> list[int]:
    """The tokens of a prompt; ValueError by the place where it stands unless it can be continued so."""
    ids = encode(tokenizer, prompt, where)
    engine.check(within(tokenizer, sampling, engine.config), [ids], [where])
    return ids


def text_tokens(tokenizer: Tokenizer, paths: Sequence[Path]) -> Tensor:
    """The tokens of UTF-8 text files."""
    return torch.tensor(tokenizer.encode(read_text(paths)))
