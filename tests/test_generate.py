"""Sampling: the seed, the filters, the window, the stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt.generate import sample, stream
from fastgpt.models.gpt import GPT

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def make_model(**options) -> GPT:
    torch.manual_seed(0)
    model = GPT(23, 16, 2, 1, 8, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def generate(model: GPT | None = None, prompt: Tensor = PROMPT, **options) -> Tensor:
    return fastgpt.generate(model or make_model(), prompt, **{"max_new_tokens": 20, **options})


def test_the_seed_fixes_the_tokens() -> None:
    a, b, c = generate(seed=1), generate(seed=1), generate(seed=2)
    assert a.shape == (2, 23)
    assert torch.equal(a[:, :3], PROMPT)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.manual_seed(7)
    d = generate()
    torch.manual_seed(7)
    assert torch.equal(d, generate())


def test_stream_is_generate_one_by_one_and_touches_nothing() -> None:
    model = make_model().train()
    whole = generate(model, seed=3)
    for i, token in enumerate(stream(model, PROMPT, max_new_tokens=20, seed=3)):
        assert torch.equal(token, whole[:, 3 + i])
        assert model.training
        assert torch.is_grad_enabled()


def test_greedy_takes_the_likeliest_of_the_last_window() -> None:
    model = make_model()
    tokens = generate(model, temperature=0)
    for t in range(3, 23):
        assert torch.equal(model(tokens[:, max(0, t - 8) : t])[:, -1].argmax(-1), tokens[:, t])
    assert torch.equal(tokens, generate(model, top_k=1))
    assert torch.equal(tokens, generate(model, top_p=1e-9))


def test_filters_keep_exactly_the_right_tokens() -> None:
    p = torch.tensor([[0.15, 0.4, 0.05, 0.3, 0.1]])

    def drawn(**options) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        return set(
            sample(p.log().expand(2000, 5), 1.0, *(options.get(n) for n in ("k", "p")), generator).tolist()
        )

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(k=2) == {1, 3}
    assert drawn(p=0.39) == {1}
    assert drawn(p=0.5) == {1, 3}
    assert drawn(p=0.84) == {0, 1, 3}
    assert drawn(p=1.0) == drawn()
    assert drawn(k=3, p=0.8) == {1, 3}  # of what top-k left, 1 and 3 hold 0.82
    assert drawn(k=100) == drawn()


def test_frequencies_follow_the_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    for temperature in (0.5, 1.0, 2.0):
        counts = torch.bincount(sample(logits, temperature, None, None, torch.Generator().manual_seed(0)))
        torch.testing.assert_close(counts / 20_000, (logits[0] / temperature).softmax(-1), atol=0.015, rtol=0)


def test_stop_token_ends_each_row() -> None:
    free = generate(seed=5)[:, 3:]
    stop = int(free[0, 4])
    got = generate(seed=5, stop_token=stop)[:, 3:]
    for row, other in zip(got, free, strict=True):
        hits = (other == stop).nonzero()
        end = int(hits[0]) if len(hits) else len(other)
        assert torch.equal(row[: end + 1], other[: end + 1][: len(row)])
        assert (row[end:] == stop).all()


def test_padding_is_never_generated() -> None:
    model = make_model(pad_idx=0)
    assert (generate(model, max_new_tokens=300, temperature=5.0) != 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected at least 0, got -1"),
        ({"temperature": -0.5}, "temperature: expected at least 0, got -0.5"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"stop_token": 23}, r"stop_token: expected an id in \[0, 23\), got 23"),
        (
            {"prompt": torch.zeros(2, 0, dtype=torch.int64)},
            r"tokens: expected shape \[B, T\] with T >= 1, got \(2, 0\)",
        ),
        ({"prompt": torch.tensor([[99]])}, r"tokens: expected ids in \[0, 23\), got 99"),
        (
            {"prompt": torch.tensor([[99] + [1] * 10])},  # outside the window of 8
            r"tokens: expected ids in \[0, 23\), got 99 at \[0, 0\]",
        ),
        ({"seed": 2**63}, r"seed: expected an integer in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**options)


@pytest.mark.parametrize("prompt", [torch.tensor([[1.5]]), torch.tensor([[True]]), [[1]]])
def test_a_prompt_is_an_integer_tensor(prompt) -> None:
    with pytest.raises(TypeError, match=r"tokens: expected (int64 or int32|a tensor), got"):
        generate(prompt=prompt)


@pytest.mark.parametrize("temperature", [1e-45, 1e-320, 1e300, float("inf")])
@pytest.mark.parametrize("pad_idx", [None, 0])
def test_no_temperature_overflows(temperature: float, pad_idx: int | None) -> None:
    model = make_model(pad_idx=pad_idx)
    tokens = generate(model, temperature=temperature, seed=0)
    assert torch.equal(tokens, generate(model, temperature=0)) == (temperature < 1)


def test_each_module_keeps_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().train()
    model.h[0].eval()
    before = [module.training for module in model.modules()]
    generate(model)
    assert [module.training for module in model.modules()] == before

    def fail(_: Tensor) -> Tensor:
        assert not model.training
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "embed", fail)
    with pytest.raises(RuntimeError, match="broken"):
        generate(model)
    assert [module.training for module in model.modules()] == before
