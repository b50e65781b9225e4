"""Our own matrix product (csrc/cpu/gemm.h) at every level, beyond the sizes at which the ops choose it."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from fastgpt_kernels import load_cpu
from fastgpt_kernels.cpu import gemm
from fastgpt_kernels.cpu.linear import MOST_FEW_ROWS
from op_cases import check, forms
from torch import Tensor

from fastgpt import ops

LEVELS = load_cpu().isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around tiles (8 x 48), panels (16 rows), the 768 or 1536 elements summed at once, the 384 columns from which two
# threads pack panels of their own, and the 1024 rows from which they share them; parts of 2048 rows and of 3072 (with
# sums beside them 768) columns.
SHAPES = [
    (1, 1, 1), (7, 49, 33), (17, 96, 769), (40, 513, 200), (33, 7, 1700), (20, 400, 1601), (20, 400, 3100),
    (20, 50, 2016), (30, 1000, 1700), (1030, 100, 70), (1030, 800, 770), (1041, 530, 1601), (1030, 3100, 20),
    (2060, 60, 20),
]  # fmt: skip
LARGE = (1030, 800, 3100)


def matrix(rows: int, columns: int, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Normal numbers [rows, columns], one of its dimensions adjacent, NaN around them in memory."""
    if transposed:
        return matrix(columns, rows, dtype, False).t()
    around = torch.full((rows + 2, columns + 3), torch.nan, dtype=dtype)
    around[1:-1, 1 : columns + 1] = torch.randn(rows, columns)
    return around[1:-1, 1 : columns + 1]


def bound(a: Tensor, b: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the sums in fp32, which wander: a few roundings of all magnitudes together is much; and of the result."""
    unit = torch.finfo(dtype).eps / 2
    return (
        8 * 2**-24 * (a.abs() @ b.abs()) + 1.01 * unit * exact.abs() + 4 * torch.finfo(dtype).smallest_normal
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape: tuple[int, int, int], dtype: torch.dtype, level: str) -> None:
    load_cpu().set_isa(level)
    torch.set_num_threads(2)
    m, n, k = shape
    for along_a, along_b, add in itertools.product((False, True), (False, True), (False, True)):
        a, b = matrix(m, k, dtype, along_a), matrix(k, n, dtype, not along_b)
        c = torch.full((m + 2, n + 5), torch.nan, dtype=dtype)
        inside = c[1:-1, 2 : n + 2]
        inside.copy_(torch.randn(m, n))
        before = inside.double() if add else 0.0
        gemm._gemm(a, b, inside, add=add)
        exact = a.double() @ b.double() + before
        assert ((inside.double() - exact).abs() <= bound(a.double(), b.double(), exact, dtype)).all()
        inside.fill_(torch.nan)
        assert c.isnan().all()  # nothing outside was written


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_epilogue(
    shape: tuple[int, int, int], dtype: torch.dtype, level: str, activation: str | None
) -> None:
    load_cpu().set_isa(level)
    torch.set_num_threads(2)
    m, n, k = shape
    a, b, bias = matrix(m, k, dtype, False) / k**0.5, matrix(k, n, dtype, True), torch.randn(n).to(dtype)
    c, kept = torch.full((2, m, n), torch.nan, dtype=dtype)
    gemm._gemm(a, b, c, bias, activation, kept)
    exact = a.double() @ b.double()
    slack = bound(a.double(), b.double(), exact, dtype)
    assert ((kept.double() - exact).abs() <= slack).all()
    z = exact + bias.double()
    if activation is not None:
        z = F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    # GELU's slope is at most 1.13, and its own error some units of the larger of 1 and the result in the last place.
    unit = torch.finfo(dtype).eps / 2
    assert ((c.double() - z).abs() <= 1.2 * slack + unit * z.abs() + 8 * 2**-24 * (1 + z.abs())).all()


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(530, 1601), (100, 3200)])
def test_a_row_is_the_same_beside_others_and_with_any_threads(
    n: int, k: int, dtype: torch.dtype, level: str
) -> None:
    load_cpu().set_isa(level)
    a, b = torch.randn(1041, k).to(dtype), torch.randn(n, k).to(dtype).t()
    whole = torch.empty(len(a), n, dtype=dtype)
    gemm._gemm(a, b, whole)
    for rows, num_threads in ((slice(700, 705), 2), (slice(3, 800), 3), (slice(0, 1041), 4)):
        torch.set_num_threads(num_threads)
        some = torch.empty_like(whole[rows])
        gemm._gemm(a[rows], b, some)
        assert torch.equal(some, whole[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_many_rows_over_several_parts(dtype: torch.dtype) -> None:
    test_epilogue(LARGE, dtype, LEVELS[-1], "gelu")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_are_the_same_beside_others(dtype: torch.dtype, level: str) -> None:
    """The kernel that streams the weight, by `ops.linear`."""
    load_cpu().set_isa(level)
    x, weight = torch.randn(16, 300).to(dtype), torch.randn(101, 300).to(dtype)
    alone = [ops.linear(row[None], weight, backend="cpu") for row in x]
    for rows in range(2, MOST_FEW_ROWS[dtype] + 1):
        together = ops.linear(x[:rows], weight, backend="cpu")
        assert torch.equal(together, torch.cat(alone[:rows]))


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (1, 1), (5, 1), (1, 7)], ids=str)
def test_operands_that_share_memory_with_themselves(strides: tuple[int, int]) -> None:
    a, b = (torch.randn(500).as_strided((20, 30), strides) for _ in range(2))
    for left, right in ((a, b.t()), (b, a.t()), (a[:, :1], b.t()[:1]), (a[:1], b.t()), (a, b.t()[:, :1])):
        c = torch.empty(left.shape[0], right.shape[1])
        gemm._gemm(left, right, c)
        torch.testing.assert_close(c, left @ right)


@pytest.mark.parametrize("rows", [60, 1100])
def test_several_python_threads_at_once(rows: int) -> None:
    torch.set_num_threads(2)
    a, b = torch.randn(rows, 200), torch.randn(200, 500)
    expected = torch.empty(rows, 500)
    gemm._gemm(a, b, expected)

    def again(_: int) -> bool:
        torch.set_num_threads(2)  # a new thread has as many as the machine
        c = torch.empty(rows, 500)
        gemm._gemm(a, b, c)
        return torch.equal(c, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(again, range(40)))


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 0, 4), (4, 4, 0)], ids=str)
def test_empty_products_are_the_library_s(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    assert not gemm.faster(torch.float32, m, n, k)
    assert torch.equal(gemm.mm(torch.randn(m, k), torch.randn(k, n)), torch.zeros(m, n))
    with pytest.raises(ValueError, match="none empty"):
        gemm._gemm(torch.randn(m, k), torch.randn(k, n), torch.zeros(m, n))


def test_shapes_and_dtypes_that_do_not_fit_are_an_error() -> None:
    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5)
    for wrong in ((a, b[:3], c), (a, b, c[:2]), (a, b.double(), c), (a, b, torch.empty(5, 3).t())):
        with pytest.raises(
            ValueError, match=r"gemm: expected \[m, k\], \[k, n\] and \[m, n\] of one dtype, none empty, got"
        ):
            gemm._gemm(*wrong)


def test_nan_and_infinity_stay_in_their_row_and_column() -> None:
    a, b, c = torch.randn(30, 70), torch.randn(70, 130), torch.empty(30, 130)
    a[3, 69], b[0, 129] = torch.nan, torch.inf
    gemm._gemm(a, b, c)
    finite = c.isfinite()
    assert not finite[3].any()
    assert not finite[:, 129].any()
    finite[3] = finite[:, 129] = True
    assert finite.all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("op", ["linear", "mlp", "linear_cross_entropy"])
def test_ops_by_our_own_product_alone(op: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load_cpu().set_isa(level)
    monkeypatch.setattr(gemm, "faster", lambda dtype, m, n, k: m * n * k > 0)
    monkeypatch.setattr("fastgpt_kernels.cpu.linear.MOST_FEW_ROWS", dict.fromkeys(DTYPES, 0))
    report = check(op, backend="cpu", cases=forms(op))
    assert report.ok, report


def test_small_products_and_few_columns_are_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_AMD", True)
    for level in LEVELS:
        load_cpu().set_isa(level)
        assert gemm.faster(torch.float32, 2048, 768, 768) == (level != "generic")
        assert gemm.faster(torch.float16, 2048, 768, 768) == (level != "generic")
        assert gemm.faster(torch.bfloat16, 2048, 768, 768) == (level == "avx512_bf16")
        assert not gemm.faster(torch.float32, 64, 64, 64)
        assert not gemm.faster(torch.float32, 4096, 128, 4096)
        assert not gemm.faster(torch.float32, 4096, 4096, 4)
        assert not gemm.faster(torch.bfloat16, 4096, 4096, 64)
    monkeypatch.setattr(gemm, "_AMD", False)
    assert not gemm.faster(torch.float32, 2048, 768, 768)
