"""The GPT training step: forward, loss, backward, AdamW; fp32, or bf16 by autocast."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks import buffers
from benchmarks.results import COMPILED, EAGER, FASTGPT, Row
from fastgpt._core.spec import Draw
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.models.stock_gpt import StockGPT
from fastgpt.testing.timing import Step, measure, step_clock

if TYPE_CHECKING:
    from benchmarks.suites import Budget, Options

OP = "gpt_step"
MODEL = GPTConfig(vocab_size=4096, embedding_dim=256, num_heads=4, num_layers=4, max_seq_length=128)
BATCH, LENGTH, BATCHES = 8, 128, 4
COMPILE_SECONDS = 30.0  # about, with a cold cache

# A step has no bound per element, so this is what it must keep to: the loss, and every parameter's gradient by
# its relative L2 error, against the stock model in fp64. A wrong kernel misses these by orders of magnitude.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}

Model = Callable[[Tensor, Tensor], Tensor]
LossAndGradients = tuple[float, dict[str, Tensor]]


def rows(dtype: str, options: Options, budget: Budget, seconds: float) -> list[Row]:
    from benchmarks.suites import compile_refusal

    device, case = options.device, f"{MODEL.num_layers}x{MODEL.embedding_dim}-batch_{BATCH}x{LENGTH}"
    if dtype not in LOSS_TOLERANCE:
        return [Row(OP, case, dtype, "step", FASTGPT, note="only fp32 and bf16")]
    batches = random_batches(device)
    notes, steps, errors, peaks = {}, {}, {}, {}
    for name in (FASTGPT, EAGER, COMPILED):
        if name == COMPILED and (refusal := compile_refusal(options, budget, COMPILE_SECONDS)):
            notes[name] = refusal
            continue
        module, call = contender(name, device)
        started = time.perf_counter()
        try:
            errors[name] = checked(module, call, dtype, device)
        except Exception as failure:  # torch.compile fails in many ways; the others go on
            if name != COMPILED:
                raise
            notes[name] = f"torch.compile failed: {type(failure).__name__}"
            continue
        if name == COMPILED:
            budget.compiling += time.perf_counter() - started
        if not errors[name] <= 1.0:
            notes[name] = f"outside tolerance ×{errors[name]:.3g}"
            if name == FASTGPT:
                continue
        steps[name] = training_step(module, call, batches, dtype)
        steps[name](0)
        peaks[name] = buffers.peak_bytes(partial(steps[name], 0), device)
    timings = measure(steps, device, sets=BATCHES, seconds=4 * seconds, clock=step_clock(device))

    tokens = BATCH * LENGTH
    flops = 6 * parameter_count(StockGPT(MODEL)) * tokens
    result = []
    for name in (FASTGPT, EAGER, COMPILED):
        row = Row(OP, case, dtype, "step", name, flops=flops, tokens=tokens, note=notes.get(name, ""))
        row.backend = "automatic" if name == FASTGPT else None
        row.error, row.peak_bytes = errors.get(name), peaks.get(name)
        row.sets, row.inputs = BATCHES, "as in training"
        if name in timings:
            row.take(timings[name])
        result.append(row)
    return result


def contender(name: str, device: torch.device) -> tuple[nn.Module, Model]:
    """A model with the weights that all contenders start from, and how to call it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = GPT(MODEL).state_dict()
    module = GPT(MODEL) if name == FASTGPT else StockGPT(MODEL)
    module.load_state_dict(weights)
    module.to(device)
    if name != COMPILED:
        return module, module
    torch._dynamo.reset()
    return module, torch.compile(module, dynamic=False)


def random_batches(device: torch.device) -> list[Tensor]:
    """Each is (tokens, targets)."""
    draw = Draw(0, device)
    return [draw.integers(0, MODEL.vocab_size, (2, BATCH, LENGTH)) for _ in range(BATCHES)]


def checked(module: nn.Module, call: Model, dtype: str, device: torch.device) -> float:
    """The error of one step's loss and gradients as a fraction of the tolerance, against the stock model in fp64."""
    return error(loss_and_gradients(module, call, random_batches(device)[0], dtype), exact(device), dtype)


@cache
def exact(device: torch.device) -> LossAndGradients:
    """Loss and gradients of the first batch."""
    module, _ = contender(EAGER, device)
    return loss_and_gradients(module.double(), module, random_batches(device)[0], "fp64")


def training_step(module: nn.Module, call: Model, batches: list[Tensor], dtype: str) -> Step:
    device = batches[0].device.type
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step(i: int) -> None:
        tokens, targets = batches[i]
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            loss = call(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def loss_and_gradients(module: nn.Module, call: Model, batch: Tensor, dtype: str) -> LossAndGradients:
    tokens, targets = batch
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        loss = call(tokens, targets)
    loss.backward()
    gradients = {name: p.grad.double() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return loss.item(), gradients


def error(got: LossAndGradients, truth: LossAndGradients, dtype: str, floor: float = 0.0) -> float:
    """The largest error as a fraction of its tolerance; `floor` of the largest gradient is added to each's size."""
    worst = abs(got[0] - truth[0]) / LOSS_TOLERANCE[dtype]
    least = floor * max(gradient.norm().item() for gradient in truth[1].values())
    for name, gradient in truth[1].items():
        if name not in got[1]:
            return float("inf")
        relative = ((got[1][name] - gradient).norm() / (gradient.norm() + least)).item()
        worst = max(worst, relative / GRADIENT_TOLERANCE[dtype]) if relative == relative else float("inf")
    return worst


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if not name.startswith("wpe"))
