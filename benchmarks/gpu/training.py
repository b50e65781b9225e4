"""The GPT-2 124M training step, batch 8×1024, bf16 autocast, AdamW: ours and the same model in stock PyTorch.

Timed by the wall clock over several consecutive steps, for launching is part of training; device time beside it.
Model FLOPs utilisation (MFU) by 6·N·tokens, N without the positions' table, over the best bf16 matrix product
measured in the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import gpt_step
from benchmarks.gpu import contest
from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.record import Recorder
from benchmarks.results import COMPILED, EAGER, FASTGPT, Row
from benchmarks.suites import Budget
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.models.stock_gpt import StockGPT
from fastgpt.testing.timing import Step, WallClock, measure

GPT2 = GPTConfig(vocab_size=50304, embedding_dim=768, num_heads=12, num_layers=12, max_seq_length=1024)
TINY = GPTConfig(vocab_size=64, embedding_dim=32, num_heads=2, num_layers=1, max_seq_length=16)
BATCHES, LOSSES = 4, 5
BATCH = 8
LOSS_TOLERANCE = 2e-2  # of a loss after a few bf16 steps against eager PyTorch's; about 10 at the start
WORSE_THAN_EAGER = 2.0  # in the largest error of a gradient: clearly
CALLS = 4  # consecutive steps in a sample, at least
OURS_GRAPH, OURS_COMPILED = f"{FASTGPT} graph", f"{FASTGPT} compiled"
CONTENDERS = (EAGER, FASTGPT, OURS_GRAPH, COMPILED, OURS_COMPILED)


@dataclass
class Contender:
    module: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor], Tensor]  # a batch in, its loss out


def run(machine: Gpu, recorder: Recorder, budget: Budget, full: bool) -> None:
    recorder.limits(machine.limits(), "start")
    config: GPTConfig = machine.sizes((GPT2,), (TINY,))[0]
    batches = random_batches(config, machine)
    weights = {name: value.clone() for name, value in _model(EAGER, config, machine).state_dict().items()}
    exact = exact_step(config, batches[0], machine)
    parameters = gpt_step.parameter_count(_model(EAGER, config, machine))

    machine.forget_compiled()
    ran = Heats(config, parameters, batches, machine, recorder)
    for name in CONTENDERS:
        compiled = name in (COMPILED, OURS_COMPILED)
        if compiled and budget.left < 60.0 and not machine.dry:
            ran.notes[name] = "this part's time is spent"
            continue
        try:
            contender, first = build(name, config, batches[0], weights, machine)
            ran.errors[name] = gpt_step.error(first, exact, "bf16")
            ran.losses[name] = [contender.step(batches[i % BATCHES]).item() for i in range(LOSSES)]
        except Exception as error:  # torch.compile or a capture that fails, no memory: the others go on
            ran.notes[name] = contest.reason(error)
            torch.cuda.empty_cache()
            continue
        ran.admit(name, contender)
        if name == OURS_GRAPH:  # compiling may take all the time there is: what is there is timed before
            ran.time(0.0 if machine.dry else 6.0)
    ran.time(0.0 if machine.dry else min(max(0.3 * budget.left, 5.0), 30.0))
    recorder.limits(machine.limits(), "end")


@dataclass
class Heats:
    """Contenders that are ready, and what is known of each; `time` times all of them in turn."""

    config: GPTConfig
    parameters: int
    batches: list[Tensor]
    machine: Gpu
    recorder: Recorder
    notes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def admit(self, name: str, contender: Contender) -> None:
        """Into the timing, unless it is ours and does not learn what stock PyTorch learns.

        The tolerance of a gradient was set on a smaller model: past it, ours must be clearly worse than eager's.
        """
        losses, error, eagers = self.losses[name], self.errors[name], self.errors.get(EAGER, 0.0)
        self.recorder.finding(kind="losses", contender=name, losses=losses, error=error, eager_error=eagers)
        apart = max(abs(a - b) for a, b in zip(losses, self.losses.get(EAGER, losses), strict=True))
        if not (error <= 1.0 and apart <= LOSS_TOLERANCE):
            self.notes[name] = (
                f"gradients ×{error:.3g} of the tolerance, eager's ×{eagers:.3g}; losses {apart:.3g} apart"
            )
        allowed = max(1.0, WORSE_THAN_EAGER * eagers) if math.isfinite(eagers) else 1.0
        if name.startswith(FASTGPT) and not (error <= allowed and apart <= LOSS_TOLERANCE):
            return
        self.steps[name] = partial(_on_batch, contender.step, self.batches)
        self.peaks[name] = self.machine.peak_bytes(partial(self.steps[name], 0))

    def time(self, seconds: float) -> None:
        """Rows of all contenders so far; later ones of the same contender count."""
        machine, config, length = self.machine, self.config, self.config.max_seq_length
        timings = measure(
            self.steps,
            machine.device,
            sets=BATCHES,
            seconds=seconds / 2,  # two clocks, one after the other
            min_rounds=machine.rounds,
            min_calls=CALLS,
            clock=WallClock(machine.clock),
        )
        tokens, case = BATCH * length, f"{config.num_layers}x{config.embedding_dim}-batch_{BATCH}x{length}"
        for name in (one for one in CONTENDERS if one in self.errors or one in self.notes):
            row = Row(
                gpt_step.OP, case, "bf16", "step", name, flops=6.0 * self.parameters * tokens, tokens=tokens
            )
            row.note, row.error = self.notes.get(name, ""), self.errors.get(name)
            row.peak_bytes, row.sets, row.inputs = self.peaks.get(name), BATCHES, "as in training"
            row.backend = "automatic" if name == FASTGPT else None
            if name in timings:
                row.take(timings[name])
            self.recorder.rows([row])


def random_batches(config: GPTConfig, machine: Gpu) -> list[Tensor]:
    """Each is (tokens, targets)."""
    draw, shape = machine.draw(0), (2, BATCH, config.max_seq_length)
    return [draw.integers(0, config.vocab_size, shape) for _ in range(BATCHES)]


def exact_step(config: GPTConfig, batch: Tensor, machine: Gpu) -> gpt_step.LossAndGradients:
    """Loss and gradients of the stock model in fp64, sequence by sequence: a whole batch would not fit."""
    stock = _model(EAGER, config, machine).double()
    losses, sums = list[float](), dict[str, Tensor]()
    for i in range(BATCH):
        loss, gradients = gpt_step.loss_and_gradients(stock, stock, batch[:, i : i + 1], "fp64")
        losses.append(loss)
        for name, gradient in gradients.items():
            sums[name] = sums[name].add_(gradient, alpha=1 / BATCH) if i else gradient / BATCH
    return sum(losses) / BATCH, sums


def build(
    name: str, config: GPTConfig, batch: Tensor, weights: dict[str, Tensor], machine: Gpu
) -> tuple[Contender, gpt_step.LossAndGradients]:
    """A contender at the initial weights, compiled or captured as its name says; its first loss and gradients."""
    module = _model(name, config, machine)
    module.load_state_dict(weights)
    call = machine.compile(module) if name in (COMPILED, OURS_COMPILED) else module
    first = gpt_step.loss_and_gradients(module, call, batch, "bf16")
    # capturable: the step count lives on the device. For all, so that they do the same work.
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=1e-4, fused=True, capturable=machine.device.type == "cuda"
    )

    def step(tokens_and_targets: Tensor) -> Tensor:
        tokens, targets = tokens_and_targets
        with torch.autocast(machine.device.type, torch.bfloat16):
            loss = call(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    if name != OURS_GRAPH:
        return Contender(module, optimizer, step), first
    fixed = batch.clone()
    replay = machine.graphed(lambda: step(fixed))
    with torch.no_grad():  # warm-up and capture trained it
        for parameter_name, parameter in module.named_parameters():
            parameter.copy_(weights[parameter_name])
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()

    def graph_step(tokens_and_targets: Tensor) -> Tensor:
        fixed.copy_(tokens_and_targets)
        return replay()

    return Contender(module, optimizer, graph_step), first


def _model(name: str, config: GPTConfig, machine: Gpu) -> nn.Module:
    torch.manual_seed(0)
    return (GPT if name.startswith(FASTGPT) else StockGPT)(config).to(machine.device)


def _on_batch(step: Callable[[Tensor], Tensor], batches: list[Tensor], i: int) -> object:
    return step(batches[i])
