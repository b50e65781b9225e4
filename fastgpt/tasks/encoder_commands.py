"""The commands that teach an encoder by itself: `fastgpt train vision`, `fastgpt train audio`."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastgpt.tasks.options import ENCODER, ENCODER_LEARNING, ENCODER_LR, EncoderSizes, Learning

if TYPE_CHECKING:
    from fastgpt.models.audio import AudioConfig
    from fastgpt.models.vision import VisionConfig
    from fastgpt.tasks.encoders import Change, Labelled


def train_vision(
    data: Path | None = None,
    out: Path = Path("fastgpt-vision"),
    image_size: int = 32,
    patch_size: int = 4,
    channels: Literal[1, 3] = 3,
    sizes: EncoderSizes = ENCODER,
    learning: Learning = ENCODER_LEARNING,
) -> int:
    """Train an encoder of images to name what they show.

    Args:
        data: JSONL of lines with an "image" (a path, from the file's directory) and a "label"; without it,
            scikit-learn's handwritten digits, 8 x 8 pixels of one channel.
        out: Directory for the encoder.
        image_size: Pixels of a side; other images are resampled, with a note.
        patch_size: Pixels of a patch's side.
        channels: 3 for colours, 1 for grey.
        sizes: The encoder.
        learning: How to learn.
    """
    from fastgpt.models.vision import VisionConfig
    from fastgpt.tasks import digits, encoders

    if data is None:
        if (image_size, patch_size, channels) != (32, 4, 3):
            raise ValueError(
                "data: expected it with sizes of images, got none: those of the digits are given"
            )
        config, all_of_it = replace(digits.VISION, **asdict(sizes)), digits.handwritten()
    else:
        config = VisionConfig(
            image_size=image_size, patch_size=patch_size, channels=channels, labels=encoders.labels_of(data),
            **asdict(sizes),
        )  # fmt: skip
        all_of_it = encoders.read(data, config)
    learned, kept = all_of_it.split(learning.held_out, learning.seed)
    return _train(config, learned, kept, None, out, learning)


def train_audio(
    data: Path | None = None,
    out: Path = Path("fastgpt-audio"),
    max_seconds: float = 10.0,
    mels: int = 40,
    pool: int = 10,
    sizes: EncoderSizes = ENCODER,
    learning: Learning = ENCODER_LEARNING,
) -> int:
    """Train an encoder of sounds to name what they say.

    Args:
        data: JSONL of lines with a "sound" (a path, from the file's directory) and a "label"; without it, digits
            spoken by espeak-ng in noise, some of its voices held out.
        out: Directory for the encoder.
        max_seconds: Longest sound.
        mels: Bands of the spectrogram.
        pool: Frames of 20 ms that become one position.
        sizes: The encoder.
        learning: How to learn.
    """
    from fastgpt.models.audio import AudioConfig
    from fastgpt.tasks import digits, encoders

    labels = digits.LABELS if data is None else encoders.labels_of(data)
    config = AudioConfig(max_seconds=max_seconds, mels=mels, pool=pool, labels=labels, **asdict(sizes))
    if data is not None:
        learned, kept = encoders.read(data, config).split(learning.held_out, learning.seed)
        return _train(config, learned, kept, None, out, learning)
    if learning.held_out != ENCODER_LEARNING.held_out:
        raise ValueError("held_out: expected it with data, got none: whole voices are held out")
    learned, kept = digits.spoken(learning.seed)
    return _train(config, learned, digits.in_noise(kept, learning.seed), digits.noisy, out, learning)


def _train(
    config: VisionConfig | AudioConfig,
    learned: Labelled,
    kept: Labelled,
    change: Change | None,
    out: Path,
    learning: Learning,
) -> int:
    from fastgpt.tasks import encoders
    from fastgpt.train.checkpoint import check_can_save
    from fastgpt.train.loop import TrainConfig, device_named

    check_can_save(out)
    device = device_named(learning.device)
    encoder = encoders.make(config, learning.seed)
    parameters = sum(p.numel() for p in encoder.parameters())
    print(
        f"{parameters:,} parameters, {len(config.labels)} labels; {len(learned.labels)} to learn from,"
        f" {len(kept.labels)} held out"
    )
    lr, steps = ENCODER_LR if learning.lr is None else learning.lr, learning.steps
    training = TrainConfig(
        steps=steps, batch_size=learning.batch_size, lr=lr, min_lr=lr / 100, warmup=max(1, steps // 10),
        bf16=learning.bf16, seed=learning.seed, log_every=max(1, steps // 20), eval_every=max(1, steps // 5),
    )  # fmt: skip
    started = time.perf_counter()
    records = encoders.train(encoder, learned, kept, training, change, device=device)
    encoder.save_pretrained(out)
    seconds = time.perf_counter() - started
    print(f"held-out accuracy {records[-1]['accuracy']:.4f}, trained in {seconds:.0f} s; saved in {out}")
    return 0
