"""Images and sounds from files to what the encoders take; what had to be resampled is said by a `MediaNote`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from torch import Tensor

from fastgpt.models.audio import RATE, AudioConfig
from fastgpt.models.vision import VisionConfig

MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
PATH = str | os.PathLike[str]


class MediaNote(UserWarning):
    """A file was not as the model takes it, and was brought to it."""


def image(source: PATH | Any, config: VisionConfig) -> Tensor:
    """fp32 [channels, image_size, image_size] in -1 to 1 of an image file or a Pillow image.

    Other sizes, 1 x 1 too, are resampled (bicubic; what is not square is stretched), other colours converted;
    transparency is laid on black.

    Raises:
        OSError, ValueError: naming the file: it cannot be read, or is no image.
    """
    import numpy
    from PIL import Image, UnidentifiedImageError

    name = "image" if isinstance(source, Image.Image) else os.fspath(source)
    try:
        with source if isinstance(source, Image.Image) else Image.open(source) as opened:
            picture = (
                opened.convert("RGBA") if "transparency" in opened.info or opened.mode == "LA" else opened
            )
            if picture.mode == "RGBA":
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
            if config.channels not in MODES:
                raise ValueError(f"{name}: expected a model of 1 or 3 channels, got {config.channels}")
            picture = picture.convert(MODES[config.channels])
    except UnidentifiedImageError:
        raise ValueError(f"{name}: expected an image file, got something else") from None
    except (OSError, SyntaxError) as error:  # Pillow's for a file that is cut short
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        raise ValueError(f"{name}: expected a whole image file, got {error}") from None
    size = config.image_size
    if picture.size != (size, size):
        _note(f"{name}: {picture.width}x{picture.height} resampled to {size}x{size}")
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(picture, dtype="float32")).view(size, size, config.channels)
    return pixels.permute(2, 0, 1) / 127.5 - 1


def sound(source: PATH, config: AudioConfig) -> Tensor:
    """fp32 [samples] at 16 kHz of a sound file: several channels are averaged, other rates resampled.

    Silence is a sound like others. Raises OSError or ValueError that names the file: it cannot be read, is no sound,
    has no samples, or more than the model takes.
    """
    import soundfile

    name = os.fspath(source)
    with open(name, "rb") as file:  # the system's own error, if it cannot be read
        try:
            data, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, TypeError) as error:
            raise ValueError(f"{name}: expected a sound file, got {error}") from None
    if data.shape[1] > 1:
        _note(f"{name}: {data.shape[1]} channels averaged")
    mono = data.mean(axis=1)
    if rate != RATE and len(mono):
        _note(f"{name}: {rate} Hz resampled to {RATE} Hz")
        mono = resampled(mono, rate)
    if not 1 <= len(mono) <= config.max_samples:
        raise ValueError(
            f"{name}: expected a sound of up to {config.max_seconds} seconds, got {len(mono) / RATE:.1f}"
        )
    wave = torch.from_numpy(mono)
    if not bool(wave.isfinite().all()):
        raise ValueError(f"{name}: expected finite samples, got NaN or infinity")
    return wave


def resampled(samples: Any, rate: int) -> Any:
    """A numpy array of samples at `rate` as one at 16 kHz, fp32, by a polyphase filter."""
    from scipy.signal import resample_poly

    common = gcd(rate, RATE)
    return resample_poly(samples, RATE // common, rate // common).astype("float32")


def padded(sounds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms side by side, zeros behind the shorter: ([B, samples], lengths int64 [B])."""
    return torch.nn.utils.rnn.pad_sequence(list(sounds), batch_first=True), torch.tensor(
        [len(s) for s in sounds]
    )


@contextmanager
def notes_in_one() -> Iterator[None]:
    """All `MediaNote`s of a job as one line on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MediaNote)
        yield
    notes = [warning for warning in caught if issubclass(warning.category, MediaNote)]
    for other in caught:
        if other not in notes:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if notes:
        text = f"note: {len(notes)} files were brought to what the model takes; the first: {notes[0].message}"
        print(text, file=sys.stderr)


def _note(text: str) -> None:
    warnings.warn(text, MediaNote, stacklevel=3)
