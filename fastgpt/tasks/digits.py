"""Digits, written and spoken, that can be had anywhere: scikit-learn's handwritten ones, and espeak-ng's voices."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastgpt.models.audio import RATE, AudioConfig
from fastgpt.models.vision import VisionConfig
from fastgpt.tasks.encoders import Inputs, Labelled
from fastgpt.tasks.media import resampled

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LABELS = tuple("0123456789")
VISION = VisionConfig(
    image_size=8, patch_size=2, channels=1, embedding_dim=64, num_heads=4, num_layers=3, dropout=0.1,
    labels=LABELS,
)  # fmt: skip
AUDIO = AudioConfig(
    mels=40, pool=10, max_seconds=2.0, embedding_dim=96, num_heads=4, num_layers=3, dropout=0.1, labels=LABELS
)  # fmt: skip
VOICES = ("m1", "m2", "m3", "m5", "m6", "m8", "f1", "f2", "f4", "f5", "klatt", "klatt2", "klatt4")
HELD_OUT_VOICES = ("m4", "m7", "f3", "klatt3")  # of which nothing is heard in training
ACCENTS = ("en-us", "en-gb")
PEAK = 0.5
SHIFT, LOUDEST, FAINTEST = 0.15, 5.0, 30.0  # seconds of silence before; dB of the signal over the noise


def handwritten() -> Labelled:
    """scikit-learn's 1,797 digits of 8 x 8 pixels (Alpaydin, Kaynak 1998), in -1 to 1."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.int64)
    return Labelled(list(images), labels)


def spoken(seed: int = 0, takes: int = 4) -> tuple[Labelled, Labelled]:
    """Digits by every voice at `takes` speeds and pitches, without noise; (training, voices held out).

    Raises:
        OSError: there is no espeak-ng; what to install.
    """
    if shutil.which("espeak-ng") is None:
        raise OSError("espeak-ng is not installed: apt install espeak-ng (or brew install espeak-ng)")
    draw = random.Random(seed)
    found = []
    for voices in (VOICES, HELD_OUT_VOICES):
        asked = [
            (f"{accent}+{voice}", draw.randint(110, 220), draw.randint(20, 80), digit)
            for voice in voices
            for accent in ACCENTS
            for digit in range(10)
            for _ in range(takes)
        ]
        with ThreadPoolExecutor() as pool:
            waves = list(pool.map(lambda one: _say(*one), asked))
        found.append(Labelled(waves, torch.tensor([digit for *_, digit in asked])))
    return found[0], found[1]


def _say(voice: str, speed: int, pitch: int, digit: int) -> Tensor:
    import soundfile

    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", WORDS[digit]]
    data, rate = soundfile.read(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout))
    wave = torch.tensor(resampled(data, rate), dtype=torch.float32)
    return wave * (PEAK / wave.abs().amax().clamp(min=1e-3))


def noisy(waves: Inputs, generator: torch.Generator) -> Inputs:
    """Each after a little silence, in white noise of another loudness."""
    made = []
    for wave in waves:
        before, level = torch.rand(2, generator=generator).tolist()
        wave = torch.cat([wave.new_zeros(int(before * SHIFT * RATE)), wave])
        decibels = LOUDEST + level * (FAINTEST - LOUDEST)
        noise = torch.randn(wave.shape, generator=generator)
        made.append(wave + noise * wave.square().mean().sqrt() * 10 ** (-decibels / 20))
    return made


def in_noise(data: Labelled, seed: int) -> Labelled:
    """To be tried on: the same noise each time."""
    return Labelled(noisy(data.inputs, torch.Generator().manual_seed(seed)), data.labels)
