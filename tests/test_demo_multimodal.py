"""The questions of the multimodal demo: asked fairly, answered rightly, and judged so that failing shows."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastgpt.demos import multimodal
from fastgpt.demos.multimodal import GOAL, QUESTIONS, Asked, Source, answer_to, asked, chance, exact, reached
from fastgpt.tasks import digits
from fastgpt.tasks.encoders import Labelled
from fastgpt.tasks.multimodal import IMAGE, SOUND


def data() -> tuple[Labelled, Labelled]:
    labels = torch.arange(20) % 10
    images = [torch.full((1, 8, 8), float(i)) for i in range(20)]
    return Labelled(images, labels), Labelled([torch.full((800,), 1.0 + i) for i in range(20)], labels)


def test_answers() -> None:
    questions = list(QUESTIONS)
    assert [answer_to(q, 3, 8) for q in questions] == ["no", "11", "the spoken one", "3", "8"]
    assert [answer_to(q, 8, 3) for q in questions] == ["no", "11", "the written one", "8", "3"]
    assert [answer_to(q, 4, 4) for q in questions] == ["yes", "8", "neither", "4", "4"]


def test_samples_show_and_say_the_digits_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "LOUDEST", 60.0)  # dB over the noise
    monkeypatch.setattr(digits, "FAINTEST", 60.0)
    monkeypatch.setattr(digits, "SHIFT", 0.0)
    images, sounds = data()
    questions, samples = Source(images, sounds, 0).samples(40)
    for one, sample in zip(questions, samples, strict=True):
        assert int(sample.images[0][0, 0, 0]) % 10 == one.written
        assert round(float(sample.sounds[0].median())) % 10 == (one.said + 1) % 10
        assert sample.answer == f" {one.answer}\n"
        assert (sample.prompt.index(IMAGE) < sample.prompt.index(SOUND)) == one.image_first
    assert {one.image_first for one in questions} == {True, False}


def test_chance_is_what_guessing_reaches() -> None:
    draw = random.Random(7)
    drawn = [asked(draw) for _ in range(20_000)]
    for image in (True, False):
        best: dict[tuple[str, int], Counter[str]] = {}
        for one in drawn[:10_000]:
            best.setdefault((one.question, one.said if image else one.written), Counter())[one.answer] += 1
        guesses = [
            best[one.question, one.said if image else one.written].most_common(1)[0][0]
            for one in drawn[10_000:]
        ]
        reached_by_guessing = exact(drawn[10_000:], guesses)
        for question, value in chance(image).items():
            assert reached_by_guessing[question] == pytest.approx(value, abs=0.04)
    assert "Which digit is spoken?" not in chance(True)
    assert "Which digit is written?" not in chance(False)


def test_exact_counts_every_question() -> None:
    questions = [Asked("What is their sum?", 1, 2, True), Asked("Which is larger?", 1, 2, True)]
    assert exact(questions, ["3", "the written one"]) == {
        "What is their sum?": 1.0, "Which is larger?": 0.0, "all": 0.5
    }  # fmt: skip


@pytest.mark.parametrize("wrong", ["nothing", "joint", "projectors", "no image", "no sound"])
def test_the_verdict_is_no_when_anything_is_missing(wrong: str) -> None:
    chances = {"images": chance(True), "sounds": chance(False)}
    results = {
        "joint": {"all": GOAL - 0.01 if wrong == "joint" else 0.95},
        "projectors": {"all": 0.96 if wrong == "projectors" else 0.4},
        "chance": chances,
        "blank": {kind: dict(table) for kind, table in chances.items()},
    }
    if wrong.startswith("no "):
        results["blank"][f"{wrong[3:]}s"]["What is their sum?"] += 0.2
    assert reached(results) == (wrong == "nothing")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_the_whole_runs_and_says_that_it_has_not_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("VOICES", ("m1",)), ("HELD_OUT_VOICES", ("f1",)), ("ACCENTS", ("en-us",))):
        monkeypatch.setattr(digits, name, value)
    monkeypatch.setattr(multimodal, "HELD_OUT", 20)
    assert multimodal.run(tmp_path, scale=0.001) == 1
    assert "Goals MISSED" in capsys.readouterr().out
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "model").iterdir()} >= {"text", "vision", "audio", "tokenizer.json"}
