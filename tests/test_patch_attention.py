"""The attention of transformers, replaced: whose choice holds, models of other ways, pickles, export."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import subprocess
import sys
from typing import Any

import hugging_face_models as made
import pytest
import torch
from torch import Tensor, nn

import fastgpt
from fastgpt import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


def names(model: Any) -> set[str]:
    """What the attentions of a Llama call."""
    return {layer.self_attn.config._attn_implementation for layer in model.model.layers}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each call of our attention."""
    seen, run = list[int](), ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: (seen.append(1), run(*a, **k))[1])
    return seen


# --- the configuration ---


def test_configurations_stay_what_they_are(tmp_path: Any) -> None:
    import transformers as hf

    model = made.model("llama")
    before, text = model.config, model.config.to_json_string()
    attentions = [layer.self_attn for layer in model.model.layers]
    report = fastgpt.patch(model)
    assert model.config is before is model.model.config
    assert before._attn_implementation == "sdpa"
    assert before.to_json_string() == text
    assert names(model) == {"fastgpt"}
    assert isinstance(attentions[0].config, type(before))
    assert attentions[0].config.hidden_size == 32
    before.hidden_size = 48  # one and the same to whoever looks
    assert attentions[0].config.hidden_size == 48
    attentions[1].config.hidden_size = 32
    assert before.hidden_size == 32
    assert names(hf.LlamaForCausalLM(model.config)) == {"sdpa"}
    model.save_pretrained(tmp_path)
    assert "fastgpt" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert fastgpt.unpatch(model) == len(report.replaced)
    assert all(module.config is before for module in (model, model.model, *attentions))


def test_what_the_user_names_later_runs(calls: list[int]) -> None:
    model, batch = made.model("llama"), made.inputs("llama")
    expected = model(**batch).loss
    fastgpt.patch(model)
    model(**batch)
    assert len(calls) == 2
    model.set_attn_implementation("eager")
    assert names(model) == {"eager"}
    torch.testing.assert_close(model(**batch).loss, expected)
    assert len(calls) == 2
    model.set_attn_implementation("sdpa")
    assert names(model) == {"fastgpt"}
    model.set_attn_implementation("eager")
    fastgpt.unpatch(model)
    assert names(model) == {"eager"} == {model.config._attn_implementation}
    report = fastgpt.patch(model)
    assert [e.by for e in report.entries if e.kind == "attention"] == ["ops.attention"] * 2
    assert names(model) == {"fastgpt"}
    model.config._attn_implementation = "flex_attention"
    report = fastgpt.patch(model)
    why = {e.why for e in report.entries if e.kind == "attention"}
    assert why == {"attn_implementation='flex_attention' was chosen"}
    assert fastgpt.unpatch(model) == len(report.replaced)


def test_two_models_of_one_configuration_and_parts_of_one() -> None:
    import transformers as hf

    shared = made.config("llama")
    a, b = hf.LlamaForCausalLM(shared), hf.LlamaForCausalLM(shared)
    fastgpt.patch(a)
    fastgpt.patch(b)
    fastgpt.unpatch(a)
    assert (names(a), names(b)) == ({"sdpa"}, {"fastgpt"})
    fastgpt.unpatch(b.model.layers[0])
    assert [layer.self_attn.config._attn_implementation for layer in b.model.layers] == ["sdpa", "fastgpt"]
    report = fastgpt.patch(b.model.layers[0])
    assert any(e.kind == "attention" and e.by for e in report.entries)
    assert names(b) == {"fastgpt"}


def test_an_attention_whose_function_is_its_own_is_left() -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Doubled(LlamaAttention):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            return 2 * hidden_states, None

    class Asking(LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    for kind in (Doubled, Asking):
        model = made.model("llama")
        model.model.layers[0].self_attn.__class__ = kind
        report = fastgpt.patch(model)
        why = [e.why for e in report.entries if e.kind == "attention"]
        assert why == ["a subclass with a forward of its own", None]


def test_support_of_sdpa_is_asked_of_the_model_around(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made.model("bert")
    assert any(e.kind == "attention" for e in fastgpt.patch(model).replaced)
    fastgpt.unpatch(model)
    monkeypatch.setattr(type(model.bert), "_supports_sdpa", False)  # others of its file still do
    why = {e.why for e in fastgpt.patch(model).left if e.kind == "attention"}
    assert why == {"its model does not support SDPA, whose masks ours takes"}


LEFT = {
    "DeepseekV32": "does something else by the name of its attention",
    "Gemma2": "its model does not support SDPA, whose masks ours takes",
    "GptOss": "its model does not support SDPA, whose masks ours takes",
    "Inkling2Text": "its model does not support SDPA, whose masks ours takes",
    "Qwen3": None,
    "Gemma3Text": None,
    "Gemma4Text": None,
    "DeepseekV3": None,
    "Doge": None,
}


@pytest.mark.parametrize("family", LEFT)
def test_models_of_other_ways(family: str) -> None:
    """Sparse attention, sinks, soft caps, layers of several kinds: left, or equal."""
    import transformers as hf

    if not hasattr(hf, family + "Config"):
        pytest.skip(f"needs a transformers with {family}")
    torch.manual_seed(0)
    kind = getattr(hf, family.removesuffix("Text") + "ForCausalLM")
    model = kind(getattr(hf, family + "Config")(**made.small(family))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    other = copy.deepcopy(model)
    report = fastgpt.patch(other)
    assert {e.why for e in report.entries if e.kind == "attention"} == {LEFT[family]}
    batch = made.inputs("llama")
    for mask in (batch["attention_mask"], None):
        with torch.no_grad():
            expected, got = (m(batch["input_ids"], attention_mask=mask).logits for m in (model, other))
        seen = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(got[seen], expected[seen], rtol=1e-3, atol=1e-4)


# --- copies and pickles ---

FRESH = """
import pickle, sys, torch, transformers
batch, expected = torch.load(sys.argv[1] + "/batch", weights_only=False)
attention = torch.load(sys.argv[1] + "/attention", weights_only=False)
for model in (attention, pickle.load(open(sys.argv[1] + "/all", "rb"))):
    assert model.model.layers[0].self_attn.config._attn_implementation == "fastgpt"
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**batch).logits, expected)
    import fastgpt
    assert fastgpt.unpatch(model) > 0
    assert model.model.layers[0].self_attn.config is model.config is model.model.config
"""


def test_pickles_load_where_only_transformers_is_imported(tmp_path: Any) -> None:
    model, batch = made.model("llama"), made.inputs("llama")
    batch.pop("labels")
    fastgpt.patch(model, only="attention")  # of which no module's class says anything
    torch.save(model, tmp_path / "attention")
    fastgpt.patch(model)
    (tmp_path / "all").write_bytes(pickle.dumps(model))
    torch.save((batch, model(**batch).logits.detach()), tmp_path / "batch")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_copies_have_one_configuration() -> None:
    model = made.model("llama")
    fastgpt.patch(model)
    other = copy.deepcopy(model)
    assert names(other) == {"fastgpt"}
    other.set_attn_implementation("eager")
    assert (names(other), names(model)) == ({"eager"}, {"fastgpt"})
    fastgpt.unpatch(other)
    assert other.model.layers[0].self_attn.config is other.config is not model.config


# --- export, and what is put on later ---


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_exports(family: str) -> None:
    model, batch = made.model(family), made.inputs(family)
    batch.pop("labels")
    expected = model(**batch).logits
    fastgpt.patch(model)
    exported = torch.export.export(model, (), {**batch, "use_cache": False})
    called = {str(node.target) for node in exported.graph.nodes}
    assert any("fastgpt.attention" in name for name in called)
    got = exported.module()(**batch, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_adapters_put_on_later() -> None:
    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base, self.down, self.up = layer, nn.Linear(32, 2, False), nn.Linear(2, 32, False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model, batch = made.model("llama"), made.inputs("llama")
    fastgpt.patch(model)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj, nn.Linear(64, 64, bias=False))
    loss = model(**batch).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fastgpt.unpatch(model)
    expected = model(**batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)
