"""What the tasks that learn from a file of examples share: a model to begin with, the fit, what is saved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from fastgpt.models.classifier import Classifier
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.tasks.options import FRESH, Fresh, Learning
from fastgpt.train import checkpoint, loop
from fastgpt.train.data import Batch
from fastgpt.train.tokenizer import Tokenizer, make_tokenizer

T = TypeVar("T")
M = TypeVar("M", GPT, Classifier)
_ROUND = (
    32  # tokens: a fresh model has room for that many more than the longest example, and up to a multiple
)


def start(model: str | None, fresh: Fresh, texts: Sequence[str], seed: int) -> tuple[GPT, Tokenizer]:
    """The model in a directory (or of a name on the hub) and its tokenizer, or a fresh one, made for `texts`."""
    if model is not None:
        if fresh != FRESH:
            raise ValueError("model: expected no options of a fresh one with it")
        return checkpoint.load(model)
    tokenizer = make_tokenizer("bpe", "\n".join(texts), fresh.vocab_size)
    sizes = asdict(fresh) | {"vocab_size": tokenizer.vocab_size}
    length = sizes.pop("max_length")
    if length is None:
        length = (max(len(tokenizer.encode(text)) for text in texts) // _ROUND + 2) * _ROUND
    torch.manual_seed(seed)
    return GPT(GPTConfig(**sizes, max_seq_length=length)), tokenizer


def split(items: Sequence[T], learning: Learning, where: object) -> tuple[list[T], list[T]]:
    """(to learn, held out), each in the order of `items`."""
    if not 0 < learning.held_out < 1:
        raise ValueError(f"held_out: expected a fraction in (0, 1), got {learning.held_out}")
    if len(items) < 2:
        raise ValueError(
            f"{where}: expected at least two examples, one of them to hold out, got {len(items)}"
        )
    count = min(max(round(len(items) * learning.held_out), 1), len(items) - 1)
    generator = torch.Generator().manual_seed(learning.seed)
    held_out = set(torch.randperm(len(items), generator=generator)[:count].tolist())
    learned = [item for i, item in enumerate(items) if i not in held_out]
    return learned, [items[i] for i in sorted(held_out)]


def learn(
    model: M, tokenizer: Tokenizer, source: Iterator[Batch], held_out: list[Batch], learning: Learning, out: Path,
    *, base: str | None, examples: Path,
) -> M:  # fmt: skip
    """Train `model` on batches; returns it with the weights of the lowest held-out loss, as they are saved in `out`.

    `base` and `examples`, what it was made from and of, are written down beside it.
    """
    lr = (1e-3 if base is None else 2e-4) if learning.lr is None else learning.lr
    config = loop.TrainConfig(
        steps=learning.steps, batch_size=learning.batch_size, lr=lr, min_lr=lr / 10,
        warmup=min(50, learning.steps // 10), bf16=learning.bf16, seed=learning.seed,
        log_every=max(1, learning.steps // 100), eval_every=max(1, learning.steps // 10),
    )  # fmt: skip
    device = loop.device_named(learning.device)
    training = {"model": base, "examples": str(examples), **vars(config)}
    records = list[loop.Record]()

    def on_record(record: loop.Record) -> None:
        best = min((r["held_out"] for r in records if "held_out" in r), default=math.inf)
        records.append(record)
        if record.get("held_out", math.inf) < best:
            checkpoint.save(str(out), model, tokenizer, training, records)

    def evaluate() -> loop.Record:
        return {"held_out": loop.held_out_loss(model, loop.on_device(device, held_out), config)}

    loop.fit(model, source, config, evaluate, device=device, on_record=on_record)
    model = type(model).from_pretrained(out)
    checkpoint.save(str(out), model, tokenizer, training, records)  # with all the records
    return model
