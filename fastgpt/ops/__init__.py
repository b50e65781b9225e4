"""The public functions of the engine: one module per op, registered by its import."""

from fastgpt.ops.attention import attention
from fastgpt.ops.attention_qkv import attention_qkv
from fastgpt.ops.attention_varlen import attention_varlen
from fastgpt.ops.gelu import gelu
from fastgpt.ops.layer_norm import layer_norm
from fastgpt.ops.softmax import softmax

__all__ = ["attention", "attention_qkv", "attention_varlen", "gelu", "layer_norm", "softmax"]
