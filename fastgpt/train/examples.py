"""Supervised examples, a prompt and the answer to it, as batches: only the answer is learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.models.gpt import IGNORE_INDEX
from fastgpt.train.data import Batch

_POOL = 16  # batches whose examples are sorted by length together


class Example(NamedTuple):
    """Token ids; at least one of each."""

    prompt: Sequence[int]
    answer: Sequence[int]

    @property
    def length(self) -> int:
        """What the model sees of it: all but the last token."""
        return len(self.prompt) + len(self.answer) - 1

    def check(self, context: int, where: str) -> None:
        """ValueError by the place where it stands unless there is something to learn and the model can see it."""
        if not self.prompt or not self.answer:
            raise ValueError(f"{where}: expected a prompt and an answer of at least one token each")
        if self.length > context:
            raise ValueError(
                f"{where}: expected at most {context} tokens, the model's context, got {self.length} of the prompt"
                " and the answer"
            )


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(tokens, targets), int64 [B, T]: T is the longest example's length, shorter ones are filled up on the right.

    targets[t] is what follows tokens[t] where that belongs to the answer, and -100, which no loss counts, else. In
    a causal model nothing before the filling sees it, so that it needs no token of its own: it is token 0.
    """
    length = max(example.length for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.int64)
    targets = torch.full((len(examples), length), IGNORE_INDEX, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(examples):
        ids = torch.tensor([*prompt, *answer])
        tokens[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return tokens, targets


def batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless (tokens, targets); every example once before any comes again; the same seed gives the same batches."""
    lengths = [example.length for example in examples]
    for rows in shuffled(lengths, batch_size, seed):
        yield collate([examples[i] for i in rows])


def held_out_batches(examples: Sequence[Example], batch_size: int) -> list[Batch]:
    """All examples once, in an order that their lengths alone decide."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    return [
        collate([examples[i] for i in order[begin : begin + batch_size]])
        for begin in range(0, len(order), batch_size)
    ]


def shuffled(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices: in a new order each time through, those in a batch of about the same length.

    The last batch of a time through may be smaller.
    """
    if not lengths:
        raise ValueError("examples: expected at least one, got none")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        found = list[list[int]]()
        for begin in range(0, len(order), _POOL * batch_size):
            pool = sorted(order[begin : begin + _POOL * batch_size], key=lambda i: lengths[i])
            found += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        for i in torch.randperm(len(found), generator=generator).tolist():
            yield found[i]
