"""The formulas of the article, word for word in fp64, beside the ops that the models are made of."""

import math

import pytest
import torch
from torch import Tensor

from fastgpt import ops

BACKENDS = ["cpu", "torch", "reference"]
HALF_ULP = 2.0**-24


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)) V."""
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1]), dim=-1) @ v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [False, True], ids=["attention(q, k, v)", "attention(q, q, v)"])
def test_attention_and_its_gradients(backend: str, shared: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 19, 16, requires_grad=True) for _ in range(3))
    given = (q, q, v) if shared else (q, k, v)
    wanted = [q, v] if shared else [q, k, v]
    exact = {t: t.detach().double().requires_grad_() for t in (q, k, v)}
    y, reference = ops.attention(*given, backend=backend), attention(*(exact[t] for t in given))
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, wanted, dy)
    references = torch.autograd.grad(reference, [exact[t] for t in wanted], dy.double())
    for got, right in zip([y, *gradients], [reference, *references], strict=True):
        # Sums of at most 2 * 19 * 16 rounded products of numbers up to about 4.
        torch.testing.assert_close(got.double(), right, atol=64 * 4 * HALF_ULP, rtol=64 * HALF_ULP)


def test_shared_queries_and_keys_get_the_sum_of_both_gradients() -> None:
    torch.manual_seed(0)
    q, v, dy = torch.randn(3, 1, 2, 33, 24).unbind(0)
    shared, apart = q.clone().requires_grad_(), [q.clone().requires_grad_() for _ in range(2)]
    ops.attention(shared, shared, v).backward(dy)
    ops.attention(*apart, v).backward(dy)
    assert apart[0].grad is not None
    assert apart[1].grad is not None
    torch.testing.assert_close(shared.grad, apart[0].grad + apart[1].grad)
    assert not torch.equal(apart[0].grad, apart[1].grad)


def test_learning_is_gradient_descent_on_the_negative_log_likelihood() -> None:
    """One step of a GPT against the same step by hand: L = -mean log p(next token), W <- W - rate * dL/dW."""
    import fastgpt

    torch.manual_seed(0)
    model = fastgpt.GPT(11, 8, 2, 1, 6)
    tokens, targets = torch.randint(11, (2, 6)), torch.randint(11, (2, 6))
    loss = model(tokens, targets)
    log_p = torch.log_softmax(model(tokens).double(), dim=-1)
    by_hand = -log_p.gather(-1, targets[..., None]).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("c_attn.weight"))
    (gradient,) = torch.autograd.grad(by_hand, [weight])
    loss.backward()
    expected = weight.detach() - 0.1 * gradient
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(weight.detach(), expected, atol=1e-7, rtol=1e-5, msg=name)
