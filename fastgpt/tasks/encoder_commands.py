"""The commands that teach an encoder by itself: `fastgpt train vision`, `fastgpt train audio`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    embedding_dim: int = 64,
    num_heads: int = 4,
    num_layers: int = 3,
    dropout: float = 0.1,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 2e-3,
    held_out: float = 0.25,
    bf16: bool = False,
    seed: int = 0,
) -> int:
    """Train an encoder of images to name what they show.

    Args:
        data: JSONL of lines with an "image" (a path, from the file's directory) and a "label"; without it,
            scikit-learn's handwritten digits, whose size the model then has.
        out: Directory for the encoder.
        image_size: Pixels of a side; other images are resampled, with a note.
        patch_size: Pixels of a patch's side.
        channels: 3 for colours, 1 for grey.
        embedding_dim: Width of the model.
        num_heads: Attention heads a layer.
        num_layers: Transformer blocks.
        dropout: Probability, on every branch.
        steps: Updates of the weights.
        batch_size: Images a batch.
        lr: Peak learning rate (AdamW).
        held_out: Fraction of the images that is not trained on; without data a quarter.
        bf16: Compute in bfloat16 by autocast.
        seed: Of the initial weights, of the order of the images, and of which are held out.
    """
    from dataclasses import replace

    from fastgpt.models.vision import VisionConfig
    from fastgpt.tasks import digits, encoders

    sizes: dict[str, Any] = {
        "embedding_dim": embedding_dim, "num_heads": num_heads, "num_layers": num_layers, "dropout": dropout
    }  # fmt: skip
    if data is None:
        config, (learned, kept) = replace(digits.VISION, **sizes), digits.handwritten(seed)
    else:
        labels = encoders.labels_of(data)
        config = VisionConfig(
            image_size=image_size, patch_size=patch_size, channels=channels, labels=labels, **sizes
        )
        learned, kept = encoders.read(data, config).split(held_out, seed)
    return _train(config, learned, kept, None, out, steps, batch_size, lr, bf16, seed)


def train_audio(
    data: Path | None = None,
    out: Path = Path("fastgpt-audio"),
    max_seconds: float = 10.0,
    mels: int = 40,
    pool: int = 10,
    embedding_dim: int = 96,
    num_heads: int = 4,
    num_layers: int = 3,
    dropout: float = 0.1,
    steps: int = 400,
    batch_size: int = 64,
    lr: float = 2e-3,
    held_out: float = 0.25,
    bf16: bool = False,
    seed: int = 0,
) -> int:
    """Train an encoder of sounds to name what they say.

    Args:
        data: JSONL of lines with a "sound" (a path, from the file's directory) and a "label"; without it, digits
            spoken by espeak-ng in noise, some of its voices held out.
        out: Directory for the encoder.
        max_seconds: Longest sound.
        mels: Bands of the spectrogram.
        pool: Frames of 20 ms that become one position.
        embedding_dim: Width of the model.
        num_heads: Attention heads a layer.
        num_layers: Transformer blocks.
        dropout: Probability, on every branch.
        steps: Updates of the weights.
        batch_size: Sounds a batch.
        lr: Peak learning rate (AdamW).
        held_out: Fraction of the sounds that is not trained on.
        bf16: Compute in bfloat16 by autocast.
        seed: Of the initial weights, of the order of the sounds, and of which are held out.
    """
    from fastgpt.models.audio import AudioConfig
    from fastgpt.tasks import digits, encoders

    labels = digits.LABELS if data is None else encoders.labels_of(data)
    config = AudioConfig(
        max_seconds=max_seconds, mels=mels, pool=pool, embedding_dim=embedding_dim, num_heads=num_heads,
        num_layers=num_layers, dropout=dropout, labels=labels,
    )  # fmt: skip
    if data is None:
        learned, kept = digits.spoken(seed)
        kept = digits.in_noise(kept, seed)
    else:
        learned, kept = encoders.read(data, config).split(held_out, seed)
    change = digits.noisy if data is None else None
    return _train(config, learned, kept, change, out, steps, batch_size, lr, bf16, seed)


def _train(
    config: VisionConfig | AudioConfig, learned: Labelled, kept: Labelled, change: Change | None, out: Path,
    steps: int, batch_size: int, lr: float, bf16: bool, seed: int,
) -> int:  # fmt: skip
    from fastgpt.tasks import encoders
    from fastgpt.train.checkpoint import check_can_save
    from fastgpt.train.loop import TrainConfig

    check_can_save(out)
    encoder = encoders.make(config, seed)
    parameters = sum(p.numel() for p in encoder.parameters())
    print(
        f"{parameters:,} parameters, {len(config.labels)} labels; {len(learned.labels)} to learn from,"
        f" {len(kept.labels)} held out"
    )
    training = TrainConfig(
        steps=steps, batch_size=batch_size, lr=lr, min_lr=lr / 100, warmup=max(1, steps // 10), bf16=bf16, seed=seed,
        log_every=max(1, steps // 20), eval_every=max(1, steps // 5),
    )  # fmt: skip
    started = time.perf_counter()
    records = encoders.train(encoder, learned, kept, training, change)
    encoder.save_pretrained(out)
    seconds = time.perf_counter() - started
    print(f"held-out accuracy {records[-1]['accuracy']:.4f}, trained in {seconds:.0f} s; saved in {out}")
    return 0
