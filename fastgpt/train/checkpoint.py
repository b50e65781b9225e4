"""A trained model in a directory: weights, config, tokenizer and how it was trained."""

from __future__ import annotations

import json
import os
from typing import Any

from fastgpt.models.checkpoint import atomic_files, json_bytes
from fastgpt.models.gpt import GPT
from fastgpt.nn import Backend
from fastgpt.train.loop import Record
from fastgpt.train.tokenizer import Tokenizer, load_tokenizer

TOKENIZER, TRAINING, LOSSES, PLOT = "tokenizer.json", "training.json", "losses.jsonl", "loss.png"


def save(
    path: str,
    model: GPT,
    tokenizer: Tokenizer,
    training: dict[str, Any],
    records: list[Record],
    plot: bytes = b"",
) -> None:
    """Everything at once: an interrupted save leaves the previous checkpoint whole."""
    with atomic_files(path) as write:
        model.write_files(write)
        write(TOKENIZER, tokenizer.to_json())
        write(TRAINING, json_bytes(training))
        write(LOSSES, "".join(json.dumps(record) + "\n" for record in records).encode())
        if plot:
            write(PLOT, plot)


def load(path: str, *, backend: Backend = None) -> tuple[GPT, Tokenizer]:
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: expected a directory with a saved model, got none")
    model = GPT.from_pretrained(path, backend=backend)
    tokenizer = load_tokenizer(os.path.join(path, TOKENIZER))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{path}: expected a tokenizer of at most {model.config.vocab_size} tokens, got {tokenizer.vocab_size}"
        )
    return model, tokenizer
