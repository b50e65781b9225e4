"""Hazards that only attention has, and what its three forms owe to one another."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import DEVICE, backends
from torch import Tensor

from fastgpt import ops
from fastgpt.reference.philox import keep_mask
from fastgpt.testing.memory import same_bits

BACKENDS = backends("attention")


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tensor(*values: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["mask", "qkv"])
def test_minus_infinity_in_a_float_mask_hides_like_false(backend: str, needs: str) -> None:
    """Single keys, and every key of a query: zeros and zero gradients, as scaled_dot_product_attention has it."""
    q, k, v = (normal(2, 3, 8, 16, seed=seed) for seed in range(3))
    seen = normal(3, 8, 8, seed=3) < 0.5
    seen[:, 1] = False
    added = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)
    wanted = {
        "mask": [added.requires_grad_()],
        "qkv": [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()],
    }[needs]
    out = ops.attention(q, k, v, mask=added, backend=backend)
    expected = ops.attention(q, k, v, mask=seen, backend="reference")
    torch.testing.assert_close(out, expected)
    assert out[:, :, 1].abs().max() == 0
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, wanted, weight)
    assert all(grad.isfinite().all() for grad in grads)
    if needs == "mask":
        assert grads[0][~seen].abs().max() == 0
        assert grads[0][seen].abs().max() > 0
    else:
        torch.testing.assert_close(grads, torch.autograd.grad(expected, wanted, weight))
        assert grads[0][:, :, 1].abs().max() == 0


@pytest.mark.parametrize("queries", [6, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_finite_minimum_in_a_float_mask(backend: str, queries: int) -> None:
    """As transformers pad: hidden beside ordinary keys; where a query has nothing else, it sees all keys alike.

    Of such a row the lse is too coarse for the gradients; without a gradient coming in it must give none.
    """
    inputs = [normal(2, 2, n, 16, seed=seed).requires_grad_() for seed, n in enumerate((queries, 40, 40))]
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(2, 1, queries, 40, device=DEVICE)
    mask[0, :, :, 30:] = lowest
    mask[1, :, :, :35] = lowest  # on the left
    visible = mask == 0
    mask[:, :, 1] = lowest
    ordinary = [row for row in range(queries) if row != 1]
    options: tuple[dict[str, Any], ...] = ({}, {"softcap": 2.0, "alibi_slopes": tensor(0.5, 0.1)})
    for given in options[: 1 if backend == "torch" else 2]:
        out, lse = ops.attention(*inputs, mask=mask, return_lse=True, backend=backend, **given)
        expected, expected_lse = ops.attention(
            *inputs, mask=visible, return_lse=True, backend="reference", **given
        )
        torch.testing.assert_close(out[:, :, 1], inputs[2].mean(2))
        torch.testing.assert_close(lse[:, :, 1], torch.full_like(lse[:, :, 1], lowest))
        torch.testing.assert_close(out[:, :, ordinary], expected[:, :, ordinary])
        torch.testing.assert_close(lse[:, :, ordinary], expected_lse[:, :, ordinary])
        weights = [normal(*t.shape, seed=7) for t in (out, lse)]
        grads = torch.autograd.grad((out, lse), inputs, weights, retain_graph=True)
        assert all(bool(grad.isfinite().all()) for grad in grads)
        for weight in weights:
            weight[:, :, 1] = 0.0
        grads = torch.autograd.grad((out, lse), inputs, weights)
        wanted = torch.autograd.grad((expected, expected_lse), inputs, weights)
        assert not grads[0][:, :, 1].any()
        torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [6, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float_mask_of_ten_thousands(backend: str, queries: int) -> None:
    """A score of 1e4 has steps of 1e-3, and no more may be lost than that."""
    inputs = [normal(1, 2, n, 16, seed=seed).requires_grad_() for seed, n in enumerate((queries, 40, 40))]
    mask = torch.where(normal(queries, 40, seed=4) > 0, 1e4, -1e4)
    mask[3] = -1e4
    out, lse = ops.attention(*inputs, mask=mask, return_lse=True, backend=backend)
    exact = [t.double() for t in inputs]
    expected, expected_lse = ops.attention(*exact, mask=mask.double(), return_lse=True, backend="reference")
    close = functools.partial(torch.testing.assert_close, check_dtype=False, rtol=2e-3, atol=2e-3)
    close(out, expected)
    close(lse, expected_lse)
    weight = normal(*out.shape, seed=5)
    grads = torch.autograd.grad(out, inputs, weight)
    close(grads, torch.autograd.grad(expected, inputs, weight.double()))


# What the forms of attention share, for 2 samples of 2 heads with 19 queries and keys.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 5, "scale": 0.3},
    "lengths": {"causal": True, "kv_lengths": tensor(19, 11)},
    "alibi": {"alibi_slopes": tensor([0.5, 0.1], [0.2, 1.0])},
    "bool_mask": {"mask": normal(2, 1, 19, 19) > 0, "causal": True},
    "float_mask": {"mask": normal(1, 2, 19, 19)},
    "softcap": {"softcap": 2.0, "window": (None, 3)},
    "dropout": {"dropout_p": 0.3, "rng": tensor(5, 2**33)},
}
ON = [
    pytest.param(backend, options, id=f"{backend}-{name}")
    for backend in BACKENDS
    for name, options in OPTIONS.items()
    if backend != "torch" or name not in ("softcap", "dropout")  # it refuses: test_ops
]


@pytest.mark.parametrize(("backend", "options"), ON)
def test_packed_qkv_has_the_bits_of_its_three_parts(backend: str, options: dict[str, Any]) -> None:
    (qkv,) = leaves(normal(2, 19, 3 * 2 * 16))
    parts = leaves(*qkv.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4))
    packed = ops.attention_qkv(qkv, 2, **options, return_lse=True, backend=backend)
    apart = ops.attention(*parts, **options, return_lse=True, backend=backend)
    weights = normal(2, 2, 19, 16, seed=1), normal(2, 2, 19, seed=2)
    (dqkv,) = torch.autograd.grad(packed, qkv, weights)
    grads = torch.autograd.grad(apart, parts, weights)
    for one, other in zip(packed, apart, strict=True):
        assert same_bits(one, other)
    assert dqkv.is_contiguous()
    assert same_bits(dqkv, torch.stack(grads).permute(1, 3, 0, 2, 4).flatten(2))


@pytest.mark.parametrize(("backend", "options"), ON)
def test_packed_documents_are_as_each_alone(backend: str, options: dict[str, Any]) -> None:
    """As long as each other and as max_seqlen, so that dropout counts alike; and with other lengths and a margin."""
    for lengths, longest in (([19, 19], 19), ([7, 0, 19], 21))[: 1 if "dropout_p" in options else 2]:
        ends = tensor(0, *lengths).cumsum(0).int()
        q, k, v = leaves(*(normal(sum(lengths), 2, 16, seed=seed) for seed in range(3)))
        shared = dict(options)
        if len(lengths) == 3:
            if "mask" in shared:
                shared["mask"] = (
                    normal(3, 1, 21, 21) > 0 if shared["mask"].dtype == torch.bool else normal(2, 21, 21)
                )
            if "kv_lengths" in shared:
                shared["kv_lengths"] = tensor(3, 0, 18)
            if "alibi_slopes" in shared:
                shared["alibi_slopes"] = normal(3, 2)
        packed = ops.attention_varlen(
            q, k, v, ends, ends, longest, longest, **shared, return_lse=True, backend=backend
        )
        found = []
        for b, (start, end) in enumerate(pairwise(ends.tolist())):
            own = {name: of_document(value, name, b, end - start) for name, value in shared.items()}
            one = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))
            out, lse = ops.attention(*one, **own, return_lse=True, backend=backend)
            found.append((out[0].transpose(0, 1), lse[0]))
        alone = torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], -1)
        weights = normal(sum(lengths), 2, 16, seed=4), normal(2, sum(lengths), seed=5)
        pairs = [
            *zip(packed, alone, strict=True),
            *zip(*(torch.autograd.grad(both, (q, k, v), weights) for both in (packed, alone)), strict=True),
        ]
        for one, other in pairs:
            if backend in ("torch", "reference"):  # document by document too
                assert same_bits(one.contiguous(), other.contiguous())
            else:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def of_document(value: Any, name: str, b: int, length: int) -> Any:
    """What an option of the packed call is for document b alone."""
    if name == "mask":
        value = value[(None,) * (4 - value.dim())]
        return value[b if value.shape[0] > 1 else 0, :, :length, :length]
    if name == "rng":  # the elements of the documents before it are counted
        return value + tensor(0, b * 2 * length * length)
    return value[b : b + 1] if name in ("kv_lengths", "alibi_slopes") else value


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_query_sees_the_last_key_that_exists(backend: str) -> None:
    """Causality and windows go by the length of the sample; what lies beyond it may be NaN."""
    q, k, v = normal(3, 4, 5, 16), normal(3, 2, 12, 16, seed=1), normal(3, 2, 12, 16, seed=2)
    lengths = tensor(12, 7, 0, dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:], v[b, :, length:] = torch.nan, torch.nan
    for options in ({"causal": True}, {"causal": True, "window": 3}, {"window": (2, 1)}, {}):
        given = leaves(q, k, v)
        out, lse = ops.attention(*given, **options, kv_lengths=lengths, return_lse=True, backend=backend)
        grads = torch.autograd.grad(out, given, torch.ones_like(out))
        for b, length in enumerate(lengths.tolist()):
            short = leaves(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
            expected = ops.attention(*short, **options, return_lse=True, backend="reference")
            torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), expected)
            wanted = torch.autograd.grad(expected[0], short, torch.ones_like(expected[0]))
            cut = (grads[0][b : b + 1], *(g[b : b + 1, :, :length] for g in grads[1:]))
            torch.testing.assert_close(cut, wanted)
            assert not grads[1][b, :, length:].any()
            assert not grads[2][b, :, length:].any()
        if options == {"causal": True}:
            assert bool((grads[2][1, :, 6].abs() > 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ways_to_write_a_window(backend: str) -> None:
    q, k, v = normal(1, 2, 20, 16), normal(1, 2, 30, 16, seed=1), normal(1, 2, 30, 16, seed=2)

    def attend(**options: Any) -> Tensor:
        return ops.attention(q, k, v, backend=backend, **options)

    assert same_bits(attend(window=4), attend(window=(3, 3)))
    assert same_bits(attend(window=4, causal=True), attend(window=(3, 0)))
    assert same_bits(attend(window=(None, None)), attend())
    assert same_bits(attend(window=(None, 0)), attend(causal=True))
    assert same_bits(attend(window=(5, 7), causal=True), attend(window=(5, 0)))
    torch.testing.assert_close(attend(window=1), v[:, :, 10:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_forms_are_scaled_dot_product_attention(backend: str) -> None:
    """A drop-in where the two mean the same; causal in PyTorch is top-left, so only for as many queries as keys."""
    q, k, v = normal(2, 4, 20, 16), normal(2, 4, 20, 16, seed=1), normal(2, 4, 20, 16, seed=2)
    for options in (
        {},
        {"scale": 0.5},
        {"is_causal": True},
        {"attn_mask": normal(20, 20)},
        {"attn_mask": normal(2, 1, 1, 20) > -1.0},
        {"enable_gqa": True},
    ):
        kv = [t[:, :2] if "enable_gqa" in options else t for t in (k, v)]
        ours = {"causal": options.get("is_causal", False), "mask": options.get("attn_mask")}
        both = []
        for function, given in (
            (F.scaled_dot_product_attention, options),
            (functools.partial(ops.attention, backend=backend), {**ours, "scale": options.get("scale")}),
        ):
            inputs = leaves(q, *kv)
            out = function(*inputs, **given)
            both.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
        torch.testing.assert_close(both[1], both[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_heads_inside_or_outside_have_the_same_bits(backend: str) -> None:
    """q, k and v as views of [B, T, H, D], as a projection leaves them; the output has that order too."""
    plain = leaves(normal(2, 4, 19, 16), normal(2, 2, 23, 16, seed=1), normal(2, 2, 23, 16, seed=2))
    inside = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in plain]
    mask, weight = normal(2, 1, 19, 23), normal(2, 4, 19, 16, seed=3)
    found = []
    for inputs, of_mask in ((plain, mask), (inside, mask.mT.contiguous().mT)):
        out = ops.attention(*inputs, causal=True, mask=of_mask, backend=backend)
        assert out.transpose(1, 2).is_contiguous()
        found.append((out, *torch.autograd.grad(out, inputs, weight)))
    for one, other in zip(*found, strict=True):
        assert same_bits(one.contiguous(), other.contiguous())


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_dropout_takes_away_what_philox_says(backend: str) -> None:
    """With the unit matrix as v the output is the dropped probabilities."""
    q, k, v = (
        normal(2, 3, 9, 16),
        normal(2, 3, 16, 16, seed=1),
        torch.eye(16, device=DEVICE).expand(2, 3, 16, 16),
    )
    rng = tensor(7, 2**32 - 100)  # the counter passes into its second word
    out = ops.attention(q, k, v, dropout_p=0.4, rng=rng, backend=backend)
    keep = keep_mask((2, 3, 9, 16), 0.4, rng)
    assert torch.equal(out != 0, keep)
    whole = ops.attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, torch.where(keep, whole / 0.6, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing(backend: str) -> None:
    """Zeros, an lse of -inf, and zero gradients, also under a gradient of lse."""
    inputs = leaves(normal(1, 2, 20, 16), normal(1, 2, 4, 16, seed=1), normal(1, 2, 4, 16, seed=2))
    out, lse = ops.attention(*inputs, causal=True, return_lse=True, backend=backend)
    assert not out[:, :, :16].any()
    assert bool((lse[:, :, :16] == -torch.inf).all())
    assert bool(lse[:, :, 16:].isfinite().all())
    dq, dk, dv = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
    assert not dq[:, :, :16].any()
    assert all(bool(grad.isfinite().all()) for grad in (dq, dk, dv))
    assert bool(dq[:, :, 17:].any())
