"""A trained model in a directory: weights, config, tokenizer and how it was trained."""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from fastgpt.models import hugging_face
from fastgpt.models.checkpoint import CONFIG, WEIGHTS, Write, atomic_files, json_bytes, refuse_non_file
from fastgpt.models.gpt import GPT
from fastgpt.nn import Backend
from fastgpt.train.loop import Record
from fastgpt.train.tokenizer import TOKENIZER, Tokenizer, load_tokenizer

TRAINING, LOSSES, PLOT = "training.json", "losses.jsonl", "loss.png"
FILES = (TOKENIZER, TRAINING, LOSSES, PLOT, CONFIG, WEIGHTS)
WRITERS = ("matplotlib.backends.backend_agg", "safetensors.torch", "tqdm")  # needed late in a run


def check_can_save(path: str | os.PathLike[str], names: Sequence[str] = FILES) -> None:
    """OSError or ImportError now if files of these names could not be written into the directory `path` after
    hours of work. Leaves nothing behind, not even the directory if there was none."""
    for module in WRITERS:
        importlib.import_module(module)
    path = os.fspath(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise NotADirectoryError(f"{path}: expected a directory or nothing, got a file")
    for name in names:
        refuse_non_file(os.path.join(path, name))
    made, parent = [], path
    while parent and not os.path.exists(parent):
        made.append(parent)
        parent = os.path.dirname(parent)
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe.{secrets.token_hex(8)}")
        try:
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            os.unlink(probe)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error
    finally:
        for directory in made:
            with suppress(OSError):  # never made, or no longer empty
                os.rmdir(directory)


class Writes(Protocol):
    """A model that writes its config and its weights, these last."""

    def write_files(self, write: Write) -> None: ...


def save(
    path: str,
    model: Writes,
    tokenizer: Tokenizer,
    training: dict[str, Any],
    records: list[Record],
    plot: bytes = b"",
) -> None:
    """A save that fails leaves the previous checkpoint whole; one killed in its last instant may leave new files
    beside old weights, which come last."""
    with atomic_files(path) as write:
        write(TOKENIZER, tokenizer.to_json())
        write(TRAINING, json_bytes(training))
        write(LOSSES, "".join(json.dumps(record) + "\n" for record in records).encode())
        if plot:
            write(PLOT, plot)
        model.write_files(write)


def load(path: str, *, backend: Backend = None) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a directory, or of a name on the hub, as `GPT.from_pretrained`."""
    path = hugging_face.locate(path)
    model = GPT.from_pretrained(path, backend=backend)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{path}: expected a tokenizer of at most {model.config.vocab_size} tokens, got {tokenizer.vocab_size}"
        )
    return model, tokenizer
