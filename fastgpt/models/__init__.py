"""Whole models on the fused ops."""

from fastgpt.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
