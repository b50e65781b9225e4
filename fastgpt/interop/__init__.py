"""Other people's models on our kernels: `patch` and `unpatch`, and the attention that transformers can ask for."""

from fastgpt.interop.attention import register as register_attention
from fastgpt.interop.patch import KINDS, patch, unpatch
from fastgpt.interop.report import Entry, PatchReport

__all__ = ["KINDS", "Entry", "PatchReport", "patch", "register_attention", "unpatch"]
