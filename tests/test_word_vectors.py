"""Word vectors from gensim's own files into a token embedding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgpt.models.gpt import GPT
from fastgpt.models.word_vectors import initialise_embedding

gensim = pytest.importorskip("gensim")

WORDS = ["the", "cat", "Sat", "mat", "unseen"]


class Tokens:
    """Token i is the i-th text."""

    texts = (" the", "the", "cat", " SAT", "mat", " ", "<pad>", "other")
    vocab_size = len(texts)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[i] for i in ids)


def vectors(dim: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {word: torch.randn(dim) for word in (*WORDS, "sat")}


def write(path: Path, binary: bool, dim: int = 16) -> Path:
    keyed = gensim.models.KeyedVectors(dim)
    keyed.add_vectors(list(vectors(dim)), [v.numpy() for v in vectors(dim).values()])
    keyed.save_word2vec_format(str(path), binary=binary)
    return path


@pytest.mark.parametrize("binary", [False, True])
def test_rows_are_the_words_and_others_stay(tmp_path: Path, binary: bool) -> None:
    model = GPT(10, 16, 2, 1, 8, pad_idx=6)
    before = model.wte.weight.detach().clone()
    done = initialise_embedding(model, Tokens(), write(tmp_path / "v.vec", binary), binary=binary)
    assert done.found == [0, 1, 2, 3, 4]
    assert done.left == [5, 6, 7]
    for token, word in zip(done.found, ("the", "the", "cat", "sat", "mat"), strict=True):
        torch.testing.assert_close(model.wte.weight[token], vectors()[word], rtol=1e-6, atol=1e-6)
    assert torch.equal(model.wte.weight[5:], before[5:])
    assert model.wte.weight.requires_grad


def test_faults_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "v.vec", False, 12)
    with pytest.raises(ValueError, match=r"v\.vec: expected vectors of embedding_dim=16, got 12"):
        initialise_embedding(GPT(10, 16, 2, 1, 8), Tokens(), path)
    with pytest.raises(ValueError, match=r"tokenizer: expected at most vocab_size=5 tokens, got 8"):
        initialise_embedding(GPT(5, 12, 2, 1, 8), Tokens(), path)
    with pytest.raises(FileNotFoundError, match="none"):
        initialise_embedding(GPT(10, 12, 2, 1, 8), Tokens(), tmp_path / "none")
    path.write_text("no header\n")
    with pytest.raises(ValueError, match=r"v\.vec: expected word2vec's text format"):
        initialise_embedding(GPT(10, 12, 2, 1, 8), Tokens(), path)
    truncated = write(tmp_path / "t.bin", True)
    truncated.write_bytes(truncated.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"t\.bin: expected word2vec's binary format"):
        initialise_embedding(GPT(10, 16, 2, 1, 8), Tokens(), truncated, binary=True)
    with pytest.raises(ValueError, match=r"v\.vec: expected word2vec's binary format, got its text format"):
        initialise_embedding(GPT(10, 12, 2, 1, 8), Tokens(), write(path, False, 12), binary=True)
