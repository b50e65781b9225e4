"""The commands of the tasks: `fastgpt translate | answer | classify` learn from a file, or work through one;
`perplexity | quantize` measure a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastgpt.tasks.options import FRESH, LEARNING, Fresh, Learning

if TYPE_CHECKING:
    from fastgpt.tasks.prompted import Predicted, Prompted


def translate(
    out: Path,
    train: Path | None = None,
    data: Path | None = None,
    model: str | None = None,
    batch: int = 16,
    bleu: Literal["auto", "13a", "intl", "zh", "char"] = "auto",
    learning: Learning = LEARNING,
    fresh: Fresh = FRESH,
) -> int:
    """Learn to translate from a JSONL file (--train), or translate one (--model, --data).

    Args:
        out: Directory for what was learned; or the JSONL file for the translations, which goes on where it ended.
        train: Lines with "source", "target" and, where there are several, "to", the name of the target's language.
        data: Lines with "source" and "to"; where they have a "target", too, exact match and BLEU are printed.
        model: Directory of what was learned; with --train the GPT to go on from, instead of a fresh one.
        batch: Lines that are translated together.
        bleu: How BLEU splits texts; auto is zh where "to" names Chinese, and 13a elsewhere.
        learning: How to learn.
        fresh: The GPT to begin with, where no model is given.
    """
    from fastgpt.tasks.translate import translation

    return _prompted(translation(bleu), out, train, data, model, batch, learning, fresh)


def answer(
    out: Path,
    train: Path | None = None,
    data: Path | None = None,
    model: str | None = None,
    batch: int = 16,
    learning: Learning = LEARNING,
    fresh: Fresh = FRESH,
) -> int:
    """Learn to answer questions from a JSONL file (--train), or answer those of one (--model, --data).

    Args:
        out: Directory for what was learned; or the JSONL file for the answers, which goes on where it ended.
        train: Lines with "question", "answer" and, if there is one, the "context" that tells the answer.
        data: Lines with "question" and "context"; where they have an "answer", too, exact match and F1 are printed.
        model: Directory of what was learned; with --train the GPT to go on from, instead of a fresh one.
        batch: Lines that are answered together.
        learning: How to learn.
        fresh: The GPT to begin with, where no model is given.
    """
    from fastgpt.tasks.answer import TASK

    return _prompted(TASK, out, train, data, model, batch, learning, fresh)


def classify(
    out: Path,
    train: Path | None = None,
    data: Path | None = None,
    model: str | None = None,
    batch: int = 16,
    learning: Learning = LEARNING,
    fresh: Fresh = FRESH,
) -> int:
    """Learn to classify texts from a JSONL file (--train), or classify those of one (--model, --data).

    With a model that `fastgpt train vision` or `train audio` has made, the lines are of images or sounds.

    Args:
        out: Directory for what was learned; or the JSONL file for the labels, which goes on where it ended.
        train: Lines with "text" and "label".
        data: Lines with "text" (or "image", or "sound": a path from the file's directory); where they have a "label",
            too, accuracy and macro F1 are printed.
        model: Directory of what was learned; with --train the GPT to go on from, instead of a fresh one.
        batch: Lines that are classified together.
        learning: How to learn.
        fresh: The GPT to begin with, where no model is given.
    """
    from fastgpt.tasks import classify as task
    from fastgpt.tasks import encoders

    if _learns(train, data, model, learning, fresh):
        assert train is not None
        task.train(train, out, model=model, learning=learning, fresh=fresh)
        return _learned("classify", out)
    assert model is not None
    assert data is not None
    encoder = encoders.load(Path(model))
    if encoder is not None:
        return _told(encoders.classify_file(encoder, data, out, batch=batch), out)
    return _told(task.classify_file(*task.load(Path(model)), data, out, batch=batch), out)


def perplexity(
    model: str,
    text: tuple[Path, ...],
    window: int | None = None,
    stride: int | None = None,
) -> int:
    """Measure how well a model foresees a text: the exponential of its mean loss in nats per token.

    Args:
        model: Directory that `fastgpt train` or transformers wrote (GPT-2), or a name on the Hugging Face hub.
        text: UTF-8 text files.
        window: Tokens that the model sees at once; its context when not given.
        stride: How far the window moves; half of it when not given.
    """
    import time

    from fastgpt.generate import perplexity as measured
    from fastgpt.tasks.text import Speed, bytes_of, read_bandwidth, text_tokens
    from fastgpt.train import checkpoint

    gpt, tokenizer = checkpoint.load(model)
    tokens = text_tokens(tokenizer, text)
    started = time.perf_counter()
    value, count, windows = measured(gpt, tokens, window=window, stride=stride)
    seconds = time.perf_counter() - started
    speed = Speed(count, seconds, windows * bytes_of(gpt), read_bandwidth(tokens.device))
    print(f"perplexity {value:.4f}; {speed}")
    return 0


def quantize(model: str, text: tuple[Path, ...] = (), report: bool = False) -> int:
    """Show what keeping a model's weights in bf16 or int8 saves, and what it costs in perplexity.

    Nothing is written: weights are rounded when a model is loaded (`fastgpt generate --weights int8`).

    Args:
        model: Directory that `fastgpt train` or transformers wrote (GPT-2), or a name on the Hugging Face hub.
        text: UTF-8 text files to measure on; without any, the tail of Python's language reference.
        report: Measure the perplexity (minutes, for a large model).
    """
    from fastgpt.tasks.quantize import table
    from fastgpt.train import checkpoint

    if text and not report:
        raise ValueError("text: expected it with --report, and only there")
    gpt, tokenizer = checkpoint.load(model)
    print(table(gpt, tokenizer, text if report else None))
    return 0


def _prompted(
    task: Prompted, out: Path, train: Path | None, data: Path | None, model: str | None, batch: int,
    learning: Learning, fresh: Fresh,
) -> int:  # fmt: skip
    from fastgpt.train import checkpoint

    if _learns(train, data, model, learning, fresh):
        assert train is not None
        task.train(train, out, model=model, learning=learning, fresh=fresh)
        return _learned(task.name, out)
    assert model is not None
    assert data is not None
    return _told(task.predict_file(*checkpoint.load(model), data, out, batch=batch), out)


def _learns(
    train: Path | None, data: Path | None, model: str | None, learning: Learning, fresh: Fresh
) -> bool:
    """Whether a command learns; ValueError for options that do not go together."""
    if (train is None) == (data is None):
        raise ValueError(f"data: expected either --train or --data, got {'none' if data is None else 'both'}")
    if train is not None:
        return True
    if model is None:
        raise ValueError("model: expected it with --data, got none")
    if learning != LEARNING or fresh != FRESH:
        raise ValueError("train: expected it with options of learning, got --data")
    return False


def _learned(name: str, out: Path) -> int:
    print(f"saved in {out}\nnext: fastgpt {name} --model {out} --data lines.jsonl --out results.jsonl")
    return 0


def _told(found: Predicted, out: Path) -> int:
    there = f", {found.there} were there" if found.there else ""
    print(f"{found.made} results written to {out}{there}")
    if found.scores is not None:
        print(
            f"of {found.scored} lines: "
            + ", ".join(f"{name} {value:.4g}" for name, value in found.scores.items())
        )
    if found.left_out:
        print(found.left_out, file=sys.stderr)
    return 0
