"""The check before the timing: outputs and gradients against the fp64 reference, by the op's own error bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt._core.spec import Draw, OpSpec

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST_NORMAL = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14}


class Truth:
    """What a call with these inputs must give, to be compared with any number of implementations.

    gradients: the inputs that have one. output_gradients: the dy of the check, random, one per output.
    """

    def __init__(self, spec: OpSpec, inputs: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.spec, self.inputs, self.dtype = spec, inputs, dtype
        self.gradients = tuple(
            name
            for name in spec.gradients
            if isinstance(inputs.get(name), Tensor) and inputs[name].is_floating_point()
        )
        with torch.no_grad():
            outputs = _as_tuple(spec.baseline(**inputs))
        draw = Draw(1, outputs[0].device)
        self.output_gradients = [draw.normal(y.shape, y.dtype, mean=0.1) for y in outputs]
        exact = {key: _double(value) for key, value in inputs.items()}
        self.exact = self._call(spec.reference, exact, [dy.double() for dy in self.output_gradients])
        dys = {name: dy.double() for name, dy in zip(spec.outputs, self.output_gradients, strict=False)}
        conditions = spec.condition({key: _double(value) for key, value in inputs.items()}, dys)
        self.allowed = {name: self._allowed(conditions[name], value) for name, value in self.exact.items()}

    def error(self, function: Callable[..., Any]) -> float:
        """The largest error as a fraction of the bound, over all outputs and gradients; inf if one is not there."""
        got = self._call(function, self.inputs, self.output_gradients)
        worst = 0.0
        for name, exact in self.exact.items():
            value = got.get(name)
            if value is None or value.shape != exact.shape:
                return float("inf")
            same = (value.double() == exact) | (value.isnan() & exact.isnan())
            error = self.allowed[name]
            half_ulp = UNIT[value.dtype] * torch.clamp(exact.abs() + error, min=SMALLEST_NORMAL[value.dtype])
            ratio = ((value.double() - exact).abs() / (half_ulp + error)).masked_fill_(same, 0.0)
            worst = max(worst, ratio.nan_to_num_(nan=float("inf")).max().item() if ratio.numel() else 0.0)
        return worst

    def _call(
        self, function: Callable[..., Any], inputs: Mapping[str, Any], output_gradients: list[Tensor]
    ) -> dict[str, Tensor]:
        """Outputs by name, and gradients by "d" + name."""
        call = {
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }
        leaves = [call[name].requires_grad_() for name in self.gradients]
        outputs = _as_tuple(function(**call))
        result = {name: y.detach() for name, y in zip(self.spec.outputs, outputs, strict=False)}
        if leaves:
            grads = torch.autograd.grad(outputs, leaves, output_gradients)
            result |= {f"d{name}": grad for name, grad in zip(self.gradients, grads, strict=True)}
        return result

    def _allowed(self, condition: Any, exact: Tensor) -> Tensor:
        """The part of the bound that does not depend on the dtype of the output."""
        allowed = self.spec.c * 2.0**-24 * condition.amplitude + 2.0**-126
        if condition.rounded is not None:
            like = self.inputs[condition.rounded_like].dtype if condition.rounded_like else self.dtype
            allowed = allowed + UNIT[like] * condition.rounded
        if condition.underflow is not None:
            allowed = allowed + UNIT[self.dtype] * SMALLEST_NORMAL[self.dtype] * condition.underflow
        return allowed.expand(exact.shape)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
