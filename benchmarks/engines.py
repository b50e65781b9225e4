"""Whole texts from GPT-2 124M: prompts of 16 tokens continued by 64 each, greedily, 1, 8 and 32 together.

Beside our engine stand Hugging Face's `generate`, CTranslate2 and llama.cpp (`pip install transformers ctranslate2
llama-cpp-python gguf`), those that are installed, on the same weights, in their own formats and default options. The
time is that of the call: prompts in, tokens out. In fp32 all texts must begin the same, or they are not timed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.results import FASTGPT, Row
from fastgpt.decoding import WEIGHTS
from fastgpt.generate import Engine, Sampling
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.testing.timing import measure
from fastgpt.train.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    from benchmarks.suites import Options

OP = "gpt2_generate"
PROMPT, NEW = 16, 64
BATCHES = (1, 8, 32)
# In fp32 so many first tokens of so many texts must be ours: by chance one of 50,257 would be. Where two are nearly
# as likely as each other rounding chooses, in llama.cpp also that of its GELU, a table in fp16.
BEGIN, AGREE = 4, 0.9
HUGGING_FACE, CTRANSLATE2, LLAMA_CPP = "hugging face", "ctranslate2", "llama.cpp"
NEEDED = {
    HUGGING_FACE: ("transformers",),
    CTRANSLATE2: ("ctranslate2", "transformers"),
    LLAMA_CPP: ("llama_cpp", "gguf"),
}

Prompts = list[list[int]]
Generate = Callable[[Prompts], Prompts]  # the tokens that follow each


def jobs(config: GPTConfig, options: Options) -> list[tuple[str, Callable[[float], list[Row]]]]:
    return [(f"{OP} {batch}", partial(rows, config, batch, options.device)) for batch in BATCHES]


def rows(config: GPTConfig, batch: int, device: torch.device, seconds: float) -> list[Row]:
    model, threads = talkative(config), torch.get_num_threads()
    prompts = torch.randint(
        config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)
    )
    ids: Prompts = prompts.tolist()
    notes: dict[tuple[str, str], str] = {}
    ready: dict[tuple[str, str], Generate] = {}
    with ExitStack() as stack:
        for weights in WEIGHTS:
            ready[FASTGPT, weights] = ours(model, weights, batch)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model.save_pretrained(directory / HUGGING_FACE)
        for name, make in ((HUGGING_FACE, hugging_face), (CTRANSLATE2, ctranslate2), (LLAMA_CPP, llama_cpp)):
            missing = [module for module in NEEDED[name] if importlib.util.find_spec(module) is None]
            if missing:
                notes[name, "fp32"] = f"{' and '.join(missing)} not installed"
                continue
            for weights, generate in stack.enter_context(make(model, directory, batch, threads)).items():
                ready[name, weights] = generate
        expected = ready[FASTGPT, "fp32"](ids)
        for (name, weights), generate in list(ready.items()):
            got = generate(ids)
            same = sum(a == b for a, b in zip(got, expected, strict=True))
            notes[name, weights] = f"{same} of {batch} texts as ours in fp32"
            alike = sum(a[:BEGIN] == b[:BEGIN] for a, b in zip(got, expected, strict=True))
            if [len(text) for text in got] != [NEW] * batch or (weights == "fp32" and alike < AGREE * batch):
                notes[name, weights] += ", not the same work"
                del ready[name, weights]
        timings = measure(
            {" ".join(key): partial(_call, generate, ids) for key, generate in ready.items()},
            device,
            seconds=max(10 * seconds, 60.0),
            min_rounds=3,
        )
    made = []
    for key, note in notes.items():
        row = Row(OP, f"124M-{batch}x{PROMPT}+{NEW}", key[1], "fwd", key[0], tokens=batch * NEW, note=note)
        row.inputs = "cold"
        if " ".join(key) in timings:
            row.take(timings[" ".join(key)])
        made.append(row)
    return made


def _call(generate: Generate, prompts: Prompts, _: int) -> None:
    generate(prompts)


def talkative(config: GPTConfig) -> GPT:
    """Random weights, but large ones: those of the usual initialisation say one token again and again."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "wte" not in name:
                p.mul_(6.0)
    return model


def ours(model: GPT, weights: str, batch: int) -> Generate:
    engine = Engine(model, weights=weights, batch=batch)

    def generate(prompts: Prompts) -> Prompts:
        made = {c.prompt: c.tokens for c in engine.run(prompts, Sampling(NEW, temperature=0)) if c.finished}
        return [made[i] for i in range(len(prompts))]

    return generate


@contextmanager
def hugging_face(model: GPT, directory: Path, batch: int, threads: int) -> Iterator[dict[str, Generate]]:
    from transformers import GPT2LMHeadModel

    def made(dtype: torch.dtype) -> Generate:
        theirs: Any = GPT2LMHeadModel.from_pretrained(directory / HUGGING_FACE)
        theirs = theirs.to(dtype).eval()
        theirs.generation_config.eos_token_id = None  # no text ends early
        theirs.generation_config.pad_token_id = 0

        def generate(prompts: Prompts) -> Prompts:
            ids = torch.tensor(prompts)
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
            )
            return out[:, PROMPT:].tolist()

        return generate

    yield {name: made(dtype) for name, dtype in WEIGHTS.items() if dtype != torch.int8}


@contextmanager
def ctranslate2(model: GPT, directory: Path, batch: int, threads: int) -> Iterator[dict[str, Generate]]:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    # The converter wants a tokenizer: token i is the text "i", the last the end.
    words = [*(f"{i}" for i in range(model.config.vocab_size - 1)), END_OF_TEXT]
    files = directory / HUGGING_FACE
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    made: dict[str, Generate] = {}
    for weights, kind in (("fp32", "float32"), ("int8", "int8_float32")):
        target = directory / f"{CTRANSLATE2}-{weights}"
        TransformersConverter(os.fspath(files)).convert(os.fspath(target), quantization=kind)
        generator = ctranslate2.Generator(os.fspath(target), compute_type=kind, intra_threads=threads)

        def generate(prompts: Prompts, generator: Any = generator) -> Prompts:
            results = generator.generate_batch(
                [[words[i] for i in prompt] for prompt in prompts],
                max_length=NEW, min_length=NEW, sampling_topk=1, include_prompt_in_result=False, end_token=[],
            )  # fmt: skip
            return [result.sequences_ids[0] for result in results]

        made[weights] = generate
    yield made


@contextmanager
def llama_cpp(model: GPT, directory: Path, batch: int, threads: int) -> Iterator[dict[str, Generate]]:
    import llama_cpp as llama

    quiet = llama.llama_log_callback(lambda level, text, data: None)  # its loading fills screens
    llama.llama_log_set(quiet, None)
    made: dict[str, Generate] = {}
    open_: list[Callable[[], None]] = []
    try:
        for weights in WEIGHTS:
            path = directory / f"{weights}.gguf"
            write_gguf(model, weights, path)
            loaded = llama.llama_model_load_from_file(os.fsencode(path), llama.llama_model_default_params())
            options = llama.llama_context_default_params()
            options.n_ctx = batch * (PROMPT + NEW)
            options.n_batch = options.n_ubatch = max(batch * PROMPT, 512)
            options.n_seq_max = batch
            options.n_threads = options.n_threads_batch = threads
            if weights == "fp32":  # as everybody's; F16 by default
                options.type_k = options.type_v = llama.GGML_TYPE_F32
            context = llama.llama_init_from_model(loaded, options)
            tokens = llama.llama_batch_init(batch * PROMPT, 0, 1)
            made[weights] = partial(_llama_generate, llama, context, tokens, model.config.vocab_size)
            open_ += [partial(llama.llama_batch_free, tokens), partial(llama.llama_free, context)]
            open_ += [partial(llama.llama_model_free, loaded)]
        yield made
    finally:
        for close in open_:
            close()


def _llama_generate(llama: Any, context: Any, tokens: Any, vocab_size: int, prompts: Prompts) -> Prompts:
    import numpy as np

    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    texts: Prompts = [[] for _ in prompts]
    new, first = prompts, 0  # of each sequence: the tokens to append, and the position of the first
    for _ in range(NEW):
        n, last = 0, []
        for sequence, ids in enumerate(new):
            for i, token in enumerate(ids):
                tokens.token[n], tokens.pos[n], tokens.logits[n] = token, first + i, i + 1 == len(ids)
                tokens.n_seq_id[n], tokens.seq_id[n][0] = 1, sequence
                n += 1
            last.append(n - 1)
        tokens.n_tokens = n
        if llama.llama_decode(context, tokens) != 0:
            raise RuntimeError("llama_decode failed")
        first += len(new[0])
        logits = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (vocab_size,)) for i in last]
        new = [[int(row.argmax())] for row in logits]
        for text, ids in zip(texts, new, strict=True):
            text += ids
    return texts


def write_gguf(model: GPT, weights: str, path: Path) -> None:
    """The model as llama.cpp reads it: products and token embedding in F32, BF16 or Q8_0, all else in F32."""
    import gguf

    config = model.config
    kind = {"fp32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16,
            "int8": gguf.GGMLQuantizationType.Q8_0}[weights]  # fmt: skip
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.max_seq_length)
    writer.add_embedding_length(config.embedding_dim)
    writer.add_feed_forward_length(4 * config.embedding_dim)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["1 2"])
    names = {
        "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        stem, _, part = name.rpartition(".")
        if stem.startswith("h."):
            _, layer, inside = stem.split(".", 2)
            theirs = f"blk.{layer}.{names[inside]}.{part}"
        else:
            theirs = f"{names[stem]}.{part}"
        data = tensor.numpy()
        if tensor.dim() == 2 and stem != "wpe":
            writer.add_tensor(theirs, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
