"""GPT-2 124M as a whole: a training step (4 x 512 tokens, AdamW), a step of decoding (one sequence, 512 tokens), and
whole texts (engines.py).

Beside the stock PyTorch model stands Hugging Face's, where transformers is installed: as people run it, its loss
computed by itself. A training step has no bound per element; `gpt_step` says what it must keep to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import buffers, engines, gpt_step, limits
from benchmarks.results import COMPILED, EAGER, FASTGPT, Row
from fastgpt.decoding import WEIGHTS, Decoder
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.models.stock_gpt import StockGPT
from fastgpt.testing.timing import Step, measure, step_clock

if TYPE_CHECKING:
    from benchmarks.suites import Budget, Options

MODEL = GPTConfig(vocab_size=50257, embedding_dim=768, num_heads=12, num_layers=12, max_seq_length=1024)
BATCH, LENGTH, BATCHES = 4, 512, 2
CONTEXT, NEW = 512, 8  # tokens in the cache, and steps that a sample takes from there
HUGGING_FACE, HUGGING_FACE_COMPILED = "hugging face eager", "hugging face compiled"
COMPILE_SECONDS = 90.0


def jobs(
    options: Options, budget: Budget, meter: limits.LimitMeter
) -> list[tuple[str, Callable[[float], list[Row]]]]:
    steps = [
        (f"gpt2_step {d}", partial(step_rows, d, options, budget, meter))
        for d in options.dtypes
        if d in ("fp32", "bf16")
    ]
    decoding = ("gpt2_decode", partial(decode_rows, options, meter))
    return [decoding, *engines.jobs(MODEL, options), *steps]


def step_rows(
    dtype: str, options: Options, budget: Budget, meter: limits.LimitMeter, seconds: float
) -> list[Row]:
    device, case = options.device, f"124M-{BATCH}x{LENGTH}"
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(MODEL.vocab_size, (2, BATCH, LENGTH), generator=draw) for _ in range(BATCHES)]
    notes, models = {}, contenders(options, budget)
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    truth: gpt_step.LossAndGradients | None = None
    errors: dict[str, float] = {}
    for name in (EAGER, FASTGPT, HUGGING_FACE, COMPILED, HUGGING_FACE_COMPILED):
        if isinstance(models[name], str):
            notes[name] = models[name]
            continue
        module, call = models[name]()
        got = gpt_step.loss_and_gradients(module, call, batches[0][:, :1], dtype)
        if name == EAGER:
            truth = got
        elif name == FASTGPT:  # against the stock model in the same dtype: each may be off once
            assert truth is not None
            errors[name] = gpt_step.error(got, truth, dtype) / 2
            if not errors[name] <= 1.0:
                notes[name] = f"outside tolerance ×{errors[name]:.3g}"
                continue
        steps[name] = gpt_step.training_step(module, call, batches, dtype)
        steps[name](0)
        peaks[name] = buffers.peak_bytes(partial(steps[name], 0), device)
    product = "float32" if dtype == "fp32" else "bfloat16"
    limit, amount = meter.steps([product], limits.to_json(meter.measure(), "step"))[product]
    timings = measure(
        {**steps, "limit": limit},
        device,
        sets=BATCHES,
        seconds=max(8 * seconds, 60.0),
        clock=step_clock(device),
    )
    beside = {product: amount / timings["limit"].seconds.median}
    tokens = BATCH * LENGTH
    flops = 6 * gpt_step.parameter_count(StockGPT(MODEL)) * tokens
    rows = []
    for name in (FASTGPT, EAGER, COMPILED, HUGGING_FACE, HUGGING_FACE_COMPILED):
        row = Row(
            "gpt2_step", case, dtype, "step", name, flops=flops, tokens=tokens, note=notes.get(name, "")
        )
        row.error, row.peak_bytes, row.sets, row.inputs = (
            errors.get(name),
            peaks.get(name),
            BATCHES,
            "as in training",
        )
        row.limits = beside
        if name in timings:
            row.take(timings[name])
        rows.append(row)
    return rows


def contenders(options: Options, budget: Budget) -> dict[str, Any]:
    """By name a function that makes (module, call), or why there is none."""
    from benchmarks.suites import compile_refusal

    def ours(kind: type[nn.Module], compiled: bool = False) -> Callable[[], tuple[nn.Module, gpt_step.Model]]:
        def make() -> tuple[nn.Module, gpt_step.Model]:
            torch.manual_seed(0)
            weights = GPT(MODEL).state_dict()
            module = kind(MODEL)
            module.load_state_dict(weights)
            return module, torch.compile(module, dynamic=False) if compiled else module

        return make

    def hugging_face(compiled: bool) -> Callable[[], tuple[nn.Module, gpt_step.Model]]:
        def make() -> tuple[nn.Module, gpt_step.Model]:
            from transformers import GPT2Config, GPT2LMHeadModel

            torch.manual_seed(0)
            module = GPT2LMHeadModel(
                GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
            )
            called = torch.compile(module, dynamic=False) if compiled else module

            def loss(tokens: Tensor, targets: Tensor) -> Tensor:
                # The model shifts labels itself; its own are the tokens, as everybody calls it.
                return called(input_ids=tokens, labels=tokens).loss

            return module, loss

        return make

    refusal = compile_refusal(options, budget, COMPILE_SECONDS)
    there = importlib.util.find_spec("transformers") is not None
    missing = "transformers is not installed"
    return {
        FASTGPT: ours(GPT),
        EAGER: ours(StockGPT),
        COMPILED: refusal or ours(StockGPT, True),
        HUGGING_FACE: hugging_face(False) if there else missing,
        HUGGING_FACE_COMPILED: refusal or (hugging_face(True) if there else missing),
    }


def decode_rows(options: Options, meter: limits.LimitMeter, seconds: float) -> list[Row]:
    """A step of our decoder in each kind of weights, and Hugging Face's with its cache in fp32 and bf16."""
    torch.manual_seed(0)
    model = GPT(MODEL).eval()
    tokens = torch.randint(MODEL.vocab_size, (1, CONTEXT))
    steps: dict[str, Step] = {}
    moved: dict[str, int] = {}
    for weights in WEIGHTS:
        decoder = Decoder(model, weights=weights)
        decoder.prefill(tokens)
        moved[weights] = decoder.bytes_per_step
        steps[weights] = partial(_decode, decoder, tokens[:, -1])
    steps |= {f"{HUGGING_FACE} {d}": step for d, step in _hugging_face_decoders(tokens).items()}
    limit, amount = meter.steps(["read"], limits.to_json(meter.measure(), "decode"))["read"]
    timings = measure({**steps, "limit": limit}, options.device, seconds=max(4 * seconds, 20.0))
    read = amount / timings["limit"].seconds.median
    rows = []
    for name, timing in timings.items():
        if name == "limit":
            continue
        kind = name.rpartition(" ")[2]
        contender = HUGGING_FACE if name.startswith(HUGGING_FACE) else FASTGPT
        row = Row(
            "gpt2_decode",
            f"124M-context_{CONTEXT}",
            kind,
            "fwd",
            contender,
            moved=NEW * moved[kind],
            tokens=NEW,
        )
        row.limits, row.inputs = {"copy": read}, "cold"
        row.note = f"{row.moved / timing.seconds.median / read:.2f} of read bandwidth"
        row.take(timing)
        rows.append(row)
    return rows


def _decode(decoder: Decoder, token: Tensor, _: int) -> None:
    for _ in range(NEW):
        decoder.step(token)
    decoder.lengths -= NEW


def _hugging_face_decoders(tokens: Tensor) -> dict[str, Step]:
    if importlib.util.find_spec("transformers") is None:
        return {}
    from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

    def step(module: Any, cache: Any, _: int) -> None:
        with torch.no_grad():
            for _ in range(NEW):
                module(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-NEW)

    steps: dict[str, Step] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        module: Any = GPT2LMHeadModel(GPT2Config())
        module = module.to(dtype).eval()
        cache = DynamicCache()
        with torch.no_grad():
            module(input_ids=tokens, past_key_values=cache, use_cache=True)
        steps[name] = partial(step, module, cache)
    return steps
