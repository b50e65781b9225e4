"""Decoding with a GPT on the CPU at the speed of its memory: one call of C++ for each token, all layers in it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.models.gpt import GPT, check_ids
from fastgpt.nn import ACTIVATIONS

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class Decoder:
    """Next-token logits of `batch` sequences, one token at a time, with their keys and values kept.

    Args:
        model: on the CPU. Its weights are copied: later changes are not seen.
        weights: "fp32", "bf16", or "int8" with a scale for each output (largest magnitude / 127). Activations and
            sums are fp32; keys and values are bf16, with "fp32" fp32.
        batch: 1 to 16 sequences.
        max_length: tokens of a sequence, at most the model's max_seq_length, which it is when None.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: the C++ kernels are not there; the reason.

    Where one token of one sequence is decoded, every weight is needed for two operations: the time is that of
    reading them (Williams, Waterman, Patterson, "Roofline", 2009).
    """

    def __init__(
        self, model: GPT, *, weights: str = "bf16", batch: int = 1, max_length: int | None = None
    ) -> None:
        if not isinstance(model, GPT):
            raise TypeError(f"model: expected a fastgpt.GPT, got {type(model).__name__}")
        if weights not in WEIGHTS:
            raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
        if not isinstance(batch, int) or not 1 <= batch <= 16:
            raise ValueError(f"batch: expected 1 to 16 sequences, got {batch!r}")
        config = model.config
        most = config.max_seq_length
        length = most if max_length is None else max_length
        if not isinstance(length, int) or not 1 <= length <= most:
            raise ValueError(f"max_length: expected 1 to max_seq_length={most}, got {max_length!r}")
        device = model.wte.weight.device
        if device.type != "cpu":
            raise ValueError(f"model: expected it on the CPU, got {device}")
        try:
            from fastgpt_kernels.cpu import decode
        except ImportError as error:
            raise RuntimeError(f"Decoder: the cpu kernels cannot be used: {error}") from error
        self._decode = decode
        self.config, self.batch, self.max_length = config, batch, length
        self.weights = _pack(decode, model, WEIGHTS[weights])
        self._addresses = decode.table(self.weights)
        cache = torch.float32 if weights == "fp32" else torch.bfloat16
        shape = (
            config.num_layers,
            batch,
            config.num_heads,
            length,
            config.embedding_dim // config.num_heads,
        )
        self.keys, self.values = torch.zeros(shape, dtype=cache), torch.zeros(shape, dtype=cache)
        self.lengths = torch.zeros(batch, dtype=torch.int64)  # of each sequence, tokens seen

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [batch, vocab_size], fp32, of what follows when `tokens` [batch] are appended to the sequences.

        Raises:
            ValueError: a token that is none, or the padding; a sequence that is full.
        """
        if isinstance(tokens, Tensor):
            tokens = tokens.as_subclass(Tensor)  # of others the values would not be looked at
        check_ids("tokens", tokens, self.config.vocab_size, torch.device("cpu"))
        if self.config.pad_idx is not None and bool((tokens == self.config.pad_idx).any()):
            raise ValueError(
                f"tokens: expected none equal to pad_idx={self.config.pad_idx}: all are looked at"
            )
        if tokens.shape != (self.batch,):
            raise ValueError(f"tokens: expected shape ({self.batch},), got {tuple(tokens.shape)}")
        if int(self.lengths.max()) >= self.max_length:
            raise ValueError(
                f"tokens: expected at most max_length={self.max_length} in a sequence, got one more"
            )
        tokens = tokens.long().contiguous()
        logits = self._decode.decode_step(
            self.weights, self._addresses, tokens, self.lengths, self.keys, self.values
        )
        self.lengths += 1
        return logits

    def prefill(self, tokens: Tensor) -> Tensor:
        """The logits after the last of tokens [batch, T], T >= 1, which are appended one by one."""
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens: expected shape [batch, T] with T >= 1, got {tuple(tokens.shape)}")
        for column in tokens.unbind(1):
            logits = self.step(column)
        return logits

    def reset(self) -> None:
        """Forget all sequences."""
        self.lengths.zero_()

    @property
    def bytes_per_step(self) -> int:
        """What a step must read: every weight once, and the keys and values so far."""
        packed = [p for block in self.weights.blocks for p in block if isinstance(p, self._decode.Packed)]
        read = sum(t.nbytes for p in (*packed, self.weights.head) for t in p if t is not None)
        each = self.keys[:, 0, :, 0].nbytes + self.values[:, 0, :, 0].nbytes
        return read + each * int(self.lengths.sum())


def _pack(decode: Any, model: GPT, dtype: torch.dtype) -> Any:
    config = model.config

    def fp32(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(torch.float32, copy=True).contiguous()

    def norm(module: Any) -> Any:
        bias = torch.zeros_like(module.weight) if module.bias is None else module.bias
        return decode.Norm(fp32(module.weight), fp32(bias))

    def packed(layer: nn.Linear) -> Any:
        return decode.quantized(layer.weight, dtype)._replace(bias=fp32(layer.bias))

    stack: Any = model.h
    blocks = [
        decode.Block(
            norm(block.ln_1),
            packed(block.attn.c_attn),
            packed(block.attn.c_proj),
            norm(block.ln_2),
            packed(block.mlp.c_fc),
            packed(block.mlp.c_proj),
        )
        for block in stack
    ]
    embedding = decode.quantized(model.wte.weight, dtype)
    learned = config.positions == "learned"
    positions = model.wpe.weight if learned else model.positions.encoding
    return decode.Weights(
        embedding,
        fp32(positions),
        1.0 if learned else math.sqrt(config.embedding_dim),
        blocks,
        norm(model.ln_f),
        embedding if model.lm_head is None else packed(model.lm_head),
        config.num_heads,
        blocks[0].fc.weight.shape[0],
        config.layer_norm_eps,
        ACTIVATIONS[config.activation],
    )
