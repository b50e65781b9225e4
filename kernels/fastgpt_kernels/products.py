"""`linear`, `mlp` and the output head as several backends have them: matrix products by PyTorch's library or a
backend's own, with what surrounds them by its kernels.

x is taken as rows [.., k], weight [n, k] may be a transposed view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import memory

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # by the name of an activation


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, summed in fp32."""
    rows = as_rows(x).contiguous()  # else PyTorch rounds in 16 bits before it adds the bias
    if x.dtype == torch.float16 and x.is_cpu:  # there PyTorch sums in fp16, for some layouts
        y = F.linear(rows.float(), weight.float(), None if bias is None else bias.float()).half()
    else:
        y = F.linear(rows, weight, bias)
    # No view, as PyTorch's own result is none: of what a Function returns a view cannot be changed in place.
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], weight.shape[0]))


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b of matrices, summed in fp32."""
    if a.dtype == torch.float16 and a.is_cpu:
        result = torch.mm(a.float(), b.float())
        return result.half() if out is None else out.copy_(result)
    return torch.mm(a, b, out=out)


def add_mm(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to += a @ b, rounded to 16 bits once."""
    if to.dtype == torch.float16 and to.is_cpu:
        to.copy_(torch.addmm(to.float(), a.float(), b.float()))
    else:
        to.addmm_(a, b)


class Products(NamedTuple):
    """Products of matrices: `mm` and `add_mm`, or what a backend has in their place."""

    mm: Callable[..., Tensor] = mm
    add_mm: Callable[[Tensor, Tensor, Tensor], None] = add_mm


LIBRARY = Products()


class Kernels(NamedTuple):
    """What a backend has of its own: GELU, and the sum of a gradient over its rows."""

    gelu_fwd: Callable[[Tensor, Tensor | None, str], Tensor]
    gelu_bwd: Callable[[Tensor, Tensor, Tensor | None, str, bool, bool], tuple[Tensor | None, Tensor | None]]
    column_sums: Callable[[Tensor], Tensor]
    products: Products = LIBRARY


def as_rows(x: Tensor) -> Tensor:
    """x as a matrix; of as many rows, where they are empty."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def linear_fwd(
    own: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, h)."""
    if activation is None:
        return product(x, weight, bias), None
    h = product(x, weight)
    return own.gelu_fwd(h, bias, APPROXIMATE[activation]), h if keep else None


def linear_bwd(
    own: Kernels,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias)."""
    if activation is None or h is None:
        dz: Tensor | None = dy
        dbias = own.column_sums(dy) if need_dbias else None
    else:
        need_dz = need_dx or need_dweight
        dz, dbias = own.gelu_bwd(dy, h, bias, APPROXIMATE[activation], need_dz, need_dbias)
    dx = through(own, dz, weight) if need_dx and dz is not None else None
    dweight = over_rows(own, dz, x) if need_dweight and dz is not None else None
    return dx, dweight, dbias


def mlp_fwd(
    own: Kernels,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """(y, h)."""
    h = product(x, w1)
    return product(own.gelu_fwd(h, b1, APPROXIMATE[activation]), w2, b2), h if keep else None


def mlp_bwd(
    own: Kernels,
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    h: Tensor,
    activation: str,
    need_dx: bool,
    need_dw1: bool,
    need_db1: bool,
    need_dw2: bool,
    need_db2: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dw1, db1, dw2, db2)."""
    dw2 = over_rows(own, dy, own.gelu_fwd(h, b1, APPROXIMATE[activation])) if need_dw2 else None
    db2 = own.column_sums(dy) if need_db2 else None
    dx = dw1 = db1 = None
    if need_dx or need_dw1 or need_db1:
        da = through(own, dy, w2)
        dz, db1 = own.gelu_bwd(da, h, b1, APPROXIMATE[activation], need_dx or need_dw1, need_db1)
        dx = through(own, dz, w1) if need_dx and dz is not None else None
        dw1 = over_rows(own, dz, x) if need_dw1 and dz is not None else None
    return dx, dw1, db1, dw2, db2


def through(own: Kernels, dz: Tensor, weight: Tensor) -> Tensor:
    """dx = dz @ weight [.., k]."""
    return own.products.mm(as_rows(dz), weight).view(*dz.shape[:-1], weight.shape[1])


def over_rows(own: Kernels, dy: Tensor, x: Tensor) -> Tensor:
    """dy.T @ x [n, k], summed over the rows."""
    return own.products.mm(as_rows(dy).t(), as_rows(x))


def column_sums(dy: Tensor) -> Tensor:
    """The sum of dy [.., n] over its rows, in fp32 (fp64), in dy's dtype."""
    rows = as_rows(dy)
    if dy.dtype in (torch.bfloat16, torch.float16):
        return rows.sum(0, dtype=torch.float32).to(dy.dtype)
    return rows.sum(0)


# --- the output head ---

BLOCK_BYTES = 63 * 2**20  # of logits
ROUNDINGS = 4  # sums of dweight in 16 bits at the most; more blocks are summed in fp32
_CLASSES = 8192  # of a partial sum on its way into fp32

# From the logits of some rows, which it may overwrite, and their place: dlogits, if gradients are wanted.
Step = Callable[[Tensor, slice], Tensor | None]


def block_rows(rows: int, classes: int, dtype: torch.dtype) -> int:
    """Rows of logits in memory at once: of nearly equal blocks, none above BLOCK_BYTES (but 16 rows at least)."""
    most = max(BLOCK_BYTES // max(classes * dtype.itemsize, 1) // 16 * 16, 16)
    if rows <= most:
        return max(rows, 1)
    each = math.ceil(rows / math.ceil(rows / most))
    return math.ceil(each / 16) * 16


def sweep(
    by: Products, x: Tensor, weight: Tensor, step: Step, need_dx: bool, need_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) of logits = x @ weight.T, block by block; step(logits, rows) gives dlogits."""
    rows, classes = as_rows(x), weight.shape[0]
    size = block_rows(rows.shape[0], classes, x.dtype)
    places = [slice(begin, min(begin + size, rows.shape[0])) for begin in range(0, rows.shape[0], size)]
    dx = memory.empty_like(rows) if need_dx else None
    dweight = total = None
    if need_dweight:
        dweight = memory.empty((classes, x.shape[-1]), x.dtype, x.device)
        if len(places) == 0 or classes == 0:
            dweight.zero_()
        elif len(places) > ROUNDINGS and x.dtype.itemsize == 2:
            total = torch.zeros(dweight.shape, dtype=torch.float32, device=x.device)
    buffer = memory.empty((min(size, rows.shape[0]), classes), x.dtype, x.device)
    for place in places:
        some = rows[place]
        logits = by.mm(some, weight.mT, out=buffer[: some.shape[0]])
        dlogits = step(logits, place)
        if dlogits is None:
            continue
        if dx is not None:
            by.mm(dlogits, weight, out=dx[place])
        if total is not None:
            for begin in range(0, classes, _CLASSES):
                some_classes = slice(begin, begin + _CLASSES)
                total[some_classes] += by.mm(dlogits[:, some_classes].t(), some)
        elif dweight is not None and place.start == 0:
            by.mm(dlogits.t(), some, out=dweight)
        elif dweight is not None:
            by.add_mm(dweight, dlogits.t(), some)
    if total is not None and dweight is not None:
        dweight.copy_(total)
    return None if dx is None else dx.view(x.shape), dweight


def each_row(dloss: Tensor, targets: Tensor, count: Tensor | None, reduction: str) -> Tensor:
    """The gradient of each row's own loss, [rows]."""
    if reduction == "mean" and count is not None:
        dloss = dloss / count
    return dloss.expand(targets.shape).reshape(-1).contiguous()


def scaled(grad: Tensor | None, dloss: Tensor, needed: bool) -> Tensor | None:
    """The gradient for dloss from that which forward made for 1."""
    if not needed or grad is None:
        return None
    if dloss.is_cpu:  # never rounded to 16 bits itself
        return grad * dloss.item()
    return (grad.float() * dloss).to(grad.dtype)


def reduced(losses: Tensor, count: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64)
    return (total if count is None else total / count).to(losses.dtype)


# From the logits [rows, V] of a block, which it may overwrite, their targets, the gradient of each row's loss or
# None, lse or None where it is not known yet, and ignore_index: (losses or None, lse, dlogits or None).
Head = Callable[
    [Tensor, Tensor, Tensor | None, Tensor | None, int], tuple[Tensor | None, Tensor, Tensor | None]
]


def head_of(fwd: Callable[..., Any], bwd: Callable[..., Any]) -> Head:
    """By the entries of a backend's `cross_entropy`."""

    def head(
        logits: Tensor, targets: Tensor, g: Tensor | None, lse: Tensor | None, ignore_index: int
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        losses = dlogits = None
        if lse is None:
            losses, lse, _ = fwd(logits, targets, ignore_index, 0.0, "none")
        if g is not None:
            dlogits = bwd(g, logits, targets, lse, None, ignore_index, 0.0, "none")
        return losses, lse, dlogits

    return head


def linear_cross_entropy_fwd(
    by: Products,
    head: Head,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss, lse, count, dx, dweight)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    losses, lse = (memory.empty(targets.shape, dtype, x.device) for _ in range(2))
    count = (targets != ignore_index).sum().float() if reduction == "mean" else None
    flat, flat_losses, flat_lse = targets.reshape(-1), losses.view(-1), lse.view(-1)
    one = torch.ones((), dtype=dtype, device=x.device)
    g = each_row(one, targets, count, reduction) if need_dx or need_dweight else None

    def step(logits: Tensor, rows: slice) -> Tensor | None:
        of_rows = None if g is None else g[rows]
        loss, flat_lse[rows], dlogits = head(logits, flat[rows], of_rows, None, ignore_index)
        assert loss is not None  # as lse was not known
        flat_losses[rows] = loss
        return dlogits

    dx, dweight = sweep(by, x, weight, step, need_dx, need_dweight)
    return reduced(losses, count, reduction), lse, count, dx, dweight


def linear_cross_entropy_bwd(
    by: Products,
    head: Head,
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    count: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    ignore_index: int,
    reduction: str,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight)."""
    if dx is not None or dweight is not None:
        return scaled(dx, dloss, need_dx), scaled(dweight, dloss, need_dweight)
    flat, flat_lse, g = targets.reshape(-1), lse.reshape(-1), each_row(dloss, targets, count, reduction)

    def step(logits: Tensor, rows: slice) -> Tensor | None:
        return head(logits, flat[rows], g[rows], flat_lse[rows], ignore_index)[2]

    return sweep(by, x, weight, step, need_dx, need_dweight)
