"""The GPT: the article's constructor, one result on every backend, and no leaks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastgpt
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.models.stock_gpt import StockGPT

VOCAB, DIM, HEADS, LAYERS, LENGTH, PAD = 61, 32, 4, 2, 12, 0
Options = dict


def make_model(seed: int = 0, **options) -> GPT:
    """A small GPT with random weights large enough for every part to matter, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(VOCAB, DIM, HEADS, LAYERS, LENGTH, options.pop("pad_idx", PAD), **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.2 if p.dim() > 1 else 0.5
            p.copy_(
                scale * torch.randn(p.shape, generator=generator)
                + (1.0 if ".weight" in name and p.dim() == 1 else 0)
            )
    return model


def make_tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(1, VOCAB, (2, 3, LENGTH), generator=generator)
    tokens[0, :3] = PAD  # padding ahead: its first queries see nothing at all
    tokens[1, 5] = PAD
    targets[2, -4:] = PAD
    targets[1, 2] = -100
    return tokens, targets


def run(model: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Logits and every gradient of the loss."""
    model.zero_grad()
    model(tokens, targets).backward()
    return {"logits": model(tokens).detach(), **{name: p.grad for name, p in model.named_parameters()}}


def exact_and_bound(
    model: GPT, tokens: Tensor, targets: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The fp64 reference's results, and how far fp32 may be from each.

    A dot product of n terms rounded in fp32 is the exact one with every term moved by at most n * 2^-24
    of itself (Higham, Accuracy and Stability, 3.1). So the bound is what such moves of all weights do
    to the exact results, n being the longest sum (the MLP's second product), at worst over a few draws.
    """
    exact = GPT(GPTConfig(**{**model.config.to_dict(), "backend": "reference"})).double()
    weights = {name: p.double() for name, p in model.state_dict().items()}
    exact.load_state_dict(weights)
    results = run(exact, tokens, targets)
    bound = dict.fromkeys(results, 0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        moved = {
            name: p * (1 + 4 * DIM * 2**-24 * (2 * torch.randint(2, p.shape, generator=generator) - 1))
            for name, p in weights.items()
        }
        exact.load_state_dict(moved)
        for name, value in run(exact, tokens, targets).items():
            bound[name] = max(bound[name], (value - results[name]).abs().max().item())
    return results, bound


def misses(got: dict[str, Tensor], exact: dict[str, Tensor], bound: dict[str, float]) -> list[str]:
    return [name for name in exact if not (got[name] - exact[name]).abs().max().item() <= bound[name]]


def test_the_articles_constructor() -> None:
    vocab_size, embedding_dim, num_heads, num_layers, max_seq_length, pad_idx = 50, 16, 2, 2, 10, 0
    model = fastgpt.GPT(vocab_size, embedding_dim, num_heads, num_layers, max_seq_length, pad_idx)
    tokens = torch.randint(1, 50, (3, 10))
    assert model(tokens).shape == (3, 10, 50)
    assert model(tokens.int(), tokens).shape == ()
    assert isinstance(fastgpt.nn.PositionalEncoding(embedding_dim, max_seq_length, pad_idx), nn.Module)
    assert fastgpt.GPT(fastgpt.GPTConfig(50, 16, 2, 2, 10, 0)).config == model.config


@pytest.mark.parametrize(
    "options", [{}, {"positions": "sinusoidal", "tie_output": False}, {"pad_idx": None, "bias": False}]
)
@pytest.mark.parametrize("path", ["auto", "cpu,torch", "torch", "reference", "stock"])
def test_same_weights_same_results_on_every_path(path: str, options: Options) -> None:
    model = make_model(**options)
    tokens, targets = make_tokens()
    exact, bound = exact_and_bound(model, tokens, targets)
    other: nn.Module
    if path == "stock":
        other = StockGPT(model.config)
    else:
        other = GPT(
            GPTConfig(**{**model.config.to_dict(), "backend": None if path == "auto" else path.split(",")})
        )
    other.load_state_dict(model.state_dict())
    assert not misses(run(other, tokens, targets), exact, bound)


def test_the_bound_has_teeth() -> None:
    tokens, targets = make_tokens()
    model = make_model()
    exact, bound = exact_and_bound(model, tokens, targets)
    for wrong in ({"activation": "gelu"}, {"layer_norm_eps": 2e-5}, {"pad_idx": None}):
        other = make_model(**wrong)
        other.load_state_dict(model.state_dict())
        assert "logits" in misses(run(other, tokens, targets), exact, bound), wrong


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_padding_does_not_leak(backend: str | None, positions: str) -> None:
    model = make_model(tie_output=False, positions=positions, backend=backend)
    tokens, targets = make_tokens()
    targets[tokens == PAD] = -100  # what stands at a pad predicts nothing
    before = run(model, tokens, targets)
    with torch.no_grad():
        model.wte.weight[PAD] = 37.0
    after = run(model, tokens, targets)
    real = tokens != PAD
    assert torch.equal(before.pop("logits")[real], after.pop("logits")[real])
    for name in before:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("pad_idx", [None, PAD])
def test_the_future_does_not_leak(backend: str | None, pad_idx: int | None) -> None:
    model = make_model(backend=backend, pad_idx=pad_idx)
    tokens, targets = make_tokens()
    targets[:, 7:] = -100
    changed = tokens.clone()
    changed[:, 7:] = changed[:, 7:] % (VOCAB - 1) + 1
    before, after = run(model, tokens, targets), run(model, changed, targets)
    assert torch.equal(before["logits"][:, :7], after["logits"][:, :7])
    assert not torch.equal(before["logits"][:, 7:], after["logits"][:, 7:])
    for name in list(before)[1:]:
        assert torch.equal(before[name], after[name]), name


def test_loss_is_the_mean_over_the_targets_that_count() -> None:
    model = make_model()
    tokens, targets = make_tokens()
    log_p = model(tokens).log_softmax(-1)
    counts = (targets != PAD) & (targets != -100)
    expected = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0][counts].mean()
    torch.testing.assert_close(model(tokens, targets), expected)


@pytest.mark.parametrize("pad_idx", [None, PAD])
def test_compiles_as_one_graph(pad_idx: int | None) -> None:
    model = make_model(pad_idx=pad_idx)
    tokens, targets = make_tokens()
    exact, bound = exact_and_bound(model, tokens, targets)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(tokens, targets).backward()
    got = {"logits": compiled(tokens).detach(), **{name: p.grad for name, p in model.named_parameters()}}
    assert not misses(got, exact, bound)


def test_bf16_by_autocast_keeps_the_residual_stream_in_fp32() -> None:
    model, (tokens, targets) = make_model(), make_tokens()
    streams = []
    model.h[1].register_forward_pre_hook(lambda *_: None)
    original = model.h[1].ln_2.forward
    model.h[1].ln_2.forward = lambda x, r: streams.append((x.dtype, r.dtype)) or original(x, r)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets)
    loss.backward()
    assert streams == [(torch.bfloat16, torch.float32)]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(tokens, targets).item(), rel=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_tied_head_is_the_token_embedding() -> None:
    tied, untied = (
        GPT(VOCAB, DIM, HEADS, LAYERS, LENGTH),
        GPT(VOCAB, DIM, HEADS, LAYERS, LENGTH, tie_output=False),
    )
    extra = set(untied.state_dict()) - set(tied.state_dict())
    assert extra == {"lm_head.weight"}
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.wte.weight.detach()})
    tokens, targets = make_tokens()
    assert torch.equal(tied(tokens), untied(tokens))
    (a, b), c = (
        (run(untied, tokens, targets)[n] for n in ("wte.weight", "lm_head.weight")),
        run(tied, tokens, targets),
    )
    torch.testing.assert_close(c["wte.weight"], a + b)


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT(512, 128, 4, 8, 128, 3)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(
                p, torch.ones_like(p) if "ln" in name and "weight" in name else torch.zeros_like(p)
            )
            continue
        std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
        assert abs(p.mean().item()) < 6 * std / math.sqrt(p.numel()), name
        assert p.std().item() == pytest.approx(std, rel=0.03), name
    assert not model.wte.weight[3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads: expected a divisor of embedding_dim=32, got 5"),
        ({"vocab_size": 0}, "vocab_size: expected an integer >= 1, got 0"),
        ({"num_layers": 1.5}, "num_layers: expected an integer >= 1, got 1.5"),
        ({"max_seq_length": None}, "max_seq_length: expected an integer >= 1, got None"),
        ({"hidden_dim": -1}, "hidden_dim: expected an integer >= 1, got -1"),
        ({"pad_idx": 61}, r"pad_idx: expected None or a token id in \[0, 61\), got 61"),
        ({"pad_idx": True}, r"pad_idx: expected None or a token id in \[0, 61\), got True"),
        ({"positions": "rope"}, "positions: expected one of learned, sinusoidal, got 'rope'"),
        ({"activation": "relu"}, "activation: expected one of gelu, gelu_tanh, got 'relu'"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"layer_norm_eps": 0}, "layer_norm_eps: expected a number > 0, got 0"),
        ({"bias": 1}, "bias: expected true or false, got 1"),
    ],
)
def test_config_errors(change: Options, message: str) -> None:
    sizes = ("vocab_size", "embedding_dim", "num_heads", "num_layers", "max_seq_length")
    good = dict(zip(sizes, (VOCAB, DIM, HEADS, LAYERS, LENGTH), strict=True))
    with pytest.raises(ValueError, match=message):
        GPT(**{**good, **change})


@pytest.mark.parametrize(
    ("tokens", "targets", "error", "message"),
    [
        ([[1, 61]], None, ValueError, r"tokens: expected ids in \[0, 61\), got 61 at \[0, 1\]"),
        ([[-1]], None, ValueError, r"tokens: expected ids in \[0, 61\), got -1 at \[0, 0\]"),
        ([[1]], [[62]], ValueError, r"targets: expected ids in \[0, 61\), got 62 at \[0, 0\]"),
        ([[1] * 13], None, ValueError, "tokens: expected at most max_seq_length=12 a sequence, got 13"),
        ([1, 2], None, ValueError, r"tokens: expected shape \[B, T\], got \(2,\)"),
        ([[1, 2]], [[1]], ValueError, r"targets: expected shape \(1, 2\), got \(1, 1\)"),
        ([[1.0]], None, TypeError, "tokens: expected int64 or int32, got torch.float32"),
    ],
)
def test_token_errors(tokens: list, targets: list | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_model()(torch.tensor(tokens), None if targets is None else torch.tensor(targets))


@pytest.mark.parametrize(
    ("tokens", "targets", "error", "message"),
    [
        ([[1]], None, TypeError, "tokens: expected a tensor, got list"),
        (torch.ones(1, 1).long(), [[1]], TypeError, "targets: expected a tensor, got list"),
        (
            torch.ones(1, 1, dtype=torch.int64, device="meta"),
            None,
            ValueError,
            "tokens: expected it on cpu as the model, got meta",
        ),
        (
            torch.ones(1, 1).long(),
            torch.ones(1, 1, dtype=torch.int64, device="meta"),
            ValueError,
            "targets: expected it on cpu as the model, got meta",
        ),
    ],
)
def test_what_is_no_tensor_or_elsewhere(tokens, targets, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_model()(tokens, targets)
