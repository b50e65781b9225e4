"""Classifying texts: lines with "text" and "label"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgpt._core.validate import positive
from fastgpt.models.classifier import Classifier
from fastgpt.nn import evaluating
from fastgpt.tasks.jsonl import Fields, Job, Line, read, text_field
from fastgpt.tasks.learning import learn, split, start
from fastgpt.tasks.options import FRESH, LEARNING, Fresh, Learning
from fastgpt.tasks.prompted import Predicted, Scores
from fastgpt.train import checkpoint
from fastgpt.train.data import Batch
from fastgpt.train.examples import shuffled
from fastgpt.train.tokenizer import Tokenizer, load_tokenizer

RESULT = ("prediction", "probability")


def train(
    examples: Path,
    out: Path,
    *,
    model: str | None = None,
    learning: Learning = LEARNING,
    fresh: Fresh = FRESH,
) -> tuple[Classifier, Tokenizer]:
    """Learn the lines of a file, all labels that are in it; what was learned is in the directory `out`, too.

    Args:
        model: directory or name of the GPT to go on from; a fresh one when None.
        fresh: what a fresh one is like.

    Raises:
        OSError, ValueError: naming the file and the line: bad, or longer than the model's context.
    """
    checkpoint.check_can_save(out)
    lines = read(examples, lambda fields, where: (_text(fields, where), text_field(fields, "label", where)))
    labels = sorted({line.value[1] for line in lines})
    learned, held_out = split(lines, learning, examples)
    gpt, tokenizer = start(model, fresh, [line.value[0] for line in lines], learning.seed)
    classifier = Classifier(gpt, labels)

    def example(line: Line) -> tuple[list[int], int]:
        ids = _ids(classifier, tokenizer, line.value[0], f"{examples}:{line.number}")
        return ids, labels.index(line.value[1])

    known, unknown = [example(line) for line in learned], [example(line) for line in held_out]
    batch_size = learning.batch_size
    source = _batches(known, batch_size, learning.seed)
    rest = [_collate(unknown[i : i + batch_size]) for i in range(0, len(unknown), batch_size)]
    return learn(classifier, tokenizer, source, rest, learning, out, base=model, examples=examples), tokenizer


def load(path: Path) -> tuple[Classifier, Tokenizer]:
    """What `train` has left in a directory."""
    return Classifier.from_pretrained(path), load_tokenizer(str(path))


def classify(
    model: Classifier, tokenizer: Tokenizer, texts: Sequence[str], *, batch: int = 16
) -> list[tuple[str, float]]:
    """(label, its probability) of each text, whatever texts are beside it; ValueError naming a bad `text`, from 1."""
    positive("batch", batch)
    ids = [_ids(model, tokenizer, text, f"text {n}") for n, text in enumerate(texts, 1)]
    found = dict(_labelled(model, ids, list(range(len(ids))), batch))
    return [found[i] for i in range(len(ids))]


def classify_file(
    model: Classifier,
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    *,
    batch: int = 16,
    progress: bool = True,
) -> Predicted:
    """As `classify`, from one JSONL file into another: what `jsonl.Job` says of bad lines and of going on.

    A result has "prediction" and "probability". Lines with labels that the model does not know have them, too; they
    are not scored, but named in `left_out`.
    """

    positive("batch", batch)

    def ids(fields: Fields, where: str) -> list[int]:
        if "label" in fields:
            text_field(fields, "label", where)
        return _ids(model, tokenizer, _text(fields, where), where)

    job = Job(source, target, ids, RESULT)
    there = len(job.made)
    with job.writing(progress) as write:
        texts, wanted = [line.value for line in job.lines], [i for i, _ in job.wanted]
        for i, (label, probability) in _labelled(model, texts, wanted, batch):
            write((i, 0), {"prediction": label, "probability": round(probability, 6)})
    return told(job, there, model.labels)


def told(job: Job, there: int, labels: Sequence[str]) -> Predicted:
    """What came of a job whose results have a "prediction", one of `labels`; `there` were made before."""
    made = [fields for fields in job.made.values() if "label" in fields]
    known = [fields for fields in made if fields["label"] in labels]
    left_out = [job.report()] if job.bad else []
    if len(known) < len(made):
        names = sorted({fields["label"] for fields in made} - set(labels))
        left_out.append(
            f"labels that the model does not know, not scored: {len(made) - len(known)} ({', '.join(names)})"
        )
    found = scores([f["prediction"] for f in known], [f["label"] for f in known]) if known else None
    return Predicted(len(job.wanted), there, found, len(known), "; ".join(left_out))


def scores(predictions: Sequence[str], labels: Sequence[str]) -> Scores:
    """Accuracy, and F1 averaged over the classes that occur, as fractions."""
    from sklearn.metrics import accuracy_score, f1_score

    macro = f1_score(labels, predictions, average="macro", zero_division=0.0)
    return {"accuracy": float(accuracy_score(labels, predictions)), "macro F1": float(macro)}


def _text(fields: Fields, where: str) -> str:
    return text_field(fields, "text", where).strip()


def _ids(model: Classifier, tokenizer: Tokenizer, text: str, where: str) -> list[int]:
    ids, context = tokenizer.encode(text), model.gpt.config.max_seq_length
    if not ids:
        raise ValueError(f"{where}: expected some text, got none")
    if len(ids) > context:
        raise ValueError(f"{where}: expected at most {context} tokens, the model's context, got {len(ids)}")
    return ids


@torch.no_grad()
def _probabilities(model: Classifier, texts: Sequence[list[int]]) -> Tensor:
    tokens, last, _ = _collate([(ids, 0) for ids in texts])
    with evaluating(model):
        return model(tokens, last).float().softmax(dim=-1)  # [B, classes]


def _labelled(
    model: Classifier, texts: Sequence[list[int]], wanted: list[int], batch: int
) -> Iterator[tuple[int, tuple[str, float]]]:
    """(index, (label, probability)) of the wanted texts, short ones first."""
    order = sorted(wanted, key=lambda i: len(texts[i]))
    for begin in range(0, len(order), batch):
        rows = order[begin : begin + batch]
        best = _probabilities(model, [texts[i] for i in rows]).max(dim=-1)
        for i, label, probability in zip(rows, best.indices.tolist(), best.values.tolist(), strict=True):
            yield i, (model.labels[label], probability)


def _collate(examples: Sequence[tuple[list[int], int]]) -> Batch:
    """(tokens [B, T] filled up on the right, last [B], classes [B]), int64."""
    tokens = torch.zeros(len(examples), max(len(ids) for ids, _ in examples), dtype=torch.int64)
    for row, (ids, _) in enumerate(examples):
        tokens[row, : len(ids)] = torch.tensor(ids)
    last = torch.tensor([len(ids) - 1 for ids, _ in examples])
    return tokens, last, torch.tensor([label for _, label in examples])


def _batches(examples: Sequence[tuple[list[int], int]], batch_size: int, seed: int) -> Iterator[Batch]:
    for rows in shuffled([len(ids) for ids, _ in examples], batch_size, seed):
        yield _collate([examples[i] for i in rows])
