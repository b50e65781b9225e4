"""GPT-2 in Hugging Face's layout: what transformers writes we read, what we write it reads, with the same results.

transformers is no dependency: where it is missing, the layout is proven on files made here by its published names.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.generate import Engine, Sampling
from fastgpt.models import checkpoint, hugging_face
from fastgpt.models.gpt import GPT, IGNORE_INDEX, GPTConfig

SIZES = {"vocab_size": 97, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)


def config_json(**changes: Any) -> dict[str, Any]:
    return {"model_type": "gpt2", **SIZES, "eos_token_id": 96, **changes}


def hub_tensors(layers: int = 2, d: int = 32, vocab: int = 97, length: int = 24) -> dict[str, Tensor]:
    """As the first GPT-2 on the hub has them: no prefix, layers [k, n], a mask among them."""
    tensors = {"wte.weight": torch.randn(vocab, d), "wpe.weight": torch.randn(length, d)}
    for i in range(layers):
        for name, shape in {
            "ln_1.weight": (d,), "ln_1.bias": (d,), "attn.c_attn.weight": (d, 3 * d), "attn.c_attn.bias": (3 * d,),
            "attn.c_proj.weight": (d, d), "attn.c_proj.bias": (d,), "ln_2.weight": (d,), "ln_2.bias": (d,),
            "mlp.c_fc.weight": (d, 4 * d), "mlp.c_fc.bias": (4 * d,), "mlp.c_proj.weight": (4 * d, d),
            "mlp.c_proj.bias": (d,),
        }.items():  # fmt: skip
            tensors[f"h.{i}.{name}"] = torch.randn(shape) * 0.1
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, length, length).tril()
    return tensors | {"ln_f.weight": torch.randn(d), "ln_f.bias": torch.randn(d)}


def write(directory: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / checkpoint.CONFIG).write_text(json.dumps(config_json(**changes)))
    save_file(tensors, directory / checkpoint.WEIGHTS, {"format": "pt"})
    return directory


def gpt2_logits(tensors: dict[str, Tensor], tokens: Tensor, heads: int = 4) -> Tensor:
    """GPT-2 from the names of its tensors, in fp64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x, d = t["wte.weight"][tokens] + t["wpe.weight"][: tokens.shape[1]], t["wte.weight"].shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (d,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    def layer(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    for i in range(2):
        qkv = layer(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(d, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + layer(out, f"h.{i}.attn.c_proj")
        hidden = F.gelu(layer(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + layer(hidden, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ t["wte.weight"].T


def test_the_hub_s_first_layout_is_read(tmp_path: Path) -> None:
    tensors, tokens = hub_tensors(), torch.randint(97, (3, 24))
    model = GPT.from_pretrained(write(tmp_path, tensors))
    assert model.config == GPTConfig(97, 32, 4, 2, 24, eos_idx=96, dropout=0.1, attention_dropout=0.1)
    assert model.config.input_dropout == 0.1
    assert replace(model.config, dropout=0.0).input_dropout == 0.0
    torch.testing.assert_close(model(tokens).double(), gpt2_logits(tensors, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "pad_idx", "eos_idx"),
    [
        ({"eos_token_id": 50256}, None, None),  # GPT-2's, in a model of fewer tokens
        ({"pad_token_id": 96}, None, 96),  # a batch is filled up with what ends a text
        ({"pad_token_id": 5}, 5, 96),
        ({"pad_token_id": -1, "eos_token_id": [7, 8]}, None, 7),
        ({"n_head": None, "num_attention_heads": 4, "eos_token_id": None}, None, None),
    ],
)
def test_special_tokens_and_other_names(
    tmp_path: Path, changes: dict[str, Any], pad_idx: int | None, eos_idx: int | None
) -> None:
    values = {name: value for name, value in config_json(**changes).items() if name != "n_head" or value}
    directory = write(tmp_path, hub_tensors())
    (directory / checkpoint.CONFIG).write_text(json.dumps(values))
    config = GPT.from_pretrained(directory).config
    assert (config.pad_idx, config.eos_idx, config.num_heads) == (pad_idx, eos_idx, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bitwise(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    tensors = {
        f"transformer.{name}": t.to(dtype) for name, t in hub_tensors().items() if ".attn.bias" not in name
    }
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    if not tied:
        tensors["lm_head.weight"] = torch.randn(97, 32).to(dtype)
    model = GPT.from_pretrained(write(tmp_path / "theirs", tensors, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / checkpoint.WEIGHTS)
    if tied:
        del tensors["lm_head.weight"]
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor), name
    again = GPT.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_shards_are_read(tmp_path: Path) -> None:
    tensors, names = hub_tensors(), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    whole = GPT.from_pretrained(write(tmp_path / "whole", tensors))
    sharded = write(tmp_path / "sharded", {})
    (sharded / checkpoint.WEIGHTS).unlink()
    places = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: t for name, t in tensors.items() if places[name] == file}, sharded / file)
    (sharded / checkpoint.SHARDS).write_text(json.dumps({"weight_map": places}))
    for a, b in zip(whole.parameters(), GPT.from_pretrained(sharded).parameters(), strict=True):
        assert torch.equal(a, b)
    (sharded / checkpoint.SHARDS).write_text(json.dumps({"weight_map": places | {"h.9.x": names[0]}}))
    with pytest.raises(
        ValueError, match=r"model-00001-of-00002.safetensors: h.9.x: expected as the index says"
    ):
        GPT.from_pretrained(sharded)
    (sharded / checkpoint.SHARDS).write_text(json.dumps({"weight_map": dict.fromkeys(places, "../x")}))
    with pytest.raises(ValueError, match=r"index.json: expected files beside it"):
        GPT.from_pretrained(sharded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "config.json: model_type: expected 'gpt2', got 'llama'"),
        ({"scale_attn_weights": False}, "scale_attn_weights: expected True, got False"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx: expected False, got True",
        ),
        ({"activation_function": "relu"}, "activation_function: expected one of gelu_new, .* got 'relu'"),
        ({"n_head": 5}, "num_heads: expected a divisor of embedding_dim=32, got 5"),
        ({"n_layer": 3}, r"transformer\.h\.2\.ln_1\.weight: expected a tensor of shape \(32,\), got none"),
        ({"n_inner": 64}, r"h\.0\.mlp\.c_fc\.weight: expected shape \(32, 64\), got \(32, 128\)"),
    ],
)
def test_other_models_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(write(tmp_path, hub_tensors(), **changes))


def test_a_truncated_file_and_a_head_that_is_not_the_embedding(tmp_path: Path) -> None:
    write(tmp_path, hub_tensors() | {"lm_head.weight": torch.randn(97, 32)})
    with pytest.raises(
        ValueError, match=r"lm_head.weight: expected the token embedding, as tie_word_embeddings says"
    ):
        GPT.from_pretrained(tmp_path)
    file = tmp_path / checkpoint.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: expected a safetensors file"):
        GPT.from_pretrained(tmp_path)


def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="expected a directory with a saved model, got none"):
        GPT.from_pretrained(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="expected a directory with a saved model, got a file"):
        GPT.from_pretrained(tmp_path / "file")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        hugging_face.locate("somebody/gpt2")


def test_a_name_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    write(tmp_path, hub_tensors())
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(tmp_path))
    assert GPT.from_pretrained("somebody/gpt2").config.vocab_size == 97

    def unreachable(name: str, **options: Any) -> str:
        raise RuntimeError("no connection\nand a long story")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"got none; and from the hub: no connection$"):
        GPT.from_pretrained("somebody/gpt2")


# --- beside transformers itself ---


def their_model(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    quiet = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**SIZES, **quiet, bos_token_id=96, eos_token_id=96, **changes)).eval()


@needs_transformers
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path: Path, tied: bool) -> None:
    from transformers import GPT2LMHeadModel

    theirs = their_model(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / checkpoint.SHARDS).exists()
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert theirs.state_dict().keys() == again.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for name in (*SIZES, "activation_function", "tie_word_embeddings", "eos_token_id"):
        assert getattr(again.config, name) == getattr(theirs.config, name), name


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients_are_transformers(tmp_path: Path, padded: bool, dtype: torch.dtype) -> None:
    """Beside transformers in fp64, on the same rounded weights, within 4 units of the dtype's rounding.

    Measured are up to 1.2 (logits) and 3 (a gradient), transformers' own 1.2 and 3.6. Both take the loss in fp32.
    """
    changes = {"pad_token_id": 0} if padded else {}
    theirs = their_model(**changes)
    theirs.save_pretrained(tmp_path)
    ours, theirs = GPT.from_pretrained(tmp_path).to(dtype), theirs.to(dtype).double()
    tokens = torch.randint(1, 97, (3, 24))
    if padded:
        tokens[0, 20:] = tokens[1, 7:] = 0
    seen = tokens != 0
    labels = tokens.masked_fill(~seen, IGNORE_INDEX)
    expected = theirs(input_ids=tokens, attention_mask=seen.long(), labels=labels)
    expected.loss.backward()
    logits = ours(tokens)
    loss = ours(tokens, F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX))
    loss.backward()
    unit = torch.finfo(dtype).eps

    def off(got: Tensor, truth: Tensor) -> float:
        return float((got - truth).detach().norm() / truth.detach().norm())

    assert off(logits[seen], expected.logits[seen]) <= 4 * unit
    unit = max(unit, torch.finfo(torch.float32).eps)
    assert off(loss, expected.loss) <= 4 * unit
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    truth = hugging_face.from_layout({name: p.grad for name, p in theirs.named_parameters()})
    assert gradients.keys() == truth.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert off(gradient, truth[name]) <= 4 * unit, name


@needs_transformers
def test_greedy_text_is_transformers_token_by_token(tmp_path: Path) -> None:
    """20 prompts of 1 to 39 tokens, 200 tokens each; both keep keys and values.

    Where two tokens are as likely as each other to the last bits the choice is rounding's: the model is one whose
    likeliest two differ by more than that.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "n_positions": 240, "n_embd": 64, "n_layer": 3, "n_head": 4}
    theirs: Any = GPT2LMHeadModel(
        GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, pad_token_id=None)
    ).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.dim() > 1:  # random weights of the usual size say one token again and again
                p.mul_(1.0 if "wte" in name else 12.0)
    theirs.save_pretrained(tmp_path)
    prompts = [torch.randint(1000, (1 + 2 * i,)).tolist() for i in range(20)]
    engine = Engine(GPT.from_pretrained(tmp_path), batch=7)
    made = {c.prompt: c.tokens for c in engine.run(prompts, Sampling(200, temperature=0)) if c.finished}
    assert len({tuple(tokens) for tokens in made.values()}) == 20
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
        assert made[i] == out[0, len(prompt) :].tolist(), i
        assert len(set(made[i])) > 20  # no text of few words


@needs_transformers
def test_ten_training_steps_give_the_same_losses(tmp_path: Path) -> None:
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).train()
    theirs.train()
    batches = torch.randint(97, (10, 4, 24))
    losses: list[list[float]] = []
    for model in (ours, theirs):
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), [*losses, []]
        for batch in batches:
            labels = F.pad(batch[:, 1:], (0, 1), value=IGNORE_INDEX)
            loss = model(batch, labels) if model is ours else model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)
