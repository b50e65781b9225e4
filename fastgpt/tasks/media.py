"""Images and sounds from files to what the encoders take; what had to be resampled is said by a `MediaNote`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import gcd
from typing import Any

import torch
from torch import Tensor

from fastgpt.models.audio import RATE, AudioConfig
from fastgpt.models.vision import VisionConfig

MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
SIXTEEN_BITS = "I;16"  # what Pillow's modes of a 16-bit channel begin with
FILE_RATES = 1000, 768_000  # samples a second
PATH = str | os.PathLike[str]


class MediaNote(UserWarning):
    """A file, `name`, was not as the model takes it, and was brought to it."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name}: {what}")
        self.name = name


def image(source: PATH | Any, config: VisionConfig) -> Tensor:
    """fp32 [channels, image_size, image_size] in -1 to 1 of an image file or a Pillow image.

    Other sizes, 1 x 1 too, are resampled (bicubic; what is not square is stretched), other colours converted, 16 bits
    a pixel brought to 8; transparency is laid on black, and what a camera says of its rotation is followed.

    Raises:
        OSError, ValueError: naming the file: it cannot be read, or is no image.
    """
    import numpy
    from PIL import Image, UnidentifiedImageError

    if config.channels not in MODES:
        raise ValueError(f"config: expected a model of 1 or 3 channels, got {config.channels}")
    ours = not isinstance(source, Image.Image)
    name = os.fspath(source) if ours else "image"
    try:
        opening: Any = Image.open(source) if ours else nullcontext(source)
        with opening as opened:
            if opened.mode.startswith(SIXTEEN_BITS):
                _note(name, "16 bits a pixel brought to 8")
            picture = _converted(opened, MODES[config.channels])
    except UnidentifiedImageError:
        raise ValueError(f"{name}: expected an image file, got something else") from None
    # Pillow's for a file that is cut short, damaged, or vast
    except (OSError, SyntaxError, RuntimeError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        raise ValueError(f"{name}: expected a whole image file, got {error}") from None
    size = config.image_size
    if picture.size != (size, size):
        _note(name, f"{picture.width}x{picture.height} resampled to {size}x{size}")
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(picture, dtype="float32")).view(size, size, config.channels)
    return pixels.permute(2, 0, 1) / 127.5 - 1


def _converted(opened: Any, mode: str) -> Any:
    """A Pillow image as one of 8 bits a channel, upright, without transparency."""
    import numpy
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith(SIXTEEN_BITS):  # which Pillow itself would clip at 255
        picture = Image.fromarray((numpy.asarray(picture) >> 8).astype("uint8"))
    elif picture.mode in ("I", "F"):
        raise ValueError(f"32 bits a pixel (Pillow's mode {picture.mode}), of which the range is not known")
    if "transparency" in picture.info or picture.mode == "LA":
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return picture.convert(mode)


def sound(source: PATH, config: AudioConfig) -> Tensor:
    """fp32 [samples] at 16 kHz of a sound file: several channels are averaged, other rates resampled.

    Silence is a sound like others. Raises OSError or ValueError that names the file: it cannot be read, is no sound,
    was cut short (where its header says so), has no samples, or more than the model takes.
    """
    import soundfile

    name = os.fspath(source)
    with open(name, "rb") as file:  # the system's own error, if it cannot be read
        try:
            with soundfile.SoundFile(file) as opened:
                rate = opened.samplerate
                _check_sound(name, opened.frames, rate, opened.extra_info, config)  # before it takes memory
                data = opened.read(dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, TypeError) as error:
            raise ValueError(f"{name}: expected a sound file, got {error}") from None
    if not len(data):
        raise ValueError(f"{name}: expected a sound, got no samples")
    if data.shape[1] > 1:
        _note(name, f"{data.shape[1]} channels averaged")
    mono = data.mean(axis=1)
    if rate != RATE:
        _note(name, f"{rate} Hz resampled to {RATE} Hz")
        mono = resampled(mono, rate)[: config.max_samples]  # a part of a sample may be rounded up
    wave = torch.from_numpy(mono)
    if not bool(wave.isfinite().all()):
        raise ValueError(f"{name}: expected finite samples, got NaN or infinity")
    return wave


def _check_sound(name: str, frames: int, rate: int, header: str, config: AudioConfig) -> None:
    low, high = FILE_RATES
    if not low <= rate <= high:
        raise ValueError(f"{name}: expected {low} to {high} samples a second, got {rate}")
    if "(should be" in header:  # libsndfile's, where a header tells of more than there is
        raise ValueError(f"{name}: expected a whole sound file, got one that is cut short")
    if frames > config.max_seconds * rate:
        raise ValueError(
            f"{name}: expected a sound of up to {config.max_seconds} seconds, got {frames / rate:.6g}"
        )


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
    notes = [warning for warning in caught if isinstance(warning.message, MediaNote)]
    for other in caught:
        if other not in notes:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if notes:
        files = len({note.message.name for note in notes if isinstance(note.message, MediaNote)})
        text = f"note: {files} files were brought to what the model takes; the first: {notes[0].message}"
        print(text, file=sys.stderr)


def _note(name: str, what: str) -> None:
    warnings.warn(MediaNote(name, what), stacklevel=3)
