"""Questions about short passages: where somebody lives, what somebody eats, how old somebody is.

A passage tells a few things of different kinds about two people; the answer tells one of them in a sentence. Who has
what is drawn anew for each passage, so that it can only be read; those asked about in the end were never learned.
No two facts are of one kind: what a model of this size learns in minutes is to find the fact that a question is
about, and not yet to tell two people apart who both live somewhere.
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
    "Oslo", "Paris", "Lima", "Cairo", "Rome", "Quito", "Delhi", "Tokyo", "Bern", "Accra", "Hanoi", "Dublin",
]  # fmt: skip
JOBS = [
    "baker", "nurse", "pilot", "farmer", "doctor", "singer", "teacher", "painter", "lawyer", "sailor", "miner",
]  # fmt: skip
COLOURS, THINGS = ["red", "blue", "green", "white", "black"], ["kite", "lamp", "boat", "bike", "hat", "ball"]
FOODS = ["rice", "soup", "bread", "cheese", "fish", "beans", "salad", "noodles", "apples", "pasta"]
SPORTS = ["tennis", "chess", "football", "golf", "hockey", "rugby", "darts", "polo"]
LANGUAGES = ["French", "Greek", "Polish", "Hindi", "Dutch", "Arabic", "Korean", "Swedish", "Turkish"]
MONTHS = ["January", "March", "April", "June", "July", "August", "October", "December"]
# By kind: values, sentences that tell one (the first is the answer's), and what is asked.
FACTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "city": (
        CITIES,
        ["{name} lives in {value}.", "{name} has a home in {value}."],
        ["Where does {name} live?", "In which city is the home of {name}?"],
    ),
    "thing": (
        [f"{colour} {thing}" for colour in COLOURS for thing in THINGS],
        ["{name} has a {value}.", "{name} owns a {value}."],
        ["What does {name} have?", "What does {name} own?"],
    ),
    "age": (
        [str(age) for age in range(11, 60)],
        ["{name} is {value} years old.", "{name} turned {value} this year."],
        ["How old is {name}?", "What is the age of {name}?"],
    ),
    "job": (
        JOBS,
        ["{name} works as a {value}.", "{name} is the {value}."],
        ["What is the job of {name}?", "What does {name} work as?"],
    ),
    "food": (
        FOODS,
        ["{name} eats {value}.", "The food that {name} likes is {value}."],
        ["What does {name} eat?", "Which food does {name} like?"],
    ),
    "sport": (
        SPORTS,
        ["{name} plays {value}.", "{name} goes to play {value}."],
        ["What does {name} play?", "Which game does {name} play?"],
    ),
    "language": (
        LANGUAGES,
        ["{name} speaks {value}.", "{name} talks in {value}."],
        ["What does {name} speak?", "Which language does {name} speak?"],
    ),
    "birthday": (
        MONTHS,
        ["{name} was born in {value}.", "The birthday of {name} is in {value}."],
        ["When was {name} born?", "In which month is the birthday of {name}?"],
    ),
}


def run(out: Path, seed: int = 0, steps: int = 1000) -> int:
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
    """A passage of four facts about two people, no two of a kind, and so many questions about it."""
    people = draw.sample(NAMES, 2)
    facts = [
        (kind, draw.choice(people) if n > 1 else people[n], draw.choice(FACTS[kind][0]))
        for n, kind in enumerate(draw.sample(list(FACTS), 4))
    ]
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
