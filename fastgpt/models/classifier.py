"""A class for a text: a linear layer on what a GPT has made of the text's last token."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._core.dispatch import Backend
from fastgpt.models import checkpoint
from fastgpt.models.gpt import GPT, GPTConfig, check_tokens

MODEL_TYPE = "fastgpt-classifier"


class Classifier(nn.Module):
    """`model(tokens, last)` gives logits [B, classes] of texts [B, T], filled up on the right.

    `last` [B], int64, is the place of each text's last token: what comes after it is never looked at.
    `model(tokens, last, targets)` gives the mean cross-entropy in nats, fp32, for classes [B].

    Args:
        gpt: the model that reads the text; it is trained with the head.
        labels: what the classes are called, each once, in the order of the logits; saved with the model.
    """

    def __init__(self, gpt: GPT, labels: Sequence[str]) -> None:
        super().__init__()
        if len(set(labels)) != len(labels) or len(labels) < 2 or not all(isinstance(x, str) for x in labels):
            raise ValueError(f"labels: expected at least two different texts, got {list(labels)}")
        self.gpt, self.labels = gpt, tuple(labels)
        self.head = nn.Linear(gpt.config.embedding_dim, len(labels))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, last: Tensor, targets: Tensor | None = None) -> Tensor:
        config = self.gpt.config
        check_tokens(tokens, None, config, self.gpt.wte.weight.device)
        hidden = self.gpt.hidden(self.gpt.embed(tokens), tokens)
        seen = hidden[torch.arange(len(tokens), device=tokens.device), last]  # [B, D]
        logits = ops.linear(seen, self.head.weight, self.head.bias, backend=config.backend)
        return logits if targets is None else ops.cross_entropy(logits, targets, backend=config.backend)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json and then model.safetensors into the directory; each replaces an old one whole."""
        with checkpoint.atomic_files(path) as write:
            self.write_files(write)

    def write_files(self, write: checkpoint.Write) -> None:
        config = {"model_type": MODEL_TYPE, "labels": self.labels, "gpt": self.gpt.config.to_dict()}
        write(checkpoint.CONFIG, checkpoint.json_bytes(config))
        write(checkpoint.WEIGHTS, checkpoint.tensor_bytes(self.state_dict()))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, backend: Backend = None) -> Classifier:
        """The model that `save_pretrained` wrote into a directory, on the CPU, in evaluation mode.

        Raises:
            OSError, ValueError: naming the file, what was expected and what came.
        """
        file = os.path.join(path, checkpoint.CONFIG)
        values = checkpoint.read_json(file)
        labels, config = values.get("labels"), values.get("gpt")
        if (
            values.get("model_type") != MODEL_TYPE
            or not isinstance(labels, list)
            or not isinstance(config, dict)
        ):
            raise ValueError(
                f'{file}: expected "model_type": "{MODEL_TYPE}", labels and a gpt, got another model'
            )
        gpt = GPT(GPTConfig(**{**GPTConfig.from_dict(config, file).to_dict(), "backend": backend}))
        model = cls(gpt, labels)
        source, weights = checkpoint.load_tensors(os.fspath(path))
        checkpoint.check_tensors(source, weights, model.state_dict())
        model.load_state_dict(weights, assign=True)
        return model.eval()
