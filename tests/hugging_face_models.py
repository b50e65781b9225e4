"""Small random models of transformers, of each family that `fastgpt.patch` knows, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 97
FAMILIES = ("gpt2", "bert", "vit", "whisper", "t5", "t5-gated", "llama")
CAUSAL = ("gpt2", "llama")


def config(family: str, **options: Any) -> Any:
    """Without dropout; layers that are 32 wide."""
    import transformers as hf

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    if family == "gpt2":
        made = hf.GPT2Config(
            **ids, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            **options,
        )  # fmt: skip
    elif family == "bert":
        made = hf.BertConfig(
            **ids, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64, **options,
        )  # fmt: skip
    elif family == "vit":
        made = hf.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
            patch_size=8, num_labels=5, **options,
        )  # fmt: skip
    elif family == "whisper":
        made = hf.WhisperConfig(
            **ids, num_mel_bins=16, d_model=32, encoder_layers=2, encoder_attention_heads=4, decoder_layers=2,
            decoder_attention_heads=4, decoder_ffn_dim=64, encoder_ffn_dim=64, max_source_positions=20,
            max_target_positions=40, dropout=0.0, decoder_start_token_id=3, suppress_tokens=None,
            begin_suppress_tokens=None, **options,
        )  # fmt: skip
    elif family.startswith("t5"):
        made = hf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu" if family == "t5-gated" else "relu", decoder_start_token_id=0, **options,
        )  # fmt: skip
    else:
        made = hf.LlamaConfig(
            **ids, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **options,
        )  # fmt: skip
    return made


def small(family: str) -> dict[str, Any]:
    """Sizes for the configuration of a decoder in Llama's manner, of which there are many."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family.startswith("Deepseek"):
        sizes |= {
            "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        }  # fmt: skip
        if family == "DeepseekV32":
            sizes |= {"index_topk": 6, "index_n_heads": 2, "index_head_dim": 16}
    elif family.startswith("Gemma") or family in ("GptOss", "Qwen3", "Inkling2Text"):
        sizes |= {"head_dim": 8}
        if family != "Inkling2Text":
            sizes |= {"sliding_window": 6}
    if family == "GptOss":
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "Gemma4Text":
        sizes |= {
            "global_head_dim": 8, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        }  # fmt: skip
    return sizes


def model(family: str, **options: Any) -> Any:
    """With parameters that are neither ones nor zeros, in evaluation mode."""
    import transformers as hf

    kinds: dict[str, Callable[..., Any]] = {
        "gpt2": hf.GPT2LMHeadModel,
        "bert": hf.BertForMaskedLM,
        "vit": hf.ViTForImageClassification,
        "whisper": hf.WhisperForConditionalGeneration,
        "t5": hf.T5ForConditionalGeneration,
        "t5-gated": hf.T5ForConditionalGeneration,
        "llama": hf.LlamaForCausalLM,
    }
    torch.manual_seed(0)
    made = kinds[family](config(family, **options))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    if family == "gpt2":
        made.loss_type = "ForCausalLM"  # without it transformers warns, which torch.compile does not trace
    return made.eval()


def inputs(family: str, dtype: torch.dtype = torch.float32, batch: int = 3) -> dict[str, torch.Tensor]:
    """Tokens, padded on the right where the family takes a mask, with labels."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, VOCABULARY, (batch, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 15:] = mask[1, 9:] = 0
    if family == "vit":
        pixels = torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)
        return {"pixel_values": pixels, "labels": torch.randint(5, (batch,), generator=generator)}
    if family == "whisper":
        features = torch.randn(batch, 16, 40, generator=generator).to(dtype)
        return {"input_features": features, "labels": ids[:, :12].contiguous()}
    if family.startswith("t5"):
        return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :12].contiguous()}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
