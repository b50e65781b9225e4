"""The encoders of images and sounds beside the same in stock PyTorch, eager and compiled: forward and backward.

A small one of each, as the demos train it, and one of a usual size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import limits
from benchmarks.patched import Inputs, side_by_side
from benchmarks.results import Row
from fastgpt.models.audio import RATE, STRIDE, AudioConfig, AudioEncoder
from fastgpt.models.encoder import Encoder
from fastgpt.models.vision import VisionConfig, VisionEncoder
from fastgpt.tasks.digits import AUDIO, VISION

if TYPE_CHECKING:
    from benchmarks.suites import Budget, Options

LABELS = tuple(map(str, range(1000)))
SMALL = VisionConfig(
    image_size=224, patch_size=16, embedding_dim=384, num_heads=6, num_layers=12, labels=LABELS
)
TINY = AudioConfig(embedding_dim=384, num_heads=6, num_layers=4, labels=LABELS)  # the size of whisper-tiny
# (suite's name, case, configuration, inputs)
CASES: list[tuple[str, str, VisionConfig | AudioConfig, int]] = [
    ("vision", "digits-64x8x8", replace(VISION, dropout=0.0), 64),
    ("vision", "small-4x224x224", SMALL, 4),
    ("audio", "digits-64x0.7s", replace(AUDIO, dropout=0.0), 64),
    ("audio", "tiny-4x10s", TINY, 4),
]


class StockBlock(nn.Module):
    """Parameter names are those of `nn.Block`, so that its state dict loads."""

    def __init__(self, dim: int, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(dim, 3 * dim), "c_proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, hidden_dim), "c_proj": nn.Linear(hidden_dim, dim)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class StockEncoder(nn.Module):
    """What both have in common; `made_of` is the encoder whose weights and tables it takes."""

    def __init__(self, made_of: Any) -> None:
        super().__init__()
        config = made_of.config
        self.config = config
        self.h = nn.ModuleList(
            StockBlock(config.embedding_dim, config.hidden_dim, config.num_heads)
            for _ in range(config.num_layers)
        )
        self.ln_f = nn.LayerNorm(config.embedding_dim)
        self.head = nn.Linear(config.embedding_dim, len(config.labels))

    def blocks(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x)


class StockVision(StockEncoder):
    def __init__(self, made_of: VisionEncoder) -> None:
        super().__init__(made_of)
        self.patches = nn.Linear(made_of.patches.in_features, made_of.patches.out_features)
        self.positions = nn.Parameter(torch.empty_like(made_of.positions))
        self.load_state_dict(made_of.state_dict())

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        config = self.config
        kernel = self.patches.weight.view(-1, config.channels, config.patch_size, config.patch_size)
        x = (
            F.conv2d(images, kernel, self.patches.bias, stride=config.patch_size).flatten(2).mT
            + self.positions
        )
        x = self.blocks(x)
        return x if labels is None else F.cross_entropy(self.head(x.mean(1)).float(), labels)


class StockAudio(StockEncoder):
    """Of sounds of one length."""

    def __init__(self, made_of: AudioEncoder) -> None:
        super().__init__(made_of)
        dim = self.config.embedding_dim
        self.conv_1, self.conv_2 = nn.Linear(3 * self.config.mels, dim), nn.Linear(3 * dim, dim)
        self.load_state_dict(made_of.state_dict())
        self.positions = made_of.positions
        self.register_buffer("window", made_of.window, persistent=False)
        self.register_buffer("filters", made_of.filters, persistent=False)
        log_mel: Any = AudioEncoder.log_mel  # PyTorch's ops in both
        self.log_mel = partial(log_mel, self)

    def forward(self, sounds: Tensor, labels: Tensor | None = None) -> Tensor:
        x, _ = self.log_mel(sounds, None)
        for layer, stride in ((self.conv_1, 1), (self.conv_2, STRIDE)):
            kernel = layer.weight.unflatten(1, (3, -1)).mT
            x = F.gelu(F.conv1d(x.mT, kernel, layer.bias, stride, padding=1)).mT
        x = self.blocks(self.positions(x))
        return x if labels is None else F.cross_entropy(self.head(x.mean(1)).float(), labels)


def make(config: VisionConfig | AudioConfig, count: int) -> tuple[Encoder, StockEncoder, Inputs]:
    torch.manual_seed(0)
    labels = torch.randint(len(config.labels), (count,))
    if isinstance(config, VisionConfig):
        vision = VisionEncoder(config)
        images = torch.randn(count, config.channels, config.image_size, config.image_size)
        return vision, StockVision(vision), {"images": images, "labels": labels}
    audio = AudioEncoder(config)
    seconds = 0.7 if config.max_seconds < 10 else 10.0
    return (
        audio,
        StockAudio(audio),
        {"sounds": torch.randn(count, math.ceil(seconds * RATE)), "labels": labels},
    )


def jobs(
    options: Options, budget: Budget, meter: limits.LimitMeter
) -> list[tuple[str, Callable[[float], list[Row]]]]:
    return [
        (f"{name} {case} {dtype}", partial(rows, name, case, config, count, dtype, options, budget))
        for name, case, config, count in CASES
        for dtype in options.dtypes
        if dtype in ("fp32", "bf16")
    ]


def rows(
    name: str, case: str, config: VisionConfig | AudioConfig, count: int, dtype: str, options: Options,
    budget: Budget, seconds: float,
) -> list[Row]:  # fmt: skip
    ours, stock, inputs = make(config, count)
    return side_by_side(name, case, dtype, ours, stock, inputs, options, budget, seconds)
