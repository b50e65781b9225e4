"""Hazards of embeddings alone: indices out of range that nobody could look at, sums of any length, no races."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_cases import DEVICE, variants

from fastgpt import ops
from fastgpt._core import library
from fastgpt.testing.memory import same_bits

VARIANTS = variants("embedding")
OURS = [variant for variant in VARIANTS if variant.backend in ("cpu", "triton")]


def on(items: list[Any]) -> Any:
    return pytest.mark.parametrize("variant", items, ids=[variant.name for variant in items])


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)


@on(OURS)
@pytest.mark.parametrize("bad", [-1, 9, -(2**62), 2**62])
def test_out_of_range_is_nan_and_adds_to_no_gradient(variant: Any, bad: int) -> None:
    """What compiled code and a GPU do, where the values cannot be looked at first: the registered ops themselves."""
    variant.enter()
    weight, places = drawn(9, 33), drawn(4, 33)
    tokens = torch.tensor([[3, bad, 8], [0, 3, 3]], device=DEVICE)
    positions = torch.tensor([[0, 1, 4], [3, bad, 0]], device=DEVICE)
    forward = library._DIRECT[f"embedding_fwd_{variant.backend}"]
    backward = library._DIRECT[f"embedding_bwd_{variant.backend}"]
    out = forward(weight, tokens, None, None)
    assert out.isnan().all(-1).tolist() == [[False, True, False], [False] * 3]
    out = forward(weight, tokens, places, positions)
    assert out.isnan().all(-1).tolist() == [[False, True, True], [False, True, False]]
    assert torch.equal(out[1, 2], weight[3] + places[0])
    dout = drawn(2, 3, 33)
    dweight, dplaces = backward(dout, tokens, positions, 9, 4, -1, True, True)
    expected = torch.zeros(9, 33, device=DEVICE)
    expected[3], expected[8], expected[0] = dout[0, 0] + dout[1, 1] + dout[1, 2], dout[0, 2], dout[1, 0]
    torch.testing.assert_close(dweight, expected)
    expected = torch.zeros(4, 33, device=DEVICE)
    expected[0], expected[1], expected[3] = dout[0, 0] + dout[1, 2], dout[0, 1], dout[1, 0]
    torch.testing.assert_close(dplaces, expected)


@on(OURS)
@pytest.mark.parametrize("repeats", [1, 4, 5, 31, 32, 33, 63, 64, 65, 130, 257])
def test_sums_of_any_length(variant: Any, repeats: int) -> None:
    """Around the sizes of groups, pieces and chunks; the value is exact only if every row is added once."""
    variant.enter()
    others = torch.arange(6, device=DEVICE)
    tokens = torch.cat((others, torch.full((repeats,), 3, device=DEVICE), others.flip(0)))
    weight = drawn(8, 5).requires_grad_()
    dout = (
        torch.randint(-8, 9, (tokens.numel(), 5), generator=torch.Generator().manual_seed(2))
        .float()
        .to(DEVICE)
    )
    (got,) = torch.autograd.grad(ops.embedding(tokens, weight, backend=variant.backend), weight, dout)
    assert torch.equal(got, torch.zeros_like(got).index_add(0, tokens, dout))


@on(VARIANTS)
@pytest.mark.parametrize("padding_idx", [3, -5])
def test_padding_changes_no_output_and_stops_the_gradient(variant: Any, padding_idx: int) -> None:
    variant.enter()
    tokens, weight = torch.tensor([[3, 1, 3, 2]], device=DEVICE), drawn(8, 16).requires_grad_()
    out = ops.embedding(tokens, weight, padding_idx=padding_idx, backend=variant.backend)
    assert torch.equal(out, torch.nn.functional.embedding(tokens, weight))
    (got,) = torch.autograd.grad(out.sum(), weight)
    assert got.sum(-1).tolist() == [0, 16, 16, 0, 0, 0, 0, 0]


@on(VARIANTS)
def test_one_token_of_many_that_overflow_alone(variant: Any) -> None:
    """Half precision sums in fp32: what would overflow on the way does not."""
    variant.enter()
    weight = drawn(4, 8, dtype=torch.float16).requires_grad_()
    tokens = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    dout = torch.full((8, 8), 60000.0, dtype=torch.float16, device=DEVICE)
    dout[4:] = -60000.0
    (got,) = torch.autograd.grad(ops.embedding(tokens, weight, backend=variant.backend), weight, dout)
    assert not bool(got.any())


@on(VARIANTS)
def test_a_table_of_rows_apart_is_read_in_place(variant: Any) -> None:
    variant.enter()
    weight = drawn(9, 40)[:, 3:30]
    tokens = torch.tensor([8, 0, 4], device=DEVICE)
    assert torch.equal(ops.embedding(tokens, weight, backend=variant.backend), weight[tokens])


@pytest.mark.skipif(DEVICE != "cpu", reason="needs the CPU")
def test_compiled_code_cannot_look_and_does_not_crash() -> None:
    compiled = torch.compile(
        lambda tokens, weight: ops.embedding(tokens, weight), backend="aot_eager", fullgraph=True
    )
    out = compiled(torch.tensor([0, 5, -1]), drawn(5, 8))
    assert out.isnan().any(-1).tolist() == [False, True, True]


@pytest.mark.slow
@on([variant for variant in OURS if variant.level is None and not variant.emulated])
def test_more_than_2_to_the_31_elements(variant: Any) -> None:
    """In the table, the output and the gradient: ends are as they are alone."""
    rows, width = 2**21 + 8, 1024
    needed = 2 * rows * width * 4
    if _free_bytes() < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory")
    weight = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    weight[-8:] = drawn(8, width, dtype=torch.bfloat16)
    end = weight[-8:].clone()
    weight.requires_grad_()
    tokens = torch.arange(rows, device=DEVICE).flip(0)
    out = ops.embedding(tokens, weight, backend=variant.backend)
    assert same_bits(out[:8].detach(), end.flip(0))
    dout = torch.zeros_like(out)
    dout[:8] = end
    (got,) = torch.autograd.grad(out, weight, dout)
    assert same_bits(got[-8:], end.flip(0))
    assert not bool(got[-16:-8].any())


def _free_bytes() -> float:
    if DEVICE == "cpu":
        import os

        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else math.inf
