"""Dropout within the attention of transformers' models, replaced."""

from __future__ import annotations

import importlib.util
from typing import Any

import hugging_face_models as made
import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt.interop.attention import attention

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


# --- dropout ---


def with_dropout(family: str) -> Any:
    name = {"gpt2": "attn_pdrop", "bert": "attention_probs_dropout_prob", "llama": "attention_dropout"}[
        family
    ]
    settings = made.config(family)
    setattr(settings, name, 0.4)
    import transformers as hf

    torch.manual_seed(0)
    kinds = {"gpt2": hf.GPT2Model, "bert": hf.BertModel, "llama": hf.LlamaModel}
    model = kinds[family](settings)
    fastgpt.patch(model, strict=True, only="attention")
    return model


def attention_of(model: Any) -> tuple[Any, dict[str, Any]]:
    """The first attention of a model, and what it needs beside its input."""
    if hasattr(model, "h"):
        return model.h[0].attn, {}
    if hasattr(model, "encoder"):
        return model.encoder.layer[0].attention.self, {}
    return model.layers[0].self_attn, {
        "position_embeddings": model.rotary_emb(torch.zeros(1, 12, 32), torch.arange(12)[None]),
        "attention_mask": None,
    }


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_dropout(family: str) -> None:
    module, options = attention_of(with_dropout(family))
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(3))

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x, **options)[0]

    with torch.no_grad():
        module.eval()
        plain = run(0)
        assert torch.equal(run(1), plain)
        module.train()
        assert torch.equal(run(1), run(1))
        assert not torch.allclose(run(1), run(2))
        many = torch.stack([run(seed) for seed in range(200)])
        error = (many.mean(0) - plain) / (many.std(0) / 200**0.5).clamp(min=1e-6)
        assert float(many.std(0).mean()) > 0.01 * float(plain.abs().mean())
        assert float(error.abs().max()) < 6  # of 768 numbers in units of their own error
    assert torch.equal(run(1), many[1])  # with a graph the same


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_the_gradient_of_dropout(family: str) -> None:
    """With one seed a smooth function: along a direction its slope is the gradient's. fp64."""
    module, options = attention_of(with_dropout(family).double().train())
    options = {
        n: tuple(t.double() for t in value) if isinstance(value, tuple) else value
        for n, value in options.items()
    }
    generator = torch.Generator().manual_seed(5)
    x, d = (torch.randn(2, 12, 32, generator=generator, dtype=torch.float64) for _ in range(2))

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(11)
        return module(x, **options)[0].square().sum()

    x.requires_grad_()
    slope = float((torch.autograd.grad(run(x), x)[0] * d).sum())
    with torch.no_grad():
        step = 1e-5
        expected = float(run(x + step * d) - run(x - step * d)) / (2 * step)
    assert slope == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_dropout_in_fp32() -> None:
    """Of the kernel that models run: linear in the values, so that dv is the same weights' transpose."""
    module: Any = made.model("llama").model.layers[0].self_attn
    generator = torch.Generator().manual_seed(5)
    q, k, v, dy = (torch.randn(2, h, 12, 8, generator=generator) for h in (4, 2, 2, 4))

    def run(v: Tensor) -> Tensor:
        torch.manual_seed(7)
        return attention(module, q, k, v, None, dropout=0.4)[0]

    leaf, dy = v.clone().requires_grad_(), dy.transpose(1, 2)
    (dv,) = torch.autograd.grad(run(leaf), leaf, dy)
    other = torch.randn(v.shape, generator=generator)
    torch.testing.assert_close((dv * other).sum(), (dy * run(other)).sum(), rtol=1e-4, atol=1e-4)


def test_dropout_and_checkpointing() -> None:
    model, batch = with_dropout("gpt2").train(), made.inputs("gpt2")
    batch.pop("labels")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(**batch, use_cache=False).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
