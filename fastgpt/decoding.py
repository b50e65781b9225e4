"""Decoding with a GPT on the CPU at the speed of its memory: one call of C++ for each token, all layers in it; a
prompt goes through the tiled attention and the products of many rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._core.dispatch import BackendError
from fastgpt.models.gpt import GPT, check_ids
from fastgpt.nn import ACTIVATIONS

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


MOST_ROWS = 64  # sequences at once
CPU = "cpu"


class Features(NamedTuple):
    """What stands in some places of a prompt instead of a token: of an image, or a sound."""

    places: Tensor  # int64 [N], ascending
    values: Tensor  # [N, embedding_dim]


class Decoder:
    """Next-token logits of up to `batch` sequences, one token at a time, with their keys and values kept.

    Args:
        model: on the CPU. Its weights are copied: later changes are not seen.
        weights: "fp32", "bf16", or "int8" with a scale for each output (largest magnitude / 127). Activations and
            sums are fp32; keys and values are bf16, with "fp32" fp32. Where the CPU multiplies pairs (AVX-512 BF16
            and VNNI), activations meet bf16 weights as bf16, subnormals as zero, and int8 weights as 16-bit integers
            of which the largest in a row uses all.
        batch: 1 to 64 sequences; the rows in which their keys and values lie.
        max_length: tokens of a sequence, at most the model's max_seq_length, which it is when None.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendError: the C++ kernels are not there; the reason.

    What `step` gives for a sequence is bitwise the same whatever sequences are decoded beside it, and however many
    threads there are. Where one token of one sequence is decoded, every weight is needed for two operations: the time
    is that of reading them (Williams, Waterman, Patterson, "Roofline", 2009).
    """

    def __init__(
        self, model: GPT, *, weights: str = "bf16", batch: int = 1, max_length: int | None = None
    ) -> None:
        if not isinstance(model, GPT):
            raise TypeError(f"model: expected a fastgpt.GPT, got {type(model).__name__}")
        if weights not in WEIGHTS:
            raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
        if not isinstance(batch, int) or not 1 <= batch <= MOST_ROWS:
            raise ValueError(f"batch: expected 1 to {MOST_ROWS} sequences, got {batch!r}")
        config = model.config
        most = config.max_seq_length
        length = most if max_length is None else max_length
        if not isinstance(length, int) or not 1 <= length <= most:
            raise ValueError(f"max_length: expected 1 to max_seq_length={most}, got {max_length!r}")
        device = model.wte.weight.device
        if device.type != CPU:
            raise ValueError(f"model: expected it on the CPU, got {device}")
        try:
            from fastgpt_kernels.cpu import decode
        except ImportError as error:
            raise BackendError(f"Decoder: the cpu kernels cannot be used: {error}") from error
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

    def step(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [R, vocab_size], fp32, of what follows when `tokens` [R] are appended to the sequences in `rows`.

        Args:
            tokens: int64 or int32 [R].
            rows: int64 [R], none twice; all of the batch, in order, when None.

        Raises:
            TypeError, ValueError: a token that is none, or the padding; a row that is none; a sequence that is full.
        """
        if rows is None:
            rows = torch.arange(self.batch)
        _check_tensor("rows", rows)
        _check_tensor("tokens", tokens)
        tokens = self._checked(tokens, rows.shape)
        ids = rows.tolist()
        if rows.dtype != torch.int64 or len({*ids}) != len(ids) or not all(0 <= i < self.batch for i in ids):
            raise ValueError(f"rows: expected different int64 of 0 to {self.batch - 1}, got {ids}")
        positions = self.lengths[rows]
        if len(ids) and int(positions.max()) >= self.max_length:
            raise ValueError(
                f"tokens: expected at most max_length={self.max_length} in a sequence, got one more"
            )
        logits = self._decode.decode_step(
            self.weights, self._addresses, tokens, positions, rows.contiguous(), self.keys, self.values
        )
        self.lengths[rows] += 1
        return logits

    def prefill(self, tokens: Tensor) -> Tensor:
        """The logits [batch, vocab_size] after the last of tokens [batch, T], T >= 1, which are appended."""
        _check_tensor("tokens", tokens)
        if tokens.dim() != 2 or tokens.shape[0] != self.batch or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens: expected shape ({self.batch}, T) with T >= 1, got {tuple(tokens.shape)}"
            )
        return torch.cat([self.fill(row, ids) for row, ids in enumerate(tokens)])

    def fill(self, row: int, tokens: Tensor) -> Tensor:
        """The logits [1, vocab_size] after the last of tokens [T], T >= 1, appended to the sequence in `row`."""
        _check_tensor("tokens", tokens)
        if len(tokens) < 1:
            raise ValueError("tokens: expected at least one, got none")
        self._check_row("row", row)
        tokens = self._check_room(row, tokens)
        self.append(row, tokens[:-1])
        return self.step(tokens[-1:], torch.tensor([row]))

    @torch.no_grad()
    def append(self, row: int, tokens: Tensor, features: Features | None = None) -> None:
        """Tokens [T] are appended to the sequence in `row`; those of an empty one go through the layers together.

        Only an empty sequence takes `features`, in places of these tokens.
        """
        _check_tensor("tokens", tokens)
        self._check_row("row", row)
        tokens = self._check_room(row, tokens)
        if features is not None:
            self._check_features(row, len(tokens), features)
        if int(self.lengths[row]) == 0 and len(tokens):
            self._run_through(row, tokens, features)
            self.lengths[row] = len(tokens)
            return
        for token in tokens:
            self.step(token[None], torch.tensor([row]))

    def _check_room(self, row: int, tokens: Tensor) -> Tensor:
        tokens = self._checked(tokens, tokens.shape[:1])
        if int(self.lengths[row]) + len(tokens) > self.max_length:
            raise ValueError(
                f"tokens: expected at most max_length={self.max_length} in a sequence, got "
                f"{int(self.lengths[row]) + len(tokens)}"
            )
        return tokens

    def _check_features(self, row: int, length: int, features: Features) -> None:
        places, values = features
        if int(self.lengths[row]):
            raise ValueError(
                f"features: expected them in an empty sequence, got {int(self.lengths[row])} tokens"
            )
        if values.shape != (len(places), self.config.embedding_dim):
            wanted = (len(places), self.config.embedding_dim)
            raise ValueError(f"features: expected shape {wanted}, got {tuple(values.shape)}")
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < length:
            raise ValueError(f"features: expected places of 0 to {length - 1}, got {places.tolist()}")

    def _run_through(self, row: int, tokens: Tensor, features: Features | None) -> None:
        """The keys and values of a sequence's first tokens [T]."""
        w, length = self.weights, len(tokens)
        x = _rows_of(w.embedding, tokens) * w.embedding_scale  # fp32 [T, D]
        if features is not None:
            x[features.places] = features.values.float()
        x = x + w.positions[:length]
        for layer, block in enumerate(w.blocks):
            y = _normed(x, block.ln_1, w.eps)
            qkv = self._through(block.qkv, y)
            heads = qkv.view(length, 3, w.heads, -1).transpose(0, 2)  # [H, 3, T, D / H]
            self.keys[layer, row, :, :length], self.values[layer, row, :, :length] = heads[:, 1], heads[:, 2]
            if layer + 1 == len(w.blocks):
                return  # what follows is needed for the last token alone
            attended = ops.attention_qkv(qkv[None], w.heads, causal=True, backend=CPU)
            x = x + self._through(block.proj, attended[0].transpose(0, 1).reshape(length, -1))
            y = _normed(x, block.ln_2, w.eps)
            hidden = self._through(block.fc, y, "gelu_tanh" if w.approximate == "tanh" else "gelu")
            x = x + self._through(block.out, hidden)

    def _through(self, layer: Any, x: Tensor, activation: str | None = None) -> Tensor:
        """act(x @ weight.T + bias)."""
        weight, bias = layer.weight, layer.bias
        if layer.scale is not None:
            return self._decode.int8_linear(x.float(), layer, activation)
        bias = None if bias is None else bias.to(weight.dtype)
        return ops.linear(x.to(weight.dtype), weight, bias, activation=activation, backend=CPU)

    def _checked(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        tokens = tokens.as_subclass(Tensor)  # of a subclass the values would not be looked at
        check_ids("tokens", tokens, self.config.vocab_size, torch.device(CPU))
        if self.config.pad_idx is not None and bool((tokens == self.config.pad_idx).any()):
            raise ValueError(
                f"tokens: expected none equal to pad_idx={self.config.pad_idx}: all are looked at"
            )
        if tokens.shape != shape:
            raise ValueError(f"tokens: expected shape {tuple(shape)}, got {tuple(tokens.shape)}")
        return tokens.long().contiguous()

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of the sequence in row `source` are the whole of that in `target` from now on."""
        self._check_row("source", source)
        self._check_row("target", target)
        if not 0 <= length <= int(self.lengths[source]):
            raise ValueError(f"length: expected 0 to {int(self.lengths[source])}, got {length}")
        for kept in (self.keys, self.values):
            kept[:, target, :, :length] = kept[:, source, :, :length]
        self.lengths[target] = length

    def reset(self, row: int | None = None) -> None:
        """Forget the sequence in `row`, or all."""
        if row is None:
            self.lengths.zero_()
        else:
            self._check_row("row", row)
            self.lengths[row] = 0

    def _check_row(self, name: str, row: int) -> None:
        if not isinstance(row, int) or not 0 <= row < self.batch:
            raise ValueError(f"{name}: expected one of 0 to {self.batch - 1}, got {row!r}")

    @property
    def bytes_per_step(self) -> int:
        """What a step must read: every weight once, and the keys and values so far."""
        packed = [p for block in self.weights.blocks for p in block if isinstance(p, self._decode.Packed)]
        read = sum(t.nbytes for p in (*packed, self.weights.head) for t in p if t is not None)
        each = self.keys[:, 0, :, 0].nbytes + self.values[:, 0, :, 0].nbytes
        return read + each * int(self.lengths.sum())


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def rounded(weight: Tensor, dtype: torch.dtype) -> Any:
    """A product's weight [n, k] as a decoder keeps it: (weight, scale [n] or None, None)."""
    from fastgpt_kernels.cpu.decode import quantized

    return quantized(weight, dtype)


def _rows_of(embedding: Any, tokens: Tensor) -> Tensor:
    rows = embedding.weight[tokens].float()
    return rows if embedding.scale is None else rows * embedding.scale[tokens, None]


def _normed(x: Tensor, norm: Any, eps: float) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, eps, backend=CPU)


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
