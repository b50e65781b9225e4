"""Encoders by themselves: learning to name what images show or sounds say, from labelled ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt._core.validate import positive
from fastgpt.models import checkpoint
from fastgpt.models.audio import AudioConfig, AudioEncoder
from fastgpt.models.encoder import Encoder
from fastgpt.models.vision import VisionConfig, VisionEncoder
from fastgpt.nn import evaluating
from fastgpt.tasks import classify, media
from fastgpt.tasks.jsonl import Fields, Job, text_field
from fastgpt.tasks.jsonl import read as read_lines
from fastgpt.train.loop import Record, TrainConfig, fit, on_device

Inputs = Sequence[Tensor]  # images [C, H, W], or waveforms [samples]
Change = Callable[
    [Inputs, torch.Generator], Inputs
]  # of a batch in training, so that more is learned from few


@dataclass(frozen=True)
class Labelled:
    inputs: Inputs
    labels: Tensor  # int64 [N]

    def split(self, fraction: float, seed: int) -> tuple[Labelled, Labelled]:
        """(the rest, a fraction that is held out), at random."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        held = round(len(self.labels) * fraction)
        if not 0 < held < len(self.labels):
            raise ValueError(f"held_out: expected examples on both sides, got {held} of {len(self.labels)}")
        return self.chosen(order[held:]), self.chosen(order[:held])

    def chosen(self, ids: Tensor) -> Labelled:
        return Labelled([self.inputs[i] for i in ids.tolist()], self.labels[ids])


def labels_of(path: Path) -> tuple[str, ...]:
    """The labels in a JSONL file, in alphabetical order."""
    lines = read_lines(path, lambda fields, where: text_field(fields, "label", where))
    found = tuple(sorted({line.value for line in lines}))
    if len(found) < 2:
        raise ValueError(f"{path}: expected at least two labels, got {', '.join(found) or 'none'}")
    return found


def read(path: Path, config: VisionConfig | AudioConfig) -> Labelled:
    """The lines of a JSONL file: objects with an "image" or a "sound" (a path, from the file's directory) and a
    "label", one of the config's. OSError or ValueError names the line or the file."""

    def parse(fields: Fields, where: str) -> tuple[Tensor, int]:
        label = text_field(fields, "label", where)
        if label not in config.labels:
            raise ValueError(f"{where}: label: expected one of {', '.join(config.labels)}, got {label!r}")
        return _input(fields, where, path.parent, config), config.labels.index(label)

    with media.notes_in_one():
        lines = read_lines(path, parse)
    return Labelled([line.value[0] for line in lines], torch.tensor([line.value[1] for line in lines]))


def _input(fields: Fields, where: str, directory: Path, config: VisionConfig | AudioConfig) -> Tensor:
    """The image or the sound of a line; ValueError by its place, also for a file that cannot be read."""
    try:
        if isinstance(config, VisionConfig):
            return media.image(directory / text_field(fields, "image", where), config)
        return media.sound(directory / text_field(fields, "sound", where), config)
    except OSError as error:
        raise ValueError(f"{where}: {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def collate(inputs: Inputs) -> tuple[Tensor, ...]:
    """What an encoder is called with: images [B, C, H, W]; or waveforms [B, samples] and their lengths [B]."""
    return media.padded(inputs) if inputs[0].dim() == 1 else (torch.stack(list(inputs)),)


def batches(
    data: Labelled, batch_size: int, seed: int, change: Change | None
) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches in another order each time through: what `collate` gives, and labels."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for ids in torch.randperm(len(data.labels), generator=generator).split(batch_size):
            inputs = data.chosen(ids).inputs
            yield *collate(inputs if change is None else change(inputs, generator)), data.labels[ids]


@torch.no_grad()
def predict(encoder: Encoder, inputs: Inputs, batch_size: int = 64) -> Tensor:
    """The probabilities of the labels, fp32 [N, labels] on the CPU, computed where the encoder is."""
    positive("batch_size", batch_size)
    device = str(next(encoder.parameters()).device)
    parts = (collate(inputs[i : i + batch_size]) for i in range(0, len(inputs), batch_size))
    with evaluating(encoder):
        return torch.cat(
            [encoder.classify(*part).float().softmax(dim=-1).cpu() for part in on_device(device, parts)]
        )


def accuracy(encoder: Encoder, data: Labelled) -> float:
    return float((predict(encoder, data.inputs).argmax(dim=-1) == data.labels).float().mean())


def classify_file(
    encoder: Encoder, source: Path, target: Path, *, batch: int = 16, progress: bool = True
) -> classify.Predicted:
    """As `classify.classify_file`, of lines with an "image" or a "sound": a path, from the file's directory."""
    positive("batch", batch)
    config = encoder.config

    def parse(fields: Fields, where: str) -> Tensor:
        if "label" in fields:
            text_field(fields, "label", where)
        return _input(fields, where, source.parent, config)

    with media.notes_in_one():
        job = Job(source, target, parse, classify.RESULT)
    there, wanted = len(job.made), [i for i, _ in job.wanted]
    with job.writing(progress) as write:
        for begin in range(0, len(wanted), batch):
            rows = wanted[begin : begin + batch]
            best = predict(encoder, [job.lines[i].value for i in rows]).max(dim=-1)
            for i, label, probability in zip(rows, best.indices.tolist(), best.values.tolist(), strict=True):
                write((i, 0), {"prediction": config.labels[label], "probability": round(probability, 6)})
    return classify.told(job, there, config.labels)


def load(path: Path) -> Encoder | None:
    """The encoder in a directory, if what is there is one."""
    kinds = {kind.MODEL_TYPE: kind for kind in (VisionEncoder, AudioEncoder)}
    kind = kinds.get(checkpoint.read_json(str(path / checkpoint.CONFIG)).get("model_type", ""))
    return None if kind is None else kind.from_pretrained(path)


def train(
    encoder: Encoder, data: Labelled, held_out: Labelled, config: TrainConfig, change: Change | None = None,
    **options: Any,
) -> list[Record]:  # fmt: skip
    """Train in place, as `loop.fit`, whose `options` these are; records hold the held-out accuracy."""
    unit = "images" if isinstance(encoder, VisionEncoder) else "sounds"
    source = batches(data, config.batch_size, config.seed, change)
    measure = lambda: {"accuracy": accuracy(encoder, held_out)}  # noqa: E731
    return fit(encoder, source, config, measure, unit=unit, **options)


def make(config: VisionConfig | AudioConfig, seed: int) -> Encoder:
    torch.manual_seed(seed)
    return VisionEncoder(config) if isinstance(config, VisionConfig) else AudioEncoder(config)
