"""The encoder of images: a Vision Transformer (Dosovitskiy et al. 2021) on the fused ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._core.validate import positive
from fastgpt.models.encoder import Encoder, EncoderConfig, check_floats

POOLS = ("mean", "class")


@dataclass(frozen=True, kw_only=True)
class VisionConfig(EncoderConfig):
    """Square images of `channels` planes, cut into squares of `patch_size`. What stands for the whole is the mean of
    the patches, or a class token of its own (`pool`)."""

    image_size: int
    patch_size: int
    channels: int = 3
    pool: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "patch_size", "channels"):
            positive(name, getattr(self, name))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of image_size={self.image_size}, got {self.patch_size}"
            )
        if self.pool not in POOLS:
            raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {self.pool!r}")

    @property
    def positions(self) -> int:
        """Features of an image."""
        return (self.image_size // self.patch_size) ** 2


class VisionEncoder(Encoder):
    """`encoder(images)`: features [B, (image_size / patch_size)^2, embedding_dim], row by row, of floating images
    [B, channels, image_size, image_size]."""

    MODEL_TYPE, CONFIG = "fastgpt-vision", VisionConfig

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        dim = config.embedding_dim
        self.patches = nn.Linear(config.channels * config.patch_size**2, dim)
        self.positions = nn.Parameter(torch.empty(config.positions, dim))
        self.class_token = nn.Parameter(torch.empty(dim)) if config.pool == "class" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(
            self.positions, std=0.5
        )  # patches are about 1: with 0.02 it learns three times slower
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.encode(images)[1] if labels is None else self.loss(labels, images)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, None]:
        config, weight = self.config, self.patches.weight
        size = config.image_size
        check_floats("images", images, (None, config.channels, size, size), weight.device)
        p, n, batch = config.patch_size, size // config.patch_size, images.shape[0]
        # A convolution whose stride is its width is one product of the patches: [B, n, n, C, p, p].
        cut = images.to(weight.dtype).unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5)
        rows = cut.reshape(batch, n * n, config.channels * p * p)
        x = ops.linear(rows, weight, self.patches.bias, backend=config.backend) + self.positions
        if self.class_token is None:
            features = self.blocks(x)
            return features.mean(dim=1), features, None
        both = self.blocks(torch.cat([self.class_token.expand(batch, 1, -1).to(x.dtype), x], dim=1))
        return both[:, 0], both[:, 1:], None
