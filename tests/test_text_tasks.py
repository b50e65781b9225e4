"""Texts from prompts: streams, stop strings, files that can be gone on with, and what weights of fewer bits cost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgpt_kernels.cpu.decode import quantized
from test_decoding import model as decoding_model

from fastgpt.generate import Continuation, Engine, Sampling, perplexity
from fastgpt.tasks import text
from fastgpt.tasks.quantize import table
from fastgpt.train.tokenizer import BPETokenizer, ByteTokenizer

LINES = [{"prompt": "ab", "id": 7}, {"prompt": "c"}, {"prompt": "hello there"}, {"prompt": "é"}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(decoding_model(vocab_size=256), batch=3)


def jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def run(engine: Engine, source: Path, target: Path, **options: Any) -> text.Continued:
    sampling = Sampling(options.pop("max_new_tokens", 6), temperature=1.5, seed=3)
    return text.continue_file(engine, ByteTokenizer(), source, target, sampling, progress=False, **options)


def results(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    made = {(line["line"], line["sample"]): line for line in lines}
    assert len(made) == len(lines)
    return made


def test_every_prompt_of_a_file_has_its_texts(engine: Engine, tmp_path: Path) -> None:
    source, target = jsonl(tmp_path / "in.jsonl", [LINES[0], "", *LINES[1:]]), tmp_path / "out.jsonl"
    written, speed, left_out = run(engine, source, target, samples=2)
    assert (written, left_out) == (8, "")
    assert speed is not None
    assert speed.tokens == 48
    assert "tokens/s" in str(speed)
    made = results(target)
    assert {line for line, _ in made} == {1, 3, 4, 5}
    assert made[1, 0]["id"] == 7
    assert made[1, 0]["prompt"] == "ab"
    for (_, _), line in made.items():
        assert line["tokens"] == 6
        assert line["finished"] == "length"
        assert line["logprob"] < 0
    (alone,) = [c for c in engine.run([list(b"c")], Sampling(6, temperature=1.5, seed=3)) if c.finished]
    assert made[3, 0]["text"] == bytes(alone.tokens).decode(errors="replace")


def test_a_run_that_was_cut_short_goes_on(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = jsonl(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    run(engine, source, tmp_path / "whole.jsonl")
    grow, steps = engine.run, 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal steps
        for grown in grow(*args, **options):
            steps += 1
            if steps == 20:
                raise KeyboardInterrupt
            yield grown

    with monkeypatch.context() as patched:
        patched.setattr(engine, "run", interrupted)
        with pytest.raises(
            KeyboardInterrupt, match=r"\d of 4 results written to .*out\.jsonl; the same command"
        ):
            run(engine, source, target)
    before = len(results(target))
    assert 0 < before < 4  # what was written is whole
    with open(target, "a") as file:
        file.write('{"prompt": "cut')  # as a kill in the middle of a write leaves it
    assert run(engine, source, target).texts == 4 - before
    assert results(target) == results(tmp_path / "whole.jsonl")
    assert run(engine, source, target) == (0, None, "")


BAD = [
    ("{", r"expected JSON"),
    ("[1]", r"expected a JSON object, got list"),
    ({"text": "a"}, r'expected an object with a "prompt" of text, got the fields text'),
    ({"prompt": 3}, r'expected an object with a "prompt" of text, got int'),
    ({"prompt": ""}, r'expected some text, got an empty "prompt"'),
    ('{"prompt": "\\ud800"}', r'expected text in "prompt", got .*surrogates'),
    ({"prompt": "a" * 38}, r"expected at most 40 tokens, the model's context, got 38 and"),
    ({"prompt": "a", "text": "mine"}, r"expected no field called text, which the result has"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_is_left_out_and_named(engine: Engine, tmp_path: Path, line: Any, message: str) -> None:
    source, target = jsonl(tmp_path / "in.jsonl", [LINES[0], line, LINES[1]]), tmp_path / "out.jsonl"
    written, _, left_out = run(engine, source, target)
    assert written == 2
    assert re.match(rf"bad lines, left out: 1; the first: .*in\.jsonl:2: {message}", left_out)
    made = [json.loads(line) for line in target.read_text().splitlines()]
    (bad,) = [line for line in made if "error" in line]
    assert bad.keys() == {"line", "error"}
    assert bad["line"] == 2
    assert re.search(rf"in\.jsonl:2: {message}", bad["error"])
    assert {line["line"] for line in made if "text" in line} == {1, 3}
    assert run(engine, source, target) == (0, None, left_out)
    assert len(target.read_text().splitlines()) == 3  # not told twice
    jsonl(source, [LINES[0], {"prompt": "put right"}, LINES[1]])
    again = run(engine, source, target)
    assert (again.texts, again.left_out) == (1, "")
    assert results(target)[2, 0]["prompt"] == "put right"


def test_options_and_files_that_cannot_be_are_told_before_anything_is_written(
    engine: Engine, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=r"in\.jsonl: expected a JSON object on each line, got none"):
        run(engine, jsonl(tmp_path / "in.jsonl", []), target)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 0, got -1"):
        run(engine, jsonl(tmp_path / "in.jsonl", LINES), target, max_new_tokens=-1)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"line": 9, "sample": 0, "text": "x"}\n',
            r"out\.jsonl:1: expected a result of .*in\.jsonl, .* line 9",
        ),
        (
            '{"line": 2, "sample": 0, "text": "x", "prompt": "ab"}\n',
            r"out\.jsonl:1: expected a result of .*in\.jsonl, .* line 2",
        ),
        ("notes without an end", r"out\.jsonl: expected results of .*in\.jsonl, or no such file"),
        ("a list\nof things\nto do", r"out\.jsonl: expected results of .*in\.jsonl, or no such file"),
        ('{"id": 7}\n', r"out\.jsonl:1: expected a result of .*in\.jsonl, .* line None"),
    ],
)
def test_another_file_is_left_as_it_was(engine: Engine, tmp_path: Path, content: str, message: str) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text(content)
    with pytest.raises(ValueError, match=message):
        run(engine, jsonl(tmp_path / "in.jsonl", LINES), target)
    assert target.read_text() == content


def test_without_a_limit_each_prompt_has_the_room_that_it_leaves(engine: Engine, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", [{"prompt": "a" * 38}, {"prompt": "b"}])
    run(engine, source, tmp_path / "out.jsonl", max_new_tokens=None)
    assert {line: made["tokens"] for (line, _), made in results(tmp_path / "out.jsonl").items()} == {
        1: 2,
        2: 39,
    }
    full = run(engine, jsonl(source, [{"prompt": "a" * 40}]), tmp_path / "other.jsonl", max_new_tokens=None)
    assert "in.jsonl:1: expected at most 40 tokens, the model's context, got 40" in full.left_out


def test_prompts_are_never_written_over(engine: Engine, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}')
    with pytest.raises(ValueError, match="expected another file than that of the lines"):
        run(engine, source, source)
    assert source.read_text() == '{"prompt": "a"}\n{"prompt": "b"}'
    jsonl(source, [r'{"prompt": "a", "id": "\ud800"}'])
    assert run(engine, source, tmp_path / "out.jsonl")[0] == 1
    assert results(tmp_path / "out.jsonl")[1, 0]["id"] == "\ud800"


class Words:
    """Token i is a letter, `a` to `z`."""

    vocab_size = 26

    def encode(self, words: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in words]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i + ord("a")) for i in ids)

    def special_id(self, word: str) -> int | None:
        return None

    def to_json(self) -> bytes:
        return b""


@pytest.mark.parametrize(
    ("stop", "expected"),
    [((), "abcdef"), (("cd",), "ab"), (("ef", "bcx"), "abcd"), (("a",), ""), (("fx",), "abcdef")],
)
def test_a_stop_string_ends_the_text_and_is_never_shown(stop: tuple[str, ...], expected: str) -> None:
    growing, shown = text.Text(Words(), [3, 3], stop), ""
    for n in range(1, 7):
        shown += growing.more(list(range(n)), n == 6)
        assert expected.startswith(shown)
        if growing.stopped:
            break
    assert shown == expected
    assert growing.stopped == (expected != "abcdef")


def test_a_special_token_is_a_stop_string_too() -> None:
    """Decoding leaves it out of the text: there it would never be found."""
    bpe = BPETokenizer.train("abc abc", 256)
    bpe.tokenizer.add_special_tokens(["<|end|>"])
    (end,) = bpe.tokenizer.encode("<|end|>").ids
    assert bpe.special_id("<|end|>") == end
    assert bpe.special_id("a") is None
    assert bpe.special_id("<|other|>") is None
    growing = text.Text(bpe, bpe.encode("a"), ["<|end|>", "x"])
    tokens = [*bpe.encode("bc"), end, *bpe.encode("d")]
    shown = "".join(growing.more(tokens[:n], n == 4) for n in range(1, 5) if not growing.stopped)
    assert (shown, growing.stopped) == ("bc", True)


def test_ids_without_a_token_are_never_drawn(tmp_path: Path) -> None:
    engine, sampling = Engine(decoding_model(vocab_size=70)), Sampling(30, temperature=9.0, seed=0)
    for pieces in (
        text.stream_text(engine, Words(), "ab", sampling),
        text.stream_uncached(decoding_model(vocab_size=70), Words(), "ab", sampling),
    ):
        made = "".join(pieces)
        assert len(made) == 30
        assert set(made) <= set("abcdefghijklmnopqrstuvwxyz")
    source, target = jsonl(tmp_path / "in.jsonl", [{"prompt": "ab"}]), tmp_path / "out.jsonl"
    text.continue_file(engine, Words(), source, target, sampling, progress=False)
    assert results(target)[1, 0]["text"].isalpha()


def test_a_stop_string_ends_a_line_of_a_file(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def letters(prompts: Any, sampling: Any, **_: Any) -> Any:
        made = Continuation(0, 0)
        for letter in b"abcdef":
            assert made.finished is None  # who found a stop string has ended it
            made.tokens.append(letter)
            made.logprobs.append(-1.0)
            yield made
            if made.finished:
                return

    monkeypatch.setattr(engine, "run", letters)
    run(engine, jsonl(tmp_path / "in.jsonl", [{"prompt": "x"}]), tmp_path / "out.jsonl", stop=("cd",))
    (line,) = results(tmp_path / "out.jsonl").values()
    assert (line["text"], line["finished"], line["tokens"]) == ("ab", "stop", 4)


def test_a_stream_shows_no_half_characters(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def accents(prompts: Any, sampling: Any, **_: Any) -> Any:
        made = Continuation(0, 0)
        for byte in "aé漢".encode():
            made.tokens.append(byte)
            yield made

    monkeypatch.setattr(engine, "run", accents)
    assert list(text.stream_text(engine, ByteTokenizer(), "x", Sampling(6))) == ["a", "", "é", "", "", "漢"]
    with pytest.raises(ValueError, match="prompt: expected some text"):
        next(text.stream_text(engine, ByteTokenizer(), "", Sampling(6)))


def test_the_report_on_weights(tmp_path: Path) -> None:
    made = decoding_model(vocab_size=256)
    (tmp_path / "text").write_text("Some words to look at, more than the context of forty tokens. " * 3)
    lines = [line.split() for line in table(made, ByteTokenizer(), [tmp_path / "text"]).splitlines()]
    assert [line[0] for line in lines] == ["weights", "fp32", "bf16", "int8"]
    sizes = [float(line[1]) for line in lines[1:]]
    assert sizes[0] == pytest.approx(sum(p.numel() for p in made.parameters()) * 4e-6, abs=0.1)
    assert sizes[0] > sizes[1] > sizes[2]
    assert lines[1][3] == "+0.00%"
    for line, dtype in zip(lines[2:], (torch.bfloat16, torch.int8), strict=True):
        by_hand = decoding_model(vocab_size=256)
        with torch.no_grad():
            for name, parameter in by_hand.named_parameters():
                if parameter.dim() == 2 and "wpe" not in name:
                    packed = quantized(parameter, dtype)
                    scale = 1.0 if packed.scale is None else packed.scale[:, None]
                    parameter.copy_(packed.weight.float() * scale)
        tokens = torch.tensor(ByteTokenizer().encode((tmp_path / "text").read_text()))
        assert float(line[2]) == pytest.approx(perplexity(by_hand, tokens).value, rel=1e-5)
        assert line[2] != lines[1][2]
    assert len(table(made, ByteTokenizer(), None).splitlines()[0].split()) == 2
    assert torch.equal(
        made.wte.weight, decoding_model(vocab_size=256).wte.weight
    )  # the model itself is as it was
