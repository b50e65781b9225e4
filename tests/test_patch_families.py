"""`fastgpt.patch` on models of transformers, family by family: results, masks, caches, compiling."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from typing import Any

import hugging_face_models as made
import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt.interop import layers, register_attention

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of a dtype's rounding beside fp64, as in test_patch.py; the unpatched models' are up to 25 and 15.
UNITS = {torch.float32: 100.0, torch.bfloat16: 25.0}
# By family, how many modules of each kind are replaced; of what is left the reason.
REPLACED = {
    "gpt2": {"layer_norm": 5, "attention": 2, "mlp": 2, "gelu": 2, "cross_entropy": 1, "linear": 4},
    "bert": {"layer_norm": 6, "attention": 2, "mlp": 2, "gelu": 3, "linear": 12},
    "vit": {"layer_norm": 5, "attention": 2, "mlp": 2, "gelu": 2, "linear": 9},
    "whisper": {"layer_norm": 12, "attention": 6, "gelu": 4, "cross_entropy": 1, "linear": 32},
    "t5": {"rms_norm": 12, "attention": 6, "cross_entropy": 1, "linear": 32},
    "t5-gated": {"rms_norm": 12, "attention": 6, "mlp": 4, "gelu": 4, "cross_entropy": 1, "linear": 36},
    "llama": {"rms_norm": 5, "attention": 2, "mlp": 2, "cross_entropy": 1, "linear": 14},
}


def patched(model: Any) -> Any:
    other = copy.deepcopy(model)
    fastgpt.patch(other)
    return other


@pytest.mark.parametrize("family", made.FAMILIES)
def test_what_is_replaced(family: str) -> None:
    model = made.model(family)
    names, kind, called = list(model.state_dict()), type(model.config), model.config._attn_implementation
    report = fastgpt.patch(model)
    kinds = [entry.kind for entry in report.replaced]
    assert {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} == REPLACED[family]
    assert [e.why for e in report.left] == (["its head has a bias"] if family == "bert" else [])
    assert list(model.state_dict()) == names
    assert fastgpt.patch(model).to_dict() == report.to_dict()
    fastgpt.unpatch(model)
    assert model.config._attn_implementation == called
    assert type(model.config) is kind
    assert fastgpt.unpatch(model) == 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", made.FAMILIES)
def test_outputs_and_gradients_are_the_same(
    family: str, dtype: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "MUCH", 0)  # so that the small ones take the way of the large
    kind = DTYPES[dtype]
    model = made.model(family).to(kind).train(training)
    batch, other = made.inputs(family, kind), patched(model)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}
    seen = batch["attention_mask"].bool() if family in ("gpt2", "bert", "llama") else slice(None)
    results = []
    for m, x in ((copy.deepcopy(model).double(), wide), (other, batch)):
        out = m(**x)
        out.loss.backward()
        gradients = {name: p.grad.double() for name, p in m.named_parameters() if p.grad is not None}
        results.append(
            {"loss": out.loss.detach().double(), "logits": out.logits.detach().double()[seen], **gradients}
        )
        assert out.logits.dtype == next(m.parameters()).dtype
    exact, got = results
    assert got.keys() == exact.keys()
    assert len(exact) > 20
    unit = UNITS[kind] * torch.finfo(kind).eps
    largest = max(float(exact[name].norm()) for name in exact if name not in ("loss", "logits"))
    for name, value in exact.items():
        floor = 0.0 if name in ("loss", "logits") else 1e-3 * largest
        off = float((got[name] - value).norm()) / (float(value.norm()) + floor)
        assert off <= unit, f"{name}: {off / torch.finfo(kind).eps:.1f} units"


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "t5"])
def test_padding_leaks_nowhere(family: str) -> None:
    model, batch = patched(made.model(family)), made.inputs(family)
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 50, batch["input_ids"])}
    with torch.no_grad():
        a, b = (model(**x).logits for x in (batch, changed))
    seen = batch["attention_mask"].bool() if family != "t5" else slice(None)
    assert torch.equal(a[seen], b[seen])
    if family == "bert":
        assert not torch.equal(a[~batch["attention_mask"].bool()], b[~batch["attention_mask"].bool()])


@pytest.mark.parametrize("family", [*made.CAUSAL, "t5", "whisper"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_future_leaks_nowhere(family: str, masked: bool) -> None:
    model, batch = patched(made.model(family)), made.inputs(family)
    name = "input_ids" if family in made.CAUSAL else "decoder_input_ids"
    tokens = batch.pop("labels" if name == "decoder_input_ids" else "input_ids").clamp(min=5)
    batch.pop("labels", None)
    if family in made.CAUSAL and not masked:
        batch.pop("attention_mask")
    if name == "decoder_input_ids" and masked:
        batch["decoder_attention_mask"] = torch.ones_like(tokens)
        batch["decoder_attention_mask"][0, 8:] = 0
    changed = tokens.clone()
    changed[:, 7:] = 50
    with torch.no_grad():
        a, b = (model(**batch, **{name: ids}).logits for ids in (tokens, changed))
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.equal(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [*made.CAUSAL, "t5", "whisper"])
def test_generation_with_caches(family: str, cache: str, padded: bool) -> None:
    model = made.model(family)
    batch = made.inputs(family)
    batch.pop("labels")
    if family in made.CAUSAL and padded:  # on the left, as for generation
        batch = {n: x.flip(1) for n, x in batch.items()}
    elif "attention_mask" in batch and not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    texts = [m.generate(**batch, **options) for m in (model, patched(model))]
    assert torch.equal(texts[0], texts[1])
    assert texts[0].shape[1] > 5


def test_a_sliding_window() -> None:
    import transformers as hf

    torch.manual_seed(0)
    model = hf.MistralForCausalLM(
        hf.MistralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=5, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    batch, other = made.inputs("llama"), patched(model)
    for mask in (batch["attention_mask"], None):
        with torch.no_grad():
            expected, got = (m(batch["input_ids"], attention_mask=mask).logits for m in (model, other))
        seen = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-5)
    changed = batch["input_ids"].clone()
    changed[:, :4] = 50  # two layers of five tokens see nine
    with torch.no_grad():
        a, b = (other(ids).logits for ids in (batch["input_ids"], changed))
    assert torch.equal(a[:, 13:], b[:, 13:])


def test_packed_texts_do_not_see_one_another() -> None:
    model = patched(made.model("llama"))
    a, b = torch.randint(5, 97, (1, 7)), torch.randint(5, 97, (1, 9))
    places = torch.cat([torch.arange(7), torch.arange(9)])[None]
    with torch.no_grad():
        together = model(torch.cat([a, b], 1), position_ids=places, use_cache=False).logits
        alone = model(b).logits
    torch.testing.assert_close(together[:, 7:], alone, rtol=1e-4, atol=1e-5)


def test_by_name() -> None:
    """Without patch: `attn_implementation="fastgpt"`, with its mask function."""
    register_attention()
    expected, ours = made.model("gpt2"), made.model("gpt2", attn_implementation="fastgpt")
    assert ours.config._attn_implementation == "fastgpt"
    batch = made.inputs("gpt2")
    a, b = expected(**batch), ours(**batch)
    torch.testing.assert_close(b.loss, a.loss)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(b.logits[seen], a.logits[seen], rtol=1e-4, atol=1e-4)
    ours.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours(**batch).loss, a.loss)


def test_another_model_of_the_same_configuration_is_left_as_it_is() -> None:
    import transformers as hf

    shared = made.config("gpt2")
    a, b = hf.GPT2LMHeadModel(shared), hf.GPT2LMHeadModel(shared)
    fastgpt.patch(a)
    assert b.config._attn_implementation == "sdpa"
    assert b.transformer.h[0].attn.config._attn_implementation == "sdpa"
    assert a.transformer.h[0].attn.config._attn_implementation == "fastgpt"
    assert a.config is a.transformer.config is b.config is shared


def test_one_attention_alone() -> None:
    model, batch = made.model("gpt2"), made.inputs("gpt2")
    expected = model(**batch).loss
    report = fastgpt.patch(model, exclude="transformer.h.0.attn")
    assert {e.name: e.why for e in report.left} == {"transformer.h.0.attn": "not asked for"}
    names = [block.attn.config._attn_implementation for block in model.transformer.h]
    assert names == ["sdpa", "fastgpt"]
    torch.testing.assert_close(model(**batch).loss, expected)


def test_saved_and_pickled(tmp_path: Any) -> None:
    import transformers as hf

    model = made.model("gpt2")
    batch, plain = made.inputs("gpt2"), model(**made.inputs("gpt2")).logits
    fastgpt.patch(model)
    expected = model(**batch).logits + 0
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits + 0, expected)
    model.save_pretrained(tmp_path)
    again = hf.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(again(**batch).logits, plain)


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "llama"])
def test_compiles_whole(family: str) -> None:
    model, batch = made.model(family), made.inputs(family)
    batch.pop("attention_mask", None)
    expected = model(**batch).loss
    fastgpt.patch(model)
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()


def test_compiles_whole_where_a_dict_changes() -> None:
    """Into one, transformers' caches write while a compiled `generate` runs."""

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.seen = made.model("gpt2"), {"calls": 0}

        def forward(self, **batch: Tensor) -> Tensor:
            self.seen["calls"] += 1
            return self.model(**batch).loss

    model, batch = Counting(), made.inputs("gpt2")
    expected = model(**batch)
    fastgpt.patch(model)
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_autocast_and_gradient_checkpointing(family: str) -> None:
    model, batch = made.model(family).train(), made.inputs(family)
    other = patched(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = model(**batch), other(**batch)
    torch.testing.assert_close(got.loss, expected.loss, rtol=2e-2, atol=2e-2)
    assert got.logits.dtype == expected.logits.dtype == torch.bfloat16
    other(**batch).loss.backward()
    gradients = [p.grad.clone() for p in other.parameters()]
    other.zero_grad()
    other.gradient_checkpointing_enable()
    other(**batch).loss.backward()
    for p, gradient in zip(other.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_tied_head_stays_tied() -> None:
    model = made.model("gpt2")
    fastgpt.patch(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    loss = model(**made.inputs("gpt2")).loss
    loss.backward()
    gradient: Tensor = model.transformer.wte.weight.grad
    assert gradient is model.lm_head.weight.grad


def test_a_tensor_that_attention_does_not_know_is_an_error() -> None:
    from fastgpt.interop.attention import attention

    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="indices: expected no tensor of that name"):
        attention(torch.nn.Identity(), q, q, q, None, indices=torch.zeros(3))
