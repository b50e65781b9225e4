"""The generation engine: each continuation is what the model says, and as it would be alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_decoding import model as decoding_model

from fastgpt.decoding import Decoder
from fastgpt.generate import Continuation, Engine, Sampling, generate, perplexity
from fastgpt.models.gpt import GPT
from fastgpt.sampling import _likeliest
from fastgpt.testing.memory import same_bits

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8], list(range(20, 35)), [50] * 4]


def model(**options: Any) -> GPT:
    return decoding_model(**options)


def finished(
    engine: Engine, prompts: list[list[int]], sampling: Sampling, **options: Any
) -> list[Continuation]:
    made = {(c.prompt, c.sample): c for c in engine.run(prompts, sampling, **options)}
    return [made[key] for key in sorted(made)]


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_a_prompt_through_the_layers_at_once_is_token_by_token(weights: str) -> None:
    """Keys, values and what follows: the products of many rows round otherwise, by little."""
    made, prompt = model(), torch.randint(0, 101, (30,))
    at_once, one_by_one = Decoder(made, weights=weights, batch=3), Decoder(made, weights=weights, batch=1)
    got = at_once.fill(1, prompt)
    for token in prompt:
        expected = one_by_one.step(token[None])
    scale = float(expected.abs().max())
    assert float((got - expected).abs().max()) < (2e-5 if weights == "fp32" else 0.04) * scale
    assert at_once.lengths.tolist() == [0, 30, 0]
    assert not at_once.keys[:, 0].any()
    assert not at_once.keys[:, 2].any()


def test_cached_logits_are_the_models_at_every_step() -> None:
    made, tokens = model(), torch.randint(0, 101, (1, 40))
    decoder = Decoder(made, weights="fp32")
    with torch.no_grad():
        expected = made(tokens)[0]
    got = [decoder.fill(0, tokens[0, :13])]
    got += [decoder.step(token[None]) for token in tokens[0, 13:]]
    torch.testing.assert_close(torch.cat(got), expected[12:], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_logits_are_the_same_bits_in_any_row_beside_any_others(weights: str) -> None:
    made, tokens = model(embedding_dim=200, num_layers=2), torch.randint(0, 101, (17, 6))
    alone = [Decoder(made, weights=weights).prefill(row[None]) for row in tokens]
    for batch in (2, 3, 5, 8, 17):
        together = Decoder(made, weights=weights, batch=batch).prefill(tokens[:batch])
        for row in range(batch):
            assert same_bits(together[row : row + 1], alone[row]), (batch, row)


def test_greedy_is_the_models_likeliest_token_by_token() -> None:
    made = model()
    continuations = finished(Engine(made, batch=2), PROMPTS, Sampling(10, temperature=0))
    assert [c.prompt for c in continuations] == list(range(len(PROMPTS)))
    for prompt, made_up in zip(PROMPTS, continuations, strict=True):
        assert made_up.finished == "length"
        assert len(made_up.tokens) == 10
        text = torch.tensor([prompt + made_up.tokens])
        with torch.no_grad():
            logprobs = made(text).log_softmax(-1)[0, len(prompt) - 1 : -1]
        assert logprobs.argmax(-1).tolist() == made_up.tokens
        expected = logprobs.gather(1, torch.tensor(made_up.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(made_up.logprobs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.5}])
def test_a_seed_gives_the_same_text_whatever_the_batch(options: dict[str, Any]) -> None:
    made, sampling = model(), Sampling(12, temperature=1.3, seed=4, **options)
    expected = [
        c
        for i, prompt in enumerate(PROMPTS)
        for c in [Continuation(i, j.sample, j.tokens, j.logprobs, j.finished)
                  for j in finished(Engine(made), [prompt], sampling, samples=3)]
    ]  # fmt: skip
    assert len({tuple(c.tokens) for c in expected}) == 15
    for batch in (1, 3, 8, 16):
        assert finished(Engine(made, batch=batch), PROMPTS, sampling, samples=3) == expected
    other = finished(Engine(made), PROMPTS, Sampling(12, temperature=1.3, seed=5, **options), samples=3)
    assert [c.tokens for c in other] != [c.tokens for c in expected]


def test_without_a_seed_torch_s_own_generator_is_drawn_from() -> None:
    engine, sampling = Engine(model()), Sampling(8, temperature=2.0)
    torch.manual_seed(1)
    a, b = (finished(engine, PROMPTS, sampling) for _ in range(2))
    torch.manual_seed(1)
    assert a != b
    assert a == finished(engine, PROMPTS, sampling)


def test_frequencies_are_the_model_s() -> None:
    """2,000 draws of the first token: chi-square over 11 tokens, 10 degrees of freedom, at 1 in 10,000."""
    made = model(vocab_size=11)
    with torch.no_grad():
        p = (made(torch.tensor([[3, 7]]))[0, -1] / 8).softmax(-1)
    drawn = finished(Engine(made, batch=16), [[3, 7]], Sampling(1, temperature=8.0, seed=0), samples=2000)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in drawn]), minlength=11)
    assert float(((counts - 2000 * p) ** 2 / (2000 * p)).sum()) < 35.6


def test_only_the_vocabulary_is_drawn() -> None:
    """A model's vocabulary is often rounded up: ids without a token are no text, and have no probability."""
    made = model()
    drawn = finished(
        Engine(made, batch=8), [[1]], Sampling(30, temperature=9.0, seed=0, vocabulary=5), samples=8
    )
    assert {token for c in drawn for token in c.tokens} == set(range(5))
    with torch.no_grad():
        expected = made(torch.tensor([[1]]))[0, -1, :5].log_softmax(-1)
    for c in drawn:
        assert c.logprobs[0] == pytest.approx(float(expected[c.tokens[0]]), abs=1e-4)
    tokens = generate(made, torch.ones(4, 1).long(), max_new_tokens=20, temperature=9.0, vocabulary=5)
    assert set(tokens.flatten().tolist()) == set(range(5))
    for wrong in (0, 102):
        with pytest.raises(ValueError, match=f"vocabulary: expected 1 to 101, got {wrong}"):
            Engine(made).run([[1]], Sampling(3, vocabulary=wrong))


def test_log_probabilities_are_the_same_bits_for_any_number_of_threads() -> None:
    made = decoding_model(vocab_size=70_000, embedding_dim=8, num_heads=1, num_layers=1)
    engine = Engine(made)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(finished(engine, PROMPTS, Sampling(10, temperature=0)))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]
    together = Engine(made, batch=4)
    assert finished(together, PROMPTS, Sampling(10, temperature=0)) == results[0]


def test_rows_end_on_their_own() -> None:
    made = model()
    free = finished(Engine(made), PROMPTS, Sampling(20, seed=1))
    stop = free[1].tokens[3]
    got = finished(Engine(made, batch=2), PROMPTS, Sampling(20, seed=1, stop_token=stop))
    for row, other in zip(got, free, strict=True):
        if stop in other.tokens:
            assert row.finished == "stop"
            assert row.tokens == other.tokens[: other.tokens.index(stop) + 1]
        else:
            assert (row.finished, row.tokens) == ("length", other.tokens)
    (nothing,) = Engine(made).run([[1]], Sampling(0))
    assert (nothing.tokens, nothing.finished) == ([], "length")


def test_padding_is_never_drawn() -> None:
    engine = Engine(model(pad_idx=0))
    for made in finished(engine, [[1], [2]], Sampling(39, temperature=9.0, seed=0)):
        assert 0 not in made.tokens


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1: expected at least one token, got none"),
        (
            [[1] * 37],
            {},
            "prompt 0: expected at most 40 tokens, the model's context, got 37 and max_new_tokens=4",
        ),
        ([[101]], {}, r"prompt 0: expected ids in \[0, 101\), got 101"),
        ([[1]], {"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ([[1]], {"temperature": -1.0}, "temperature: expected at least 0"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model()).run(prompts, Sampling(4, **options))
    with pytest.raises(ValueError, match="samples: expected at least 1"):
        Engine(model()).run([[1]], Sampling(4), samples=0)


def test_runs_do_not_share_rows() -> None:
    engine = Engine(model())
    first = engine.run([[1]], Sampling(4, seed=0))
    next(first)
    list(engine.run([[2]], Sampling(4, seed=0)))
    with pytest.raises(RuntimeError, match="expected one run at a time"):
        next(first)


def test_padding_is_no_prompt_and_ends_no_text() -> None:
    engine = Engine(model(pad_idx=0))
    with pytest.raises(ValueError, match="prompt 1: expected none equal to pad_idx=0"):
        engine.run([[1], [2, 0]], Sampling(4))
    with pytest.raises(ValueError, match="stop_token: expected another than pad_idx=0"):
        engine.run([[1]], Sampling(4, stop_token=0))


@pytest.mark.parametrize("spread", [0.01, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.3), (None, 0.95), (2000, 0.9), (50, None)])
def test_the_likeliest_are_those_of_the_whole_vocabulary(
    top_k: int | None, top_p: float | None, spread: float
) -> None:
    """Flat, where the likeliest 1024 do not hold enough, and peaked, where a few do."""
    scores = torch.randn(3, 5000) * spread
    p, ids = _likeliest(scores, top_k, top_p)
    kept, order = scores.sort(dim=-1, descending=True)
    kept[:, top_k or 5000 :] = -torch.inf
    whole = kept.softmax(-1)
    if top_p is not None:
        whole = whole.masked_fill(whole.double().cumsum(-1) - whole >= top_p, 0.0)
    for row in range(3):
        got, expected = ({*i[q > 0].tolist()} for i, q in ((ids[row], p[row]), (order[row], whole[row])))
        assert len(got ^ expected) <= 1  # the one at the edge, by rounding
        both = torch.zeros(5000).index_put((ids[row],), p[row] / p[row].sum())
        torch.testing.assert_close(both[order[row]], whole[row] / whole[row].sum(), rtol=1e-3, atol=1e-4)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    made = model()
    with torch.no_grad():
        made.ln_f.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="prompt 0: expected finite logits after 0 tokens, got nan"):
        list(Engine(made).run([[1]], Sampling(3)))
    with pytest.raises(FloatingPointError, match="logits: expected finite ones"):
        generate(made, torch.tensor([[1]]), max_new_tokens=2, temperature=0)
    with pytest.raises(FloatingPointError, match="loss: expected a finite one"):
        perplexity(made, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(("window", "stride"), [(None, None), (10, 3), (10, 9), (2, 1), (40, 7)])
def test_perplexity_scores_each_token_once(window: int | None, stride: int | None) -> None:
    made, tokens = model(), torch.randint(0, 101, (97,))
    value, count, windows = perplexity(made, tokens, window=window, stride=stride)
    assert count == 96
    assert windows == math.ceil((97 - (window or 40)) / (stride or (window or 40) // 2)) + 1
    w, s = window or 40, stride or (window or 40) // 2
    losses, end = [], 1
    with torch.no_grad():
        while end < len(tokens):
            last, end = end, min(max(end + s, w), len(tokens))
            begin = max(end - w, 0)
            logprobs = made(tokens[None, begin:end])[0].log_softmax(-1)
            losses += [-float(logprobs[i - 1 - begin, tokens[i]]) for i in range(last, end)]
    assert len(losses) == 96
    assert value == pytest.approx(math.exp(sum(losses) / 96), rel=1e-4)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.tensor([1]), {}, r"tokens: expected shape \[T\] with T >= 2, got \(1,\)"),
        (torch.tensor([1, 2]), {"window": 41}, "window: expected 2 to max_seq_length=40, got 41"),
        (torch.tensor([1, 2]), {"window": 8, "stride": 8}, "stride: expected 1 to window - 1 = 7, got 8"),
        (torch.tensor([1, 0]), {}, "tokens: expected none equal to pad_idx=0"),
    ],
)
def test_perplexity_names_what_is_wrong(tokens: torch.Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(model(pad_idx=0), tokens, **options)
