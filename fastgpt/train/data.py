"""Text files to token tensors and batches; everything is fixed by the files, the options and the seed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.train.tokenizer import Tokenizer, make_tokenizer

# What a model is called with for its loss. Of a text: tokens and targets, int64 [B, T]; targets[t] follows tokens[t].
Batch = tuple[Any, ...]  # tensors, or None


def read_text(paths: Sequence[str | os.PathLike[str]]) -> str:
    """The files in the order given, separated by an empty line; without files, the default corpus."""
    return "\n\n".join(_read_file(os.fspath(path)) for path in paths) if paths else default_corpus()


def _read_file(path: str) -> str:
    with open(path, "rb") as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None
    if not text.strip():
        raise ValueError(f"{path}: expected text, got {'only white space' if text else 'an empty file'}")
    return text


def default_corpus() -> str:
    """Python's language reference, which ships inside every Python as `pydoc_data.topics`: 0.4 MB."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Corpus:
    """Token ids, int64 [n], of the text to learn and of its tail, which is held out."""

    train: Tensor
    held_out: Tensor
    tokenizer: Tokenizer

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the held-out tokens' own frequencies, in nats a token: no model that ignores
        context can have a lower held-out loss."""
        counts = torch.bincount(self.held_out).double()
        p = counts[counts > 0] / counts.sum()
        return float(-(p * p.log()).sum())


def make_corpus(
    text: str, *, tokenizer: str = "bpe", vocab_size: int = 1024, seq_length: int, held_out: float = 0.1
) -> Corpus:
    """Split the tail off, train the tokenizer on the rest, and encode both."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a fraction in (0, 1), got {held_out}")
    if seq_length < 1:
        raise ValueError(f"seq_length: expected at least 1, got {seq_length}")
    cut = len(text) - math.ceil(len(text) * held_out)
    encoder = make_tokenizer(tokenizer, text[:cut], vocab_size)
    train, tail = (torch.tensor(encoder.encode(part), dtype=torch.int64) for part in (text[:cut], text[cut:]))
    for name, part in (("corpus", train), ("held-out tail of the corpus", tail)):
        if len(part) <= seq_length:
            raise ValueError(
                f"{name}: expected at least {seq_length + 1} tokens (one sequence of {seq_length} and its targets),"
                f" got {len(part)}: give more text or shorter sequences"
            )
    return Corpus(train, tail, encoder)


def batches(tokens: Tensor, batch_size: int, seq_length: int, seed: int) -> Iterator[Batch]:
    """Endless random windows of the text; the same seed gives the same batches."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(len(tokens) - seq_length, (batch_size,), generator=generator)
        window = tokens[start[:, None] + torch.arange(seq_length + 1)]  # [B, T + 1]
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()


def held_out_batches(
    tokens: Tensor, batch_size: int, seq_length: int, limit: int | None = None
) -> list[Batch]:
    """The text once, in adjoining windows (at most `limit` batches; what fills no window is left out)."""
    windows = (len(tokens) - 1) // seq_length
    x = tokens[: windows * seq_length].view(windows, seq_length)
    y = tokens[1 : windows * seq_length + 1].view(windows, seq_length)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))[:limit]
