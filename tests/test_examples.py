"""Supervised examples: the loss is on the answer alone, filling changes nothing, every example has its turn."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastgpt.models.gpt import GPT
from fastgpt.train.examples import Example, batches, collate, held_out_batches, shuffled
from fastgpt.train.loop import TrainConfig, held_out_loss

EXAMPLES = [Example([5, 6, 7], [8, 9]), Example([1], [2]), Example([3, 4], [5, 6, 7, 8, 9])]


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(20, 16, 2, 2, 32)


def test_targets_are_the_answer_and_what_precedes_it_does_not_count() -> None:
    tokens, targets = collate(EXAMPLES)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.tolist() == [[5, 6, 7, 8, 0, 0], [1, 0, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8]]
    _ = -100
    assert targets.tolist() == [[_, _, 8, 9, _, _], [2, _, _, _, _, _], [_, 5, 6, 7, 8, 9]]


def test_the_loss_is_that_of_the_answers_by_hand() -> None:
    gpt = model()
    tokens, targets = collate(EXAMPLES)
    by_hand = []
    for prompt, answer in EXAMPLES:
        logits = gpt(torch.tensor([[*prompt, *answer]]))[0].log_softmax(dim=-1)
        by_hand += [-logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
    loss = gpt(tokens, targets)
    assert loss.item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    # What would be the prompt's own targets has no part in it: with them the loss is another.
    unmasked = torch.where(targets == -100, torch.roll(tokens, -1, 1), targets)
    assert abs(gpt(tokens, unmasked).item() - loss.item()) > 1e-3
    filled = torch.where(torch.arange(6) > torch.tensor([[3], [0], [5]]), 13, tokens)
    assert gpt(filled, targets).item() == loss.item()  # nothing that counts sees the filling


def test_the_held_out_loss_counts_answers_alone() -> None:
    gpt, config = model(), TrainConfig()
    whole = held_out_loss(gpt, held_out_batches(EXAMPLES, 3), config)
    apart = held_out_loss(gpt, held_out_batches(EXAMPLES, 1), config)  # batches with 1, 2 and 5 targets
    assert whole == pytest.approx(apart, rel=1e-5)
    assert [len(tokens) for tokens, _ in held_out_batches(EXAMPLES, 2)] == [2, 1]


def test_every_example_has_its_turn_beside_others_of_its_length() -> None:
    lengths = torch.randint(1, 100, (203,), generator=torch.Generator().manual_seed(1)).tolist()
    per_epoch = -(-203 // 8)
    found = list(itertools.islice(shuffled(lengths, 8, seed=0), 2 * per_epoch))
    for epoch in (found[:per_epoch], found[per_epoch:]):
        assert sorted(i for rows in epoch for i in rows) == list(range(203))
    assert found[:per_epoch] != found[per_epoch:]
    assert found == list(itertools.islice(shuffled(lengths, 8, seed=0), 2 * per_epoch))
    assert found != list(itertools.islice(shuffled(lengths, 8, seed=1), 2 * per_epoch))
    padded = sum(max(lengths[i] for i in rows) * len(rows) for rows in found)
    assert padded < 1.15 * 2 * sum(lengths)  # drawn at random, batches of 8 would take 1.75 times as many
    longest = [max(lengths[i] for i in rows) for rows in found]
    assert longest != sorted(longest)
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        next(shuffled([], 8, 0))


def test_batches_hold_the_examples() -> None:
    tokens, targets = next(batches(EXAMPLES, 8, seed=0))
    assert {tuple(row) for row in tokens.tolist()} == {tuple(row) for row in collate(EXAMPLES)[0].tolist()}
    assert int((targets != -100).sum()) == 8


def test_an_example_that_cannot_be_learned_is_told_by_its_place() -> None:
    Example([1] * 30, [2, 3]).check(31, "in.jsonl:7")
    with pytest.raises(
        ValueError, match=r"in\.jsonl:7: expected at most 30 tokens, the model's context, got 31"
    ):
        Example([1] * 30, [2, 3]).check(30, "in.jsonl:7")
    for empty in (Example([], [1]), Example([1], [])):
        with pytest.raises(ValueError, match=r"in\.jsonl:7: expected a prompt and an answer"):
            empty.check(30, "in.jsonl:7")
