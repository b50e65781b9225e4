"""The feed-forward part of a transformer block, by definition.

z = x @ w1.T + b1,  y = gelu(z) @ w2.T + b2

Backward keeps h = x @ w1.T alone, before its bias, and computes gelu(h + b1) again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastgpt.reference import gelu as reference
from fastgpt.reference.common import Condition, upcast
from fastgpt.reference.gelu import APPROXIMATE
from fastgpt.reference.linear import Errors, Layer, activated, product, product_bwd, product_conditions


def mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu_tanh"
) -> Tensor:
    """y [..., n] in x's dtype, for w1 [m, k] and w2 [n, m]."""
    z = product(x, w1)
    if b1 is not None:
        z = z + upcast(b1)
    y = product(activated(z, activation), w2)
    return (y if b2 is None else y + upcast(b2)).to(x.dtype)


def condition(inputs: Mapping[str, Any], grads: Mapping[str, Tensor]) -> dict[str, Condition]:
    """Of y and all gradients: h, gelu(z), their gradient and dz are each rounded once."""
    x, w1, w2 = inputs["x"], inputs["w1"], inputs["w2"]
    layer = Layer.of(x, w1, inputs.get("b1"), inputs.get("activation", "gelu_tanh"))
    a, errors = layer.y, layer.y_errors
    a_errors = Errors(errors.amplitude, errors.rounded + a.abs())
    amplitude, rounded = Errors(a_errors.amplitude + a.abs(), a_errors.rounded).through(w2.abs().mT)
    if (b2 := inputs.get("b2")) is not None:
        amplitude = amplitude + b2.abs()
    found = {"y": Condition(amplitude, rounded)}
    dy = grads.get("y")
    if dy is None:
        return found
    zero = Errors(0.0 * dy, 0.0 * dy)
    second = product_conditions(dy, zero, a, w2, suffix="2", x_errors=a_errors)
    da = dy @ w2
    dz, dz_errors = layer.backward(da, Errors(second["dx"].amplitude, da.abs()))
    named = second | product_conditions(dz, dz_errors, x, w1, suffix="1")
    names = {"dx": "dx", "dw1": "dweight1", "db1": "dbias1", "dw2": "dweight2", "db2": "dbias2"}
    found.update({name: named[other] for name, other in names.items()})
    return found


def supports(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> None:
    """The definition takes everything."""
    return


def mlp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, h): h = x @ w1.T in x's dtype, where backward will need it."""
    h = product(x, w1).to(x.dtype, copy=True)
    y = mlp(x, w1, b1, w2, b2, activation=activation)
    return y, h if keep else None


def mlp_bwd(
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
    z = upcast(h) if b1 is None else upcast(h) + upcast(b1)
    a, need_da = activated(z, activation), need_dx or need_dw1 or need_db1
    da, dw2, db2 = product_bwd(upcast(dy), a, w2, need_da, need_dw2, need_db2)
    dx = dw1 = db1 = None
    if da is not None:
        dz = da * reference.slope(z, APPROXIMATE[activation])
        dx, dw1, db1 = product_bwd(dz, x, w1, need_dx, need_dw1, need_db1)
    grads = (dx, dw1, db1, dw2, db2)
    return tuple(None if grad is None else grad.to(x.dtype) for grad in grads)
