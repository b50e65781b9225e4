"""Masks under `fastgpt.patch`: that hide everything, that are not what is said of them, that PyTorch refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from patch_helpers import (
    WITHOUT,
    called,
    check_agrees,
    check_same,
    modules,
    unseeing,
)
from torch import nn

import fastgpt
from fastgpt import ops
from fastgpt.interop import mha


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by whether it was causal with every attention that was ours."""
    calls, own = list[bool](), ops.attention_qkv
    monkeypatch.setattr(
        mha.ops, "attention_qkv", lambda *a, **k: (calls.append(k["causal"]), own(*a, **k))[1]
    )
    return calls


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["sample", "query", "added", "heads", "both"])
@pytest.mark.parametrize("name", WITHOUT)
def test_queries_that_see_nothing(name: str, kind: str, training: bool, grad: bool) -> None:
    """PyTorch's fused functions give NaN, its layers zeros."""
    module, x = modules(name, **WITHOUT[name]).train(training), torch.randn(3, 6, 32)
    with torch.set_grad_enabled(grad):
        expected = check_agrees(module, lambda m: called(m, x, **unseeing(kind)))
    if not training and not grad and name == "encoder":
        assert expected.isnan().any()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", WITHOUT)
def test_a_mask_that_is_only_said_to_be_causal(name: str, training: bool, grad: bool) -> None:
    """PyTorch's layers take the word for it, its fused functions look at the mask."""
    module, x = modules(name, **WITHOUT[name]).train(training), torch.randn(3, 6, 32)
    wrong = torch.ones(6, 6, dtype=torch.bool).triu(2)
    added = torch.zeros(6, 6).masked_fill(wrong, -torch.inf)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.set_grad_enabled(grad):
        for mask in (wrong, added, torch.randn(6, 6), torch.zeros(6, 6)):
            for options in ({}, {"padding": padding.to(mask.dtype) if mask.is_floating_point() else padding}):
                check_agrees(module, lambda m: called(m, x, mask, causal=True, **options))  # noqa: B023
                check_agrees(module, lambda m: called(m, x, mask, **options))  # noqa: B023


def test_other_lengths_said_to_be_causal() -> None:
    module = modules("attention")
    x, memory = torch.randn(3, 4, 32), torch.randn(3, 6, 32)
    mask = torch.ones(4, 6, dtype=torch.bool).triu(3)
    for options in ({}, {"key_padding_mask": torch.zeros(3, 6, dtype=torch.bool)}):
        said = {"need_weights": False, "attn_mask": mask, "is_causal": True, **options}
        check_agrees(module, lambda m: m(x, memory, memory, **said)[0])  # noqa: B023


def test_in_inference_what_is_causal_is_ours(attended: list[bool]) -> None:
    module, x = modules("encoder").eval(), torch.randn(3, 6, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.no_grad():
        for options in ({"mask": causal, "causal": True}, {"mask": causal == 0}, {"padding": padding}, {}):
            check_agrees(module, lambda m: called(m, x, **options))  # noqa: B023
    assert attended == [
        True,
        False,
        False,
    ]  # the second lets the first query see nothing but itself and the past


WRONG = {
    "mask of another length": {"mask": torch.zeros(6, 5, dtype=torch.bool)},
    "mask that would broadcast": {"mask": torch.zeros(1, 6, dtype=torch.bool)},
    "mask of one sample's heads": {"mask": torch.zeros(4, 6, 6, dtype=torch.bool)},
    "mask of samples": {"mask": torch.zeros(3, 6, 6, dtype=torch.bool)},
    "mask of one": {"mask": torch.zeros(1, 6, 6, dtype=torch.bool)},
    "mask of four dimensions": {"mask": torch.zeros(3, 4, 6, 6, dtype=torch.bool)},
    "mask of integers": {"mask": torch.zeros(6, 6, dtype=torch.int64)},
    "mask of fp64": {"mask": torch.zeros(6, 6, dtype=torch.float64)},
    "mask of bf16": {"mask": torch.zeros(6, 6, dtype=torch.bfloat16)},
    "padding of another length": {"padding": torch.zeros(3, 5, dtype=torch.bool)},
    "padding that would broadcast": {"padding": torch.zeros(1, 6, dtype=torch.bool)},
    "padding of integers": {"padding": torch.zeros(3, 6, dtype=torch.int64)},
    "padding of three dimensions": {"padding": torch.zeros(3, 1, 6, dtype=torch.bool)},
    "nothing said to be causal": {"causal": True},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["attention", "encoder", "decoder"])
@pytest.mark.parametrize("wrong", WRONG)
def test_masks_that_pytorch_refuses(wrong: str, name: str, training: bool, grad: bool) -> None:
    module, x = modules(name, **WITHOUT[name]).train(training), torch.randn(3, 6, 32)
    with torch.set_grad_enabled(grad):
        check_agrees(module, lambda m: called(m, x, **WRONG[wrong]))


def test_inputs_that_pytorch_refuses() -> None:
    module, x = modules("attention"), torch.randn(3, 6, 32)
    for q, k, v in (
        (x, torch.randn(2, 6, 32), torch.randn(2, 6, 32)),
        (x, torch.randn(1, 6, 32), torch.randn(1, 6, 32)),
        (x, x, torch.randn(3, 5, 32)),
        (x[..., :16], x, x),
        (x.bfloat16(), x, x),
        (x, x.double(), x.double()),
        (x[0], x, x),
    ):
        assert isinstance(check_agrees(module, lambda m: m(q, k, v, need_weights=False)[0]), type)  # noqa: B023


def test_a_mask_of_fp32_beside_bf16_is_not_rounded() -> None:
    module, x = modules("attention").bfloat16(), torch.randn(3, 6, 32).bfloat16()
    mask = torch.full((6, 6), 1000.0) + torch.randn(6, 6)  # to bf16 steps of four
    with torch.no_grad():
        patched = copy.deepcopy(module)
        fastgpt.patch(patched)
        expected, got, rounded = (called(m, x, given).float() for m, given in ((module, mask), (patched, mask),
                                                                              (module, mask.bfloat16())))  # fmt: skip
    assert (got - expected).norm() < 0.1 * (rounded - expected).norm()


def test_a_mask_that_is_learned() -> None:
    module, x = modules("attention"), torch.randn(3, 6, 32)
    bias = torch.randn(6, 6)
    padding = torch.zeros(3, 6).masked_fill(torch.arange(6) > 4, -torch.inf)
    check_same(module, lambda m, x, b: called(m, x, b, padding.to(b.dtype)), [x, bias])
