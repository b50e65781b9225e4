"""`fastgpt.patch` on models of transformers as people train them: GPT-2 124M, BERT-base and ViT-base.

Beside the patched model stands the same one unpatched, eager and compiled; a forward without gradients, and forward
with backward. The patched model's loss and gradients are checked against the unpatched one's in fp32.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fastgpt
from benchmarks import buffers, gpt_step, limits
from benchmarks.results import COMPILED, EAGER, FASTGPT, Row
from fastgpt.testing.timing import Step, measure

if TYPE_CHECKING:
    from benchmarks.suites import Budget, Options

COMPILE_SECONDS = 90.0
Inputs = dict[str, Tensor]


def gpt2() -> tuple[nn.Module, Inputs]:
    import transformers as hf

    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    )
    model.loss_type = "ForCausalLM"  # without it transformers warns, which torch.compile does not trace
    return model, _tokens(50257)


def bert() -> tuple[nn.Module, Inputs]:
    import transformers as hf

    config = hf.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return hf.BertForMaskedLM(config), _tokens(config.vocab_size)


def vit() -> tuple[nn.Module, Inputs]:
    import transformers as hf

    config = hf.ViTConfig()
    config.num_labels = 1000
    return hf.ViTForImageClassification(config), {
        "pixel_values": torch.randn(4, 3, 224, 224),
        "labels": torch.randint(1000, (4,)),
    }


def _tokens(vocabulary: int) -> Inputs:
    ids = torch.randint(vocabulary, (2, 512))
    return {"input_ids": ids, "labels": ids}


MODELS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Inputs]]]] = {
    "patched_gpt2": ("124M-2x512", gpt2),
    "patched_bert": ("base-2x512", bert),
    "patched_vit": ("base-4x224x224", vit),
}


def jobs(
    options: Options, budget: Budget, meter: limits.LimitMeter
) -> list[tuple[str, Callable[[float], list[Row]]]]:
    return [
        (f"{name} {dtype}", partial(rows, name, dtype, options, budget, meter))
        for name in MODELS
        for dtype in options.dtypes
        if dtype in ("fp32", "bf16")
    ]


def rows(
    name: str, dtype: str, options: Options, budget: Budget, meter: limits.LimitMeter, seconds: float
) -> list[Row]:
    case, make = MODELS[name]
    if importlib.util.find_spec("transformers") is None:
        return [Row(name, case, dtype, "fwd", FASTGPT, note="transformers is not installed")]
    torch.manual_seed(0)
    model, inputs = make()
    patched = copy.deepcopy(model)
    fastgpt.patch(patched)
    return side_by_side(name, case, dtype, patched, model, inputs, options, budget, seconds)


def side_by_side(
    name: str,
    case: str,
    dtype: str,
    ours: nn.Module,
    stock: nn.Module,
    inputs: Inputs,
    options: Options,
    budget: Budget,
    seconds: float,
) -> list[Row]:
    """Rows of a model beside PyTorch's own of the same weights and names, eager and compiled.

    Called with `inputs` both give the loss, or an object that has it.
    """
    from benchmarks.suites import compile_refusal

    truth = _loss_and_gradients(stock, inputs, "fp32")
    got = _loss_and_gradients(ours, inputs, dtype)
    error = gpt_step.error(got, truth, dtype, floor=1e-3)  # a bias on keys has a gradient of rounding alone
    notes, steps, peaks = dict[str, str](), dict[tuple[str, str], Step](), dict[tuple[str, str], int]()
    contenders: dict[str, Any] = {FASTGPT: ours, EAGER: stock}
    refusal = compile_refusal(options, budget, COMPILE_SECONDS)
    if refusal:
        notes[COMPILED] = refusal
    else:
        contenders[COMPILED] = torch.compile(copy.deepcopy(stock), dynamic=False)
    if not error <= 1.0:
        notes[FASTGPT] = f"outside tolerance ×{error:.3g}"
        del contenders[FASTGPT]
    for contender, called in contenders.items():
        for pass_, step in (("fwd", _forward), ("fwd+bwd", _forward_backward)):
            steps[contender, pass_] = partial(step, called, inputs, dtype)
            steps[contender, pass_](0)
            peaks[contender, pass_] = buffers.peak_bytes(partial(steps[contender, pass_], 0), options.device)
    timings = measure(
        {" ".join(key): step for key, step in steps.items()},
        options.device,
        seconds=max(8 * seconds, 40.0),
        min_rounds=3,
    )
    made = []
    for contender in (FASTGPT, EAGER, COMPILED):
        for pass_ in ("fwd", "fwd+bwd"):
            row = Row(name, case, dtype, pass_, contender, note=notes.get(contender, ""))
            row.error = error if contender == FASTGPT else None
            row.peak_bytes, row.inputs = peaks.get((contender, pass_)), "as in training"
            if (contender, pass_) in steps:
                row.take(timings[f"{contender} {pass_}"])
            made.append(row)
    return made


def _loss(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss


def _forward(model: Any, inputs: Inputs, dtype: str, _: int) -> None:
    data = {name: x for name, x in inputs.items() if name != "labels"}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        model(**data)


def _forward_backward(model: Any, inputs: Inputs, dtype: str, _: int) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = _loss(model(**inputs))
    loss.backward()
    model.zero_grad(set_to_none=True)


def _loss_and_gradients(model: nn.Module, inputs: Inputs, dtype: str) -> gpt_step.LossAndGradients:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = _loss(model(**inputs))
    loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients
