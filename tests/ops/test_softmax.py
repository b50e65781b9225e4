"""Hazards of softmax alone: Philox, dropout, hidden elements, infinities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import variants

from fastgpt import ops
from fastgpt.reference.philox import first_words, keep_mask
from fastgpt.testing.memory import same_bits

VARIANTS = variants("softmax")
WITH_DROPOUT = [variant for variant in VARIANTS if variant.backend != "torch"]
RNG = torch.tensor(
    [0x1234_5678_9ABC_DEF0, 2**63 - 100]
)  # the counter passes 2**63 and 2**64's low words wrap


def on(items: list[Any]) -> Any:
    return pytest.mark.parametrize("variant", items, ids=[variant.name for variant in items])


def run(x: torch.Tensor, variant: Any, **options: Any) -> torch.Tensor:
    variant.enter()
    return ops.softmax(x, backend=variant.backend, **options)


def test_philox_known_answers() -> None:
    """philox4x32_10, Random123's kat_vectors, for the counters that dropout uses (two words of zeros)."""
    key = torch.tensor(0)
    assert first_words(key, torch.tensor([0])).item() == 0x6627E8D5


@pytest.mark.parametrize("counter", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1])
@pytest.mark.parametrize("seed", [0, 1, 2**32, -1, 0x1234_5678_9ABC_DEF0])
def test_philox_against_the_paper(seed: int, counter: int) -> None:
    """Ten rounds written out once more in Python's integers, and checked against both published answers."""
    words = [counter & 0xFFFFFFFF, (counter >> 32) & 0xFFFFFFFF, 0, 0]
    assert first_words(torch.tensor(seed), torch.tensor([counter])).item() == philox(words, seed)
    assert philox([0, 0, 0, 0], 0) == 0x6627E8D5
    assert philox([0xFFFFFFFF] * 4, -1) == 0x408F276D


def philox(c: list[int], seed: int) -> int:
    k = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


@on(WITH_DROPOUT)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_the_dropout_mask_is_that_of_the_definition(variant: Any, dtype: torch.dtype) -> None:
    """Forward and backward, for every backend, width of vector and shape with the same elements in order."""
    for shape in ((40, 33), (2, 4, 5, 33), (1, 1320), (1320, 1)):
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        keep = keep_mask((40, 33), 0.4, RNG).reshape(shape)
        y = run(x, variant, dropout_p=0.4, rng=RNG)
        assert torch.equal(y != 0, keep)
        if shape[-1] == 1:
            continue
        # dx = p * (g - sum(p * g)): with g nothing but at one element it tells whether that one was kept.
        dy = torch.zeros(shape, dtype=dtype)
        dy[..., 3] = 1.0
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx[..., 3] != 0, keep[..., 3])


@on(WITH_DROPOUT)
def test_the_keep_rate(variant: Any) -> None:
    x = torch.zeros(100, 1000)
    for p in (0.01, 0.1, 0.5, 0.9):
        kept = (run(x, variant, dropout_p=p, rng=RNG) != 0).double().mean().item()
        assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / 1e5) ** 0.5


@on(WITH_DROPOUT)
def test_rng_is_drawn_from_torch_and_not_advanced_when_given(variant: Any) -> None:
    x = torch.zeros(4, 100)
    torch.manual_seed(3)
    first = run(x, variant, dropout_p=0.5)
    second = run(x, variant, dropout_p=0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(run(x, variant, dropout_p=0.5), first)
    rng = RNG.clone()
    run(x, variant, dropout_p=0.5, rng=rng)
    assert torch.equal(rng, RNG)


@on(WITH_DROPOUT)
def test_neighbouring_offsets_are_neighbouring_elements(variant: Any) -> None:
    x = torch.zeros(1, 64)
    whole = run(x, variant, dropout_p=0.5, rng=torch.tensor([7, 0])) != 0
    shifted = run(x, variant, dropout_p=0.5, rng=torch.tensor([7, 16])) != 0
    assert torch.equal(whole[:, 16:], shifted[:, :-16])


@on(VARIANTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_rows_that_see_nothing_are_zero(variant: Any, dtype: torch.dtype) -> None:
    """By a boolean mask, by causality with more queries than keys, and by both together."""
    x = torch.randn(2, 9, 5, dtype=dtype)
    hidden = torch.ones(2, 9, 5, dtype=torch.bool)
    hidden[1, 3] = False
    half = torch.ones(9, 5, dtype=torch.bool)
    half[:, :2] = False
    for options, rows in (
        ({"mask": hidden}, [(1, 3)]),
        ({"causal": True}, [(0, 0), (1, 3)]),
        ({"causal": True, "mask": half}, [(0, 5), (1, 4)]),
    ):
        leaf = x.clone().requires_grad_()
        y = run(leaf, variant, **options)
        (dx,) = torch.autograd.grad(y, leaf, torch.randn_like(y))
        for row in rows:
            assert not bool(y[row].any())
            assert not bool(dx[row].any())
        assert bool(y.isfinite().all())
        assert bool(dx.isfinite().all())


@on(VARIANTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38], ids=["nan", "inf", "-inf", "max"])
def test_what_is_hidden_is_never_looked_at(variant: Any, value: float) -> None:
    """Not its value, and not the gradient that comes in there."""
    x, dy = torch.randn(2, 3, 11, 37), torch.randn(2, 3, 11, 37)
    mask = torch.rand(2, 1, 1, 37) < 0.7
    triangle = torch.ones(11, 37, dtype=torch.bool).tril(26)
    for options, seen in (
        ({"mask": mask}, mask),
        ({"causal": True}, triangle),
        ({"causal": True, "mask": mask, "scale": 0.3}, mask & triangle),
    ):
        found = []
        for hidden in (0.0, value):
            leaf = torch.where(seen, x, hidden).requires_grad_()
            y = run(leaf, variant, **options)
            (dx,) = torch.autograd.grad(y, leaf, dy)
            assert not bool(y.detach().masked_fill(seen, 0.0).any())
            assert not bool(dx.masked_fill(seen, 0.0).any())
            found.append((y.detach(), dx))
        assert same_bits(found[0][0], found[1][0])
        assert same_bits(found[0][1], found[1][1])


@on(VARIANTS)
def test_minus_infinity_behaves_as_in_torch(variant: Any) -> None:
    x = torch.randn(4, 33)
    x[0, 5:] = -torch.inf
    x[1] = -torch.inf
    x[2, 7] = torch.inf
    expected = torch.softmax(x, -1)
    torch.testing.assert_close(run(x, variant), expected, equal_nan=True)
    mask = torch.where(x.isinf(), x, 0.0)[:2]
    torch.testing.assert_close(
        run(x[3:].expand(2, 33), variant, mask=mask), torch.softmax(x[3:] + mask, -1), equal_nan=True
    )


@on(VARIANTS)
def test_a_row_of_finite_minimum_stays_uniform(variant: Any) -> None:
    """As Hugging Face writes its masks."""
    x = torch.randn(3, 40)
    mask = torch.full((3, 40), torch.finfo(torch.float32).min)
    torch.testing.assert_close(run(x, variant, mask=mask), torch.full((3, 40), 1 / 40))


@on(VARIANTS)
def test_a_mask_is_read_by_its_strides(variant: Any) -> None:
    """Transposed, stepped, expanded, offset, reversed in dimensions: the values count, not the layout."""
    x = torch.randn(3, 4, 10, 12)
    big = torch.randn(30, 4, 12, 10)
    for mask in (
        big[0].transpose(-1, -2),
        big[:3, :, :, 0:1].transpose(-1, -2).expand(3, 4, 10, 12),
        big[::10].transpose(-1, -2),
        big[5, 2, :, 3],
        big[:3, 0:1, 0:1, 0:1],
        torch.tensor(0.5),
    ):
        for kind in (mask, mask > 0):
            expected = run(x, variant, mask=kind.expand(x.shape).contiguous())
            assert same_bits(run(x, variant, mask=kind), expected)


@on(VARIANTS)
def test_a_large_shift_changes_nothing(variant: Any) -> None:
    """The maximum is taken off first; powers of two keep the inputs exact."""
    x = torch.randint(-50, 50, (8, 65)).float() / 8
    assert same_bits(run(x, variant), run(x + 1024.0, variant))


@on(VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_causal_blocks_of_a_longer_sequence(variant: Any, dtype: torch.dtype) -> None:
    """The last queries alone give the rows that they have among all: bottom-right alignment."""
    x = torch.randn(2, 40, 40, dtype=dtype)
    whole = run(x, variant, causal=True)
    for queries in (1, 2, 17):
        assert same_bits(run(x[:, -queries:], variant, causal=True), whole[:, -queries:])
