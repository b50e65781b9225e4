"""fastgpt: fused kernels for GPT models in PyTorch, each proven against an exact reference.

from fastgpt import ops, nn
y = ops.layer_norm(x, weight, bias)           # drop-in functions
norm = nn.LayerNorm(768)                      # drop-in modules
model = fastgpt.GPT(vocab_size, embedding_dim, num_heads, num_layers, max_seq_length, pad_idx)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastgpt import nn, ops
from fastgpt._core.dispatch import BackendError, backends, explain, use_backend
from fastgpt._core.memory import keep_large_blocks
from fastgpt.generate import generate
from fastgpt.interop import PatchReport, patch, unpatch
from fastgpt.models.audio import AudioConfig, AudioEncoder
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.models.multimodal import MultimodalGPT
from fastgpt.models.vision import VisionConfig, VisionEncoder

if TYPE_CHECKING:
    from fastgpt import testing

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "AudioConfig",
    "AudioEncoder",
    "BackendError",
    "GPTConfig",
    "MultimodalGPT",
    "PatchReport",
    "VisionConfig",
    "VisionEncoder",
    "backends",
    "explain",
    "generate",
    "keep_large_blocks",
    "nn",
    "ops",
    "patch",
    "testing",
    "unpatch",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "testing":  # the harness, when it is asked for
        return importlib.import_module("fastgpt.testing")
    raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
