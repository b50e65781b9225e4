"""Which chapter of Python's reference a paragraph is from, beside a logistic regression on the same split's words.

The text is `pydoc_data.topics`, which is part of every Python. It is split by paragraph, since a chapter can be one
topic; a paragraph that stands in several topics is one. A GPT learns the language from the training paragraphs alone,
then the chapters.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch

from fastgpt.demos.prompted import MODEL, PREDICTIONS, RESULTS, TEST, TRAIN, write_examples
from fastgpt.models.checkpoint import atomic_files, json_bytes
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.tasks import classify
from fastgpt.tasks.jsonl import Fields
from fastgpt.tasks.options import Learning
from fastgpt.train import checkpoint, loop
from fastgpt.train.data import make_corpus

LENGTH = 320  # tokens that the models see
CHARACTERS = range(40, 500)  # of a paragraph
LANGUAGE = "language"  # the directory of the GPT before it learns chapters
CHAPTERS = {
    "lexical analysis": "identifiers id-classes strings numbers integers floating imaginary",
    "data model": "objects types specialnames customization attribute-access numeric-types sequence-types"
    " callable-types context-managers",
    "execution model": "execmodel naming dynamic-features exceptions",
    "expressions": "atom-identifiers atom-literals attribute-references await binary bitwise booleans calls"
    " comparisons conversions dict exprlists in lambda lists operator-summary power shifting slicings subscriptions"
    " unary yield",
    "simple statements": "assert assignment augassign break continue del global import nonlocal pass raise return",
    "compound statements": "compound class async else for function if try while with",
    "built-in types": "bltin-code-objects bltin-ellipsis-object bltin-null-object bltin-type-objects specialattrs"
    " string-methods truth typesfunctions typesmapping typesmethods typesmodules typesseq typesseq-mutable",
    "format strings": "formatstrings",
    "debugger": "debugger",
}


def run(out: Path, seed: int = 0, language_steps: int = 600, steps: int = 300) -> int:
    """Learn the language, then the chapters, and name those of others; 1 if the commonest would do as well."""
    checkpoint.check_can_save(out, (TRAIN, TEST, PREDICTIONS, RESULTS))
    lines = paragraphs()
    random.Random(seed).shuffle(lines)
    test, train = lines[: len(lines) // 5], lines[len(lines) // 5 :]
    write_examples(out, train, test)
    begun, used = time.perf_counter(), time.process_time()
    _learn_language(out / LANGUAGE, [line["text"] for line in train], language_steps, seed)
    learning = Learning(steps=steps, batch_size=32, lr=5e-4, held_out=0.1, seed=seed)
    model, tokenizer = classify.train(out / TRAIN, out / MODEL, model=str(out / LANGUAGE), learning=learning)
    found = classify.classify_file(model, tokenizer, out / TEST, out / PREDICTIONS)
    taken = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - used}
    labels = [line["label"] for line in test]
    commonest = max(sorted(CHAPTERS), key=[line["label"] for line in train].count)
    assert found.scores is not None
    scores = {
        "fine-tuned GPT": found.scores,
        "logistic regression": classify.scores(_regression(train, test), labels),
        "the commonest chapter": classify.scores([commonest] * len(test), labels),
    }
    with atomic_files(out) as write:
        write(RESULTS, json_bytes({"scores": scores, "learned": len(train), "tried": len(test), **taken}))
    print(f"{len(train)} paragraphs learned, {len(test)} others named; accuracy, macro F1:")
    for name, score in scores.items():
        print(f"  {name:22} {score['accuracy']:.3f} {score['macro F1']:.3f}")
    better = found.scores["accuracy"] > scores["the commonest chapter"]["accuracy"]
    print(f"More than the commonest chapter: {'reached' if better else 'MISSED'}. All of it is in {out}.")
    return 0 if better else 1


def paragraphs() -> list[Fields]:
    """Every paragraph of the reference once, with its chapter; none that stands in two chapters."""
    from pydoc_data.topics import topics

    found = dict[str, set[str]]()
    for chapter, names in CHAPTERS.items():
        for name in names.split():
            for paragraph in topics.get(name, "").split("\n\n"):
                text = " ".join(paragraph.split())
                if len(text) in CHARACTERS:
                    found.setdefault(text, set()).add(chapter)
    return [{"text": text, "label": min(chapters)} for text, chapters in found.items() if len(chapters) == 1]


def _learn_language(out: Path, texts: list[str], steps: int, seed: int) -> None:
    corpus = make_corpus("\n".join(texts), vocab_size=1024, seq_length=LENGTH)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(corpus.tokenizer.vocab_size, 128, 4, 4, LENGTH, dropout=0.1))
    config = loop.TrainConfig(steps=steps, batch_size=8, lr=2e-3, min_lr=2e-4, seed=seed)
    records = loop.train(model, corpus, LENGTH, config)
    checkpoint.save(str(out), model, corpus.tokenizer, {"text": TRAIN, **vars(config)}, records)


def _regression(train: list[Fields], test: list[Fields]) -> list[str]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
    model.fit([line["text"] for line in train], [line["label"] for line in train])
    return model.predict([line["text"] for line in test]).tolist()
