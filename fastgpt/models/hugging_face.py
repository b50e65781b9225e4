"""GPT-2 as Hugging Face's transformers keeps it: config.json, and weights in one safetensors file or in shards."""

from __future__ import annotations

import os
import re
from typing import Any

from torch import Tensor

from fastgpt.models import checkpoint

MODEL_TYPE = "gpt2"
# Fields of GPTConfig by their names there; what is absent has GPT-2's own value.
_FIELDS = {
    "vocab_size": ("vocab_size", 50257),
    "embedding_dim": ("n_embd", 768),
    "num_heads": ("n_head", 12),
    "num_layers": ("n_layer", 12),
    "max_seq_length": ("n_positions", 1024),
    "hidden_dim": ("n_inner", None),
    "dropout": ("resid_pdrop", 0.1),
    "embedding_dropout": ("embd_pdrop", 0.1),
    "attention_dropout": ("attn_pdrop", 0.1),
    "layer_norm_eps": ("layer_norm_epsilon", 1e-5),
    "tie_output": ("tie_word_embeddings", True),
    "pad_idx": ("pad_token_id", None),
    "eos_idx": ("eos_token_id", 50256),
}
# transformers' other names for some of them.
_ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}
# What would make another model of it, by the only value that is understood.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_PREFIX = "transformer."
_TRANSPOSED = re.compile(
    r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight"
)  # Conv1D: [k, n]
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, in older files


def config_fields(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The fields of a GPTConfig from those of `values`, a config.json.

    Our GPT hides its padding from attention, where transformers' is told what to hide; a padding that is also what
    ends a text is none to us.

    Raises:
        ValueError: another architecture, or an option that our GPT does not have.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{source}: model_type: expected {MODEL_TYPE!r}, got {values.get('model_type')!r}")
    for name, only in _FIXED.items():
        if values.get(name, only) != only:
            raise ValueError(f"{source}: {name}: expected {only}, got {values[name]!r}")
    activation = values.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{source}: activation_function: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
        )
    known = {_ALIASES.get(name, name): value for name, value in values.items()} | values
    fields = {ours: known.get(theirs, default) for ours, (theirs, default) in _FIELDS.items()}
    eos, pad = fields["eos_idx"], fields["pad_idx"]
    if isinstance(eos, list):
        eos = eos[0] if eos else None
    for name, idx in (("eos_idx", eos), ("pad_idx", pad)):  # outside the vocabulary it is never met
        there = (
            not isinstance(idx, int)
            or not isinstance(fields["vocab_size"], int)
            or 0 <= idx < fields["vocab_size"]
        )
        fields[name] = idx if there else None
    if fields["pad_idx"] == fields["eos_idx"]:  # batches are filled up with what ends a text: it is one, too
        fields["pad_idx"] = None
    if fields["embedding_dropout"] == fields["dropout"]:
        fields["embedding_dropout"] = None  # it follows the other
    return {**fields, "activation": _ACTIVATIONS[activation]}


def config_values(fields: dict[str, Any]) -> dict[str, Any] | None:
    """config.json's values for the fields of a GPTConfig; None if GPT-2 is no name for it."""
    if fields["positions"] != "learned" or not fields["bias"]:
        return None
    values = {theirs: fields[ours] for ours, (theirs, _) in _FIELDS.items()}
    if values["embd_pdrop"] is None:
        values["embd_pdrop"] = values["resid_pdrop"]
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == fields["activation"])
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["GPT2LMHeadModel"],
        **values,
        "activation_function": activation,
        "bos_token_id": fields["eos_idx"],
    }


def to_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict by Hugging Face's names; weights of layers as views [k, n]."""
    return {
        name if name == "lm_head.weight" else _PREFIX + name: tensor.t()
        if _TRANSPOSED.fullmatch(name)
        else tensor
        for name, tensor in state.items()
    }


def from_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_layout`, contiguous."""
    names = {name: name.removeprefix(_PREFIX) for name in tensors}
    return {
        ours: tensors[name].t().contiguous() if _TRANSPOSED.fullmatch(ours) else tensors[name]
        for name, ours in names.items()
    }


def read(directory: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a directory as our state dict, which must have the names and shapes of `state`.

    With or without the prefix of the model inside; masks among them, and a head beside the embedding that it is tied
    to and equals, are left out.
    """
    source, found = checkpoint.load_tensors(directory)
    if not any(name.startswith(_PREFIX) for name in found):
        found = {
            name if name == "lm_head.weight" else _PREFIX + name: tensor for name, tensor in found.items()
        }
    found = {name: t for name, t in found.items() if not _BUFFERS.fullmatch(name.removeprefix(_PREFIX))}
    expected, head = to_layout(state), found.get("lm_head.weight")
    if head is not None and "lm_head.weight" not in expected:
        embedding = found.get(_PREFIX + "wte.weight")
        if embedding is not None and head.shape == embedding.shape and bool((head == embedding).all()):
            del found["lm_head.weight"]
        else:
            raise ValueError(
                f"{source}: lm_head.weight: expected the token embedding, as tie_word_embeddings says, got another"
            )
    checkpoint.check_tensors(source, found, expected)
    return from_layout(found)


def locate(path: str | os.PathLike[str]) -> str:
    """The directory `path`, or that into which the model of this name was fetched from the hub.

    Raises:
        FileNotFoundError: there is no such directory, and no such model to be had.
    """
    directory = os.fspath(path)
    if os.path.isdir(directory):
        return directory
    if os.path.exists(directory):
        raise NotADirectoryError(f"{directory}: expected a directory with a saved model, got a file")
    nothing = f"{directory}: expected a directory with a saved model, got none"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", directory) or directory.startswith("."):
        raise FileNotFoundError(nothing)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{nothing} (names on the hub need: pip install huggingface_hub)") from None
    try:
        return snapshot_download(directory, allow_patterns=["*.json", "*.safetensors", "merges.txt"])
    except Exception as error:  # the hub's own, requests' or httpx's, by version
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{nothing}; and from the hub: {why}") from error
