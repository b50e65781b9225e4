"""Text to token ids and back: a byte-level BPE trained on the spot, or plain bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Protocol

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
END_OF_TEXT = "<|endoftext|>"  # GPT-2's
BYTES = {"type": "bytes"}  # what tokenizer.json holds for the byte tokenizer


class Tokenizer(Protocol):
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def special_id(self, text: str) -> int | None:
        """The token that `text` names, if it is one that decoding leaves out."""
        ...

    def to_json(self) -> bytes: ...


class ByteTokenizer:
    """The UTF-8 bytes themselves: 256 tokens, no training, nothing beside Python needed."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def special_id(self, text: str) -> int | None:
        return None

    def to_json(self) -> bytes:
        return json.dumps(BYTES).encode()


class BPETokenizer:
    """A Hugging Face tokenizer (`tokenizers.Tokenizer`) behind the three calls used here."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        tokenizer.no_truncation()  # its file may ask for both, which would change texts unseen
        tokenizer.no_padding()
        self.vocab_size: int = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, text: str, vocab_size: int, special: Sequence[str] = ()) -> BPETokenizer:
        """Byte-level BPE as in GPT-2: every text can be encoded, and decodes to itself.

        `special` are tokens of their own beside those `vocab_size`; decoding leaves them out.
        """
        if vocab_size < 256:
            raise ValueError(f"vocab_size: expected at least 256 (one token a byte), got {vocab_size}")
        if vocab_size > 2**31:
            raise ValueError(f"vocab_size: expected at most 2**31, got {vocab_size}")
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(
            pre_tokenizers.ByteLevel.alphabet()
        )  # sorted: the ids must not change from run to run
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
        tokenizer.add_special_tokens(list(special))
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def special_id(self, text: str) -> int | None:
        token = self.tokenizer.token_to_id(text)
        return token if token is not None and not self.tokenizer.decode([token]) else None

    def to_json(self) -> bytes:
        return self.tokenizer.to_str(pretty=True).encode()


def make_tokenizer(kind: str, text: str, vocab_size: int) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return BPETokenizer.train(text, vocab_size)
    raise ValueError(f"tokenizer: expected bpe or bytes, got {kind!r}")


def load_tokenizer(directory: str) -> Tokenizer:
    """The tokenizer in a directory: tokenizer.json, or vocab.json and merges.txt as GPT-2 came with.

    Raises:
        OSError, ValueError: naming the file, what was expected and what came.
    """
    path = os.path.join(directory, TOKENIZER)
    vocab, merges = (os.path.join(directory, name) for name in (VOCAB, MERGES))
    if not os.path.exists(path) and os.path.exists(vocab):
        return _gpt2_tokenizer(vocab, merges)
    with open(path, "rb") as file:
        data = file.read()
    try:
        if json.loads(data) == BYTES:
            return ByteTokenizer()
        from tokenizers import Tokenizer as HFTokenizer

        return BPETokenizer(HFTokenizer.from_str(data.decode()))
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path}: expected a tokenizer's JSON, got {error}") from None


def _gpt2_tokenizer(vocab: str, merges: str) -> BPETokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    for path in (vocab, merges):
        with open(path, "rb"):  # the system's own error, if it cannot be read
            pass
    try:
        tokenizer = Tokenizer(models.BPE.from_file(vocab, merges))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{vocab}, {merges}: expected a BPE's tokens and merges, got {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return BPETokenizer(tokenizer)
