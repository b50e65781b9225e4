"""`fastgpt.patch` on torch.nn's MultiheadAttention and Transformer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from patch_helpers import DTYPES, check_same, shaken
from torch import Tensor, nn

import fastgpt

MASKS = ("none", "bool", "added", "causal", "padding", "both", "heads")


def masks(kind: str, queries: int, keys: int, batch: int = 3) -> dict[str, Any]:
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[0, keys // 2 :] = True
    added = torch.zeros(queries, keys).masked_fill(causal, -torch.inf)
    return {
        "none": {},
        "bool": {"attn_mask": causal},
        "added": {"attn_mask": added},
        "causal": {"attn_mask": causal, "is_causal": True},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "heads": {"attn_mask": causal.expand(batch * 4, queries, keys)},
    }[kind]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "cross"),  # a mask of other keys is not said to be causal
    [*((kind, False) for kind in MASKS), *((kind, True) for kind in MASKS if kind != "causal")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_multihead_attention(dtype: str, cross: bool, kind: str, batch_first: bool) -> None:
    module = shaken(nn.MultiheadAttention(32, 4, batch_first=batch_first)).to(DTYPES[dtype])
    keys = 9 if cross else 6
    options = masks(kind, 6, keys)
    options = {n: m.to(DTYPES[dtype]) if isinstance(m, Tensor) and m.dtype == torch.float32 else m
               for n, m in options.items()}  # fmt: skip

    def call(m: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
        other = memory if cross else x
        said = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() and x.dtype == torch.float64 else v
                for n, v in options.items()}  # fmt: skip
        out, weights = m(x, other, other, need_weights=False, **said)
        assert weights is None
        return out + 0 * memory.sum()

    inputs = [torch.randn(3, 6, 32), torch.randn(3, keys, 32)]
    inputs = [(x if batch_first else x.transpose(0, 1).contiguous()).to(DTYPES[dtype]) for x in inputs]
    report = check_same(module, call, inputs)
    assert [e.by for e in report.replaced] == ["ops.attention"]


def test_attention_weights_are_still_given() -> None:
    module = shaken(nn.MultiheadAttention(32, 4, batch_first=True))
    x = torch.randn(2, 5, 32)
    expected, weights = module(x, x, x)
    fastgpt.patch(module, strict=True)
    got = module(x, x, x)
    torch.testing.assert_close(got[0], expected)
    torch.testing.assert_close(got[1], weights)
    alone, _ = module(x[0], x[0], x[0], need_weights=False)  # without a batch
    torch.testing.assert_close(alone, expected[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="attn_mask"):
        module(x, x, x, need_weights=False, is_causal=True)


LAYERS = {"post": {}, "pre": {"norm_first": True}, "gelu": {"activation": "gelu"}, "no_bias": {"bias": False}}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformer_layers(dtype: str, options: str, training: bool) -> None:
    made = dict(d_model=32, nhead=4, dim_feedforward=48, dropout=0.0, batch_first=True, **LAYERS[options])
    encoder = shaken(nn.TransformerEncoderLayer(**made)).to(DTYPES[dtype]).train(training)  # type: ignore[arg-type]
    decoder = shaken(nn.TransformerDecoderLayer(**made), 1).to(DTYPES[dtype]).train(training)  # type: ignore[arg-type]
    x, memory = (torch.randn(3, n, 32).to(DTYPES[dtype]) for n in (6, 9))
    causal, padding = torch.ones(6, 6, dtype=torch.bool).triu(1), masks("padding", 6, 6)["key_padding_mask"]
    report = check_same(encoder, lambda m, x: m(x, src_mask=causal, src_key_padding_mask=padding), [x])
    assert [e.kind for e in report.replaced].count("transformer") == 2
    check_same(
        decoder,
        lambda m, x, memory: m(x, memory, tgt_mask=causal, tgt_is_causal=True, tgt_key_padding_mask=padding),
        [x, memory],
    )


def test_the_article_s_transformer() -> None:
    """nn.Transformer as a whole, in evaluation with its fast path and nested tensors, and in training."""
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
    shaken(model)
    patched = copy.deepcopy(model)
    report = fastgpt.patch(patched, strict=True)
    assert {e.module for e in report.replaced} == {
        "TransformerEncoderLayer", "TransformerDecoderLayer", "MultiheadAttention", "LayerNorm",
    }  # fmt: skip
    src, tgt = torch.randn(3, 7, 32), torch.randn(3, 5, 32)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    for training in (True, False):
        for m in (model, patched):
            m.train(training)
        with torch.set_grad_enabled(training):
            for options in ({}, {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}):
                expected = model(src, tgt, tgt_mask=causal, **options)
                got = patched(src, tgt, tgt_mask=causal, **options)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_dropout_of_a_transformer_layer_is_there() -> None:
    layer = shaken(nn.TransformerEncoderLayer(32, 4, 48, dropout=0.5, activation="gelu", batch_first=True))
    fastgpt.patch(layer, strict=True)
    x = torch.randn(2, 6, 32)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


class Louder(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return 3 * super()._ff_block(x)


def test_a_layer_that_overrides_a_part_is_left() -> None:
    layer, x = shaken(Louder(32, 4, 48, 0.0, batch_first=True)), torch.randn(2, 5, 32)
    expected = layer(x)
    report = fastgpt.patch(layer)
    assert "a subclass with a forward of its own" in {e.why for e in report.left}
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_where_its_own_mode_says() -> None:
    """As in drawing several results from a model in evaluation, its dropouts in training."""
    layer = shaken(nn.TransformerEncoderLayer(32, 4, 48, 0.5, "gelu", batch_first=True))
    fastgpt.patch(layer, strict=True)
    layer.eval()
    layer.dropout.train()
    x = torch.randn(2, 5, 32).requires_grad_()
    assert not torch.equal(layer(x), layer(x))
    layer.dropout = nn.Identity()  # type: ignore[assignment]
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_query_that_sees_nothing(kind: str) -> None:
    module = shaken(nn.MultiheadAttention(32, 4, batch_first=True))
    patched, x = copy.deepcopy(module), torch.randn(2, 5, 32)
    fastgpt.patch(patched, strict=True)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2] = True
    given = mask if kind == "bool" else torch.zeros(5, 5).masked_fill(mask, -torch.inf)
    expected, got = (m(x, x, x, need_weights=False, attn_mask=given)[0] for m in (module, patched))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
