"""Dates and numbers in words, between English and Chinese both ways, and from English into French and German.

All texts are made by babel and num2words (and the rules of Chinese numerals, which num2words lacks). The dates and
numbers to be translated in the end occur in no training example, in no direction and no format.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator
from pathlib import Path

from fastgpt.demos.prompted import learn_and_try
from fastgpt.tasks.jsonl import Fields
from fastgpt.tasks.options import Fresh, Learning
from fastgpt.tasks.translate import translation

GOAL = 0.95  # of held-out translations are, letter by letter, right
LANGUAGES = {"zh": "Chinese", "en": "English", "fr": "French", "de": "German"}
DIRECTIONS = (("en", "zh"), ("zh", "en"), ("en", "fr"), ("en", "de"))
DATES, NUMBERS = 3000, 6000  # of these
HELD_OUT = 250  # of each


def run(out: Path, seed: int = 0, steps: int = 2000) -> int:
    """Make examples, learn them with a fresh GPT, translate what was held out; 0 if the goal is reached, else 1."""
    draw = random.Random(seed)
    lines: dict[bool, list[Fields]] = {True: [], False: []}
    for kind, things in (("date", _dates(draw)), ("number", _numbers(draw))):
        for i, texts in enumerate(things):
            for source, to in DIRECTIONS:
                line = {"source": texts[source], "to": LANGUAGES[to], "target": texts[to], "kind": kind}
                lines[i < HELD_OUT].append(line)
    return learn_and_try(
        translation(), out, lines[False], lines[True],
        Learning(steps=steps, batch_size=64, lr=3e-3, held_out=0.01, seed=seed),
        Fresh(vocab_size=640, embedding_dim=128, num_layers=3),
        GOAL,
    )  # fmt: skip


def _dates(draw: random.Random) -> Iterator[dict[str, str]]:
    from babel.dates import format_date

    first, last = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
    for day in draw.sample(range(first, last + 1), DATES):
        date, how = datetime.date.fromordinal(day), draw.choice(("long", "full"))
        yield {language: format_date(date, how, locale=language) for language in LANGUAGES}


def _numbers(draw: random.Random) -> Iterator[dict[str, str]]:
    from num2words import num2words

    numbers = {
        draw.randrange(10 ** draw.randint(1, 6)): None for _ in range(2 * NUMBERS)
    }  # each once, in order
    for number in list(numbers)[:NUMBERS]:
        texts = {language: num2words(number, lang=language) for language in ("en", "fr", "de")}
        yield texts | {"zh": chinese(number)}


def chinese(number: int) -> str:
    """A number below 100,000,000 in Chinese numerals: 零 stands for each gap between places, 十 begins with no 一."""
    high, low = divmod(number, 10_000)
    text = f"{_below_ten_thousand(high)}万" if high else ""
    gap = "零" if high and 0 < low < 1000 else ""
    text += gap + _below_ten_thousand(low)
    return text.removeprefix("一") if text.startswith("一十") else text or "零"


def _below_ten_thousand(number: int) -> str:
    text, gap = "", False
    for place, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // place % 10
        if digit:
            text += ("零" if gap and text else "") + "零一二三四五六七八九"[digit] + name
        gap = not digit
    return text
