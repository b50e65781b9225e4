"""A saved model: bitwise the same again, whole or not at all, and faults named."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_gpt import DIM, LENGTH, VOCAB, Options, make_model, make_tokens
from torch import Tensor

from fastgpt.models import checkpoint, hugging_face
from fastgpt.models.gpt import GPT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"tie_output": False, "positions": "sinusoidal", "hidden_dim": 48}])
def test_save_and_load_bitwise(tmp_path: Path, options: Options, dtype: torch.dtype) -> None:
    model = make_model(**options).to(dtype).eval()
    model.save_pretrained(tmp_path / "new" / "dir")
    state = torch.get_rng_state()
    loaded = GPT.from_pretrained(tmp_path / "new" / "dir")
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.config == model.config
    tokens, _ = make_tokens()
    assert torch.equal(loaded(tokens), model(tokens))
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype
        assert b.requires_grad


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["transformer.h.1.ln_2.bias"]


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:-1]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.2.ln_1.bias"] = torch.zeros(32)


def integers(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.ln_f.bias"] = torch.zeros(32, dtype=torch.int32)


def mixed(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.0.ln_1.bias"] = tensors["transformer.h.0.ln_1.bias"].bfloat16()


def fp8(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (drop, r"transformer\.h\.1\.ln_2\.bias: expected a tensor of shape \(32,\), got none"),
        (reshape, r"transformer\.wte\.weight: expected shape \(61, 32\), got \(60, 32\)"),
        (add, r"transformer\.h\.2\.ln_1\.bias: expected no such tensor, got shape \(32,\)"),
        (integers, r"transformer\.ln_f\.bias: expected float32 as transformer\.wte\.weight, got int32"),
        (mixed, r"transformer\.h\.0\.ln_1\.bias: expected float32 as transformer\.wte\.weight, got bfloat16"),
        (
            fp8,
            r"transformer\.wte\.weight: expected one of float32, bfloat16, float16, float64, got float8_e4m3fn",
        ),
    ],
)
def test_faulty_weights_are_named(tmp_path: Path, fault: Callable, message: str) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    tensors = hugging_face.to_layout(model.state_dict())
    fault(tensors)
    (tmp_path / checkpoint.WEIGHTS).write_bytes(checkpoint.tensor_bytes(tensors))
    with pytest.raises(ValueError, match=r"model\.safetensors: " + message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (checkpoint.WEIGHTS, b"junk", ValueError, "expected a safetensors file"),
        (checkpoint.WEIGHTS, None, FileNotFoundError, "model.safetensors"),
        (checkpoint.CONFIG, None, FileNotFoundError, "config.json"),
        (checkpoint.CONFIG, b"{", ValueError, "config.json: expected JSON"),
        (checkpoint.CONFIG, b"[]", ValueError, "config.json: expected a JSON object, got list"),
        (checkpoint.CONFIG, b"{}", ValueError, "config.json: expected the fields .*, got no vocab_size"),
        (
            checkpoint.CONFIG,
            {"model_type": "fastgpt"},
            ValueError,
            "config.json: expected the fields .*, got unexpected activation_function",
        ),
        (checkpoint.CONFIG, {"n_head": 5}, ValueError, "config.json: num_heads: expected a divisor"),
        (
            checkpoint.CONFIG,
            {"n_embd": "32"},
            ValueError,
            "config.json: embedding_dim: expected an integer",
        ),
    ],
)
def test_faulty_files_are_named(
    tmp_path: Path, name: str, content, error: type[Exception], message: str
) -> None:
    make_model().save_pretrained(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    elif isinstance(content, dict):
        (tmp_path / name).write_text(json.dumps({**json.loads((tmp_path / name).read_text()), **content}))
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("broken", ["tensor_bytes", "fsync"])
def test_a_failed_save_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    make_model(0).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint if broken == "tensor_bytes" else checkpoint.os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        make_model(1).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_directory_in_a_files_place_stops_the_save_ahead_of_the_first_file(tmp_path: Path) -> None:
    make_model(0).save_pretrained(tmp_path)
    (tmp_path / checkpoint.WEIGHTS).unlink()
    (tmp_path / checkpoint.WEIGHTS).mkdir()
    before = (tmp_path / checkpoint.CONFIG).read_bytes()
    with pytest.raises(IsADirectoryError) as raised:
        GPT(VOCAB, DIM, 1, 1, LENGTH).save_pretrained(tmp_path)
    assert raised.value.filename == str(tmp_path / checkpoint.WEIGHTS)
    assert (tmp_path / checkpoint.CONFIG).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("broken", ["open", "fsync", "replace"])
def test_a_failed_save_names_the_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(path: object, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, broken, fail)
        with pytest.raises(OSError, match="No space") as raised:
            make_model().save_pretrained(tmp_path)
    assert raised.value.filename == str(tmp_path / checkpoint.CONFIG)
    assert not list(tmp_path.iterdir())


def test_weights_are_placed_last_and_the_umask_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed, replace = [], checkpoint.os.replace
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda a, b: (placed.append(Path(b).name), replace(a, b))[1]
    )
    before = os.umask(0o027)
    try:
        make_model().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert placed == [checkpoint.CONFIG, checkpoint.WEIGHTS]
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}
