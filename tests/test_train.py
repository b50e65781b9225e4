"""Text to trained checkpoint: tokenizers, batches, the loop, and the files it leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt.models.gpt import GPT
from fastgpt.train import checkpoint, data, loop
from fastgpt.train.plot import loss_plot
from fastgpt.train.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog; é ≥ 0\n" * 60
LENGTH = 16


def make_corpus(**options) -> data.Corpus:
    return data.make_corpus(TEXT, **{"tokenizer": "bytes", "seq_length": LENGTH, **options})


def make_model(seed: int = 0, vocab_size: int = 256) -> GPT:
    torch.manual_seed(seed)
    return GPT(vocab_size, 32, 2, 1, LENGTH)


def train(model: GPT, corpus: data.Corpus, **options) -> list[loop.Record]:
    config = loop.TrainConfig(**{"steps": 4, "batch_size": 4, "warmup": 2, "lr": 3e-3, **options})
    return loop.train(model, corpus, LENGTH, config, progress=False)


def test_bpe_covers_every_text_and_is_deterministic(tmp_path: Path) -> None:
    a, b = BPETokenizer.train(TEXT, 300), BPETokenizer.train(TEXT, 300)
    assert a.to_json() == b.to_json()
    assert 256 < a.vocab_size <= 300
    for text in (TEXT, " never seen: 漢字 \x00\t\r\n", ""):
        assert a.decode(a.encode(text)) == text
    assert len(a.encode(TEXT)) < len(TEXT.encode()) / 2
    (tmp_path / "tokenizer.json").write_bytes(a.to_json())
    assert load_tokenizer(str(tmp_path)).encode(TEXT) == a.encode(TEXT)


def test_a_tokenizer_neither_cuts_nor_fills_up(tmp_path: Path) -> None:
    trained = BPETokenizer.train(TEXT, 300)
    expected = trained.encode(TEXT)
    trained.tokenizer.enable_truncation(5)
    trained.tokenizer.enable_padding(length=10_000)
    (tmp_path / "tokenizer.json").write_bytes(trained.to_json())
    assert load_tokenizer(str(tmp_path)).encode(TEXT) == expected


def test_vocab_and_merges_suffice(tmp_path: Path) -> None:
    trained = BPETokenizer.train(TEXT, 300)
    model = json.loads(trained.to_json())["model"]
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"])
    )
    (tmp_path / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": trained.vocab_size}))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.vocab_size == trained.vocab_size + 1
    assert loaded.encode(TEXT) == trained.encode(TEXT)
    assert loaded.encode("a<|endoftext|>b")[1] == trained.vocab_size
    assert loaded.decode(loaded.encode(" 漢字 \t")) == " 漢字 \t"
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "merges.txt").write_text("no such pair")
    with pytest.raises(ValueError, match=r"merges\.txt: expected a BPE's tokens and merges"):
        load_tokenizer(str(tmp_path))


def test_bytes(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 0xA9, 0xC3]) == "é\ufffd"
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_json())
    assert isinstance(load_tokenizer(str(tmp_path)), ByteTokenizer)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer's JSON"):
        load_tokenizer(str(tmp_path))


def test_the_tail_is_held_out() -> None:
    corpus = make_corpus(held_out=0.25)
    everything = torch.tensor(list(TEXT.encode()))
    assert torch.equal(torch.cat([corpus.train, corpus.held_out]), everything)
    assert len(corpus.held_out) / len(everything) == pytest.approx(0.25, abs=0.01)


def test_unigram_entropy() -> None:
    corpus = data.Corpus(torch.zeros(1), torch.tensor([3, 3, 5, 9]), ByteTokenizer())
    assert corpus.unigram_entropy == pytest.approx(1.5 * 0.6931471805599453)


def test_batches_are_windows_of_the_text_fixed_by_the_seed() -> None:
    tokens = torch.arange(100)
    first, again, other = (data.batches(tokens, 3, 8, seed) for seed in (1, 1, 2))
    seen = set()
    for _ in range(50):
        (x, y), (x2, _), (x3, _) = next(first), next(again), next(other)
        assert torch.equal(y, x + 1)
        assert torch.equal(x, x[:, :1] + torch.arange(8))
        assert torch.equal(x, x2)
        assert not torch.equal(x, x3)
        seen |= set(x[:, 0].tolist())
    assert min(seen) <= 4
    assert max(seen) >= 87
    assert max(seen) <= 91


def test_held_out_batches_cover_the_text_once() -> None:
    work = data.held_out_batches(torch.arange(36), 2, 5)
    assert torch.cat([x.flatten() for x, _ in work]).tolist() == list(range(35))
    assert torch.cat([y.flatten() for _, y in work]).tolist() == list(range(1, 36))
    assert [len(x) for x, _ in work] == [2, 2, 2, 1]


def test_loss_falls() -> None:
    corpus = make_corpus()
    records = train(make_model(), corpus, steps=120, log_every=30, eval_every=60)
    assert [r["step"] for r in records] == [1, 30, 60, 90, 120]
    assert [r["step"] for r in records if "held_out" in r] == [60, 120]
    assert records[0]["loss"] > 5.3
    assert records[-1]["held_out"] < corpus.unigram_entropy - 1
    assert all(r["tokens_per_s"] > 0 and r["grad_norm"] > 0 for r in records)


def test_seed_fixes_everything() -> None:
    def losses(seed: int) -> list[float]:
        return [r["loss"] for r in train(make_model(seed), make_corpus(), seed=seed, log_every=1)]

    assert losses(0) == losses(0) != losses(1)


def test_bf16_trains() -> None:
    records = train(make_model(), make_corpus(), bf16=True, steps=30)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5


def gradients(parts: int, batch: tuple[Tensor, Tensor]) -> tuple[float, float, list[Tensor]]:
    """Loss, gradient norm, and the gradients as the optimizer gets them."""
    model, seen = make_model(), []
    config = loop.TrainConfig(clip=0.1)
    optimizer = loop.make_optimizer(model, config)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
    work = list(zip(*(t.chunk(parts) for t in batch), strict=True))
    loss, norm = loop.train_step(model, optimizer, work, 0, config)
    return loss, norm, seen


def test_accumulation_equals_a_bigger_batch_and_clipping_clips() -> None:
    batch = next(data.batches(make_corpus().train, 8, LENGTH, 0))
    (loss, norm, whole), (loss2, norm2, parts) = gradients(1, batch), gradients(4, batch)
    assert loss2 == pytest.approx(loss, rel=1e-6)
    assert norm2 == pytest.approx(norm, rel=1e-5)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    clipped = torch.stack([g.norm() for g in whole]).norm().item()
    assert norm > 0.1
    assert clipped == pytest.approx(0.1, rel=1e-4)


def test_weight_decay_acts_on_matrices_only() -> None:
    model = make_model()
    decayed, plain = loop.make_optimizer(model, loop.TrainConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_schedule() -> None:
    config = loop.TrainConfig(steps=101, warmup=10, lr=1.0, min_lr=0.1)
    rates = [config.lr_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_divergence_is_reported() -> None:
    model = make_model()
    with torch.no_grad():
        model.wte.weight[:] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 0: loss nan.*try a lower lr"):
        train(model, make_corpus())


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    corpus = make_corpus(tokenizer="bpe", vocab_size=280)
    model = make_model(vocab_size=corpus.tokenizer.vocab_size)
    image = loss_plot([("training", [1, 2], [3.0, 2.0], "-")], "loss", ("unigram entropy", 2.5))
    checkpoint.save(str(tmp_path), model, corpus.tokenizer, {"steps": 2}, [{"step": 1, "loss": 3.0}], image)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        ["config.json", "model.safetensors", "tokenizer.json", "training.json", "losses.jsonl", "loss.png"]
    )
    assert json.loads((tmp_path / "losses.jsonl").read_text()) == {"step": 1, "loss": 3.0}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    loaded, tokenizer = checkpoint.load(str(tmp_path))
    tokens = torch.tensor([tokenizer.encode("the quick")])
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_length": 10_000}, r"corpus: expected at least 10001 tokens .*, got \d+"),
        ({"seq_length": 500}, r"held-out tail of the corpus: expected at least 501 tokens .*, got \d+"),
        ({"held_out": 0.0}, r"held_out: expected a fraction in \(0, 1\), got 0.0"),
        ({"tokenizer": "words"}, "tokenizer: expected bpe or bytes, got 'words'"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size: expected at least 256"),
        ({"tokenizer": "bpe", "vocab_size": 2**70}, r"vocab_size: expected at most 2\*\*31, got 1180591620"),
        ({"seq_length": 0}, "seq_length: expected at least 1, got 0"),
    ],
)
def test_corpus_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_corpus(**options)


def test_files_are_joined_in_order_and_bad_ones_named(tmp_path: Path) -> None:
    for name, content in (
        ("b", b"one"),
        ("a", b"two\r\n"),
        ("empty", b""),
        ("blank", b" \n"),
        ("latin", b"ab\xe9"),
    ):
        (tmp_path / name).write_bytes(content)
    assert data.read_text([tmp_path / "b", tmp_path / "a"]) == "one\n\ntwo\r\n"
    assert data.read_text([]) == data.default_corpus()
    assert len(data.default_corpus()) > 300_000
    for name, message in (
        ("empty", "empty: expected text, got an empty file"),
        ("blank", "blank: expected text, got only white space"),
        ("latin", "latin: expected UTF-8 text, got byte 0xe9 at offset 2"),
    ):
        with pytest.raises(ValueError, match=message):
            data.read_text([tmp_path / "b", tmp_path / name])
    with pytest.raises(OSError):
        data.read_text([tmp_path / "missing"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected more than 0, got 0.0"),
        ({"clip": float("nan")}, "clip: expected more than 0, got nan"),
        ({"warmup": -1}, "warmup: expected at least 0, got -1"),
        (
            {"seed": -(2**63) - 1},
            r"seed: expected an integer in \[-2\*\*63, 2\*\*63\), got -9223372036854775809",
        ),
        ({"beta2": 1.0}, r"beta2: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_train_config_errors(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.TrainConfig(**option)


def test_evaluation_keeps_each_modules_mode() -> None:
    model, config = make_model().train(), loop.TrainConfig()
    model.h[0].eval()
    before = [module.training for module in model.modules()]
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    loop.held_out_loss(model, [(tokens, tokens)], config)
    with pytest.raises(ValueError, match="tokens: expected ids"):
        loop.held_out_loss(model, [(tokens - 1, tokens)], config)
    assert [module.training for module in model.modules()] == before


def test_a_place_that_can_be_saved_to_is_left_as_it_was(tmp_path: Path) -> None:
    checkpoint.check_can_save(tmp_path / "new" / "dir")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    checkpoint.check_can_save(tmp_path / "old")
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    (tmp_path / "old" / "loss.png").mkdir()
    with pytest.raises(IsADirectoryError):
        checkpoint.check_can_save(tmp_path / "old")


def test_weights_take_their_place_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (placed.append(Path(b).name), replace(a, b))[1])
    checkpoint.save(str(tmp_path), make_model(), ByteTokenizer(), {}, [], b"png")
    assert sorted(placed) == sorted(checkpoint.FILES)
    assert placed[-1] == "model.safetensors"
