"""The same GPT in stock PyTorch, as a user would write it today: what the demo and the benchmarks
compare against. Parameter names are GPT's, so that its state dict loads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.models.gpt import IGNORE_INDEX, GPTConfig, counted
from fastgpt.nn import ACTIVATIONS, PositionalEncoding


class StockAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_dropout = config.attention_dropout
        self.c_attn = nn.Linear(config.embedding_dim, 3 * config.embedding_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.embedding_dim, config.embedding_dim, bias=config.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.c_attn(x).split(dim, dim=2)
        q, k, v = (t.view(batch, length, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        p = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, dim))


class StockMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.hidden_dim is not None
        self.c_fc = nn.Linear(config.embedding_dim, config.hidden_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.hidden_dim, config.embedding_dim, bias=config.bias)
        self.approximate = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class StockBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.embedding_dim, config.layer_norm_eps, bias=config.bias)
        self.attn = StockAttention(config)
        self.ln_2 = nn.LayerNorm(config.embedding_dim, config.layer_norm_eps, bias=config.bias)
        self.mlp = StockMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), mask))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class StockGPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embedding_dim
        self.wte = nn.Embedding(config.vocab_size, dim, padding_idx=config.pad_idx)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.max_seq_length, dim)
        else:
            self.positions = PositionalEncoding(dim, config.max_seq_length, config.pad_idx)
        self.dropout = nn.Dropout(config.input_dropout)
        self.h = nn.ModuleList(StockBlock(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(dim, config.layer_norm_eps, bias=config.bias)
        self.lm_head = None if config.tie_output else nn.Linear(dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        pad_idx, length = self.config.pad_idx, tokens.shape[1]
        mask = None
        if pad_idx is not None:  # SDPA takes a mask or is_causal, not both
            causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
            mask = causal & (tokens != pad_idx)[:, None, None, :]
        x = self.wte(tokens)
        if self.config.positions == "learned":
            x = x + self.wpe.weight[:length]
        else:
            x = self.positions(x * math.sqrt(self.config.embedding_dim), tokens)
        x = self.dropout(x)
        for block in self.h:
            x = block(x, mask)
        logits = F.linear(self.ln_f(x), self.wte.weight if self.lm_head is None else self.lm_head.weight)
        if targets is None:
            return logits
        labels = counted(targets, pad_idx).flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE_INDEX)
