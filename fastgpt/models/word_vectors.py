"""Word vectors (word2vec's text and binary files, fastText's .vec) as the first values of a token embedding."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, Protocol

import torch

from fastgpt.models.gpt import GPT


class Decodes(Protocol):
    vocab_size: int

    def decode(self, ids: list[int]) -> str: ...


class Initialised(NamedTuple):
    """Tokens whose row is now a word's vector, and those that keep theirs: no such word, or no word at all."""

    found: list[int]
    left: list[int]


@torch.no_grad()
def initialise_embedding(
    model: GPT, tokenizer: Decodes, path: str | os.PathLike[str], *, binary: bool = False
) -> Initialised:
    """Copy the vectors of a file into the rows of `model.wte` whose tokens are those words.

    A token's word is its text without white space around it, as it stands or else in lower case. Read by gensim.

    Args:
        model: embedding_dim is the length of the vectors. A tied output head changes with it.
        tokenizer: of the model.
        path: word2vec's text format, which fastText's .vec is, or with `binary` word2vec's binary one.

    Raises:
        OSError, ValueError: naming the file, what was expected and what came.
    """
    vectors = _read(os.fspath(path), binary)
    dim = model.config.embedding_dim
    if vectors.vector_size != dim:
        raise ValueError(f"{path}: expected vectors of embedding_dim={dim}, got {vectors.vector_size}")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most vocab_size={model.config.vocab_size} tokens, got {tokenizer.vocab_size}"
        )
    found, left = [], []
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token]).strip()
        word = next((w for w in (text, text.lower()) if w and w in vectors.key_to_index), None)
        if word is None or token == model.config.pad_idx:
            left.append(token)
            continue
        model.wte.weight[token] = torch.from_numpy(vectors[word].copy()).to(model.wte.weight)
        found.append(token)
    return Initialised(found, left)


def _read(path: str, binary: bool) -> Any:
    from gensim.models import KeyedVectors

    with open(path, "rb") as file:  # the system's own error, if it cannot be read
        _, first = file.readline(), file.readline(2**16)
    if binary and _is_text(first):  # which would be taken for vectors all the same
        raise ValueError(f"{path}: expected word2vec's binary format, got its text format")
    try:
        return KeyedVectors.load_word2vec_format(path, binary=binary)
    except (ValueError, EOFError, UnicodeDecodeError) as error:
        kind = "binary" if binary else "text"
        raise ValueError(f"{path}: expected word2vec's {kind} format, got {error}") from None


def _is_text(line: bytes) -> bool:
    """Whether a line is a word and numbers."""
    try:
        return len([float(number) for number in line.split()[1:]]) > 0
    except ValueError:
        return False
