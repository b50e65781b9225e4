"""Options of the tasks that learn from examples, as the command line shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Learning:
    """How to learn."""

    steps: int = 1000
    """Updates of the weights."""
    batch_size: int = 32
    """Examples a batch."""
    lr: float | None = None
    """Peak learning rate (AdamW); without it 1e-3, or 2e-4 where a model is given."""
    held_out: float = 0.05
    """Fraction of the examples that are not trained on, to measure the loss on."""
    bf16: bool = False
    """Compute in bfloat16 by autocast."""
    device: str = "auto"
    """Where to learn: cpu, cuda or auto."""
    seed: int = 0
    """Of the initial weights, of the order of the examples, and of which are held out."""


@dataclass(frozen=True)
class Fresh:
    """The GPT to begin with, where no model is given."""

    vocab_size: int = 1024
    """Tokens of the BPE, which is trained on the examples."""
    embedding_dim: int = 128
    """Width of the model."""
    num_heads: int = 4
    """Attention heads a layer."""
    num_layers: int = 4
    """Transformer blocks."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """Learned positions, or the sinusoidal encoding."""
    dropout: float = 0.0
    """Probability, on the embeddings and on every branch."""
    max_length: int | None = None
    """Tokens of its context; without it some more than the longest example has."""


LEARNING, FRESH = Learning(), Fresh()  # what is done where nothing else is said


@dataclass(frozen=True)
class EncoderSizes:
    """An encoder of images or sounds."""

    embedding_dim: int = 64
    """Width of the model."""
    num_heads: int = 4
    """Attention heads a layer."""
    num_layers: int = 3
    """Transformer blocks."""
    dropout: float = 0.1
    """Probability, on every branch."""


ENCODER_LR = 2e-3
ENCODER, ENCODER_LEARNING = EncoderSizes(), Learning(steps=600, batch_size=64, lr=ENCODER_LR, held_out=0.25)
