"""The command line: every mistake is one line and exit code 2; train and generate end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import cli, demo
from fastgpt.models import checkpoint
from fastgpt.train import data

SIZES = {"embedding-dim": 16, "num-heads": 2, "num-layers": 1, "seq-length": 16, "steps": 4, "batch-size": 2}
TINY = [f"--{name}={n}" for name, n in {**SIZES, "eval-every": 2, "log-every": 1}.items()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; é\n" * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "out"
    assert cli.main(["train", "--text", str(text), "--out", str(out), "--vocab-size", "300", *TINY]) == 0
    return out


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line on stderr of a command that must end in exit code 2."""
    capsys.readouterr()
    assert cli.main([str(a) for a in args]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip("\n")
    assert line.startswith("fastgpt: error: "), captured.err
    assert "\n" not in line, captured.err
    return line


def no_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a command gets as far as its text."""

    def never(*_, **__):
        pytest.fail("the corpus was built before the mistake was found")

    monkeypatch.setattr(data, "make_corpus", never)
    monkeypatch.setattr(demo, "make_corpus", never)


def test_train_leaves_a_whole_checkpoint(model: Path) -> None:
    names = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "training.json",
        "losses.jsonl",
        "loss.png",
    }
    assert {file.name for file in model.iterdir()} == names
    records = [json.loads(line) for line in (model / "losses.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert "held_out" in records[-1]
    assert json.loads((model / "training.json").read_text())["steps"] == 4


def test_generate_streams_the_prompt_and_the_same_text_for_a_seed(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for seed in (1, 1, 2):
        args = [
            "generate",
            "--model",
            str(model),
            "--prompt",
            "thé ",
            "--max-new-tokens",
            "12",
            "--seed",
            str(seed),
        ]
        assert cli.main([*args, "--temperature", "1.5", "--top-k", "200", "--top-p", "0.99"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("thé ")
    assert cli.main([*args, "--temperature", "1e-45"]) == 0
    capsys.readouterr()
    assert cli.main([*args, "--max-new-tokens", "0"]) == 0
    assert capsys.readouterr().out == "thé \n"
    assert len(outputs[0]) > 8
    for options in (["--backend", "reference"], ["--weights", "int8"]):
        assert cli.main([*args, "--temperature", "0", *options]) == 0
        shown = capsys.readouterr()
        assert shown.out.startswith("thé ")
        assert "of the memory's bandwidth" in shown.err
        rest = shown.out.removeprefix("thé ").rstrip("\n")
        assert cli.main([*args, "--temperature", "0", *options, "--stop", rest[3:5]]) == 0
        assert capsys.readouterr().out == f"thé {rest[: rest.index(rest[3:5])]}\n"


def test_a_file_of_prompts_is_continued_and_gone_on_with(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "the quick"}\n{"prompt": "fox"}\n')
    args = ["generate", "--model", str(model), "--prompts", str(tmp_path / "in.jsonl")]
    args += ["--out", str(tmp_path / "out.jsonl"), "--samples", "2", "--seed", "1"]
    assert cli.main(args) == 0
    assert "4 texts written" in (out := capsys.readouterr().out)
    assert "of the memory's bandwidth" in out
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    assert cli.main(args) == 0
    assert "0 texts written" in capsys.readouterr().out
    alone = fails(capsys, "generate", "--model", model, "--prompt", "a", "--out", tmp_path / "x")
    assert "out: expected it with --prompts, and only there" in alone
    assert "prompt: expected either --prompt or --prompts, got none" in fails(
        capsys, "generate", "--model", model
    )
    many = fails(capsys, "generate", "--model", model, "--prompt", "a", "--samples", "2")
    assert "samples: expected 1 with --prompt, got 2" in many


def test_perplexity_and_what_weights_of_fewer_bits_cost(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["perplexity", "--model", str(model), "--text", str(text)]) == 0
    assert "of the memory's bandwidth" in (out := capsys.readouterr().out)
    assert out.startswith("perplexity ")
    assert cli.main(["quantize", "--model", str(model), "--report", "--text", str(text)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["weights", "fp32", "bf16", "int8"]
    assert all("%" in line for line in lines[1:])
    assert cli.main(["quantize", "--model", str(model)]) == 0
    assert "%" not in capsys.readouterr().out
    assert "window: expected 2 to" in fails(
        capsys, "perplexity", "--model", model, "--text", text, "--window", 999
    )


def test_bytes_bf16_and_the_sinusoidal_positions(text: Path, tmp_path: Path) -> None:
    options = ["--tokenizer", "bytes", "--bf16", "--positions", "sinusoidal", "--accumulate", "2", *TINY]
    assert cli.main(["train", "--text", str(text), "--out", str(tmp_path / "m"), *options]) == 0
    assert (
        cli.main(["generate", "--model", str(tmp_path / "m"), "--prompt", "a", "--max-new-tokens", "5"]) == 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-heads 3", "num_heads: expected a divisor of embedding_dim=16, got 3"),
        ("--seq-length 100000", "corpus: expected at least 100001 tokens"),
        ("--steps 0", "steps: expected at least 1, got 0"),
        ("--vocab-size 10", "vocab_size: expected at least 256 (one token a byte), got 10"),
        ("--dropout 1.5", "dropout: expected a probability in [0, 1), got 1.5"),
        (
            "--seed 9223372036854775808",
            "seed: expected an integer in [-2**63, 2**63), got 9223372036854775808",
        ),
        ("--device tpu", "device: expected cpu, cuda or auto, got 'tpu'"),
        ("--backend nonsense", "backend: expected one"),
    ],
)
def test_bad_training_options(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    out = tmp_path / "out"
    assert message in fails(capsys, "train", "--text", text, "--out", out, *TINY, *options.split())
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "expected text, got an empty file"),
        (b"caf\xe9", "expected UTF-8 text, got byte 0xe9 at offset 3"),
        (b"short", "corpus: expected at least 17 tokens (one sequence of 16 and its targets)"),
    ],
)
def test_bad_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    """And the model that the run would have replaced is untouched."""
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert message in fails(capsys, "train", "--text", tmp_path / "text", "--out", model, *TINY)
    assert message in fails(
        capsys, "train", "--text", tmp_path / "text", "--out", model, *TINY, "--tokenizer", "bytes"
    )
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_text_is_a_directory_or_out_a_file(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Is a directory" in fails(capsys, "train", "--text", tmp_path, *TINY)
    assert "expected a directory or nothing, got a file" in fails(
        capsys, "train", "--text", text, "--out", text, *TINY
    )
    assert "expected a directory or nothing, got a file" in fails(capsys, "demo", "--out", text)


def test_bad_generation(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*options: object) -> str:
        return fails(capsys, "generate", "--model", model, *options)

    assert "prompt: expected some text, got an empty prompt" in wrong("--prompt", "")
    assert "top_p: expected a number in (0, 1], got 2.0" in wrong("--prompt", "a", "--top-p", 2)
    assert "temperature: expected at least 0, got -1.0" in wrong("--prompt", "a", "--temperature", -1)
    missing = fails(capsys, "generate", "--model", tmp_path / "none", "--prompt", "a")
    assert "none: expected a directory with a saved model, got none" in missing
    assert "config.json: No such file" in fails(capsys, "generate", "--model", tmp_path, "--prompt", "a")


@pytest.mark.parametrize(("fault", "message"), [("missing", "got none"), ("misshapen", "got (7, 16)")])
def test_bad_checkpoint(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, message: str
) -> None:
    from safetensors.torch import load_file

    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors, name = load_file(model / checkpoint.WEIGHTS), "transformer.wte.weight"
    shape = tuple(tensors[name].shape)
    if fault == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(7, 16)
    (tmp_path / checkpoint.WEIGHTS).write_bytes(checkpoint.tensor_bytes(tensors))
    line = fails(capsys, "generate", "--model", tmp_path, "--prompt", "a")
    assert "wte.weight: expected " in line
    assert str(shape) in line
    assert message in line


@pytest.mark.parametrize(
    "error", [ValueError("no such op"), OSError("disk\nfull"), NotImplementedError("a"), TypeError("b")]
)
def test_user_errors_are_one_line(error: Exception) -> None:
    message = cli.user_error(error)
    assert message is not None
    assert "\n" not in message
    assert "'" not in message


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyError("ours")])
def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken() -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", broken)
    with pytest.raises(type(error), match="ours"):
        cli.main(["doctor"])


def test_a_missing_extra_says_what_to_install(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = fails(capsys, "train", "--text", text, *TINY)
    assert line.endswith("tokenizers is not installed; it comes with: pip install fastgpt[all]")


@pytest.mark.parametrize("module", ["matplotlib.backends.backend_agg", "safetensors.torch", "tqdm"])
@pytest.mark.parametrize("command", ["train", "demo"])
def test_what_is_needed_at_the_end_is_missed_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    module: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    no_corpus(monkeypatch)
    line = fails(capsys, command, "--out", tmp_path / "out")
    assert f"{module.partition('.')[0]} is not installed; it comes with: pip install fastgpt[all]" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "demo"])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "file: expected a directory or nothing, got a file"),
        ("file/sub", "file/sub: Not a directory"),
        ("/proc/fastgpt", "/proc/fastgpt: No such file or directory"),
        ("read-only", "read-only: Permission denied"),
    ],
)
def test_no_place_to_save_is_noticed_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    out: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("read-only").mkdir()
    make = os.open

    def refuse(path, *args, **kwargs):  # permissions do not bind whoever is root
        if str(path).startswith("read-only"):
            raise PermissionError(13, "Permission denied", str(path))
        return make(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    no_corpus(monkeypatch)
    assert message in fails(capsys, command, "--out", out)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "read-only"}


def test_unknown_backend_is_noticed_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_corpus(monkeypatch)
    assert "backend: expected one" in fails(capsys, "train", "--out", tmp_path, "--backend", "cpu,nonsense")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_line(error: Exception) -> None:
    message = cli.user_error(error)
    assert message is not None
    assert message.startswith("not enough memory: ")
    assert "enforce" not in message


def test_a_batch_larger_than_memory(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "train", "--text", text, "--out", tmp_path / "o", *TINY, "--batch-size", 10**15)
    assert "not enough memory: can't allocate memory: you tried to allocate" in line


def test_demo_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = data.default_corpus()[:60_000]
    monkeypatch.setattr(demo, "default_corpus", lambda: text)
    monkeypatch.setattr(demo, "compiled_path", lambda *_: (None, "not in this test"))
    assert (
        cli.main(["demo", "--minutes", "0", "--out", str(tmp_path / "out")]) == 1
    )  # five steps teach nothing
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["agrees"]
    assert not results["below_unigram_entropy"]
    assert {name: len(losses) for name, losses in results["losses"].items()} == dict.fromkeys(
        results["held_out"], 5
    )
    assert {"losses.png", "results.json", "model"} == {file.name for file in (tmp_path / "out").iterdir()}
    out = capsys.readouterr().out
    assert "not measured: not in this test" in out
    assert "Losses agree" in out
    assert "The time is up" in out
    assert out.splitlines()[-1].startswith("Large freed blocks were kept, for every path alike")
    assert (
        cli.main(["generate", "--model", str(tmp_path / "out" / "model"), "--prompt", "a", "--seed", "1"])
        == 0
    )


def test_as_a_process(tmp_path: Path) -> None:
    """`python -m fastgpt`: the exit code and nothing but the one line; a usage mistake is 2 as well."""

    def run(*args: str, **settings: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(p for p in sys.path if p)
        return subprocess.run(
            [sys.executable, "-m", "fastgpt", *args],
            capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, **settings},
        )  # fmt: skip

    wrong = run("generate", "--model", "nowhere/none", "--prompt", "a", HF_HUB_OFFLINE="1")
    line = "fastgpt: error: nowhere/none: expected a directory with a saved model, got none"
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith(line)
    assert wrong.stderr.count("\n") == 1
    assert "layer_norm" in run("doctor").stdout
    setting = run("doctor", FASTGPT_BACKEND="nonsense")
    assert (setting.returncode, setting.stdout) == (2, "")
    assert setting.stderr.startswith("fastgpt: error: FASTGPT_BACKEND: expected one of cpu")
    usage = run("train", "--steps", "many")
    assert usage.returncode == 2
    assert "--steps" in usage.stderr
    assert "Traceback" not in usage.stderr
