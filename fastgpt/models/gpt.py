"""The GPT: a decoder-only transformer in GPT-2's arrangement (Radford et al. 2019) on the fused ops."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgpt import ops
from fastgpt._core.dispatch import Backend
from fastgpt._core.validate import positive
from fastgpt.models import checkpoint, hugging_face
from fastgpt.nn import ACTIVATIONS, Block, LayerNorm, PositionalEncoding

IGNORE_INDEX = -100  # targets that do not count, as in F.cross_entropy
POSITIONS = ("learned", "sinusoidal")
MODEL_TYPE = "fastgpt"  # in config.json, where it is not GPT-2's


@dataclass(frozen=True)
class GPTConfig:
    """Everything that defines a GPT; `backend` only says which kernels run it and is not saved.

    `positions`: "learned" (GPT-2), or "sinusoidal", where token embeddings are scaled by sqrt(embedding_dim)
    as in "Attention Is All You Need", section 3.4. `dropout` acts on the output of every branch and, unless
    `embedding_dropout` is given, on the embeddings; `attention_dropout` on attention's probabilities. `hidden_dim`
    defaults to 4 * embedding_dim. `eos_idx` is the token that ends a text; the model itself does not look at it.
    """

    vocab_size: int
    embedding_dim: int
    num_heads: int
    num_layers: int
    max_seq_length: int
    pad_idx: int | None = None
    hidden_dim: int | None = None
    positions: str = "learned"
    activation: str = "gelu_tanh"
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    bias: bool = True
    tie_output: bool = True
    layer_norm_eps: float = 1e-5
    eos_idx: int | None = None
    backend: Backend = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "embedding_dim",
            "num_heads",
            "num_layers",
            "max_seq_length",
            "hidden_dim",
        ):
            value = getattr(self, name)
            if name == "hidden_dim" and value is None:
                object.__setattr__(self, name, 4 * self.embedding_dim)
            else:
                positive(name, value)
        if self.embedding_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embedding_dim={self.embedding_dim}, got {self.num_heads}"
            )
        for name in ("pad_idx", "eos_idx"):
            idx = getattr(self, name)
            if idx is not None and (
                isinstance(idx, bool) or not isinstance(idx, int) or not 0 <= idx < self.vocab_size
            ):
                raise ValueError(
                    f"{name}: expected None or a token id in [0, {self.vocab_size}), got {idx!r}"
                )
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {self.positions!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        for name in ("dropout", "embedding_dropout", "attention_dropout"):
            p = getattr(self, name)
            if p is None and name == "embedding_dropout":
                continue  # as `dropout`, also in a copy with another one
            if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {p!r}")
        if not isinstance(self.layer_norm_eps, (int, float)) or not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps: expected a number > 0, got {self.layer_norm_eps!r}")
        for name in ("bias", "tie_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")

    @property
    def input_dropout(self) -> float:
        """The dropout on the embeddings."""
        return self.dropout if self.embedding_dropout is None else self.embedding_dropout

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> GPTConfig:
        known = [f.name for f in fields(cls) if f.name != "backend"]
        required = ("vocab_size", "embedding_dim", "num_heads", "num_layers", "max_seq_length")
        unknown = sorted(set(values) - set(known))
        missing = [name for name in required if name not in values]
        if unknown or missing:
            what = f"unexpected {', '.join(unknown)}" if unknown else f"no {', '.join(missing)}"
            raise ValueError(f"{source}: expected the fields {', '.join(known)}, got {what}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["backend"]
        return values


class GPT(nn.Module):
    """`GPT(vocab_size, embedding_dim, num_heads, num_layers, max_seq_length, pad_idx)` or `GPT(GPTConfig(...))`.

    `model(tokens)` gives logits [B, T, vocab_size] for int64 or int32 tokens [B, T];
    `model(tokens, targets)` gives the mean cross-entropy in nats, fp32, where targets [B, T] are already
    shifted (targets[t] is what follows tokens[t]) and those equal to `pad_idx` or -100 do not count.
    Tokens equal to `pad_idx` are hidden from attention.
    """

    def __init__(
        self,
        vocab_size: int | GPTConfig,
        embedding_dim: int | None = None,
        num_heads: int | None = None,
        num_layers: int | None = None,
        max_seq_length: int | None = None,
        pad_idx: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(vocab_size, GPTConfig):
            if options or any(
                a is not None for a in (embedding_dim, num_heads, num_layers, max_seq_length, pad_idx)
            ):
                raise TypeError("GPT(config): expected nothing beside the GPTConfig")
            config = vocab_size
        else:
            sizes: tuple[Any, ...] = (embedding_dim, num_heads, num_layers, max_seq_length, pad_idx)
            config = GPTConfig(vocab_size, *sizes, **options)  # which checks them
        self.config = config
        dim = config.embedding_dim
        self.wte = nn.Embedding(config.vocab_size, dim, padding_idx=config.pad_idx)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.max_seq_length, dim)
        else:
            self.positions = PositionalEncoding(dim, config.max_seq_length, config.pad_idx)
        self.h = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                hidden_dim=config.hidden_dim,
                activation=config.activation,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                bias=config.bias,
                eps=config.layer_norm_eps,
                backend=config.backend,
            )
            for _ in range(config.num_layers)
        )
        self.ln_f = LayerNorm(dim, config.layer_norm_eps, bias=config.bias, backend=config.backend)
        # Tied, the head has no parameter of its own: it is the token embedding, transposed.
        self.lm_head = None if config.tie_output else nn.Linear(dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: normal(0, 0.02), and 1/sqrt(2 * layers) of it into the residual stream."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith("c_proj")
                std = 0.02 / math.sqrt(2 * self.config.num_layers) if residual else 0.02
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if module.padding_idx is not None:
                    with torch.no_grad():
                        module.weight[module.padding_idx].zero_()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        config = self.config
        check_tokens(tokens, targets, config, self.wte.weight.device)
        return self.head(self.hidden(self.embed(tokens), tokens), targets)

    def hidden(self, stream: Tensor, tokens: Tensor) -> Tensor:
        """What the head sees, [B, T, embedding_dim], of an embedded stream; padding among `tokens` is hidden."""
        pad = self.config.pad_idx
        mask = None if pad is None else (tokens != pad)[:, None, None, :]  # [B, 1, 1, T]
        delta: Tensor | None = None
        block: Any  # a Block, or what wraps one
        for block in self.h:
            delta, stream = block.advance(delta, stream, mask)
        return self.ln_f(delta, stream)[0]

    def head(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """Logits of hidden states, or with targets the loss."""
        config = self.config
        weight = self.wte.weight if self.lm_head is None else self.lm_head.weight
        if targets is None:
            return ops.linear(x, weight, backend=config.backend)
        labels = counted(targets, config.pad_idx)
        return ops.linear_cross_entropy(x, weight, labels, ignore_index=IGNORE_INDEX, backend=config.backend)

    def embed(self, tokens: Tensor, features: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """The stream [B, T, D] that enters the first block.

        Features [N, D] take, in order, the places of as many tokens as `places` [B, T] is True for; what stands
        there as a token does not count. Positions are added to them as to tokens.
        """
        config, learned = self.config, self.config.positions == "learned"
        fused = learned and features is None
        x = ops.embedding(
            tokens.long(),
            self.wte.weight,
            self.wpe.weight if fused else None,
            padding_idx=config.pad_idx,
            backend=config.backend,
        )
        x = x if learned else x * math.sqrt(config.embedding_dim)
        if features is not None and places is not None:
            x = x.masked_scatter(places[..., None], features.to(x.dtype))
        if not learned:
            x = self.positions(x, tokens)
        elif not fused:
            x = x + self.wpe.weight[: tokens.shape[1]]
        p = config.input_dropout
        return F.dropout(x, p) if p and self.training else x

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json and then model.safetensors into the directory; each replaces an old one whole.

        In the layout of Hugging Face's GPT-2, which `transformers.GPT2LMHeadModel.from_pretrained` loads; a model
        that GPT-2's options cannot describe (sinusoidal positions, no biases) in our own.
        """
        with checkpoint.atomic_files(path) as write:
            self.write_files(write)

    def write_files(self, write: checkpoint.Write) -> None:
        values, state = hugging_face.config_values(self.config.to_dict()), self.state_dict()
        if values is None:
            values = {"model_type": MODEL_TYPE, **self.config.to_dict()}
        else:
            state = hugging_face.to_layout(state)
        write(checkpoint.CONFIG, checkpoint.json_bytes(values))
        write(checkpoint.WEIGHTS, checkpoint.tensor_bytes(state))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, backend: Backend = None) -> GPT:
        """The model saved in a directory, in the dtype it was saved in, on the CPU, in evaluation mode.

        Its weights are the file's, mapped into memory and read as they are needed: replace the file, as
        `save_pretrained` does, but do not write into it while the model lives.

        Args:
            path: a directory that `save_pretrained` or transformers wrote (GPT-2; in one file or in shards), or a
                name on the Hugging Face hub.
            backend: which kernels run it.

        Raises:
            OSError, ValueError: naming the file, what was expected and what came.
        """
        directory = hugging_face.locate(path)
        config_file = os.path.join(directory, checkpoint.CONFIG)
        values = checkpoint.read_json(config_file)
        own = values.get("model_type", MODEL_TYPE) == MODEL_TYPE
        if own:
            values.pop("model_type", None)
        else:
            values = hugging_face.config_fields(values, config_file)
        config = GPTConfig.from_dict(values, config_file)
        with _Unfilled():
            model = cls(GPTConfig(**{**config.to_dict(), "backend": backend}))
        state = model.state_dict()
        if own:
            source, weights = checkpoint.load_tensors(directory)
            checkpoint.check_tensors(source, weights, state)
        else:
            weights = hugging_face.read(directory, state)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def extra_repr(self) -> str:
        return f"max_seq_length={self.config.max_seq_length}, tie_output={self.config.tie_output}"


class _Unfilled(TorchFunctionMode):
    """Parameters that are about to be replaced keep what their memory holds: nothing is drawn, no page is touched.

    The meta device would do so too, and import a second's worth of modules.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (
            Tensor.normal_,
            Tensor.uniform_,
            Tensor.zero_,
        ):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def check_tokens(tokens: Tensor, targets: Tensor | None, config: GPTConfig, device: torch.device) -> None:
    """Types, shapes, dtypes and devices always; the values only where looking is free: eager, on the CPU."""
    check_ids("tokens", tokens, config.vocab_size, device)
    if tokens.dim() != 2:
        raise ValueError(f"tokens: expected shape [B, T], got {tuple(tokens.shape)}")
    if tokens.shape[1] > config.max_seq_length:
        raise ValueError(
            f"tokens: expected at most max_seq_length={config.max_seq_length} a sequence, got {tokens.shape[1]}"
        )
    if targets is not None:
        check_ids("targets", targets, config.vocab_size, device, IGNORE_INDEX)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets: expected shape {tuple(tokens.shape)}, got {tuple(targets.shape)}")


def check_ids(
    name: str, ids: Tensor, vocab_size: int, device: torch.device, ignore: int | None = None
) -> None:
    """TypeError or ValueError unless `ids` are token ids (or `ignore`) that a model on `device` can take."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32, got {ids.dtype}")
    if ids.device != device:
        raise ValueError(f"{name}: expected it on {device} as the model, got {ids.device}")
    if torch.compiler.is_compiling() or type(ids) is not Tensor or ids.device.type != "cpu":
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignore is not None:
        wrong &= ids != ignore
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected ids in [0, {vocab_size}), got {ids[tuple(where)].item()} at {where}"
        )


def counted(targets: Tensor, pad_idx: int | None) -> Tensor:
    """The targets in int64, IGNORE_INDEX for those that are padding."""
    targets = targets.long()
    return targets if pad_idx is None else targets.masked_fill(targets == pad_idx, IGNORE_INDEX)
