"""The modules: state dicts of their torch.nn counterparts, the same results, clear errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastgpt.nn as fnn
from fastgpt import ops


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, True)])
def test_layer_norm_takes_torchs_state_dict(affine: bool, bias: bool) -> None:
    theirs = nn.LayerNorm(24, 1e-6, elementwise_affine=affine, bias=bias)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = fnn.LayerNorm(24, 1e-6, elementwise_affine=affine, bias=bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(3, 5, 24) + 2, torch.randn(3, 5, 24)
    close(ours(x), theirs(x))
    y, stream = ours(x, residual)
    assert torch.equal(stream, x + residual)
    close(y, theirs(x + residual))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 0.1])
def test_rms_norm_takes_torchs_state_dict(affine: bool, eps: float | None) -> None:
    theirs = nn.RMSNorm(24, eps, elementwise_affine=affine)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = fnn.RMSNorm(24, eps, elementwise_affine=affine)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(3, 5, 24) + 2, torch.randn(3, 5, 24)
    for scale in (1.0, 1e-4):  # so small that eps matters
        close(ours(scale * x), theirs(scale * x))
    y, stream = ours(x, residual)
    assert torch.equal(stream, x + residual)
    close(y, theirs(x + residual))
    close(ours.double()(1e-7 * x.double()), theirs.double()(1e-7 * x.double()))


def test_gelu_and_softmax() -> None:
    x, bias = torch.randn(4, 9), torch.randn(9)
    for approximate in ("none", "tanh"):
        close(fnn.GELU(approximate)(x, bias), nn.functional.gelu(x + bias, approximate=approximate))
    mask = torch.rand(4, 9) > 0.3
    mask[:, 0] = True
    close(fnn.Softmax(scale=0.5)(x, mask), (0.5 * x).masked_fill(~mask, -math.inf).softmax(-1))
    causal = torch.ones(4, 9, dtype=torch.bool).tril(5)  # the last query sees every key
    close(fnn.Softmax(causal=True)(x), x.masked_fill(~causal, -math.inf).softmax(-1))


def test_softmax_drops_only_while_training() -> None:
    softmax, x = fnn.Softmax(dropout_p=0.5), torch.randn(50, 50)
    assert (softmax(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(softmax.eval()(x), fnn.Softmax()(x))


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_linear_gelu_linear(activation: str, approximate: str, bias: bool) -> None:
    mlp, x = fnn.MLP(8, 32, activation=activation, bias=bias), torch.randn(2, 3, 8)
    close(mlp(x), mlp.c_proj(nn.functional.gelu(mlp.c_fc(x), approximate=approximate)))
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16


def test_attention_is_causal_attention_of_packed_heads() -> None:
    attention, x = fnn.CausalSelfAttention(12, 3), torch.randn(2, 7, 12)
    q, k, v = (t.view(2, 7, 3, 4).transpose(1, 2) for t in attention.c_attn(x).split(12, dim=-1))
    scores = (q @ k.mT / 2).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -math.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 12)
    close(attention(x), attention.c_proj(expected))


def test_block_is_the_pre_norm_block() -> None:
    block, x = fnn.Block(12, 3), torch.randn(2, 7, 12)
    middle = x + block.attn(block.ln_1(x))
    close(block(x), middle + block.mlp(block.ln_2(middle)))
    second = fnn.Block(12, 3)
    delta, stream = second.advance(*block.advance(None, x, None), None)
    close(stream + delta, second(block(x)))


@pytest.mark.parametrize("dim", [1, 6, 7])
def test_positional_encoding_is_the_formula(dim: int) -> None:
    encoding = fnn.PositionalEncoding(dim, 9)
    y = encoding(torch.zeros(1, 9, dim))
    for t in range(9):
        for d in range(dim):
            angle = t / 10000 ** ((d - d % 2) / dim)
            expected = math.sin(angle) if d % 2 == 0 else math.cos(angle)
            assert y[0, t, d].item() == pytest.approx(expected, abs=1e-6)
    assert not encoding.state_dict()
    assert encoding(torch.zeros(1, 2, dim, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_positional_encoding_adds_nothing_to_padding() -> None:
    encoding = fnn.PositionalEncoding(6, 9, 0)  # the article's argument order
    tokens = torch.tensor([[0, 0, 4, 2], [3, 1, 1, 0]])
    x = torch.randn(2, 4, 6)
    y = encoding(x, tokens)
    assert torch.equal(y[tokens == 0], x[tokens == 0])
    assert torch.equal(y[tokens != 0], encoding(x)[tokens != 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fnn.LayerNorm((2, 3)),
            r"normalized_shape: expected one dimension \(the last\), got \(2, 3\)",
        ),
        (lambda: fnn.LayerNorm(0), "normalized_shape: expected an integer >= 1, got 0"),
        (lambda: fnn.LayerNorm(8)(torch.zeros(2, 7)), r"x: expected a last dimension of 8, got \(2, 7\)"),
        (lambda: fnn.GELU("erf"), 'approximate: expected "none" or "tanh", got \'erf\''),
        (lambda: fnn.Softmax(0), r"dim: expected -1 \(the last dimension\), got 0"),
        (lambda: fnn.Softmax(dropout_p=1.0), r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
        (lambda: fnn.MLP(8, 8, activation="relu"), "activation: expected one of gelu, gelu_tanh, got 'relu'"),
        (lambda: fnn.MLP(8, 0), "hidden_dim: expected an integer >= 1, got 0"),
        (lambda: fnn.MLP(8, 8)(torch.zeros(2, 7)), r"x: expected a last dimension of 8, got \(2, 7\)"),
        (
            lambda: fnn.CausalSelfAttention(8, 2)(torch.zeros(1, 2, 6)),
            r"x: expected \[B, T, 8\], got \(1, 2, 6\)",
        ),
        (
            lambda: fnn.CausalSelfAttention(8, 2)(torch.zeros(2, 8)),
            r"x: expected \[B, T, 8\], got \(2, 8\)",
        ),
        (lambda: fnn.CausalSelfAttention(10, 3), "num_heads: expected a divisor of dim=10, got 3"),
        (lambda: fnn.Block(8, 2, dropout=-0.1), "dropout: expected a probability"),
        (lambda: fnn.PositionalEncoding(8, 0), "max_seq_length: expected an integer >= 1, got 0"),
        (
            lambda: fnn.PositionalEncoding(8, 4)(torch.zeros(1, 5, 8)),
            "at most max_seq_length=4 positions, got 5",
        ),
        (
            lambda: fnn.PositionalEncoding(8, 4)(torch.zeros(1, 4, 6)),
            r"x: expected \[B, T, 8\], got \(1, 4, 6\)",
        ),
        (
            lambda: fnn.PositionalEncoding(8, 4, 0)(torch.zeros(1, 4, 8), torch.zeros(1, 3)),
            r"tokens: expected shape \(1, 4\), got \(1, 3\)",
        ),
        (lambda: fnn.GELU(backend="none")(torch.zeros(2)), "backend: expected one"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_backend_reaches_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("layer_norm", "linear", "mlp", "attention_qkv"):
        original = getattr(ops, name)

        def spy(*args, original=original, name=name, **kwargs):
            seen.append((name, kwargs["backend"]))
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    fnn.Block(8, 2, backend="torch")(torch.randn(1, 3, 8))
    assert seen == [
        (name, "torch") for name in ("layer_norm", "linear", "attention_qkv", "linear", "layer_norm", "mlp")
    ]


def test_layers_that_are_more_than_their_weights_are_called() -> None:
    """Hooks run, and what stands in for a layer (an adapter, a quantised one) is not passed over."""

    class Adapted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1.0

    torch.manual_seed(0)
    block, x = fnn.Block(8, 2), torch.randn(1, 3, 8)
    plain = block(x)
    seen = []
    layers = {
        "c_attn": block.attn.c_attn,
        "c_proj": block.attn.c_proj,
        "fc": block.mlp.c_fc,
        "out": block.mlp.c_proj,
    }
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(block(x), plain)
    assert seen == list(layers)
    adapted = Adapted(32, 8)
    adapted.load_state_dict(block.mlp.c_proj.state_dict())
    block.mlp.c_proj = adapted
    torch.testing.assert_close(block(x), plain + 1.0)
