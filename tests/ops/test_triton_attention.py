"""The Triton attention forward in the interpreter: what the generated matrix does not force to be reached.

The interpreter's tiles are 32 x 32, those of the decode form 16 rows x 32 keys.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastgpt_kernels.triton import attention, attention_decode, attention_fwd, attention_tile
from torch import Tensor

from fastgpt import ops
from fastgpt._core import registry
from fastgpt._core.spec import Case
from fastgpt.testing.inputs import problem

pytestmark = pytest.mark.interpreter

TILED = ["_attention_fwd_kernel"]
DECODE = ["_attention_decode_kernel", "_attention_combine_kernel"]
Launches = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """(kernel, arguments by name) of every launch of the forward kernels."""
    found: Launches = []
    for module in (attention_fwd, attention_decode):
        inner = module.launch

        def launch(kernel: Any, grid: Any, *args: Any, inner: Any = inner, **named: Any) -> None:
            found.append((kernel.fn.__name__, named))
            inner(kernel, grid, *args, **named)

        monkeypatch.setattr(module, "launch", launch)
    return found


def prove(case: Case, dtype: torch.dtype = torch.float32, op: str = "attention") -> None:
    """out and lse of the case within their bounds."""
    spec = registry.get(op)
    made = problem(spec, Case(case.shape, {**case.options, "return_lse": True}), dtype)
    with torch.no_grad():
        out, lse = spec.function(**made.inputs, backend="triton")
    for name, found in made.compare({"out": out, "lse": lse}).items():
        assert found.ok, f"{case.name} {dtype} {name}: {found}"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [17, 32, 33, 65])
@pytest.mark.parametrize("keys", [1, 31, 32, 33, 64, 97])
def test_tiled_at_block_boundaries(queries: int, keys: int, causal: bool, launches: Launches) -> None:
    prove(Case((1, 1, queries, keys, 16), {"causal": causal}))
    assert [name for name, _ in launches] == TILED


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 2, 15, 16])
@pytest.mark.parametrize("keys", [1, 31, 32, 65, 129, 192])
def test_decode_at_block_boundaries(queries: int, keys: int, causal: bool, launches: Launches) -> None:
    prove(Case((1, 1, queries, keys, 16), {"causal": causal}))
    assert [name for name, _ in launches] == DECODE
    assert launches[0][1]["parts"] == min(-(-keys // 64), 4)


def test_decode_packs_a_group_and_takes_several_tiles_and_parts(launches: Launches) -> None:
    prove(Case((1, 3, 7, 200, 16), {"kv_heads": 1, "causal": True}))
    arguments = launches[0][1]
    assert arguments["tiles"] == 2  # 7 queries x 3 heads on tiles of 16 rows
    assert arguments["parts"] > 1


def test_parts_fill_the_gpu_and_stay_above_two_blocks() -> None:
    parts_of = attention_decode.parts_of
    assert parts_of(8, 32768, 64, 132) == 33
    assert parts_of(1, 1 << 20, 64, 132) == 128
    assert parts_of(264, 32768, 64, 132) == 1
    assert parts_of(1, 200, 64, 132) == 2
    assert parts_of(1, 0, 64, 132) == parts_of(0, 10, 64, 132) == 1


COMBINED: tuple[dict[str, Any], ...] = (
    {"window": "9_3", "softcap": 3.0, "alibi": "bh", "lengths": True},
    {"causal": True, "mask": "same", "over": "bhqk", "window": "40_x", "alibi": "h"},
    {"causal": True, "mask": "bool", "over": "1hqk", "softcap": 20.0, "kv_heads": 2, "v_width": 33},
    {"mask": "fp32", "over": "b1q1", "dropout": 0.4, "lengths": True, "scale": -0.4},
    {"causal": True, "dropout": 0.2, "window": 20, "kv_heads": 1, "alibi": "h"},
    {"window": "x_2", "mask": "bool", "over": "11qk", "dropout": 0.1, "softcap": 2.0},
)


@pytest.mark.parametrize("options", COMBINED, ids=lambda options: Case((), options).name)
@pytest.mark.parametrize("queries", [9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_options_together(
    dtype: torch.dtype, queries: int, options: dict[str, Any], launches: Launches
) -> None:
    prove(Case((2, 4, queries, 130, 20), options), dtype)
    assert [name for name, _ in launches] == (TILED if queries > 16 else DECODE)


@pytest.mark.parametrize("shape", [(2, 16, 40, 1, 33, 70), (2, 16, 3, 0, 16)])
def test_documents_together(shape: tuple[int, ...], launches: Launches) -> None:
    options = {
        "causal": True,
        "window": "20_x",
        "alibi": "bh",
        "dropout": 0.2,
        "mask": "fp32",
        "lengths": True,
    }
    prove(Case(shape, {**options, "keys": "_".join(str(n + 40) for n in shape[2:])}), op="attention_varlen")
    assert [name for name, _ in launches] == (TILED if max(shape[2:]) > 16 else DECODE)


def draw(queries: int, keys: int, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, 2, length, width) for length in (queries, keys, keys))  # type: ignore[return-value]


@pytest.mark.parametrize("queries", [16, 70])
@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"causal": True}, lambda distance: distance <= 0),
        ({"window": (40, 3)}, lambda distance: (distance >= -40) & (distance <= 3)),
        ({"window": (5, None)}, lambda distance: distance >= -5),
    ],
    ids=["causal", "window", "left"],
)
def test_what_a_query_does_not_see_leaves_its_bits_alone(
    queries: int, options: dict[str, Any], seen: Any
) -> None:
    q, k, v = draw(queries, 150)
    distance = torch.arange(150) - (torch.arange(queries)[:, None] + 150 - queries)
    before = ops.attention(q, k, v, return_lse=True, backend="triton", **options)
    for changed in (0, 31, 32, 80, 149):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, changed], v2[:, :, changed] = 9.0, -7.0
        after = ops.attention(q, k2, v2, return_lse=True, backend="triton", **options)
        blind = ~seen(distance)[:, changed]
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x[:, :, blind], y[:, :, blind])
            assert blind.all() or not torch.equal(x[:, :, ~blind], y[:, :, ~blind])


@pytest.mark.parametrize("queries", [4, 40])
def test_blocks_outside_window_and_length_are_not_read(queries: int) -> None:
    """A NaN there, even where p is 0, would come through."""
    q, k, v = draw(queries, 260)
    lengths = torch.tensor([200])
    options: dict[str, Any] = {"window": (30, 0), "kv_lengths": lengths, "backend": "triton"}
    expected = ops.attention(q, k, v, **options)
    for x in (k, v):
        x[:, :, : (200 - queries - 30) // 32 * 32] = torch.nan
        x[:, :, 200:] = torch.nan
    assert torch.equal(ops.attention(q, k, v, **options), expected)


@pytest.mark.parametrize("queries", [3, 33])
def test_a_foreign_document_leaves_the_bits_alone(queries: int) -> None:
    ends = torch.tensor([0, 20, 20 + queries, 60 + queries], dtype=torch.int32)
    length = int(ends[-1])
    q, k, v = (torch.randn(length, 2, 16) for _ in range(3))
    longest = max(40, queries)

    def run() -> Tensor:
        return ops.attention_varlen(q, k, v, ends, ends, longest, longest, backend="triton")

    before = run()
    for x in (q, k, v):
        x[:20] = x[20 + queries :] = torch.nan
    assert torch.equal(run()[20 : 20 + queries], before[20 : 20 + queries])


@pytest.mark.parametrize("queries", [5, 40])
def test_rows_that_see_nothing_and_rows_of_nan(queries: int) -> None:
    q, k, v = draw(queries, 50)
    mask = torch.ones(queries, 50, dtype=torch.bool)
    mask[2] = False
    q[:, 0, 3] = torch.nan
    out, lse = ops.attention(q, k, v, mask=mask, return_lse=True, backend="triton")
    assert bool((out[:, :, 2] == 0).all())
    assert bool((lse[:, :, 2] == -torch.inf).all())
    assert bool(out[:, 0, 3].isnan().all() and lse[:, 0, 3].isnan().all())
    assert bool(out[:, 1].isfinite().all() and lse[:, 1, 3:].isfinite().all())


@pytest.mark.parametrize("queries", [5, 40])
def test_an_infinite_score_gives_nan_and_an_infinite_lse(queries: int) -> None:
    q, k, v = draw(queries, 50)
    mask = torch.zeros(queries, 50)
    mask[1, 40] = torch.inf
    out, lse = ops.attention(
        q, k, v, mask=mask, dropout_p=0.5, rng=torch.tensor([1, 2]), return_lse=True, backend="triton"
    )
    assert bool(out[:, :, 1].isnan().all() and (lse[:, :, 1] == torch.inf).all())
    assert bool(out[:, :, 2:].isfinite().all())


def test_the_tile_of_the_softcap_is_right_near_zero_and_far() -> None:
    x = torch.cat([torch.logspace(-30, 1.5, 500), torch.tensor([0.0, 0.6249, 0.625, 0.6251, torch.inf])])
    x = torch.cat([x, -x, torch.tensor([torch.nan])])
    padded = torch.zeros(1024)
    padded[: len(x)] = x
    y = torch.empty_like(padded)
    _tanh_kernel[(1,)](padded, y, N=1024)
    exact = torch.tanh(padded.double())
    error = (y.double() - exact).abs() / exact.abs().clamp(min=1e-40)
    assert float(error.nan_to_num().max()) < 4 * 2**-24
    assert torch.equal(y.isnan(), exact.isnan())


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, attention_tile.tanh(tl.load(x_ptr + at)))


@triton.jit
def _block_range_kernel(cases_ptr, ranges_ptr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    case = cases_ptr + tl.program_id(0) * 6
    first, last, shift = tl.load(case), tl.load(case + 1), tl.load(case + 2)
    begin, inner_begin, inner_end, end = attention_tile.block_range(
        first, last, shift, tl.load(case + 3), tl.load(case + 4), tl.load(case + 5), LEFT, RIGHT, BLOCK
    )
    found = ranges_ptr + tl.program_id(0) * 4
    tl.store(found, begin)
    tl.store(found + 1, inner_begin)
    tl.store(found + 2, inner_end)
    tl.store(found + 3, end)


@pytest.mark.parametrize(("left", "right"), [*itertools.product([False, True], repeat=2)])
def test_block_range_has_all_that_is_seen_and_inside_nothing_else(left: bool, right: bool) -> None:
    cases = torch.tensor(
        [
            (first, first + more, shift, wide, near, end)
            for first, more in ((0, 0), (0, 31), (8, 3))
            for shift in (-20, 0, 7)
            for wide, near in ((0, 0), (3, 9), (20, 0), (100, 100))
            for end in (0, 5, 16, 37)
        ],
        dtype=torch.int32,
    )
    ranges = torch.empty(len(cases), 4, dtype=torch.int32)
    _block_range_kernel[(len(cases),)](cases, ranges, LEFT=left, RIGHT=right, BLOCK=8)
    for case, (begin, inner_begin, inner_end, end) in zip(cases.tolist(), ranges.tolist(), strict=True):
        first, last, shift, wide, near, length = case
        row, key = torch.arange(first, last + 1)[:, None] + shift, torch.arange(length)
        seen = torch.ones(last + 1 - first, length, dtype=torch.bool)
        seen &= (key >= row - wide) if left else True
        seen &= (key <= row + near) if right else True
        edges = [range(begin, inner_begin, 8), range(inner_begin, inner_end, 8), range(inner_end, end, 8)]
        starts = [start for part in edges for start in part]
        assert starts == sorted(set(starts)), case
        covered = torch.zeros(length + 8, dtype=torch.bool)
        for start in starts:
            covered[start : start + 8] = True
        assert bool(covered[:length][seen.any(0)].all()), case
        for start in edges[1]:
            assert start + 8 <= length, case
            assert bool(seen[:, start : start + 8].all()), case
        if seen.any():
            needless = [start for start in starts if not seen[:, start : start + 8].any()]
            assert not needless, (case, needless)


def test_layouts_give_the_same_bits() -> None:
    q, k, v = draw(20, 40)
    expected = ops.attention(q, k, v, backend="triton")
    inner = q.mT.contiguous().mT  # its innermost stride is not 1
    offset = torch.randn(1, 2, 40, 17)
    offset[..., 1:] = k
    for args in (
        (inner, k, v),
        (q, offset[..., 1:], v),
        (q, k, v.transpose(1, 2).contiguous().transpose(1, 2)),
    ):
        assert torch.equal(ops.attention(*args, backend="triton"), expected)
    shared = ops.attention(q, k[:, :1].expand(-1, 2, -1, -1), v, backend="triton")
    assert torch.equal(shared, ops.attention(q, k[:, :1].repeat(1, 2, 1, 1), v, backend="triton"))


@pytest.mark.parametrize(("stride", "copied"), [(16, False), (2**24 - 1, False), (2**24, True)])
def test_rows_too_far_apart_for_offsets_of_32_bits_are_copied(stride: int, copied: bool) -> None:
    x = torch.empty_strided((1, 1, 200, 16), (1, 1, stride, 1), device="meta")
    assert (attention_tile.innermost_contiguous(x) is not x) == copied


@pytest.mark.parametrize("width", [20, 64])
def test_a_new_batch_or_length_is_the_same_compiled_kernel(width: int) -> None:
    """What is compile-time is equal, alignment included."""

    def options(batch: int, length: int) -> Any:
        q = torch.empty(batch, 4, length, width, dtype=torch.bfloat16, device="meta")
        nothing = (None,) * 6
        return attention_tile.describe(q, q, q, *nothing, 0.1, -1, 0, 0.0, 0.0, 0, 0).options

    assert len({options(batch, length) for batch in (1, 2, 3) for length in (1, 4, 33, 128)}) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q": torch.empty(1, 2, 3, 300)}, "at most 256, got 300"),
        ({"v": torch.empty(1, 2, 3, 257)}, "at most 256, got 16 and 257"),
        ({"q": torch.empty(1, 2, 3, 16, dtype=torch.float64)}, "got torch.float64"),
        ({"mask": torch.empty(3, 3, dtype=torch.float64)}, "needs a mask of bool, float32"),
    ],
)
def test_refusals_say_why(changes: dict[str, Tensor], reason: str) -> None:
    plain = torch.empty(1, 2, 3, 16)
    options = ("mask", "alibi_slopes", "kv_lengths", "cu_seqlens_q", "cu_seqlens_k", "rng")
    given: dict[str, Any] = {"q": plain, "k": plain, "v": plain, **dict.fromkeys(options)}
    numbers = {"scale": 1.0, "window_left": -1, "window_right": -1, "softcap": 0.0, "dropout_p": 0.0}
    found = attention.supports(**(given | changes), **numbers, max_seqlen_q=0, max_seqlen_k=0, need_lse=True)  # type: ignore[arg-type]
    assert found is not None
    assert reason in found
