"""What encoders of images and of sounds have in common: bidirectional blocks, a head of their own, files."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._core.dispatch import Backend
from fastgpt.models import checkpoint
from fastgpt.models.gpt import GPTConfig
from fastgpt.nn import Block, LayerNorm

E = TypeVar("E", bound="Encoder")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The blocks as of `GPTConfig`; `labels` name the classes of the encoder's own task, and may be none."""

    embedding_dim: int
    num_heads: int
    num_layers: int
    hidden_dim: int | None = None
    dropout: float = 0.0
    labels: tuple[str, ...] = ()
    backend: Backend = None

    def __post_init__(self) -> None:
        like = GPTConfig(  # which checks them
            1, self.embedding_dim, self.num_heads, self.num_layers, 1,
            hidden_dim=self.hidden_dim, dropout=self.dropout,
        )  # fmt: skip
        object.__setattr__(self, "hidden_dim", like.hidden_dim)
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(set(self.labels)) != len(self.labels) or not all(isinstance(n, str) for n in self.labels):
            raise ValueError(f"labels: expected different names, got {self.labels}")

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any], source: str) -> C:
        known = {f.name for f in fields(cls)} - {"backend"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"{source}: expected the fields {', '.join(sorted(known))}, got {', '.join(unknown)}"
            )
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["backend"]
        return values


C = TypeVar("C", bound=EncoderConfig)


class Encoder(nn.Module):
    """`encoder(inputs)` gives features [B, N, embedding_dim]; `encoder(inputs, labels=labels)` the mean cross-entropy
    of its own task in nats, fp32, for int64 labels [B]; `encoder.classify(inputs)` the logits [B, len(labels)]."""

    MODEL_TYPE: ClassVar[str]
    CONFIG: ClassVar[type[EncoderConfig]]

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config: Any = config
        self.h = nn.ModuleList(
            Block(
                config.embedding_dim,
                config.num_heads,
                hidden_dim=config.hidden_dim,
                dropout=config.dropout,
                causal=False,
                backend=config.backend,
            )
            for _ in range(config.num_layers)
        )
        self.ln_f = LayerNorm(config.embedding_dim, backend=config.backend)
        self.head = nn.Linear(config.embedding_dim, len(config.labels)) if config.labels else None

    def reset_parameters(self) -> None:
        """Matrices normal with the variance 1 / inputs, into the residual stream less by 2 * layers."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith("c_proj"):
                    std /= math.sqrt(2 * self.config.num_layers)
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def encode(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """(what stands for the whole [B, D], features [B, N, D], which of them there are [B, N] or None for all)."""
        raise NotImplementedError

    def loss(self, labels: Tensor, *inputs: Any) -> Tensor:
        return ops.cross_entropy(self.classify(*inputs), labels, backend=self.config.backend)

    def classify(self, *inputs: Any) -> Tensor:
        if self.head is None:
            raise ValueError("labels: expected an encoder that has some in its configuration, got none")
        return ops.linear(
            self.encode(*inputs)[0], self.head.weight, self.head.bias, backend=self.config.backend
        )

    def blocks(self, stream: Tensor, mask: Tensor | None = None) -> Tensor:
        """The stream [B, N, D] after all blocks and the last norm; `mask` [B, N] is True for what is there."""
        delta: Tensor | None = None
        mask = None if mask is None else mask[:, None, None, :]
        block: Any
        for block in self.h:
            delta, stream = block.advance(delta, stream, mask)
        return self.ln_f(delta, stream)[0]

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """config.json and model.safetensors in a directory, each whole or not at all."""
        with checkpoint.atomic_files(path) as write:
            values = {"model_type": self.MODEL_TYPE, **self.config.to_dict()}
            write(checkpoint.CONFIG, checkpoint.json_bytes(values))
            write(checkpoint.WEIGHTS, checkpoint.tensor_bytes(self.state_dict()))

    @classmethod
    def from_pretrained(cls: type[E], path: str | os.PathLike[str], *, backend: Backend = None) -> E:
        """What `save_pretrained` wrote, in evaluation mode; OSError or ValueError that names the file."""
        directory = os.fspath(path)
        file = os.path.join(directory, checkpoint.CONFIG)
        values = checkpoint.read_json(file)
        kind = values.pop("model_type", None)
        if kind != cls.MODEL_TYPE:
            raise ValueError(f"{file}: expected the model_type {cls.MODEL_TYPE}, got {kind!r}")
        model = cls(replace(cls.CONFIG.from_dict(values, file), backend=backend))
        source, weights = checkpoint.load_tensors(directory)
        checkpoint.check_tensors(source, weights, model.state_dict())
        model.load_state_dict(weights, assign=True)
        return model.eval()


def check_floats(name: str, x: Any, shape: tuple[int | None, ...], device: torch.device) -> None:
    """TypeError or ValueError unless `x` is a floating tensor of that shape (None: any size) on that device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected it on {device} as the model, got {x.device}")
