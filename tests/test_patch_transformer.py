"""`fastgpt.patch` on torch.nn's MultiheadAttention and Transformer."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patch_helpers import (
    DTYPES,
    WITHOUT,
    called,
    check_agrees,
    check_same,
    modules,
    shaken,
    unseeing,
)
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


# --- anything at all ---

ACTIVATIONS = ("relu", "gelu", F.silu, nn.GELU("tanh"), nn.SiLU(), nn.ReLU(), nn.GELU(), torch.tanh)


@pytest.mark.parametrize("seed", range(60))
def test_any_call(seed: int) -> None:
    """Options drawn by chance: results, and in fp32 the gradients of everything that is learned."""
    pick = random.Random(seed)
    heads = pick.choice((1, 2, 3, 4))
    width, batch = heads * pick.choice((1, 5, 8, 12)), pick.choice((0, 1, 3))
    queries, keys, batch_first = pick.choice((3, 5, 8)), pick.choice((3, 6)), pick.random() < 0.7
    options: dict[str, Any] = {"bias": pick.random() < 0.7, "batch_first": batch_first}
    name = pick.choice(("attention", "cross", "encoder", "decoder"))
    if name in ("encoder", "decoder"):
        kind = nn.TransformerEncoderLayer if name == "encoder" else nn.TransformerDecoderLayer
        activation = copy.deepcopy(pick.choice(ACTIVATIONS))
        options |= {"norm_first": pick.random() < 0.5, "activation": activation, "dropout": 0.0}
        module = shaken(kind(width, heads, 20, **options), seed)
    else:
        module = shaken(nn.MultiheadAttention(width, heads, **options), seed)
    dtype = pick.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
    module = module.to(dtype).train(pick.random() < 0.5)
    x, memory = (torch.randn(n, width, dtype=dtype) if batch == 0 and pick.random() < 0.5 else
                 torch.randn(*((batch, n) if batch_first else (n, batch)), width, dtype=dtype)
                 for n in (queries, keys))  # fmt: skip
    if x.dim() != memory.dim():
        memory = torch.randn(*x.shape, dtype=dtype)
        keys = queries
    length = keys if name == "cross" else queries
    mask = pick.choice((None, None, torch.ones(queries, length, dtype=torch.bool).triu(1),
                        torch.randn(queries, length, dtype=dtype)))  # fmt: skip
    padding = pick.choice((None, torch.arange(length) >= max(1, length - 1)))
    if padding is not None and x.dim() == 3:
        padding = padding.expand(batch, length)

    def call(m: nn.Module, x: Tensor = x, memory: Tensor = memory) -> Tensor:
        if name == "encoder":
            return m(x, mask, padding)
        if name == "decoder":
            return m(x, memory, mask, None, padding)
        other = x if name == "attention" else memory
        return m(x, other, other, padding, False, mask)[0]

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=pick.random() < 0.2 and dtype == torch.float32)
    mode = pick.choice((torch.enable_grad, torch.enable_grad, torch.no_grad, torch.inference_mode))
    with autocast, mode():
        expected = check_agrees(module, call)
        learns = torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and dtype == torch.float32
        if learns and not isinstance(expected, type) and batch:
            check_same(module, lambda m, *inputs: _said(m, name, mask, padding, *inputs), [x, memory])


def _said(m: nn.Module, name: str, mask: Any, padding: Any, x: Tensor, memory: Tensor) -> Tensor:
    if mask is not None and mask.is_floating_point():
        mask = mask.to(x.dtype)
    if name == "encoder":
        return m(x, mask, padding) + 0 * memory.sum()
    if name == "decoder":
        return m(x, memory, mask, None, padding)
    other = x if name == "attention" else memory
    return m(x, other, other, padding, False, mask)[0] + 0 * memory.sum()


# --- PyTorch's fused functions and what they pass over ---


@pytest.mark.parametrize("change", ["activation", "tanh", "dropout", "attention", "autocast", "hook", "eps"])
def test_in_inference_what_pytorch_passes_over_is_passed_over(change: str) -> None:
    """Its fused function goes by what the layer was when it was made, and by the layer's own mode."""
    layer = modules("encoder", activation=nn.GELU("tanh") if change == "tanh" else "relu", dropout=0.5).eval()
    x = 3 * torch.randn(3, 6, 32)
    if change == "activation":
        layer.activation = F.silu
    if change == "dropout":
        layer.dropout.train()
    if change == "attention":
        layer.self_attn.train()
    if change == "hook":
        layer.linear1.register_forward_hook(lambda m, args, out: 2 * out)
    if change == "eps":
        layer.norm1.eps = 1.0
    # What drops agrees where it is passed over: by the layers it is drawn otherwise.
    for enabled in (True,) if change in ("dropout", "attention") else (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
                check_agrees(layer, lambda m: called(m, x))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


# --- children that are others ---


class Doubling(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("child", "made", "why"),
    [
        ("norm1", lambda: nn.RMSNorm(32), "its norm1 is another layer than nn.LayerNorm, or hooked"),
        ("norm2", lambda: Doubling(32), "its norm2 is another layer than nn.LayerNorm, or hooked"),
        ("norm1", nn.Identity, "its norm1 is another layer than nn.LayerNorm, or hooked"),
        ("norm2", lambda: nn.LayerNorm((6, 32)), "its norm2 is of another width"),
        (
            "linear1",
            lambda: nn.Sequential(nn.Linear(32, 48)),
            "its linear1 is another layer than nn.Linear, or hooked",
        ),
    ],
)
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_layer_with_another_child_is_left(name: str, child: str, made: Any, why: str) -> None:
    """At once, so that the report says so, and its children are judged by themselves."""
    layer, x = modules(name, dropout=0.0), torch.randn(3, 6, 32)
    setattr(layer, child, made())
    report = fastgpt.patch(layer)
    assert (("", why)) in {(e.name, e.why) for e in report.left}
    replaced = {e.name for e in report.replaced}
    assert {"self_attn", "norm2" if child == "norm1" else "norm1"} <= replaced
    fastgpt.unpatch(layer)
    check_agrees(layer, lambda m: called(m, x))
    whole = modules(name, dropout=0.0)
    fastgpt.patch(whole, strict=True)
    setattr(whole, child, made())  # afterwards
    expected = called(whole, x)
    fastgpt.unpatch(whole)
    torch.testing.assert_close(expected, called(whole, x), rtol=1e-4, atol=1e-4)


def test_parametrized_and_hooked_children() -> None:
    x = torch.randn(3, 6, 32)
    for before in (True, False):
        for name, child in (("encoder", "linear1"), ("decoder", "linear2"), ("attention", "out_proj")):
            module = modules(name, **WITHOUT[name])
            if not before:
                fastgpt.patch(module)
            nn.utils.parametrizations.weight_norm(getattr(module, child))
            with torch.no_grad():
                getattr(module, child).parametrizations.weight.original0.mul_(1.5)
            if before:
                fastgpt.patch(module)
            got = called(module, x)
            fastgpt.unpatch(module)
            torch.testing.assert_close(got, called(module, x), rtol=1e-4, atol=1e-4)


# --- compiled ---


@pytest.mark.parametrize(
    ("name", "training", "kind"),
    [("encoder", True, "causal"), ("decoder", False, "sample"), ("attention", False, "inference")],
)
def test_compiles_whole(name: str, training: bool, kind: str) -> None:
    module, x = modules(name, **WITHOUT[name]).train(training), torch.randn(3, 6, 32)
    options: dict[str, Any] = unseeing("sample")
    if kind == "causal":
        options = {"mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "causal": True}
    patched = copy.deepcopy(module)
    fastgpt.patch(patched, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(kind != "inference"):
        got = compiled(patched, x, **options)
        # In inference PyTorch's compiled results are not its eager ones: zeros for NaN.
        expected = (compiled if kind == "inference" else called)(module, x, **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    if kind != "inference":
        got.sum().backward()
        assert all(p.grad is not None for p in patched.parameters())
