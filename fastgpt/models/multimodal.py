"""A GPT that reads images and sounds among its text: each takes the places of tokens that stand for it, projected to
the width of the text (as in LLaVA: Liu et al. 2023, section 4.1)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._core.dispatch import Backend
from fastgpt.models import checkpoint
from fastgpt.models.audio import AudioEncoder
from fastgpt.models.encoder import Encoder
from fastgpt.models.gpt import GPT, check_tokens
from fastgpt.models.vision import VisionEncoder
from fastgpt.nn import LayerNorm

MODEL_TYPE = "fastgpt-multimodal"
PARTS = ("text", "vision", "audio")


class Projector(nn.Module):
    """Features [..., D] to the width of the text: a norm, a product, GELU, a product."""

    def __init__(self, dim: int, text_dim: int, *, std: float, backend: Backend = None) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, backend=backend)
        self.first, self.second = nn.Linear(dim, text_dim), nn.Linear(text_dim, text_dim)
        self.backend = backend
        nn.init.normal_(self.first.weight, std=dim**-0.5)
        nn.init.normal_(self.second.weight, std=std)  # features about as large as embeddings
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        w1, w2 = self.first, self.second
        return ops.mlp(
            self.norm(x), w1.weight, w1.bias, w2.weight, w2.bias, activation="gelu", backend=self.backend
        )


class MultimodalGPT(nn.Module):
    """`model(tokens, targets, images, sounds, lengths)`, of which all but the tokens may be None.

    Logits [B, T, vocab_size] for tokens [B, T], with targets the loss, both as of `GPT`. Every image is
    `vision.config.positions` tokens `image_token` in a row, every sound `audio.config.positions(length)` tokens
    `sound_token`; images [N, C, H, W] and sounds [M, samples] (int64 lengths [M]) come in the order in which they
    stand in the batch, sample after sample. A sample may have any number of each, in any order, or none.

    Args:
        text, vision, audio: the parts, of which each has learned by itself or not at all. They are not copied.
        image_token, sound_token: ids in the text's vocabulary, where there is such a part.

    Raises:
        TypeError, ValueError: naming the argument; the tokens that stand for images or sounds are not as many as
            the features.
    """

    def __init__(
        self,
        text: GPT,
        *,
        vision: VisionEncoder | None = None,
        audio: AudioEncoder | None = None,
        image_token: int | None = None,
        sound_token: int | None = None,
    ) -> None:
        super().__init__()
        self.text, self.vision, self.audio = text, vision, audio
        self.image_token, self.sound_token = image_token, sound_token
        self.image_projector, self.sound_projector = self._projector(vision), self._projector(audio)
        for name, token, part in (("image", image_token, vision), ("sound", sound_token, audio)):
            if (token is None) != (part is None):
                raise ValueError(f"{name}_token: expected one exactly where there is an encoder, got {token}")
            if token is not None and token == text.config.pad_idx:
                raise ValueError(
                    f"{name}_token: expected another than pad_idx, which nothing sees, got {token}"
                )
            if token is not None and not 0 <= token < text.config.vocab_size:
                raise ValueError(
                    f"{name}_token: expected an id in [0, {text.config.vocab_size}), got {token}"
                )
        if image_token is not None and image_token == sound_token:
            raise ValueError(f"sound_token: expected another than the image_token, got {sound_token}")

    @property
    def config(self) -> Any:
        """The text's configuration: vocabulary, padding, context."""
        return self.text.config

    def _projector(self, encoder: Encoder | None) -> Projector | None:
        config = self.text.config
        if encoder is None:
            return None
        size = float(self.text.wte.weight.detach().std())
        if config.positions == "sinusoidal":
            size *= config.embedding_dim**0.5  # as the embeddings are scaled
        return Projector(
            encoder.config.embedding_dim, config.embedding_dim, std=size * config.embedding_dim**-0.5,
            backend=config.backend,
        )  # fmt: skip

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        images: Tensor | None = None,
        sounds: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        text = self.text
        check_tokens(tokens, targets, text.config, text.wte.weight.device)
        features, places = self.features(tokens, images, sounds, lengths)
        stream = text.embed(tokens.long(), features, places)
        return text.head(text.hidden(stream, tokens), targets)

    def features(
        self, tokens: Tensor, images: Tensor | None, sounds: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(projected features [N, D] in the order of their places, the places [B, T], True for each), or Nones."""
        seen = self._seen(images)
        heard = self._heard(sounds, lengths)
        places = torch.zeros_like(tokens, dtype=torch.bool)
        for name, token, found in (
            ("images", self.image_token, seen),
            ("sounds", self.sound_token, heard),
        ):
            where = None if token is None else tokens == token
            wanted, given = 0 if where is None else int(where.sum()), 0 if found is None else len(found)
            if wanted != given:
                raise ValueError(
                    f"{name}: expected {wanted} features, as many as tokens {token}, got {given}"
                )
            if where is not None:
                places |= where
        parts = [part for part in (seen, heard) if part is not None]
        if not parts:
            return None, None
        if len(parts) == 1:
            return parts[0], places
        # Both kinds, each in its own order, in the order of all.
        is_image = tokens[places].eq(self.image_token or 0)
        order = torch.empty_like(is_image, dtype=torch.int64)
        order[is_image] = torch.arange(len(parts[0]), device=order.device)
        order[~is_image] = torch.arange(len(parts[1]), device=order.device) + len(parts[0])
        return torch.cat([part.to(parts[0].dtype) for part in parts])[order], places

    def _seen(self, images: Tensor | None) -> Tensor | None:
        if images is None:
            return None
        if self.vision is None or self.image_projector is None:
            raise ValueError("images: expected none, the model has no encoder for them")
        return self.image_projector(self.vision(images)).flatten(0, 1)

    def _heard(self, sounds: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        if sounds is None:
            return None
        if self.audio is None or self.sound_projector is None:
            raise ValueError("sounds: expected none, the model has no encoder for them")
        _, features, there = self.audio.encode(sounds, lengths)
        return self.sound_projector(features[there])

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """The parts in directories of their names, each as it saves itself, then config.json and the projectors."""
        for name in PARTS:
            part: Any = getattr(self, name)
            if part is not None:
                part.save_pretrained(os.path.join(path, name))
        state = {n: t for n, t in self.state_dict().items() if n.partition(".")[0] not in PARTS}
        values = {
            "model_type": MODEL_TYPE, "image_token": self.image_token, "sound_token": self.sound_token
        }  # fmt: skip
        with checkpoint.atomic_files(path) as write:
            write(checkpoint.CONFIG, checkpoint.json_bytes(values))
            write(checkpoint.WEIGHTS, checkpoint.tensor_bytes(state))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, backend: Backend = None) -> MultimodalGPT:
        """What `save_pretrained` wrote, in evaluation mode; OSError or ValueError that names the file."""
        path = os.fspath(path)
        file = os.path.join(path, checkpoint.CONFIG)
        values = checkpoint.read_json(file)
        if values.pop("model_type", None) != MODEL_TYPE or set(values) != {"image_token", "sound_token"}:
            raise ValueError(f"{file}: expected the configuration of a {MODEL_TYPE}, got another")
        parts: dict[str, Any] = {"text": GPT.from_pretrained(os.path.join(path, "text"), backend=backend)}
        for name, kind, token in (("vision", VisionEncoder, "image"), ("audio", AudioEncoder, "sound")):
            if values[f"{token}_token"] is not None:
                parts[name] = kind.from_pretrained(os.path.join(path, name), backend=backend)
        model = cls(**parts, **values)
        source, weights = checkpoint.load_tensors(path)
        own = {n: t for n, t in model.state_dict().items() if n.partition(".")[0] not in PARTS}
        checkpoint.check_tensors(source, weights, own)
        model.load_state_dict(weights, strict=False, assign=True)
        return model.eval()
