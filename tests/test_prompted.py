"""Translating and answering: learned from JSONL, tried on JSONL, measured."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastgpt import cli
from fastgpt.demos import answer as answer_demo
from fastgpt.demos import translate as translate_demo
from fastgpt.models.gpt import GPT
from fastgpt.tasks import answer, translate
from fastgpt.tasks.options import Fresh, Learning
from fastgpt.tasks.prompted import exact_match
from fastgpt.train import checkpoint
from fastgpt.train.tokenizer import Tokenizer

LINES = [
    {"source": source, "to": to, "target": target}
    for source, german, chinese in (("one", "eins", "一"), ("two", "zwei", "二"), ("three", "drei", "三"))
    for to, target in (("German", german), ("Chinese", chinese))
]
TASK = translate.translation()
LEARNING, FRESH = Learning(steps=200, batch_size=8, lr=1e-2, held_out=0.1), Fresh(300, 32, 2, 1)


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text(
        "".join(json.dumps(line) + "\n" if isinstance(line, dict) else line + "\n" for line in lines)
    )
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Tokenizer, Path]:
    out = tmp_path_factory.mktemp("translate")
    source = write(out / "train.jsonl", LINES * 4)
    gpt, tokenizer = TASK.train(source, out / "model", learning=LEARNING, fresh=FRESH)
    return gpt, tokenizer, out / "model"


def test_what_was_learned_is_translated_alone_or_beside_others(learned: tuple[GPT, Tokenizer, Path]) -> None:
    gpt, tokenizer, path = learned
    wanted = [line["target"] for line in LINES]
    assert TASK.predict(gpt, tokenizer, LINES) == wanted
    assert TASK.predict(gpt, tokenizer, LINES, batch=1) == wanted
    assert translate.translate(gpt, tokenizer, ["two"], "German") == ["zwei"]
    assert translate.translate(*checkpoint.load(str(path)), ["one", "two"], "Chinese") == ["一", "二"]
    assert json.loads((path / "training.json").read_text())["steps"] == 200


def test_a_file_is_translated_past_bad_lines_and_measured(
    learned: tuple[GPT, Tokenizer, Path], tmp_path: Path
) -> None:
    gpt, tokenizer, _ = learned
    wrong = {"source": "three", "to": "German", "target": "Drei"}
    source = write(
        tmp_path / "in.jsonl", [*LINES[:3], "{", {"to": "x"}, wrong, {"source": "x " * 90, "to": "x"}]
    )
    target = tmp_path / "out.jsonl"
    found = TASK.predict_file(gpt, tokenizer, source, target, progress=False)
    assert (found.made, found.there, found.scored) == (4, 0, 4)
    assert found.left_out.startswith(f"bad lines, left out: 3; the first: {source}:4: expected JSON")
    made = {line["line"]: line for line in map(json.loads, target.read_text().splitlines())}
    assert made.keys() == {1, 2, 3, 4, 5, 6, 7}
    assert made[1] == {**LINES[0], "line": 1, "prediction": "eins", "finished": "stop"}
    assert made[5]["error"].startswith(
        f'{source}:5: expected an object with a "source" of text, got the fields to'
    )
    assert ":7: expected at most" in made[7]["error"]
    assert found.scores is not None
    assert found.scores["exact match"] == 0.75
    assert found.scores["exact match Chinese"] == 1
    again = TASK.predict_file(gpt, tokenizer, source, target, progress=False)
    assert (again.made, again.there, again.scores) == (0, 4, found.scores)
    write(source, [{"source": "one", "to": "German"}])  # no answers: nothing to measure
    assert TASK.predict_file(gpt, tokenizer, source, tmp_path / "other.jsonl", progress=False).scores is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected JSON"),
        ({"source": "one"}, 'expected an object with a "target" of text, got the fields source'),
        ({"source": "", "target": "x"}, 'expected some text, got an empty "source"'),
        ({"source": "x", "target": "a\nb"}, r"expected one line of text in \"target\", got 'a\\nb'"),
        ({"source": "x", "target": "x", "to": 3}, 'expected an object with a "to" of text, got int'),
        (
            {"source": "y " * 40, "target": "x"},
            "expected at most 32 tokens, .* got 44 of the prompt and the answer",
        ),
    ],
)
def test_a_bad_example_is_told_by_its_line(tmp_path: Path, line: Any, message: str) -> None:
    source = write(tmp_path / "in.jsonl", [LINES[0], line, LINES[1]])
    with pytest.raises(ValueError, match=rf"in\.jsonl:2: {message}"):
        TASK.train(source, tmp_path / "out", learning=LEARNING, fresh=Fresh(300, 32, 2, 1, max_length=32))
    assert not (tmp_path / "out").exists()


def test_only_the_answer_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a prompt's targets are, the loss is the same: all of them are masked."""
    from fastgpt.tasks import prompted

    seen = []

    def keep(model: GPT, tokenizer: Tokenizer, source: Any, *_: Any, **__: Any) -> GPT:
        seen.append((tokenizer, next(source)))
        return model

    monkeypatch.setattr(prompted, "learn", keep)
    TASK.train(write(tmp_path / "in.jsonl", LINES), tmp_path / "out", learning=LEARNING, fresh=FRESH)
    tokenizer, (tokens, targets) = seen[0]
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        answer_ids = [token for token in wanted if token != -100]
        text = tokenizer.decode(answer_ids)
        assert text[0] == " "
        assert text[-1] == "\n"
        prompt = tokenizer.decode(row[: wanted.index(answer_ids[0]) + 1])
        (line,) = [line for line in LINES if line["target"] == text.strip()]
        assert prompt == f"{line['source']}\n{line['to']}:"


def test_scores_of_translations() -> None:
    lines = [
        {"target": "the cat sat on the mat today", "to": "English"},
        {"target": "二〇二四年三月五日星期二", "to": "Chinese"},
    ]
    perfect = translate.scores([line["target"] for line in lines], lines)
    assert perfect["exact match"] == perfect["exact match Chinese"] == 1
    assert perfect["BLEU English"] == pytest.approx(100)
    assert perfect["BLEU Chinese"] == pytest.approx(
        100
    )  # by characters: 13a sees one word, too short for BLEU-4
    found = translate.scores(["the cat sat on the mat", lines[1]["target"]], lines)
    assert found["exact match"] == 0.5
    assert found["exact match English"] == 0
    assert found["BLEU English"] == pytest.approx(100 * 2.718281828 ** (1 - 7 / 6))  # brevity alone
    assert translate.scores([lines[1]["target"]], lines[1:], "13a")["BLEU"] < 1
    assert exact_match([" a ", "b"], ["a", "c"]) == 0.5


@pytest.mark.parametrize(
    ("made", "wanted", "exact", "f1"),
    [
        ("The red kite!", "red kite", 1, 1),
        ("a red kite", "blue kite", 0, 0.5),
        ("red red kite", "red kite", 0, 0.8),  # a bag: what is there twice counts once
        ("", "kite", 0, 0),
        ("the", "a", 1, 1),
    ],
)
def test_scores_of_answers(made: str, wanted: str, exact: float, f1: float) -> None:
    assert answer.scores([made], [{"answer": wanted}]) == {"exact match": exact, "F1": pytest.approx(f1)}


def test_questions_have_contexts_or_none() -> None:
    prompt = answer.TASK.prompt
    assert (
        prompt({"question": "Who?", "context": "Tom.", "answer": "Tom"}, "")
        == "Question: Who?\nContext: Tom.\nAnswer:"
    )
    assert prompt({"question": "Who?"}, "") == "Question: Who?\nAnswer:"
    with pytest.raises(ValueError, match='f:1: expected some text, got an empty "context"'):
        prompt({"question": "Who?", "context": ""}, "f:1")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"question": f"Who is {name}?", "answer": name} for name in ("Tom", "Ann", "Lee")]
    train, out = str(write(tmp_path / "in.jsonl", lines)), str(tmp_path / "model")
    tiny = ["--steps", "2", "--vocab-size", "260", "--embedding-dim", "16", "--num-layers", "1"]
    assert cli.main(["answer", "--train", train, "--out", out, *tiny]) == 0
    assert cli.main(["answer", "--train", train, "--out", f"{out}2", "--model", out, "--steps", "1"]) == 0
    assert json.loads((tmp_path / "model2" / "training.json").read_text())["lr"] == 2e-4
    data = str(write(tmp_path / "data.jsonl", [*lines, "{"]))
    predict = ["answer", "--model", out, "--data", data, "--out", str(tmp_path / "results.jsonl")]
    capsys.readouterr()
    assert cli.main(predict) == 0
    shown = capsys.readouterr()
    assert "3 results written" in shown.out
    assert "of 3 lines: exact match " in shown.out
    assert f"bad lines, left out: 1; the first: {data}:4: expected JSON" in shown.err
    for wrong, message in (
        (["--out", out], "data: expected either --train or --data, got none"),
        (["--out", out, "--data", data], "model: expected it with --data, got none"),
        ([*predict[1:], "--steps", "3"], "train: expected it with options of learning, got --data"),
        (
            ["--out", out, "--train", train, "--model", out, "--num-layers", "2"],
            "model: expected no options of a fresh",
        ),
        (["--out", f"{out}3", "--train", data], f"{data}:4: expected JSON"),
    ):
        assert cli.main(["answer", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_what_the_demos_try_is_in_nothing_that_they_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}

    def keep(task: Any, out: Path, train: Any, test: Any, *_: Any) -> int:
        made[out.name] = train, test
        return 0

    for demo in (translate_demo, answer_demo):
        monkeypatch.setattr(demo, "learn_and_try", keep)
    monkeypatch.setattr(translate_demo, "DATES", 400)
    monkeypatch.setattr(translate_demo, "NUMBERS", 400)
    monkeypatch.setattr(answer_demo, "LEARNED", 2000)
    translate_demo.run(tmp_path / "translate", 0)
    train, test = made["translate"]
    texts = {line[name] for line in train for name in ("source", "target")}
    assert len(test) == 2 * 4 * translate_demo.HELD_OUT
    assert not [line for line in test if line["source"] in texts or line["target"] in texts]
    answer_demo.run(tmp_path / "answer", 0)
    train, test = made["answer"]
    assert len(test) > 0.9 * answer_demo.TRIED
    assert not {line["context"] for line in test} & {line["context"] for line in train}
    fact = {
        form.format(name=name, value=value): (kind, name, value)
        for kind, (values, forms, _) in answer_demo.FACTS.items()
        for form, name, value in itertools.product(forms, answer_demo.NAMES, values)
    }

    def sentences(text: str) -> list[tuple[str, str, str]]:
        return [fact[sentence] for sentence in re.split(r"(?<=\.) ", text)]

    for line in [*test, *train]:
        told, questions = sentences(line["context"]), re.split(r"(?<=\?) ", line["question"])
        for (kind, name, value), question in zip(sentences(line["answer"]), questions, strict=True):
            assert (kind, name, value) in told
            assert name in question
            assert value not in question
            # Nothing else in the passage answers the question, and the passage is about two people.
            assert [k for k, _, _ in told].count(kind) == 1
            assert len({n for _, n, _ in told}) == 2
    assert all(line["question"].count("?") == 1 for line in test)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "零"), (10, "十"), (15, "十五"), (20, "二十"), (105, "一百零五"), (110, "一百一十"), (1004, "一千零四"),
        (1010, "一千零一十"), (10010, "一万零一十"), (20305, "二万零三百零五"), (120000, "十二万"),
        (84237, "八万四千二百三十七"), (700021, "七十万零二十一"), (99999999, "九千九百九十九万九千九百九十九"),
    ],
)  # fmt: skip
def test_chinese_numerals(number: int, text: str) -> None:
    assert translate_demo.chinese(number) == text
