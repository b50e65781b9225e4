"""Translating: lines with "source", "target" and, optionally, "to", the name of the language of the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastgpt.models.gpt import GPT
from fastgpt.tasks.jsonl import Fields, text_field
from fastgpt.tasks.prompted import Prompted, Scores, exact_match
from fastgpt.train.tokenizer import Tokenizer

Bleu = Literal["auto", "13a", "intl", "zh", "char"]
_CHINESE = ("zh", "chinese", "中文", "汉语", "漢語")  # how a name of Chinese begins


def translation(bleu: Bleu = "auto") -> Prompted:
    """The task. `bleu` is how sacrebleu splits texts: auto is zh where "to" names Chinese, and 13a elsewhere."""
    return Prompted("translate", _prompt, "target", lambda made, lines: scores(made, lines, bleu))


def translate(
    model: GPT, tokenizer: Tokenizer, sources: Sequence[str], to: str | None = None, *, batch: int = 16
) -> list[str]:
    """The sources in the language `to`, by a model that `translation().train` has made."""
    language = {} if to is None else {"to": to}
    lines = [{"source": source, **language} for source in sources]
    return translation().predict(model, tokenizer, lines, batch=batch)


def scores(predictions: Sequence[str], lines: Sequence[Fields], bleu: Bleu = "auto") -> Scores:
    """Exact match, a fraction, and BLEU, 0 to 100, by language where lines have different "to".

    BLEU (Papineni et al. 2002) is sacrebleu's corpus_bleu (Post 2018); it has no sense across languages.
    """
    from sacrebleu import corpus_bleu

    found = {"exact match": exact_match(predictions, [line["target"] for line in lines])}
    languages = sorted({line.get("to", "") for line in lines})
    for language in languages:
        pairs = [
            (made, line["target"])
            for made, line in zip(predictions, lines, strict=True)
            if line.get("to", "") == language
        ]
        made, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        tokenize = bleu
        if bleu == "auto":
            tokenize = "zh" if language.lower().startswith(_CHINESE) else "13a"
        name = f" {language}" if len(languages) > 1 else ""
        if name:
            found[f"exact match{name}"] = exact_match(made, references)
        found[f"BLEU{name}"] = corpus_bleu(made, [references], tokenize=tokenize).score
    return found


def _prompt(fields: Fields, where: str) -> str:
    to = text_field(fields, "to", where).strip() if "to" in fields else "Translation"
    return f"{text_field(fields, 'source', where).strip()}\n{to}:"
