"""Questions about short passages: who has what, who lives where, how old somebody is, what somebody does.

A passage tells a few facts about a few people in any order; the answer tells one of them in a sentence. Who has what
is drawn anew for each passage, so that it can only be read; those asked about in the end were never learned.
"""

from __future__ import annotations

import random
from pathlib import Path

from fastgpt.demos.prompted import learn_and_try
from fastgpt.tasks.answer import TASK
from fastgpt.tasks.jsonl import Fields
from fastgpt.tasks.options import Fresh, Learning

GOAL = 0.9  # of held-out questions are answered exactly
LEARNED, TRIED = 40_000, 600  # questions

NAMES = [
    "Maria", "Tom", "Lena", "Omar", "Chen", "Ivan", "Nina", "Paul", "Rosa", "Hugo",
    "Emma", "Karl", "Aisha", "Luis", "Yuki", "Sara", "Noah", "Olga", "Jan", "Mei",
]  # fmt: skip
CITIES = [
    "Oslo",
    "Paris",
    "Lima",
    "Cairo",
    "Rome",
    "Quito",
    "Delhi",
    "Tokyo",
    "Bern",
    "Accra",
    "Hanoi",
    "Dublin",
]
JOBS = [
    "baker",
    "nurse",
    "pilot",
    "farmer",
    "doctor",
    "singer",
    "teacher",
    "painter",
    "lawyer",
    "sailor",
    "miner",
]
COLOURS, THINGS = ["red", "blue", "green", "white", "black"], ["kite", "lamp", "boat", "bike", "hat", "ball"]
# By kind: values, sentences that tell one (the first is the answer's), and what is asked: for the value or the name.
FACTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "city": (
        CITIES,
        ["{name} lives in {value}.", "{name} has a home in {value}."],
        ["Where does {name} live?", "Who lives in {value}?"],
    ),
    "thing": (
        [f"{colour} {thing}" for colour in COLOURS for thing in THINGS],
        ["{name} has a {value}.", "{name} owns a {value}."],
        ["What does {name} have?", "Who has the {value}?"],
    ),
    "age": (
        [str(age) for age in range(11, 60)],
        ["{name} is {value} years old.", "{name} turned {value} this year."],
        ["How old is {name}?", "Who is {value} years old?"],
    ),
    "job": (
        JOBS,
        ["{name} works as a {value}.", "{name} is the {value}."],
        ["What is the job of {name}?", "Who is the {value}?"],
    ),
}


def run(out: Path, seed: int = 0, steps: int = 2000) -> int:
    """Make passages, learn to answer with a fresh GPT, ask about others; 0 if the goal is reached, else 1."""
    draw = random.Random(seed)
    tried = {line["context"]: line for line in (_line(draw, 1) for _ in range(TRIED))}
    # All that a passage tells is asked for at once where it is learned: four times as much to learn from each.
    made = (_line(draw, draw.randint(1, 4)) for _ in range(LEARNED))
    return learn_and_try(
        TASK, out, [line for line in made if line["context"] not in tried], list(tried.values()),
        Learning(steps=steps, batch_size=64, lr=2e-3, held_out=0.01, seed=seed),
        Fresh(vocab_size=512, embedding_dim=128, num_layers=3),
        GOAL,
    )  # fmt: skip


def _line(draw: random.Random, asked: int) -> Fields:
    """A passage of two facts about each of two people, no value twice, and so many questions about it."""
    keys = [(kind, name) for name in draw.sample(NAMES, 2) for kind in draw.sample(list(FACTS), 2)]
    facts = list[tuple[str, str, str]]()
    for kind, name in keys:
        taken = {value for _, _, value in facts}
        facts.append((kind, name, draw.choice([value for value in FACTS[kind][0] if value not in taken])))
    sentences = [draw.choice(FACTS[kind][1]).format(name=name, value=value) for kind, name, value in facts]
    draw.shuffle(sentences)
    chosen = [
        (FACTS[kind], {"name": name, "value": value}) for kind, name, value in draw.sample(facts, asked)
    ]
    return {
        "context": " ".join(sentences),
        "question": " ".join(draw.choice(questions).format(**fact) for (_, _, questions), fact in chosen),
        "answer": " ".join(forms[0].format(**fact) for (_, forms, _), fact in chosen),
    }
