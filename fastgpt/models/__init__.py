"""Whole models on the fused ops."""

from fastgpt.models.audio import AudioConfig, AudioEncoder
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.models.multimodal import MultimodalGPT
from fastgpt.models.vision import VisionConfig, VisionEncoder

__all__ = [
    "GPT",
    "AudioConfig",
    "AudioEncoder",
    "GPTConfig",
    "MultimodalGPT",
    "VisionConfig",
    "VisionEncoder",
]
