"""The encoder of sounds: log-mel spectrogram, two convolutions, bidirectional blocks, as Whisper's (Radford et al.
2022, section 2.2), averaged down to a few positions a second, on the fused ops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._core.validate import positive
from fastgpt.models.encoder import Encoder, EncoderConfig, check_floats
from fastgpt.nn import PositionalEncoding

RATE = 16000  # samples a second
WINDOW, HOP = 400, 160  # samples: frames of 25 ms, 100 in a second
STRIDE = 2  # of the second convolution
WIDTH = 3  # frames, of both
RANGE = 8.0  # powers of ten below a sound's loudest, that are kept


@dataclass(frozen=True, kw_only=True)
class AudioConfig(EncoderConfig):
    """`mels` bands; `pool` frames of 20 ms become one position; a sound has at most `max_seconds`."""

    mels: int = 80
    pool: int = 10
    max_seconds: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mels", "pool"):
            positive(name, getattr(self, name))
        if not 0 < self.max_seconds <= 3600:
            raise ValueError(f"max_seconds: expected a number in (0, 3600], got {self.max_seconds!r}")

    @property
    def max_samples(self) -> int:
        return int(self.max_seconds * RATE)

    def positions(self, samples: int) -> int:
        """Features of a sound of that many samples."""
        return math.ceil(math.ceil(math.ceil(samples / HOP) / STRIDE) / self.pool)


class AudioEncoder(Encoder):
    """`encoder(sounds, lengths)`: features [B, N, embedding_dim] of waveforms [B, samples] at 16 kHz, floating.

    `lengths` int64 [B] are the samples that each has (all, when None): what is behind them has no influence. A sound
    has `config.positions(length)` features; where it has fewer than N, zeros follow. Loudness does not count.
    """

    MODEL_TYPE, CONFIG = "fastgpt-audio", AudioConfig
    filters: Tensor  # [WINDOW / 2 + 1, mels]
    window: Tensor  # [WINDOW]

    def __init__(self, config: AudioConfig) -> None:
        super().__init__(config)
        dim = config.embedding_dim
        self.conv_1 = nn.Linear(WIDTH * config.mels, dim)
        self.conv_2 = nn.Linear(WIDTH * dim, dim)
        most = math.ceil(math.ceil(config.max_samples / HOP) / STRIDE)
        self.positions = PositionalEncoding(dim, most)
        self.register_buffer("filters", mel_filters(config.mels), persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.reset_parameters()

    def forward(self, sounds: Tensor, lengths: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.encode(sounds, lengths)[1] if labels is None else self.loss(labels, sounds, lengths)

    def encode(self, sounds: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        with torch.autocast(self.filters.device.type, enabled=False):  # a product of powers, from 1e-10 on
            frames, there = self.log_mel(sounds, lengths)
        dtype = self.conv_1.weight.dtype
        x = self._convolve(self.conv_1, frames.to(dtype), 1) * there[..., None]
        x = self._convolve(self.conv_2, x, STRIDE)
        there = there[:, ::STRIDE]
        x = self.blocks(self.positions(x), there) * there[..., None]
        # The mean of the frames of a position that are there.
        short = -x.shape[1] % config.pool
        x = nn.functional.pad(x, (0, 0, 0, short)).unflatten(1, (-1, config.pool)).sum(2)
        count = nn.functional.pad(there, (0, short)).unflatten(1, (-1, config.pool)).sum(2)[..., None]
        features = x / count.clamp(min=1)
        return x.sum(1) / count.sum(1), features, count[..., 0] > 0

    def log_mel(self, sounds: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """(frames fp32 [B, F, mels] in -1 to 1, where a sound's loudest is 1; which of them there are [B, F])."""
        check_floats("sounds", sounds, (None, None), self.filters.device)
        batch, samples = sounds.shape
        if not batch:
            raise ValueError("sounds: expected at least one, got none")
        if not 1 <= samples <= self.config.max_samples:
            raise ValueError(f"sounds: expected 1 to {self.config.max_samples} samples, got {samples}")
        if lengths is None:
            lengths = torch.full((batch,), samples, device=sounds.device)
        elif lengths.shape != (batch,) or lengths.dtype != torch.int64:
            raise ValueError(
                f"lengths: expected int64 of shape ({batch},), got {lengths.dtype} {tuple(lengths.shape)}"
            )
        elif lengths.device.type == "cpu" and not bool(((lengths >= 1) & (lengths <= samples)).all()):
            raise ValueError(f"lengths: expected 1 to {samples} samples, got {lengths.tolist()}")
        behind = torch.arange(samples, device=sounds.device) >= lengths[:, None]
        sounds = sounds.float().masked_fill(behind, 0)
        peak = sounds.abs().amax(dim=1, keepdim=True)
        sounds = sounds / peak.clamp(min=1e-30)  # of very loud ones the power would be infinite
        before, frames = (WINDOW - HOP) // 2, math.ceil(samples / HOP)
        padded = nn.functional.pad(sounds, (before, WINDOW + (frames - 1) * HOP - samples - before))
        spectrum = torch.stft(
            padded, WINDOW, HOP, window=self.window.float(), center=False, return_complex=True
        )
        power = spectrum.abs().square().transpose(1, 2) @ self.filters.float()  # [B, F, mels]
        there = torch.arange(frames, device=sounds.device) * HOP < lengths[:, None]
        there_too = there[..., None]
        log = power.clamp(min=1e-10).log10()
        loudest = log.masked_fill(~there_too, -torch.inf).amax(dim=(1, 2), keepdim=True)
        log = (log - loudest).clamp(min=-RANGE) * (2 / RANGE) + 1
        return log * there_too, there

    def _convolve(self, layer: nn.Linear, x: Tensor, stride: int) -> Tensor:
        """GELU of a convolution over x [B, F, C], zeros before and after: one product of the frames side by side."""
        padded = nn.functional.pad(x, (0, 0, 1, 1))
        starts = (x.shape[1] + stride - 1) // stride
        side_by_side = [padded[:, i : i + (starts - 1) * stride + 1 : stride] for i in range(WIDTH)]
        rows = torch.cat(side_by_side, dim=-1)  # [B, F / stride, WIDTH * C]
        return ops.linear(rows, layer.weight, layer.bias, activation="gelu", backend=self.config.backend)


def mel_filters(mels: int) -> Tensor:
    """Triangles over the frequencies of a spectrum, fp32 [WINDOW / 2 + 1, mels], equally far apart in mel, which is
    2595 log10(1 + f / 700 Hz) (O'Shaughnessy 1987)."""

    def mel(f: float) -> float:
        return 2595 * math.log10(1 + f / 700)

    edges = 700 * (10 ** (torch.linspace(mel(0), mel(RATE / 2), mels + 2, dtype=torch.float64) / 2595) - 1)
    f = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)[:, None]
    up = (f - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - f) / (edges[2:] - edges[1:-1])
    triangles: Any = torch.minimum(up, down).clamp(min=0)
    return triangles.float()
