"""Tasks that are a prompt and an answer of one line: learned from JSONL, and worked through from file to file.

A GPT continues the prompt; what it learns is the answer, up to the newline that ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastgpt.generate import Engine, Sampling
from fastgpt.models.gpt import GPT
from fastgpt.tasks.jsonl import Fields, Job, Line, read, text_field
from fastgpt.tasks.learning import learn, split, start
from fastgpt.tasks.options import FRESH, LEARNING, Fresh, Learning
from fastgpt.tasks.text import check_options, ended, fitting
from fastgpt.train import checkpoint
from fastgpt.train.examples import Example, batches, held_out_batches
from fastgpt.train.tokenizer import Tokenizer

Scores = dict[str, float]
_END = "\n"  # of an answer
_GREEDY = Sampling(temperature=0)
_RESULT = ("prediction", "finished")


class Predicted(NamedTuple):
    """What came of a file: predictions made, those that were there already, scores (None: no answers to compare
    with) of how many lines, and what was left out, in words."""

    made: int
    there: int
    scores: Scores | None
    scored: int
    left_out: str


@dataclass(frozen=True)
class Prompted:
    """A task.

    Args:
        name: of the command.
        prompt: of a line's object and its file:line; ValueError by that place for a bad one. What it gives is best
            without white space at its end, which belongs to the answer's first token.
        answer: the field that holds the answer.
        score: of predictions and the objects of their lines, with answers; fractions, or BLEU.
    """

    name: str
    prompt: Callable[[Fields, str], str]
    answer: str
    score: Callable[[Sequence[str], Sequence[Fields]], Scores]

    def texts(self, fields: Fields, where: str) -> tuple[str, str]:
        """The prompt and its answer, as the model sees them; ValueError by the place for a bad line."""
        prompt, answer = self.prompt(fields, where), text_field(fields, self.answer, where).strip()
        if len(answer.splitlines()) != 1:
            raise ValueError(f'{where}: expected one line of text in "{self.answer}", got {answer!r}')
        return prompt, f" {answer}{_END}"

    def train(
        self,
        examples: Path,
        out: Path,
        *,
        model: str | None = None,
        learning: Learning = LEARNING,
        fresh: Fresh = FRESH,
    ) -> tuple[GPT, Tokenizer]:
        """Learn the lines of a file; what was learned is in the directory `out`, too.

        Args:
            model: directory or name of the GPT to go on from; a fresh one when None.
            fresh: what a fresh one is like.

        Raises:
            OSError, ValueError: naming the file and the line: bad, or longer than the model's context.
        """
        checkpoint.check_can_save(out)
        lines = read(examples, self.texts)
        learned, held_out = split(lines, learning, examples)
        gpt, tokenizer = start(model, fresh, ["".join(line.value) for line in lines], learning.seed)

        def example(line: Line) -> Example:
            prompt, answer = line.value
            made = Example(tokenizer.encode(prompt), tokenizer.encode(answer))
            made.check(gpt.config.max_seq_length, f"{examples}:{line.number}")
            return made

        gpt = learn(
            gpt, tokenizer,
            batches([example(line) for line in learned], learning.batch_size, learning.seed),
            held_out_batches([example(line) for line in held_out], learning.batch_size),
            learning, out, base=model, examples=examples,
        )  # fmt: skip
        return gpt, tokenizer

    def predict(
        self, model: GPT, tokenizer: Tokenizer, lines: Sequence[Fields], *, batch: int = 16
    ) -> list[str]:
        """The likeliest answer (token by token) to each line's prompt; ValueError naming a bad `line`, from 1."""
        engine, found = Engine(model, batch=batch), [""] * len(lines)
        prompts = [
            fitting(engine, tokenizer, self.prompt(fields, f"line {n}"), _GREEDY, f"line {n}")
            for n, fields in enumerate(lines, 1)
        ]
        for grown, answer in ended(engine, tokenizer, prompts, _GREEDY, stop=[_END]):
            found[grown.prompt] = answer.strip()
        return found

    def predict_file(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        source: Path,
        target: Path,
        *,
        batch: int = 16,
        progress: bool = True,
    ) -> Predicted:
        """As `predict`, from one JSONL file into another: what `jsonl.Job` says of bad lines and of going on.

        A result has "prediction" and "finished": "stop", or "length" where the context ended before the answer.
        """
        engine = Engine(model, batch=batch)
        check_options(engine, tokenizer, _GREEDY)

        def ids(fields: Fields, where: str) -> list[int]:
            if self.answer in fields:
                text_field(fields, self.answer, where)
            return fitting(engine, tokenizer, self.prompt(fields, where), _GREEDY, where)

        job = Job(source, target, ids, _RESULT)
        there = len(job.made)
        with job.writing(progress) as write:
            prompts = [line.value for line in job.lines]
            for grown, answer in ended(engine, tokenizer, prompts, _GREEDY, only=job.wanted, stop=[_END]):
                write((grown.prompt, 0), {"prediction": answer.strip(), "finished": grown.finished})
        made = [fields for fields in job.made.values() if self.answer in fields]
        scores = self.score([fields["prediction"] for fields in made], made) if made else None
        return Predicted(len(job.wanted), there, scores, len(made), job.report())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The fraction that are the same, but for white space around them."""
    return sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)) / len(references)
