"""Answering questions: lines with "question", "answer" and, optionally, "context", a text that tells the answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from fastgpt.models.gpt import GPT
from fastgpt.tasks.jsonl import Fields, text_field
from fastgpt.tasks.prompted import Prompted, Scores
from fastgpt.train.tokenizer import Tokenizer


def answer(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[str], context: str | None = None, *, batch: int = 16
) -> list[str]:
    """An answer to each question about the context, by a model that `TASK.train` has made."""
    about = {} if context is None else {"context": context}
    lines = [{"question": question, **about} for question in questions]
    return TASK.predict(model, tokenizer, lines, batch=batch)


def scores(predictions: Sequence[str], lines: Sequence[Fields]) -> Scores:
    """Exact match and token F1, both means over lines of texts normalised as SQuAD does (Rajpurkar et al. 2016)."""
    pairs = [(words(made), words(line["answer"])) for made, line in zip(predictions, lines, strict=True)]
    return {
        "exact match": sum(made == wanted for made, wanted in pairs) / len(pairs),
        "F1": sum(f1(made, wanted) for made, wanted in pairs) / len(pairs),
    }


def words(text: str) -> list[str]:
    """Lower case, without punctuation and without the articles a, an, the."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(made: Sequence[str], wanted: Sequence[str]) -> float:
    """The harmonic mean of the fractions of each bag of words that the other has, too; of no words 1 if both are."""
    common = (Counter(made) & Counter(wanted)).total()
    if not made or not wanted:
        return float(made == wanted)
    return 2 * common / (len(made) + len(wanted))


def _prompt(fields: Fields, where: str) -> str:
    # The question first: a model that reads from left to right then knows what to look for in the context.
    context = f"Context: {text_field(fields, 'context', where).strip()}\n" if "context" in fields else ""
    return f"Question: {text_field(fields, 'question', where).strip()}\n{context}Answer:"


TASK = Prompted("answer", _prompt, "answer", scores)
