"""The attention of transformers, replaced: attention weights, and what goes to transformers' own functions."""

from __future__ import annotations

import importlib.util
from typing import Any

import hugging_face_models as made
import pytest
import torch
from patch_helpers import patched
from torch import Tensor, nn

import fastgpt
from fastgpt import ops
from fastgpt.interop.attention import attention

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each call of our attention."""
    seen, run = list[int](), ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: (seen.append(1), run(*a, **k))[1])
    return seen


# --- attention weights ---


@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "bert", "whisper", "t5", "llama"])
def test_attention_weights_are_those_of_eager_attention(family: str, chosen: str, calls: list[int]) -> None:
    batch = made.inputs(family)
    expected = made.model(family, attn_implementation="eager")(**batch, output_attentions=True)
    model = made.model(family, attn_implementation=chosen)
    fastgpt.patch(model)
    model(**batch)
    ran = len(calls)
    assert ran > 0
    got = model(**batch, output_attentions=True)
    assert len(calls) == ran
    torch.testing.assert_close(got.loss, expected.loss)
    seen = 0
    for name in expected:
        if name.endswith("attentions"):
            assert len(got[name]) == len(expected[name])
            for a, b in zip(got[name], expected[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
                seen += 1
    assert seen >= 2
    first = got[next(n for n in got if n.endswith("attentions"))][0]
    first.retain_grad()
    got.loss.backward()
    assert float(first.grad.abs().max()) > 0
    model(**batch)
    assert len(calls) == 2 * ran  # and ours again


def test_attention_weights_without_a_mask_do_not_see_the_future() -> None:
    model, ids = made.model("gpt2"), made.inputs("gpt2")["input_ids"]
    fastgpt.patch(model)
    weights = model(ids, output_attentions=True).attentions
    assert len(weights) == 2
    assert all(bool((w.triu(1) == 0).all()) for w in weights)
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="output_attentions: expected False"):
        attention(nn.Identity(), q, q, q, None, output_attentions=True)


def test_attention_weights_of_a_compiled_model() -> None:
    model, ids = made.model("gpt2"), made.inputs("gpt2")["input_ids"]
    expected = made.model("gpt2", attn_implementation="eager")(ids, output_attentions=True).attentions
    fastgpt.patch(model)
    model(ids, output_attentions=True)  # transformers hangs up its hooks, which does not compile
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(ids).attentions is None
    got = compiled(ids, output_attentions=True).attentions
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_hook_on_eager_attention_gets_its_weights() -> None:
    model, batch, seen = made.model("llama", attn_implementation="eager"), made.inputs("llama"), list[Any]()
    fastgpt.patch(model)
    model.model.layers[0].self_attn.register_forward_hook(lambda m, i, o: seen.append(o[1]))
    model(**batch)
    assert seen[0].shape == (3, 4, 20, 20)


def test_eager_attention_without_a_mask_sees_all() -> None:
    """As transformers' does, whose SDPA would be causal."""
    model = made.model("gpt2", attn_implementation="eager")
    module, x = model.transformer.h[0].attn, torch.randn(2, 5, 32)
    expected = module(x)[0]
    fastgpt.patch(model)
    torch.testing.assert_close(module(x)[0], expected, rtol=1e-4, atol=1e-5)


# --- what goes to transformers' own functions ---


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_torch_func(family: str) -> None:
    model, batch = made.model(family), made.inputs(family)
    parameters = dict(model.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (), batch).loss

    expected = torch.func.grad(loss)(parameters)
    fastgpt.patch(model)
    got = torch.func.grad(loss)(parameters)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_vmap_and_forward_mode(chosen: str) -> None:
    model = made.model("gpt2", attn_implementation=chosen)
    module, x = model.transformer.h[0].attn, torch.randn(3, 2, 5, 32)

    def call(x: Tensor) -> Tensor:
        return module(x)[0]

    def tangent() -> Tensor:
        return torch.func.jvp(call, (x[0],), (x[1],))[1]

    many = torch.func.vmap(call)(x)
    moved = tangent() if chosen == "eager" else None  # torch's SDPA has no forward mode on a CPU
    fastgpt.patch(model)
    torch.testing.assert_close(torch.func.vmap(call)(x), many, rtol=1e-4, atol=1e-5)
    if moved is not None:
        torch.testing.assert_close(tangent(), moved)
    torch.testing.assert_close(call(x[0]), many[0], rtol=1e-4, atol=1e-5)


def test_tensor_subclasses_are_theirs(calls: list[int]) -> None:
    class Marked(Tensor):
        """Stands for a tensor that keeps something else behind its memory."""

    module = made.model("gpt2").transformer.h[0].attn
    q = torch.randn(2, 4, 5, 8)
    attention(module, q.as_subclass(Marked), q, q, None)
    assert not calls
    attention(module, q, q, q, None)
    assert calls


@pytest.mark.parametrize("masked", [None, "bool", "float", "one head"])
@pytest.mark.parametrize("batches", [(3, 1, 1), (1, 3, 3), (3, 3, 1), (1, 1, 1)])
def test_batches_of_one_are_broadcast(batches: tuple[int, ...], masked: str | None) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module: Any = made.model("llama").model.layers[0].self_attn
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, h, 6, 8).requires_grad_() for n, h in zip(batches, (4, 2, 2), strict=True))
    masks = {
        "bool": torch.ones(max(batches), 1, 6, 6, dtype=torch.bool).tril(),
        "float": torch.randn(1, 4, 6, 6),
        "one head": torch.randn(max(batches), 1, 1, 6),
    }
    mask = masks[masked] if masked else None
    expected, got = (f(module, q, k, v, mask, scaling=0.3)[0] for f in (sdpa_attention_forward, attention))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn(expected.shape)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_left_padding_of_a_decoder_with_position_bias() -> None:
    """Its first rows see nothing: finite numbers all the same, as the padding's values reach others by zero times."""
    model, batch = made.model("t5"), made.inputs("t5")
    batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
    batch["decoder_attention_mask"][0, :5] = 0
    expected, got = (m(**batch).logits for m in (model, patched(model)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
