"""Continuing texts: one as a stream, or a file of prompts, and the perplexity of a text."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.generate import Engine, Sampling, stream
from fastgpt.models.checkpoint import parse_object
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.train.data import read_text
from fastgpt.train.tokenizer import Tokenizer

_RESULT = ("line", "sample", "text", "tokens", "logprob", "finished")  # fields of a line of results
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
) -> tuple[int, Speed | None]:
    """Continue every prompt of a JSONL file into another; (how many texts were written, how fast).

    A line of `source` is an object with a "prompt"; a line of `target` the same object with "line" (counted from 1),
    "sample", "text", "tokens", "logprob" (of all tokens together, in nats) and "finished" ("stop", "length"). Lines
    are written whole, as texts are done; a run that was cut short goes on where it ended, if it is called with the
    same model and options.

    Raises:
        OSError, ValueError: naming the file and the line, before anything is made.
    """
    from tqdm import tqdm

    lines = read_jsonl(source)
    for number, line in lines:
        if not isinstance(line.get("prompt"), str):
            got = (
                type(line["prompt"]).__name__
                if "prompt" in line
                else f"the fields {', '.join(line) or 'none'}"
            )
            raise ValueError(f'{source}:{number}: expected an object with a "prompt" of text, got {got}')
        taken = [name for name in _RESULT if name in line]
        if taken:
            raise ValueError(f"{source}:{number}: expected no field called {taken[0]}, which the result has")
    if target.exists() and os.path.samefile(source, target):
        raise ValueError(f"{target}: expected another file than that of the prompts")
    prompts = [encode(tokenizer, line["prompt"], f"{source}:{number}") for number, line in lines]
    sampling = within(tokenizer, sampling, engine.config)
    engine.check(sampling, prompts, [f"{source}:{number}" for number, _ in lines])
    done, whole = _done(target, {number: line["prompt"] for number, line in lines}, samples)
    wanted = [
        (i, j) for i, (number, _) in enumerate(lines) for j in range(samples) if (number, j) not in done
    ]
    if not wanted:
        return 0, None
    if target.exists():
        os.truncate(target, whole)
    timer, written = Timer(engine), 0
    # What UTF-8 has no bytes for becomes JSON's own escape.
    with (
        open(target, "a", encoding="utf-8", errors="backslashreplace") as file,
        tqdm(total=len(wanted), disable=not progress) as bar,
    ):
        texts = {key: Text(tokenizer, prompts[key[0]], stop) for key in wanted}
        try:
            for grown in engine.run(prompts, sampling, samples=samples, only=wanted):
                timer.add()
                text = texts[grown.prompt, grown.sample]
                made = text.of(grown.said) if stop or grown.finished else ""
                if text.stopped:
                    grown.finished = "stop"
                if grown.finished is None:
                    continue
                number, line = lines[grown.prompt]
                result = {
                    "line": number, "sample": grown.sample, "text": made, "tokens": len(grown.tokens),
                    "logprob": round(sum(grown.logprobs), 6), "finished": grown.finished,
                }  # fmt: skip
                file.write(json.dumps({**line, **result}, ensure_ascii=False) + "\n")
                file.flush()
                written += 1
                bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{written} of {len(wanted)} texts written to {target}; the same command makes the rest"
            ) from None
    return written, timer.speed()


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not empty."""
    with open(path, "rb") as file:
        lines = _parsed(path, file)
    if not lines:
        raise ValueError(f"{path}: expected a line for each prompt, got none")
    return lines


def _parsed(path: Path, lines: Iterable[bytes]) -> list[tuple[int, dict[str, Any]]]:
    return [(n, parse_object(line, f"{path}:{n}")) for n, line in enumerate(lines, 1) if line.strip()]


def _done(target: Path, prompts: dict[int, str], samples: int) -> tuple[set[tuple[int, int]], int]:
    """((line, sample) of the texts that `target` has already, and how many of its bytes are whole lines)."""
    data = target.read_bytes() if target.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    done = set()
    if whole.strip():
        for number, made in _parsed(target, whole.splitlines(keepends=True)):
            line, sample = made.get("line"), made.get("sample")
            if (
                not (isinstance(line, int) and isinstance(sample, int) and "text" in made)
                or line not in prompts
                or made.get("prompt") != prompts[line]
            ):
                raise ValueError(
                    f"{target}:{number}: expected a text made of these prompts, or no such file, got line {line}"
                )
            if sample < samples:
                done.add((line, sample))
    elif data and not data.lstrip().startswith(b"{"):  # no line that was cut short
        raise ValueError(f"{target}: expected texts made of these prompts, or no such file, got another file")
    return done, len(whole)


def text_tokens(tokenizer: Tokenizer, paths: Sequence[Path]) -> Tensor:
    """The tokens of UTF-8 text files."""
    return torch.tensor(tokenizer.encode(read_text(paths)))
