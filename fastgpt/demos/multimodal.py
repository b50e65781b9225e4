"""A written and a spoken digit, and questions about both: three parts that learn apart, and then work together."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.models.checkpoint import atomic_files, json_bytes
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.models.multimodal import MultimodalGPT
from fastgpt.tasks import encoders
from fastgpt.tasks.digits import AUDIO, LABELS, VISION, WORDS, handwritten, in_noise, noisy, spoken
from fastgpt.tasks.encoders import Labelled
from fastgpt.tasks.multimodal import IMAGE, SOUND, Sample, answers, batch_of
from fastgpt.train import checkpoint
from fastgpt.train.loop import Record, TrainConfig, fit
from fastgpt.train.tokenizer import TOKENIZER, BPETokenizer

# What each needs: the image, the sound.
QUESTIONS = {
    "Is the spoken digit the one written?": (True, True),
    "What is their sum?": (True, True),
    "Which is larger?": (True, True),
    "Which digit is written?": (True, False),
    "Which digit is spoken?": (False, True),
}
GOAL = 0.85  # of held-out answers, exactly
RESULTS, PICTURE = "results.json", "samples.png"
HELD_OUT = 600  # questions
CHANCES = 50_000  # questions drawn, to know how far guessing goes


def answer_to(question: str, written: int, said: int) -> str:
    if question == "Is the spoken digit the one written?":
        return "yes" if written == said else "no"
    if question == "Which is larger?":
        return "neither" if written == said else "the written one" if written > said else "the spoken one"
    return str({"sum?": written + said, "written?": written, "spoken?": said}[question.split()[-1]])


@dataclass(frozen=True)
class Asked:
    question: str
    written: int
    said: int
    image_first: bool

    @property
    def answer(self) -> str:
        return answer_to(self.question, self.written, self.said)

    def prompt(self, image: str = IMAGE, sound: str = SOUND) -> str:
        parts = [f"written {image}", f"spoken {sound}"]
        first, second = parts if self.image_first else parts[::-1]
        return f"{first}\n{second}\n{self.question}\nAnswer:"

    def in_words(self) -> str:
        """What is written as a digit, what is spoken as a word."""
        return self.prompt(str(self.written), WORDS[self.said])


def asked(draw: random.Random) -> Asked:
    written, said = draw.randrange(10), draw.randrange(10)
    question = draw.choice(list(QUESTIONS))
    if "the one written" in question and draw.random() < 0.45:  # so that yes is as frequent as no
        said = written
    return Asked(question, written, said, draw.random() < 0.5)


class Source:
    """Questions about images and sounds of one split, the sounds in noise."""

    def __init__(self, images: Labelled, sounds: Labelled, seed: int) -> None:
        self.draw, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.images, self.sounds = (self._by_digit(data) for data in (images, sounds))

    def _by_digit(self, data: Labelled) -> list[list[Tensor]]:
        return [
            [x for x, y in zip(data.inputs, data.labels.tolist(), strict=True) if y == digit]
            for digit in range(10)
        ]

    def samples(self, count: int) -> tuple[list[Asked], list[Sample]]:
        questions = [asked(self.draw) for _ in range(count)]
        images = [self.draw.choice(self.images[one.written]) for one in questions]
        sounds = noisy([self.draw.choice(self.sounds[one.said]) for one in questions], self.generator)
        return questions, [
            Sample(one.prompt(), f" {one.answer}\n", (image,), (sound,))
            for one, image, sound in zip(questions, images, sounds, strict=True)
        ]


def text_batches(tokenizer: BPETokenizer, model: MultimodalGPT, batch_size: int, seed: int) -> Iterator[Any]:
    """The questions in words alone: the digits stand where images and sounds will."""
    draw = random.Random(seed)
    while True:
        questions = [asked(draw) for _ in range(batch_size)]
        samples = [Sample(one.in_words(), f" {one.answer}\n") for one in questions]
        yield batch_of(model, tokenizer, samples)[:2]


def exact(questions: Sequence[Asked], given: Sequence[str]) -> dict[str, float]:
    """The fraction of right answers to each question, and to all."""
    right, count = Counter[str](), Counter[str]()
    for one, text in zip(questions, given, strict=True):
        for name in (one.question, "all"):
            right[name] += text == one.answer
            count[name] += 1
    return {name: right[name] / count[name] for name in [*QUESTIONS, "all"] if count[name]}


def chance(image: bool) -> dict[str, float]:
    """How often the best guess is right that knows all but the image (or, if not `image`, the sound)."""
    draw = random.Random(0)
    tables: dict[tuple[str, int], Counter[str]] = {}
    for _ in range(CHANCES):
        one = asked(draw)
        known = one.said if image else one.written
        tables.setdefault((one.question, known), Counter())[one.answer] += 1
    right, count = Counter[str](), Counter[str]()
    for (question, _), answers_of in tables.items():
        right[question] += max(answers_of.values())
        count[question] += answers_of.total()
    return {name: right[name] / count[name] for name, needs in QUESTIONS.items() if needs[0 if image else 1]}


def run(out: Path, seed: int = 0, scale: float = 1.0) -> int:
    """Train the parts, then the whole, show what came of it; 0 if the goals are reached, else 1.

    `scale` multiplies all numbers of training steps.
    """
    started = time.perf_counter()
    checkpoint.check_can_save(out, (RESULTS, PICTURE))

    def training(steps: int, lr: float, batch_size: int = 64) -> TrainConfig:
        steps = max(10, int(steps * scale))
        return TrainConfig(
            steps=steps, batch_size=batch_size, lr=lr, min_lr=lr / 100, warmup=steps // 10, seed=seed,
            weight_decay=0.05, eval_every=steps, log_every=max(1, steps // 20),
        )  # fmt: skip

    (images, held_images), (sounds, held_sounds) = handwritten().split(1 / 4, seed), spoken(seed)
    vision, audio = encoders.make(VISION, seed), encoders.make(AUDIO, seed)
    print(f"Images alone: {len(images.labels)} handwritten digits, {len(held_images.labels)} held out.")
    seen = encoders.train(vision, images, held_images, training(1000, 2e-3))[-1]["accuracy"]
    print(f"Sounds alone: {len(sounds.labels)} spoken digits, {len(held_sounds.labels)} of voices held out.")
    tried = in_noise(held_sounds, seed)
    heard = encoders.train(audio, sounds, tried, training(300, 2e-3), noisy)[-1]["accuracy"]

    draw = random.Random(seed)
    corpus = "\n".join(f"{one.in_words()} {one.answer}" for one in (asked(draw) for _ in range(500)))
    tokenizer = BPETokenizer.train(corpus, 320, (IMAGE, SOUND))
    torch.manual_seed(seed)
    text = GPT(GPTConfig(tokenizer.vocab_size, 96, 4, 3, 64))
    tokens = {
        f"{name}_token": tokenizer.special_id(word) for name, word in (("image", IMAGE), ("sound", SOUND))
    }
    model = MultimodalGPT(text, vision=vision, audio=audio, **tokens)  # type: ignore[arg-type]
    test, held = Source(held_images, held_sounds, seed + 1).samples(HELD_OUT)
    words = [Sample(one.in_words()) for one in test]
    print("Text alone: the same questions about digits in words.")
    fit(
        text, text_batches(tokenizer, model, 64, seed), training(800, 3e-3),
        lambda: {"exact_match": exact(test, answers(model, tokenizer, words))["all"]},
    )  # fmt: skip
    alone = {"vision": seen, "audio": heard, "text": exact(test, answers(model, tokenizer, words))["all"]}

    source = Source(images, sounds, seed)

    def batches() -> Iterator[Any]:
        while True:
            yield batch_of(model, tokenizer, source.samples(64)[1])

    def evaluate() -> Record:
        return {"exact_match": exact(test, answers(model, tokenizer, held))["all"]}

    print("Together, the projectors first: the three parts are frozen.")
    fit(model, batches(), training(300, 2e-3), evaluate, rates={"text": 0, "vision": 0, "audio": 0})
    projected = exact(test, answers(model, tokenizer, held))
    print("Together, all parts.")
    slow = {"text": 1e-3, "vision": 5e-4, "audio": 5e-4}
    fit(model, batches(), training(500, 1e-3), evaluate, rates=slow)
    given = answers(model, tokenizer, held)
    blank = {
        "images": exact(
            test, answers(model, tokenizer, [replace(s, images=blanked(s.images)) for s in held])
        ),
        "sounds": exact(
            test, answers(model, tokenizer, [replace(s, sounds=blanked(s.sounds)) for s in held])
        ),
    }
    results = {
        "alone": alone, "projectors": projected, "joint": exact(test, given), "blank": blank,
        "chance": {"images": chance(True), "sounds": chance(False)},
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    model.save_pretrained(out / "model")
    with atomic_files(out / "model") as put:
        put(TOKENIZER, tokenizer.to_json())
    with atomic_files(out) as put:
        put(RESULTS, json_bytes(results))
        put(PICTURE, picture(test, held, given))
    print(report(results))
    print(f"\nIn {out}: {PICTURE}, {RESULTS}, and the model in {out / 'model'}.")
    return 0 if reached(results) else 1


def blanked(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.full_like(x, -1.0) if x.dim() == 3 else torch.zeros_like(x) for x in inputs]


def reached(results: dict[str, Any]) -> bool:
    """The goal, the gain by joint training, and chance without an input (give or take 0.1: a hundred questions)."""
    joint, blank = results["joint"]["all"], results["blank"]
    return (
        joint >= GOAL
        and joint > results["projectors"]["all"]
        and all(
            blank[name][question] <= best + 0.1
            for name, table in results["chance"].items()
            for question, best in table.items()
        )
    )


def report(results: dict[str, Any]) -> str:
    alone, chances = results["alone"], results["chance"]
    lines = [
        "",
        f"Alone, held out: images {alone['vision']:.3f}, sounds {alone['audio']:.3f}, text {alone['text']:.3f}.",
        "",
        f"{'exact match, held out':<38}projectors   joint   no image (chance)   no sound (chance)",
    ]
    for name in [*QUESTIONS, "all"]:
        cells = [f"{name:<38}{results['projectors'][name]:>10.3f}{results['joint'][name]:>8.3f}"]
        for kind in ("images", "sounds"):
            best = f"({chances[kind][name]:.3f})" if name in chances[kind] else ""
            cells.append(f"{results['blank'][kind][name]:>11.3f} {best:>8}")
        lines.append("".join(cells))
    verdict = "reached" if reached(results) else "MISSED"
    lines += ["", f"Goals {verdict}; {results['seconds']:.0f} s in all."]
    return "\n".join(lines)


def picture(test: Sequence[Asked], held: Sequence[Sample], given: Sequence[str], rows: int = 2) -> bytes:
    """A PNG of some samples: the image, the waveform, the question and the answer given (red where it is wrong)."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen: list[int] = []
    for question in QUESTIONS:
        chosen += [i for i, one in enumerate(test) if one.question == question][:rows]
    figure = Figure(figsize=(2.6 * len(QUESTIONS), 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * rows, len(QUESTIONS), squeeze=False, height_ratios=[2, 1] * rows)
    for n, i in enumerate(chosen):
        top, below = axes[2 * (n % rows)][n // rows], axes[2 * (n % rows) + 1][n // rows]
        top.imshow(held[i].images[0][0].numpy(), cmap="gray_r")
        below.plot(held[i].sounds[0].numpy(), linewidth=0.4)
        right = given[i] == test[i].answer
        top.set_title(f"{test[i].question}\n{given[i]}", fontsize=8, color="black" if right else "red")
        below.set_xlabel(f"says {LABELS[test[i].said]}", fontsize=8)
        for axis in (top, below):
            axis.set_xticks([])
            axis.set_yticks([])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
