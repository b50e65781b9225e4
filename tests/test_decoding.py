"""The decoder against the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastgpt_kernels import load_cpu
from fastgpt_kernels.cpu.decode import int8_linear, quantized

from fastgpt import GPT
from fastgpt.decoding import Decoder
from fastgpt.testing.memory import same_bits

SIZES: dict[str, Any] = {
    "vocab_size": 101, "embedding_dim": 48, "num_heads": 4, "num_layers": 3, "max_seq_length": 40,
}  # fmt: skip


def model(**options: Any) -> GPT:
    torch.manual_seed(0)
    made = GPT(**{**SIZES, **options}).eval()
    with torch.no_grad():  # logits as spread out as a trained model's, and biases that are not zero
        for name, p in made.named_parameters():
            p.copy_(
                torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.5)
                + (name.endswith("weight") and p.dim() == 1)
            )
    return made


@pytest.fixture(params=load_cpu().isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = load_cpu().isa()
    load_cpu().set_isa(request.param)
    yield request.param
    load_cpu().set_isa(before)


def logits_of(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    decoder.reset()
    return torch.stack([decoder.step(column) for column in tokens.unbind(1)], 1)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 19])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "gelu", "bias": False, "tie_output": False},
        {"positions": "sinusoidal", "num_heads": 3, "embedding_dim": 33, "hidden_dim": 50},
    ],
    ids=["gpt2", "untied", "odd"],
)
def test_logits_are_the_models(options: dict[str, Any], batch: int, isa: str) -> None:
    """fp32 at every step; each row is what it would be alone."""
    made = model(**options)
    tokens = torch.randint(0, 101, (batch, 20))
    with torch.no_grad():
        expected = made(tokens)
    got = logits_of(Decoder(made, weights="fp32", batch=batch, max_length=20), tokens)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounded_weights_are_all_that_differs(weights: str, isa: str) -> None:
    """The decoder against fp32 decoding with the weights rounded beforehand: what is left is the cache in bf16."""
    made, rounded = model(), model()
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            if p.dim() == 2 and "wpe" not in name:
                packed = quantized(p, torch.int8 if weights == "int8" else torch.bfloat16)
                p.copy_(packed.weight.float() * (1.0 if packed.scale is None else packed.scale[:, None]))
    tokens = torch.randint(0, 101, (2, 20))
    got = logits_of(Decoder(made, weights=weights, batch=2), tokens)
    expected = logits_of(Decoder(rounded, weights="fp32", batch=2), tokens)
    scale = expected.abs().max()
    assert (got - expected).abs().max() < 0.02 * scale
    assert (got - expected).abs().mean() < 0.002 * scale


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 12])
def test_the_same_bits_for_any_number_of_threads(weights: str, batch: int) -> None:
    made = model(embedding_dim=200, num_layers=2)
    decoder, tokens = Decoder(made, weights=weights, batch=batch), torch.randint(0, 101, (batch, 6))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(logits_of(decoder, tokens))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize(("weights", "most"), [("int8", 3e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_heads": 3, "embedding_dim": 33, "hidden_dim": 50, "vocab_size": 103},
        {"embedding_dim": 64, "hidden_dim": 2048 + 33, "num_layers": 1},  # more than one stretch of sums
    ],
    ids=["gpt2", "odd", "long"],
)
def test_activations_of_16_bits_are_as_good_as_of_32(
    options: dict[str, Any], weights: str, most: float, batch: int, isa: str
) -> None:
    decoder = Decoder(model(**options), weights=weights, batch=batch)
    tokens = torch.randint(0, 101, (batch, 4))
    decoder.keys, decoder.values = decoder.keys.float(), decoder.values.float()  # no other rounding
    got = logits_of(decoder, tokens)
    load_cpu().set_isa("generic")
    expected = logits_of(decoder, tokens)
    off = (got - expected).abs()
    assert off.max() < most * expected.abs().max()
    assert off.mean() < most / 10 * expected.abs().max()
    if isa == "avx512_bf16":
        assert not torch.equal(got, expected)


@pytest.mark.parametrize(
    ("rows", "k", "n"), [(1, 1, 1), (3, 31, 5), (65, 64, 241), (130, 2100, 130), (7, 33, 700)]
)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_int8_products_of_many_rows(rows: int, k: int, n: int, activation: str | None, isa: str) -> None:
    """Beside fp64 on x as it is: 2^-16 of a row's largest for each x. A row is the same bits in any company."""
    torch.manual_seed(0)
    x = torch.randn(rows, k) * torch.logspace(-3, 3, rows)[:, None]
    layer = quantized(torch.randn(n, k), torch.int8)._replace(bias=torch.randn(n))
    got = int8_linear(x, layer, activation)
    assert layer.scale is not None
    assert layer.bias is not None
    weight = layer.weight.double() * layer.scale.double()[:, None]
    exact = x.double() @ weight.T + layer.bias.double()
    of_x = 2.0**-16 * x.double().abs().amax(1, keepdim=True) * weight.abs().sum(1)
    of_sum = k * 2.0**-24 * (x.double().abs() @ weight.abs().T) + 2.0**-22 * exact.abs()
    if activation is not None:
        exact = F.gelu(exact, approximate="tanh" if activation == "gelu_tanh" else "none")
    assert bool(((got - exact).abs() <= 1.2 * (of_x + of_sum) + 1e-6).all())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for first, last in ((0, 1), (1, rows), (rows // 2, rows)):
            assert same_bits(int8_linear(x[first:last], layer, activation), got[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_what_is_not_finite_stays_so(weights: str, value: float, isa: str) -> None:
    """Rounded to whole numbers it would look like one."""
    made = model()
    with torch.no_grad():
        made.h[1].mlp.c_proj.bias[5] = value
    logits = Decoder(made, weights=weights, batch=2).prefill(torch.tensor([[1, 2], [3, 4]]))
    assert not logits.isfinite().any()


def test_int8_rows_are_within_half_a_step() -> None:
    weight = torch.randn(7, 33) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1.0, 1e-30, 2.0])[:, None]
    packed = quantized(weight, torch.int8)
    assert packed.scale is not None
    error = (packed.weight.float() * packed.scale[:, None] - weight).abs()
    assert (error <= 0.5001 * packed.scale[:, None] + 1e-37).all()


def test_prefill_is_steps_and_reset_forgets() -> None:
    decoder, tokens = Decoder(model(), batch=2), torch.randint(0, 101, (2, 9))
    last = decoder.prefill(tokens)
    assert decoder.lengths.tolist() == [9, 9]
    again = logits_of(decoder, tokens)
    torch.testing.assert_close(again[:, -1], last, rtol=0.02, atol=0.02 * float(last.abs().max()))
    assert decoder.bytes_per_step > sum(p.numel() for p in model().parameters() if p.dim() == 2) * 2 * 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "fp8"}, "weights: expected one of fp32, bf16, int8, got 'fp8'"),
        ({"batch": 65}, "batch: expected 1 to 64"),
        ({"max_length": 41}, "max_length: expected 1 to max_seq_length=40"),
    ],
)
def test_a_wrong_option_is_a_value_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(model(), **arguments)


def test_wrong_tokens_are_a_value_error() -> None:
    decoder = Decoder(model(), max_length=2)
    with pytest.raises(TypeError, match="model: expected a fastgpt"):
        Decoder(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    for tokens, message in ((torch.tensor([1, 2]), "shape"), (torch.tensor([101]), r"ids in \[0, 101\)")):
        with pytest.raises(ValueError, match=message):
            decoder.step(tokens)
    with pytest.raises(TypeError, match="tokens: expected a tensor, got list"):
        decoder.step([1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rows: expected a tensor, got list"):
        decoder.step(torch.tensor([1]), [0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row: expected one of 0 to 0, got 99"):
        decoder.reset(99)
    with pytest.raises(ValueError, match="target: expected one of 0 to 0, got 1"):
        decoder.copy(0, 1, 0)
    with pytest.raises(ValueError, match="length: expected 0 to 0, got 1"):
        decoder.copy(0, 0, 1)
    with pytest.raises(ValueError, match="ids in"):  # a subclass is looked into as well
        decoder.step(torch.nn.Parameter(torch.tensor([10**9]), requires_grad=False))
    with pytest.raises(ValueError, match="pad_idx=0"):
        Decoder(model(pad_idx=0)).step(torch.tensor([0]))
    decoder.prefill(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="at most max_length=2"):
        decoder.step(torch.tensor([3]))


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_copied_beginning_is_one_that_was_filled(weights: str) -> None:
    decoder, tokens = Decoder(model(), weights=weights, batch=3), torch.randint(0, 101, (9,))
    expected = decoder.fill(0, tokens)
    decoder.fill(2, torch.randint(0, 101, (20,)))  # what is there is overwritten
    decoder.copy(0, 2, 8)
    assert decoder.lengths.tolist() == [9, 0, 8]
    assert same_bits(decoder.fill(2, tokens[8:]), expected)


def test_the_model_may_change_afterwards() -> None:
    made, token = model(), torch.tensor([3])
    decoder = Decoder(made)
    before = decoder.step(token)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    decoder.reset()
    assert same_bits(decoder.step(token), before)
