"""The commands that show what the tasks can do."""

from __future__ import annotations

from pathlib import Path


def demo_multimodal(out: Path = Path("demo-multimodal"), seed: int = 0) -> int:
    """Train an encoder of images, one of sounds and a GPT apart, then together, and ask about digits seen and heard.

    Args:
        out: Directory for the model, a picture of samples with their answers, and the results.
        seed: Of the initial weights, the splits and the order of learning.
    """
    from fastgpt.demos.multimodal import run

    return run(out, seed)


def demo_translate(out: Path = Path("demo-translate"), seed: int = 0) -> int:
    """Learn to translate dates and numbers (English and Chinese both ways, French, German) and try it on unseen ones.

    Args:
        out: Directory for the examples, the model, its translations and the results.
        seed: Of the examples, the initial weights and the order of learning.
    """
    from fastgpt.demos.translate import run

    return run(out, seed)


def demo_answer(out: Path = Path("demo-answer"), seed: int = 0) -> int:
    """Learn to answer questions about short passages and try it on facts that none told before.

    Args:
        out: Directory for the examples, the model, its answers and the results.
        seed: Of the examples, the initial weights and the order of learning.
    """
    from fastgpt.demos.answer import run

    return run(out, seed)


def demo_classify(out: Path = Path("demo-classify"), seed: int = 0) -> int:
    """Learn which chapter of Python's reference a paragraph is from, beside a logistic regression on its words.

    Args:
        out: Directory for the examples, the models, their labels and the results.
        seed: Of the split, the initial weights and the order of learning.
    """
    from fastgpt.demos.classify import run

    return run(out, seed)
