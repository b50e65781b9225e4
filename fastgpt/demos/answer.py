"""Questions about short passages: who has what, who lives where, how old somebody is, what somebody does.

A passage tells a few facts about a few people in any order. A fact that is asked about in the end (this person, that
town) is told in no passage that is learned: its answer can only be read.
"""

from __future__ import annotations

import random
from pathlib import Path

from fastgpt.demos.prompted import learn_and_try
from fastgpt.tasks.answer import TASK
from fastgpt.tasks.jsonl import Fields
from fastgpt.tasks.options import Fresh, Learning

Key = tuple[str, str]  # a kind of fact, and a name

GOAL = 0.9  # of held-out questions are answered exactly
LEARNED, TRIED = 24_000, 600  # questions

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
# By kind: values, sentences that tell one, and what is asked, about the value or about the name.
FACTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "city": (
        CITIES,
        ["{name} lives in {value}.", "The home of {name} is in {value}."],
        ["Where does {name} live?", "Who lives in {value}?"],
    ),
    "thing": (
        [f"{colour} {thing}" for colour in COLOURS for thing in THINGS],
        ["{name} has a {value}.", "A {value} belongs to {name}."],
        ["What does {name} have?", "Who has the {value}?"],
    ),
    "age": (
        [str(age) for age in range(11, 60)],
        ["{name} is {value} years old.", "The age of {name} is {value}."],
        ["How old is {name}?", "Who is {value} years old?"],
    ),
    "job": (
        JOBS,
        ["{name} works as a {value}.", "The {value} is called {name}."],
        ["What is the job of {name}?", "Who is the {value}?"],
    ),
}


def run(out: Path, seed: int = 0, steps: int = 1500) -> int:
    """Make passages, learn to answer with a fresh GPT, ask for held-out facts; 0 if the goal is reached, else 1."""
    draw = random.Random(seed)
    known, new = dict[Key, list[str]](), dict[Key, list[str]]()
    for kind, (values, _, _) in FACTS.items():
        for name in NAMES:
            new[kind, name] = draw.sample(values, len(values) // 8)
            known[kind, name] = [value for value in values if value not in new[kind, name]]
    return learn_and_try(
        TASK, out,
        [_question(draw, known, known) for _ in range(LEARNED)],
        [_question(draw, new, known) for _ in range(TRIED)],
        Learning(steps=steps, batch_size=64, lr=3e-3, held_out=0.01, seed=seed),
        Fresh(vocab_size=512, embedding_dim=128, num_layers=3),
        GOAL,
    )  # fmt: skip


def _question(draw: random.Random, asked: dict[Key, list[str]], others: dict[Key, list[str]]) -> Fields:
    """A passage of two facts about each of three people, no value twice, and a question about one of `asked`."""
    keys = [(kind, name) for name in draw.sample(NAMES, 3) for kind in draw.sample(list(FACTS), 2)]
    draw.shuffle(keys)
    facts = dict[Key, str]()
    for key in keys:
        values = others[key] if facts else asked[key]
        facts[key] = draw.choice([value for value in values if value not in facts.values()])
    (kind, name), value = next(iter(facts.items()))
    about = draw.randrange(2)
    sentences = [draw.choice(FACTS[k][1]).format(name=n, value=v) for (k, n), v in facts.items()]
    draw.shuffle(sentences)
    return {
        "context": " ".join(sentences),
        "question": FACTS[kind][2][about].format(name=name, value=value),
        "answer": name if about else value,
    }
