"""Texts with images and sounds among them: as batches to learn from, and answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.decoding import Features
from fastgpt.generate import Engine, Sampling
from fastgpt.models.multimodal import MultimodalGPT
from fastgpt.nn import evaluating
from fastgpt.tasks.media import padded
from fastgpt.tasks.text import encode, ended
from fastgpt.train.examples import Example, collate
from fastgpt.train.tokenizer import Tokenizer

IMAGE, SOUND = "<|image|>", "<|sound|>"  # in a text, where an image or a sound is
Batch = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Sample:
    """A prompt with an `IMAGE` for each of the images [C, H, W] and a `SOUND` for each of the sounds [samples], in
    order, and its answer, where it is known."""

    prompt: str
    answer: str = ""
    images: Sequence[Tensor] = ()
    sounds: Sequence[Tensor] = ()


def prompt_ids(
    model: MultimodalGPT, tokenizer: Tokenizer, sample: Sample, where: str = "prompt"
) -> list[int]:
    """The tokens of a prompt, as many for each image and each sound as they have features.

    Raises:
        ValueError: by the name of the place, unless images and sounds are as many as the text says, and text follows
            the last: what the answer is begun from is a token.
    """
    lengths: dict[int | None, list[int]] = {}
    if model.vision is not None:
        lengths[model.image_token] = [model.vision.config.positions] * len(sample.images)
    if model.audio is not None:
        lengths[model.sound_token] = [model.audio.config.positions(len(sound)) for sound in sample.sounds]
    ids = encode(tokenizer, sample.prompt, where)
    for name, token, given in (
        (IMAGE, model.image_token, sample.images),
        (SOUND, model.sound_token, sample.sounds),
    ):
        asked = 0 if token is None else ids.count(token)
        if asked != len(given):
            raise ValueError(
                f"{where}: expected as many inputs as {name} in the text, {asked}, got {len(given)}"
            )
    if 0 in lengths:
        raise ValueError(
            f"{where}: expected a model of which no image_token or sound_token is 0, which fills up"
        )
    if ids[-1] in lengths:
        raise ValueError(f"{where}: expected text after the last image or sound, got none")
    left = {token: iter(counts) for token, counts in lengths.items()}
    return [i for token in ids for i in ([token] * next(left[token]) if token in left else [token])]


def batch_of(model: MultimodalGPT, tokenizer: Tokenizer, samples: Sequence[Sample]) -> Batch:
    """What the model is called with to learn the answers: tokens, targets, images, sounds and their lengths."""
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    found = [
        Example(
            prompt_ids(model, tokenizer, sample, f"sample {i}"),
            encode(tokenizer, sample.answer, f"sample {i}: answer"),
        )
        for i, sample in enumerate(samples)
    ]
    for i, example in enumerate(found):
        example.check(model.config.max_seq_length, f"sample {i}")
    return (*collate(found), *_inputs(samples))


def _inputs(samples: Sequence[Sample]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    images = [image for sample in samples for image in sample.images]
    sounds = [sound for sample in samples for sound in sample.sounds]
    return (torch.stack(images) if images else None, *(padded(sounds) if sounds else (None, None)))


def answers(
    model: MultimodalGPT,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    *,
    batch: int = 32,
    stop: str = "\n",
    max_new_tokens: int | None = None,
) -> list[str]:
    """The likeliest answer (token by token) to each, up to `stop`; on the CPU, with kept keys and values.

    Raises:
        ValueError: naming the sample: images and sounds are not as the text says, or it is too long.
    """
    engine, sampling = Engine(model.text, batch=batch), Sampling(max_new_tokens, temperature=0)
    prompts = [prompt_ids(model, tokenizer, sample, f"sample {i}") for i, sample in enumerate(samples)]
    features = list(_features(model, samples, prompts, batch))
    found = [""] * len(samples)
    for grown, text in ended(engine, tokenizer, prompts, sampling, stop=[stop], features=features):
        found[grown.prompt] = text.strip()
    return found


@torch.no_grad()
def _features(
    model: MultimodalGPT, samples: Sequence[Sample], prompts: Sequence[Sequence[int]], batch: int
) -> Iterator[Features | None]:
    for begin in range(0, len(samples), batch):
        rows: Any = range(begin, min(begin + batch, len(samples)))
        longest = max(len(prompts[i]) for i in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, i in enumerate(rows):
            tokens[row, : len(prompts[i])] = torch.tensor(prompts[i])
        with evaluating(model):
            values, places = model.features(tokens, *_inputs([samples[i] for i in rows]))
        if values is None or places is None:
            yield from [None] * len(rows)
            continue
        for where, own in zip(places, values.split(places.sum(1).tolist()), strict=True):
            yield Features(where.nonzero()[:, 0], own)
