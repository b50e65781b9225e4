"""A bug that the usual test does not see, and what `check` says of it: `python -m fastgpt.testing.example`.

`one_pass` takes its variance as E[x²] − mean², in one pass over the row, as many fused kernels have done. It is in
fp32 and agrees with PyTorch on `torch.randn`. Where a row's mean is large beside its spread, the difference of two
large numbers has few bits left: rows around 1000 with a spread of 1.5 keep one digit of their variance, or none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.testing.check import check


def one_pass(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm with the bug. x: [..., n], floating; weight, bias: [n] or None."""
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    variance = (wide * wide).mean(-1, keepdim=True) - mean * mean
    return _scaled((wide - mean) * torch.rsqrt(variance + eps), weight, bias).to(x.dtype)


def two_pass(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The same without it: the variance of what is centred."""
    wide = x.float()  # once: every cast would round a part of dx to x's dtype, and `check` finds that too
    centred = wide - wide.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return _scaled(centred * torch.rsqrt(variance + eps), weight, bias).to(x.dtype)


def _scaled(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    xhat = xhat if weight is None else xhat * weight.float()
    return xhat if bias is None else xhat + bias.float()


def usual_test() -> None:
    """What most projects test: PyTorch's own result on random numbers, by default tolerances. It passes."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight, bias, dy = (
            torch.randn(*shape, dtype=dtype) for shape in ((64, 1024), (1024,), (1024,), (64, 1024))
        )
        leaves = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
        y, expected = one_pass(*leaves), F.layer_norm(x, (1024,), weight, bias)
        torch.testing.assert_close(y, expected)
        if dtype == torch.float32:  # in 16 bits PyTorch's own gradients are too far off to compare with
            for ours, theirs in zip(
                *(torch.autograd.grad(out, leaves, dy) for out in (y, expected)), strict=True
            ):
                torch.testing.assert_close(ours, theirs)


def main() -> None:
    torch.set_num_threads(1)  # the cases are small: threads cost more than they give
    usual_test()
    print("torch.testing.assert_close on torch.randn, fp32 (with gradients), bf16 and fp16: passed\n")
    print(check("layer_norm", one_pass))
    print(f"\n{check('layer_norm', two_pass)}")


if __name__ == "__main__":
    main()
