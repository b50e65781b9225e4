"""Hazards that only attention has."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops

BACKENDS = ("torch", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["mask", "qkv"])
def test_minus_infinity_in_a_float_mask_hides_like_false(backend: str, needs: str) -> None:
    """Single keys, and every key of a query: zeros and zero gradients, as scaled_dot_product_attention has it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 16) for _ in range(3))
    seen = torch.rand(3, 8, 8) < 0.7
    seen[:, 1] = False
    added = torch.zeros(3, 8, 8).masked_fill(~seen, -torch.inf)
    leaves = {
        "mask": [added.requires_grad_()],
        "qkv": [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()],
    }[needs]
    out = ops.attention(q, k, v, mask=added, backend=backend)
    expected = ops.attention(q, k, v, mask=seen, backend="reference")
    torch.testing.assert_close(out, expected)
    assert out[:, :, 1].abs().max() == 0
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, weight)
    assert all(grad.isfinite().all() for grad in grads)
    if needs == "mask":
        assert grads[0][~seen].abs().max() == 0
        assert grads[0][seen].abs().max() > 0
    else:
        torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, weight))
        assert grads[0][:, :, 1].abs().max() == 0
