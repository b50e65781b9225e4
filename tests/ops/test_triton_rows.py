"""Hazards of the Triton row kernels: every form really reached, on blocks smaller than the rows, and their NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from fastgpt_kernels.triton import common, gelu, launch, layer_norm, philox, softmax
from fastgpt_kernels.triton.common import RowsConfig
from fastgpt_kernels.triton.launch import INTERPRETING, Launch, recording
from torch import Tensor

from fastgpt import ops, testing
from fastgpt._core.spec import Case
from fastgpt.reference.philox import keep_mask

interpreted = pytest.mark.interpreter
recorded_only = pytest.mark.skipif(INTERPRETING, reason="needs Triton's compiler")

FORWARD = ("layer_norm_fwd", "softmax_fwd")
BACKWARD = ("layer_norm_bwd", "softmax_bwd", "softmax_dmask")


@contextmanager
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The kernels that run within the block: their names, grids and block sizes."""
    seen: list[dict[str, Any]] = []
    original = launch.launch

    def spy(kernel: Any, grid: Any, *args: Any, **named: Any) -> None:
        seen.append({"kernel": kernel.fn.__name__, "grid": grid, **named})
        original(kernel, grid, *args, **named)

    with monkeypatch.context() as patch:
        for module in (common, gelu, layer_norm, softmax):
            patch.setattr(module, "launch", spy)
        yield seen


@contextmanager
def all_forced(config: RowsConfig, *kernels: str) -> Iterator[None]:
    with ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(common.forced(kernel, config))
        yield


@interpreted
@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.7, 0.999999999])
@pytest.mark.parametrize("rng", [(1, 2), (2**62 + 12345, 2**32 - 100), (-5, -7), (2**63 - 1, 2**63 - 3)])
def test_philox_is_the_reference_bit_by_bit(p: float, rng: tuple[int, int]) -> None:
    """Counters that cross 2**32 and 2**64, negative seeds, thresholds on both sides of 2**31."""
    x = torch.zeros(3, 70)
    state = torch.tensor(rng)
    y = ops.softmax(x, dropout_p=p, rng=state, backend="triton")
    assert torch.equal(y != 0, keep_mask(x.shape, p, state))
    assert philox.threshold(p) == min(round(p * 2**32), 2**32 - 1)


LONG = [
    ("softmax", Case((5, 70))),
    ("softmax", Case((3, 70), {"causal": True, "dropout": 0.3, "scale": 0.125})),
    ("softmax", Case((2, 2, 3, 70), {"mask": "bool", "over": "b11k"})),
    *(("softmax", Case((2, 2, 3, 70), {"mask": "fp32", "over": over})) for over in ("b11k", "11qk", "1hq1", "1111")),
    ("softmax", Case((2, 2, 3, 40), {"mask": "same", "over": "1hqk", "dropout": 0.5, "causal": True})),
    ("layer_norm", Case((9, 131))),
    ("layer_norm", Case((9, 257), {"mean": 1000.0})),
    ("layer_norm", Case((13, 100), {"residual": True})),
    ("layer_norm", Case((6, 100), {"residual": True, "weight": False, "bias": False})),
]  # fmt: skip


@interpreted
@pytest.mark.parametrize(("op", "case"), LONG, ids=[f"{op}-{case.name}" for op, case in LONG])
def test_rows_longer_than_a_block(op: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The several-pass forms, forward and backward: rows of several blocks and a tail, several rows a program."""
    with all_forced(RowsConfig(BLOCK_ROWS=4, BLOCK_COLS=32), *FORWARD, *BACKWARD), spied(monkeypatch) as seen:
        report = testing.check(op, backend="triton", dtypes=["fp32"], cases=[case], thorough=False)
    assert report.ok, report
    forms = {one["kernel"]: one["ONE_BLOCK"] for one in seen if "ONE_BLOCK" in one}
    assert forms == {f"_{op}_fwd_kernel": False, f"_{op}_bwd_kernel": False}


@interpreted
@pytest.mark.parametrize("op", ["softmax", "layer_norm"])
def test_rows_in_one_block(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row a program, and several with a last program that is not full."""
    for rows in (1, 4):
        config = RowsConfig(BLOCK_ROWS=rows, BLOCK_COLS=64)
        with all_forced(config, *FORWARD, *BACKWARD), spied(monkeypatch) as seen:
            report = testing.check(
                op, backend="triton", dtypes=["fp32"], cases=[Case((9, 50))], thorough=False
            )
        assert report.ok, report
        assert {one["BLOCK_ROWS"] for one in seen if "ONE_BLOCK" in one} == {rows}
        assert all(one["ONE_BLOCK"] for one in seen if "ONE_BLOCK" in one)


ROWS, G = 250, 0.7  # one lane that adds 250 x 0.7 in fp32 is off by 40 x 2**-24 of the sum


def _exact_enough(got: Tensor | None, term: Tensor) -> None:
    """`got` is the sum of ROWS times `term` within the bound of c = 16."""
    assert got is not None
    exact = ROWS * term.double()
    error = ((got.double() - exact).abs() / exact.abs()).max().item()
    assert error <= 16 * 2.0**-24, f"{error * 2**24:.1f} x 2**-24 of the sum"


@pytest.fixture
def one_lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One processor, which runs one program of one row at once; three columns make two blocks."""
    for module in (gelu, layer_norm, softmax):
        monkeypatch.setattr(module, "processors", lambda device: 1)
    config = RowsConfig(num_warps=32, BLOCK_ROWS=1, BLOCK_COLS=2)
    with all_forced(config, "gelu_bwd", "softmax_dmask"):
        yield


@interpreted
@pytest.mark.usefixtures("one_lane")
@pytest.mark.parametrize("cols", [2, 4], ids=["several_blocks", "one_block"])
def test_the_sums_of_layer_norm_hold_the_bound_for_any_number_of_rows(cols: int) -> None:
    x = torch.tensor([1.0, 2.0, 6.0]).expand(ROWS, 3)
    dy, mean, rstd = torch.full((ROWS, 3), G), torch.full((ROWS,), 3.0), torch.full((ROWS,), 0.46)
    with all_forced(RowsConfig(num_warps=32, BLOCK_ROWS=1, BLOCK_COLS=cols), "layer_norm_bwd"):
        *_, dw, db = layer_norm.layer_norm_bwd(dy, None, x, x[0], x[0], mean, rstd, False, True, True)
    _exact_enough(dw, dy[0].double() * (x[0].double() - 3.0) * rstd[0].double())
    _exact_enough(db, dy[0])


@interpreted
@pytest.mark.usefixtures("one_lane")
def test_the_sum_of_gelu_holds_the_bound_for_any_number_of_rows() -> None:
    x, dy = torch.full((ROWS, 3), 0.5), torch.full((ROWS, 3), G)
    dx, db = gelu.gelu_bwd(dy, x, torch.zeros(3), "tanh", True, True)
    assert dx is not None
    _exact_enough(db, dx[0])


@interpreted
@pytest.mark.usefixtures("one_lane")
def test_the_sum_of_softmax_holds_the_bound_for_any_number_of_rows() -> None:
    """Eight columns: four programs, of all rows each."""
    p = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]).expand(ROWS, 8)
    dy = torch.full((ROWS, 8), 2 * G)
    dy[:, 1] = 0.0
    _, dmask = softmax.softmax_bwd(dy, p, 1.0, torch.zeros(8), False, 0.0, None, False, True)
    assert dmask is not None
    _exact_enough(dmask[:2], torch.tensor([0.5 * G, -0.5 * G]))


@interpreted
def test_the_sum_of_partial_sums_holds_the_bound_for_any_number_of_them() -> None:
    out = torch.empty(3)
    common.column_sums(torch.full((1, 2 * ROWS, 3), G / 2), out)  # two lanes
    _exact_enough(out, torch.full((3,), G))


@interpreted
def test_compensated_sums_of_infinities_are_infinite() -> None:
    partials = torch.ones(1, 8, 4)
    partials[0, 2, 1], partials[0, 3, 2], partials[0, 5, 3] = torch.inf, -torch.inf, torch.nan
    out = torch.empty(4)
    common.column_sums(partials, out)
    assert out.tolist()[:3] == [8.0, torch.inf, -torch.inf]
    assert out[3].isnan()


@interpreted
def test_gelu_walks_rows_and_columns_in_tiles() -> None:
    for approximate in ("none", "tanh"):
        case = Case((9, 70), {"bias": True, "approximate": approximate})
        with all_forced(RowsConfig(BLOCK_ROWS=2, BLOCK_COLS=32), "gelu_fwd", "gelu_bwd"):
            report = testing.check("gelu", backend="triton", dtypes=["fp32"], cases=[case], thorough=False)
        assert report.ok, report


@interpreted
@pytest.mark.parametrize("cols", [32, 128], ids=["several_blocks", "one_block"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_softmax_nan_and_infinity(cols: int, value: float) -> None:
    """As in the reference, in every block of the row, under no mask, causality and masks; and whole rows of it."""
    x = torch.randn(2, 6, 70)
    x[0, 1, 3], x[0, 2, 40], x[0, 3, 69] = value, value, value
    x[1, 2] = value
    x[1, 4, 33:] = -torch.inf
    bool_mask = torch.rand(6, 70) < 0.7
    bool_mask[3] = False
    float_mask = torch.randn(6, 70)
    float_mask[1, 50], float_mask[4] = value, torch.finfo(torch.float32).min
    for options in (
        {},
        {"causal": True},
        {"mask": bool_mask},
        {"mask": bool_mask, "causal": True},
        {"mask": float_mask},
    ):
        expected = ops.softmax(x, **options, backend="reference")
        with all_forced(RowsConfig(BLOCK_ROWS=2, BLOCK_COLS=cols), *FORWARD):
            got = ops.softmax(x, **options, backend="triton")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7, equal_nan=True)


@interpreted
def test_what_causality_hides_is_not_looked_at() -> None:
    """NaN in hidden scores and hidden incoming gradients; blocks end inside the visible part."""
    hidden = torch.ones(20, 70, dtype=torch.bool).triu(51)
    x, dy = torch.randn(3, 20, 70), torch.randn(3, 20, 70)
    for cols in (32, 128):
        with all_forced(RowsConfig(BLOCK_ROWS=4, BLOCK_COLS=cols), *FORWARD, *BACKWARD):
            clean = _both(x, dy.masked_fill(hidden, 0.0))
            spoiled = _both(x.masked_fill(hidden, torch.nan), dy.masked_fill(hidden, torch.nan))
        for one, other in zip(clean, spoiled, strict=True):
            assert torch.equal(one, other)


def _both(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = ops.softmax(leaf, causal=True, backend="triton")
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def _launched(
    n: int, rows: int = 64, arch: str = "sm_90", dtype: torch.dtype = torch.bfloat16
) -> list[Launch]:
    x = torch.empty(rows, n, dtype=dtype, device="meta")
    w, statistics = x[0], torch.empty(rows, device="meta")
    mask = torch.empty(1, n, dtype=dtype, device="meta")
    with recording(arch) as found:
        layer_norm.layer_norm_fwd(x, w, w, None, 1e-5)
        layer_norm.layer_norm_bwd(x, None, x, w, w, statistics, statistics, True, True, True)
        softmax.softmax_fwd(x, 1.0, None, False, 0.0, None)
        softmax.softmax_bwd(x, x, 1.0, mask, False, 0.0, None, True, True)
        gelu.gelu_fwd(x, w, "tanh")
        gelu.gelu_bwd(x, x, w, "tanh", True, True)
    return found


def _name(one: Launch) -> str:
    return one.kernel.fn.__name__


@recorded_only
@pytest.mark.parametrize("n", [1, 24, 768, 1024, 4096, 16384, 50257, 131072])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_blocks_fit_a_gpu(arch: str, n: int) -> None:
    """At most 1024 threads, and no more than 64 elements of a tile for each of them."""
    for one in _launched(n, arch=arch):
        threads = one.num_warps * (64 if arch.startswith("gfx") else 32)
        rows = one.arguments.get("BLOCK_ROWS", one.arguments.get("BLOCK_PARTS"))
        assert threads <= 1024, one
        assert rows * one.arguments["BLOCK_COLS"] <= 64 * threads, one


@recorded_only
def test_long_rows_take_several_passes() -> None:
    """Which form runs at which width, as it is shipped."""
    forms = {
        n: {_name(one): one.arguments["ONE_BLOCK"] for one in _launched(n) if "ONE_BLOCK" in one.arguments}
        for n in (4096, 16384, 65536)
    }
    assert all(forms[4096].values())
    assert forms[16384] == {
        "_layer_norm_fwd_kernel": True,
        "_layer_norm_bwd_kernel": False,
        "_softmax_fwd_kernel": True,
        "_softmax_bwd_kernel": True,
    }
    assert not any(forms[65536].values())


@recorded_only
@pytest.mark.parametrize("n", [768, 16384])
def test_programs_walk_on_and_add_up_no_more_than_they_may(n: int) -> None:
    """Programs come in whole numbers of what runs at once, and in no larger a number than the bound asks for."""
    at_once = None
    for rows in (50_000, 100_000, 3_000_001, 50_000_000):
        for one in _launched(n, rows):
            if _name(one) != "_layer_norm_bwd_kernel":
                continue
            tiles, programs = common.cdiv(rows, one.arguments["BLOCK_ROWS"]), one.grid[0]
            at_once = at_once or programs
            assert programs % 128 == 0
            assert common.cdiv(tiles, programs) <= common.LONGEST_SUM
            assert programs < common.cdiv(tiles, common.LONGEST_SUM) + 2 * at_once
    assert common.walkers(5, 128) == 5
    assert common.walkers(4096, 128) == 128
    assert common.walkers(4097, 128) == 256


@recorded_only
@pytest.mark.parametrize("n", [768, 50257])
def test_registers_are_limited_on_nvidia_only(n: int) -> None:
    """Triton refuses the option for AMD. What it allows lets as many programs run as the launcher counts on."""
    limits = [one.arguments.get("maxnreg") for one in _launched(n, arch="sm_90", dtype=torch.float32)]
    assert 128 in limits
    assert set(limits) <= {128, None}
    assert not any("maxnreg" in one.arguments for one in _launched(n, arch="gfx942", dtype=torch.float32))


@recorded_only
def test_a_forced_configuration_is_what_is_launched() -> None:
    config = RowsConfig(num_warps=2, BLOCK_ROWS=8, BLOCK_COLS=512)
    with common.forced("softmax_fwd", config):
        found = {_name(one): one for one in _launched(512)}
    one = found["_softmax_fwd_kernel"]
    assert (one.num_warps, one.arguments["BLOCK_ROWS"], one.arguments["BLOCK_COLS"]) == (2, 8, 512)
    assert found["_softmax_bwd_kernel"].arguments["BLOCK_ROWS"] != 8


@recorded_only
def test_every_candidate_is_of_the_kernels_own_kind() -> None:
    for module in (gelu, layer_norm, softmax):
        for tunable in module.tunables():
            assert all(isinstance(config, RowsConfig) for config in tunable.candidates), tunable
            assert len(set(tunable.candidates)) == len(tunable.candidates) <= 18, tunable
