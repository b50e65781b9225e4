"""What looks like a known block or norm forward, and is none: gradients, what it keeps, what its code reads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fastgpt

SCALE = {"of all": 1.0}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class Detached(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x.detach())))


class Frozen(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x)
        return self.b(self.act(h))


class StraightThrough(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.act(self.a(x)))
        return y + (9 * y - (9 * y).detach())


class Hooked(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.act(self.a(x)))
        if y.requires_grad:
            y.register_hook(lambda dy: 5 * dy)
        return y


class Storing(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.act(self.a(x))
        return self.b(self.last)


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen = list[int]()

    def note(self, x: Tensor) -> None:
        self.seen.append(x.dim())

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        return self.b(self.act(self.a(x)))


class Large(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x.flip(0) if x.shape[0] > 8 else x)))


class Wide(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(2 * x if self.a.in_features == 8 else x)))


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x))) * SCALE["of all"]


class Configured(Block):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x))) * self.config.scale


KINDS = [Detached, Frozen, StraightThrough, Hooked, Storing, Counting, Large, Wide, Scaled, Configured]


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_only_looks_like_one_is_left(kind: type[Block]) -> None:
    block = kind()
    before = dict(block.__dict__)
    why = {e.kind: e.why for e in fastgpt.patch(block).left}
    assert why.keys() == {"mlp"}
    assert block.__dict__.keys() == before.keys()
    assert getattr(block, "seen", []) == []  # nothing of trying it out


def test_the_plain_one_is_taken() -> None:
    assert fastgpt.patch(Block(), only="mlp").replaced
    with torch.inference_mode():
        assert fastgpt.patch(Block(), only="mlp").replaced


class DetachedRMSNorm(nn.Module):
    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.detached = nn.Parameter(torch.ones(8)), 1e-6, detached

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x.float() * (scale.detach() if self.detached else scale)).to(x.dtype)


def test_a_norm_whose_gradient_is_another_is_left() -> None:
    with torch.no_grad():
        assert [fastgpt.patch(DetachedRMSNorm(detached)).replaced == [] for detached in (True, False)] == [
            True,
            False,
        ]
