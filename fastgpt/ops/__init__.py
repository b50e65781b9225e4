"""The public functions of the engine: one module per op, registered by its import."""

from fastgpt.ops.attention import attention
from fastgpt.ops.attention_qkv import attention_qkv
from fastgpt.ops.attention_varlen import attention_varlen
from fastgpt.ops.cross_entropy import cross_entropy
from fastgpt.ops.embedding import embedding
from fastgpt.ops.geglu import geglu
from fastgpt.ops.gelu import gelu
from fastgpt.ops.layer_norm import layer_norm
from fastgpt.ops.linear import linear
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.mlp import mlp
from fastgpt.ops.rms_norm import rms_norm
from fastgpt.ops.rope import rope
from fastgpt.ops.softmax import softmax
from fastgpt.ops.swiglu import swiglu

__all__ = [
    "attention",
    "attention_qkv",
    "attention_varlen",
    "cross_entropy",
    "embedding",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "rms_norm",
    "rope",
    "softmax",
    "swiglu",
]
