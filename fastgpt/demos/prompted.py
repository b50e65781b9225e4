"""A task that is a prompt and an answer, learned and tried out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from fastgpt.models.checkpoint import atomic_files, json_bytes
from fastgpt.tasks.jsonl import Fields
from fastgpt.tasks.options import Fresh, Learning
from fastgpt.tasks.prompted import Prompted
from fastgpt.train import checkpoint

TRAIN, TEST, PREDICTIONS, RESULTS, MODEL = (
    "train.jsonl", "test.jsonl", "predictions.jsonl", "results.json", "model"
)  # fmt: skip


def learn_and_try(
    task: Prompted, out: Path, train: Sequence[Fields], test: Sequence[Fields], learning: Learning, fresh: Fresh,
    goal: float, show: int = 3,
) -> int:  # fmt: skip
    """Do what the task's command does, with a fresh GPT; 0 if the exact match on `test` reaches the goal, else 1."""
    checkpoint.check_can_save(out, (TRAIN, TEST, PREDICTIONS, RESULTS))
    write_examples(out, train, test)
    begun, used = time.perf_counter(), time.process_time()
    model, tokenizer = task.train(out / TRAIN, out / MODEL, learning=learning, fresh=fresh)
    learned = time.perf_counter()
    found = task.predict_file(model, tokenizer, out / TEST, out / PREDICTIONS)
    assert found.scores is not None
    results = {
        "scores": found.scores, "goal": {"exact match": goal}, "learned": len(train), "tried": found.scored,
        "parameters": sum(p.numel() for p in model.parameters()), "steps": learning.steps,
        "seconds": {"learning": learned - begun, "trying": time.perf_counter() - learned},
        "cpu_seconds": time.process_time() - used,
    }  # fmt: skip
    with atomic_files(out) as write:
        write(RESULTS, json_bytes(results))
    print(
        f"{results['parameters']:,} parameters, {learning.steps} steps over {len(train):,} examples; on unseen ones:"
    )
    print("\n".join(f"  {name:20} {value:.4g}" for name, value in found.scores.items()))
    for line in (out / PREDICTIONS).read_text(encoding="utf-8").splitlines()[:show]:
        fields = json.loads(line)
        print(f"{task.prompt(fields, '')} {fields['prediction']}")
    reached = found.scores["exact match"] >= goal
    print(f"The goal, {goal:.0%} exact, is {'reached' if reached else 'MISSED'}. All of it is in {out}.")
    return 0 if reached else 1


def write_examples(out: Path, train: Sequence[Fields], test: Sequence[Fields]) -> None:
    """The examples as a user would have them; results of others are deleted."""
    (out / PREDICTIONS).unlink(missing_ok=True)
    with atomic_files(out) as write:
        for name, lines in ((TRAIN, train), (TEST, test)):
            write(name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
