"""Classifying: the head sees the last token of a text and nothing after it; labels are saved, and known or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import cli
from fastgpt.models.classifier import Classifier
from fastgpt.models.gpt import GPT
from fastgpt.tasks import classify
from fastgpt.tasks.options import Fresh, Learning
from fastgpt.train.tokenizer import Tokenizer

LINES = [
    {"text": f"{word} {i}", "label": label}
    for i in range(6)
    for label, word in (("sea", "ship"), ("air", "plane"), ("land", "train"))
]
LEARNING, FRESH = Learning(steps=60, batch_size=6, lr=1e-2, held_out=0.2), Fresh(280, 32, 2, 1)


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text(
        "".join(json.dumps(line) + "\n" if isinstance(line, dict) else line + "\n" for line in lines)
    )
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Tokenizer, Path]:
    out = tmp_path_factory.mktemp("classify")
    made = classify.train(write(out / "train.jsonl", LINES), out / "model", learning=LEARNING, fresh=FRESH)
    return *made, out / "model"


def test_the_head_sees_the_last_token_and_nothing_after_it() -> None:
    torch.manual_seed(0)
    gpt = GPT(50, 16, 2, 2, 12)
    model = Classifier(gpt, ["a", "b", "c"]).eval()
    tokens, last = torch.randint(50, (3, 12)), torch.tensor([4, 0, 11])
    logits = model(tokens, last)
    for row in range(3):
        seen = tokens[row : row + 1, : last[row] + 1]
        by_hand = gpt.hidden(gpt.embed(seen), seen)[0, -1] @ model.head.weight.T + model.head.bias
        assert torch.allclose(logits[row], by_hand, atol=1e-5)
    targets = torch.tensor([2, 0, 1])
    expected = torch.nn.functional.cross_entropy(logits, targets)
    assert model(tokens, last, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    filled = torch.where(torch.arange(12) > last[:, None], 7, tokens)
    assert torch.equal(model(filled, last), logits)
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 50
    assert not torch.allclose(model(other, last)[0], logits[0], atol=1e-5)


def test_what_was_learned_is_the_same_alone_beside_others_and_saved(
    learned: tuple[Classifier, Tokenizer, Path],
) -> None:
    model, tokenizer, path = learned
    texts = [line["text"] for line in LINES]
    found = classify.classify(model, tokenizer, [*texts, "ship " * 9])
    assert [label for label, _ in found[:-1]] == [line["label"] for line in LINES]
    for text, (label, probability) in zip(texts, found, strict=False):
        ((alone, p),) = classify.classify(model, tokenizer, [text])
        assert (alone, p) == (label, pytest.approx(probability, abs=1e-5))
    loaded, its_tokenizer = classify.load(path)
    assert loaded.labels == ("air", "land", "sea")
    assert classify.classify(loaded, its_tokenizer, texts) == found[:-1]


def test_a_file_is_classified_past_bad_lines_and_unknown_labels_are_named(
    learned: tuple[Classifier, Tokenizer, Path], tmp_path: Path
) -> None:
    model, tokenizer, _ = learned
    lines = [
        LINES[0],
        "{",
        {"text": " "},
        {"text": "plane", "label": "moon"},
        {"text": "train"},
        {**LINES[1], "label": "sea"},
    ]
    source = write(tmp_path / "in.jsonl", lines)
    found = classify.classify_file(model, tokenizer, source, tmp_path / "out.jsonl", progress=False)
    assert (found.made, found.scored) == (4, 2)
    assert found.scores == {"accuracy": 0.5, "macro F1": pytest.approx(1 / 3)}  # sea: 2/3, air: 0
    assert found.left_out.startswith(f"bad lines, left out: 2; the first: {source}:2: expected JSON")
    assert found.left_out.endswith("labels that the model does not know, not scored: 1 (moon)")
    made = {line["line"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert made[4]["prediction"] == "air"  # it has its prediction all the same
    assert made[1]["prediction"] == "sea"
    assert 0.5 < made[1]["probability"] <= 1
    assert made[3] == {"line": 3, "error": f'{source}:3: expected some text, got an empty "text"'}
    again = classify.classify_file(model, tokenizer, source, tmp_path / "out.jsonl", progress=False)
    assert (again.made, again.there, again.scores) == (0, 4, found.scores)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "expected a JSON object, got list"),
        ({"text": "x"}, 'expected an object with a "label" of text, got the fields text'),
        ({"text": "", "label": "sea"}, 'expected some text, got an empty "text"'),
        ({"text": "x", "label": 3}, 'expected an object with a "label" of text, got int'),
        ({"text": "y " * 40, "label": "sea"}, "expected at most 32 tokens, the model's context, got 40"),
    ],
)
def test_a_bad_example_is_told_by_its_line(tmp_path: Path, line: Any, message: str) -> None:
    source = write(tmp_path / "in.jsonl", [LINES[0], line, LINES[1]])
    with pytest.raises(ValueError, match=rf"in\.jsonl:2: {message}"):
        classify.train(source, tmp_path / "out", learning=LEARNING, fresh=Fresh(280, 32, 2, 1, max_length=32))
    with pytest.raises(ValueError, match=r"labels: expected at least two different texts, got .'sea'."):
        classify.train(write(source, [LINES[0]] * 3), tmp_path / "out", learning=LEARNING, fresh=FRESH)


def test_another_model_is_no_classifier(learned: tuple[Classifier, Tokenizer, Path], tmp_path: Path) -> None:
    GPT(50, 16, 2, 1, 12).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'config\.json: expected "model_type": "fastgpt-classifier"'):
        Classifier.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: "):
        GPT.from_pretrained(learned[2])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, out = str(write(tmp_path / "in.jsonl", LINES)), str(tmp_path / "model")
    tiny = ["--steps", "2", "--vocab-size", "260", "--embedding-dim", "16", "--num-layers", "1"]
    assert cli.main(["classify", "--train", train, "--out", out, *tiny]) == 0
    args = ["classify", "--model", out, "--data", train, "--out", str(tmp_path / "results.jsonl")]
    capsys.readouterr()
    assert cli.main(args) == 0
    shown = capsys.readouterr().out
    assert "18 results written" in shown
    assert "of 18 lines: accuracy " in shown
    assert cli.main([*args, "--lr", "1"]) == 2
    assert cli.main([*args, "--batch", "-1"]) == 2
    assert "batch: expected an integer >= 1, got -1" in capsys.readouterr().err
