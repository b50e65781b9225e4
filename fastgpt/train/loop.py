"""The training loop: AdamW, cosine schedule with warm-up, clipping, accumulation, bf16 autocast."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.models.gpt import IGNORE_INDEX
from fastgpt.nn import evaluating
from fastgpt.train.data import Batch, Corpus, batches, held_out_batches

# One logged step: step, loss, lr, grad_norm, tokens_per_s (or of what is counted), and what was measured (held_out).
Record = dict[str, float]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. A step takes `accumulate` batches of `batch_size` sequences."""

    steps: int = 500
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "min_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer in [-2**63, 2**63), got {self.seed}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")

    def lr_at(self, step: int) -> float:
        """Linear warm-up to `lr`, then a half cosine down to `min_lr` at the last step (counted from 0)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        low = min(self.min_lr, self.lr)
        return low + (self.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(
    model: nn.Module, config: TrainConfig, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW in PyTorch's fused form; weight decay on matrices only, not on biases and norms.

    `rates` are peak learning rates of children of the model, by name, other than the config's; the schedule is the
    same. A child with rate 0 has no place in the optimizer.
    """
    rates = dict(rates or {})
    unknown = sorted(set(rates) - {name for name, _ in model.named_children()})
    if unknown or not all(rate >= 0 for rate in rates.values()):
        raise ValueError(
            f"rates: expected rates >= 0 for {', '.join(n for n, _ in model.named_children())}, got {rates}"
        )
    groups: list[dict[str, Any]] = []
    for part in [None, *rates]:
        rate = config.lr if part is None else rates[part]
        own = [
            p
            for name, p in model.named_parameters()
            if p.requires_grad
            and (name.partition(".")[0] if name.partition(".")[0] in rates else None) == part
        ]
        if rate == 0 or not own:
            continue
        scale = rate / config.lr
        groups += [
            {"params": [p for p in own if p.dim() >= 2], "weight_decay": config.weight_decay, "scale": scale},
            {"params": [p for p in own if p.dim() < 2], "weight_decay": 0.0, "scale": scale},
        ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def train_step(
    model: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    work: Iterable[Batch],
    step: int,
    config: TrainConfig,
) -> tuple[float, float]:
    """One update from the batches of `work`, which count alike; returns the loss and the gradient's norm."""
    work = list(work)
    loss = 0.0
    for batch in work:
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=config.bf16):
            part: Tensor = model(*batch) / len(work)
        part.backward()
        loss += part.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, config.clip))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {norm}: training diverged; try a lower lr"
        )
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step) * group["scale"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def held_out_loss(model: nn.Module, work: Iterable[Batch], config: TrainConfig) -> float:
    """Mean over all targets of `work` (the last tensor of a batch) that count, in nats."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in work:
            counted = int((batch[-1] != IGNORE_INDEX).sum())
            with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=config.bf16):
                total += model(*batch).item() * counted
            count += counted
    return total / count


def train(
    model: nn.Module,
    corpus: Corpus,
    seq_length: int,
    config: TrainConfig,
    *,
    device: str = "cpu",
    on_record: Callable[[Record], None] | None = None,
    progress: bool = True,
) -> list[Record]:
    """Train a language model in place on a text; records and their order as of `fit`.

    The held-out loss is measured every `eval_every` steps and after the last.
    """
    source = batches(corpus.train, config.batch_size, seq_length, config.seed)
    held_out = held_out_batches(corpus.held_out, config.batch_size, seq_length, config.eval_batches)
    return fit(
        model, source, config, lambda: {"held_out": held_out_loss(model, on_device(device, held_out), config)},
        device=device, on_record=on_record, progress=progress,
    )  # fmt: skip


def fit(
    model: nn.Module,
    source: Iterator[Batch],
    config: TrainConfig,
    evaluate: Callable[[], Record],
    *,
    rates: Mapping[str, float] | None = None,
    unit: str = "tokens",
    device: str = "cpu",
    on_record: Callable[[Record], None] | None = None,
    progress: bool = True,
) -> list[Record]:
    """Train the model in place; `on_record` sees every record as it is made. Returns all of them.

    Args:
        source: batches; `model(*batch)` is the loss.
        evaluate: what else to record every `eval_every` steps and after the last.
        rates: learning rates of parts of the model, as for `make_optimizer`; those with 0 are
            frozen meanwhile, and without dropout.
        unit: what is counted: elements of the first tensor of a batch ("tokens"), or its rows ("images", ...).
    """
    model.to(device).train()
    optimizer = make_optimizer(model, config, rates)
    frozen = [getattr(model, part).eval() for part, rate in (rates or {}).items() if rate == 0]
    held = [p for part in frozen for p in part.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    source = on_device(device, source)
    records: list[Record] = []
    bar = _progress_bar(config.steps) if progress else None
    busy, count = 0.0, 0  # time in training steps alone, and what they took, since the last record
    try:
        for step in range(config.steps):
            start = time.perf_counter()
            work = [next(source) for _ in range(config.accumulate)]
            loss, norm = train_step(model, optimizer, work, step, config)
            busy += time.perf_counter() - start
            count += sum(batch[0].numel() if unit == "tokens" else len(batch[0]) for batch in work)
            if bar is not None:
                bar.update()
            last = step + 1 == config.steps
            evaluates = last or (step + 1) % config.eval_every == 0
            if not (evaluates or step == 0 or (step + 1) % config.log_every == 0):
                continue
            rate = count / busy
            record: Record = {
                "step": step + 1, "loss": loss, "lr": config.lr_at(step), "grad_norm": norm, f"{unit}_per_s": rate
            }  # fmt: skip
            busy, count = 0.0, 0
            measured = evaluate() if evaluates else {}
            record |= measured
            records.append(record)
            if bar is not None:
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} {unit}/s")
                if evaluates:
                    shown = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items()]
                    bar.write(", ".join([f"step {step + 1}: loss {loss:.4f}", *shown]))
            if on_record is not None:
                on_record(record)
    finally:
        for p in held:
            p.requires_grad_(True)
        if bar is not None:
            bar.close()
    return records


def on_device(device: str, source: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, each moved there when its turn comes."""
    for batch in source:
        yield tuple(t if t is None else t.to(device) for t in batch)


def _progress_bar(steps: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=steps, unit="step", dynamic_ncols=True, smoothing=0.1, disable=None
    )  # None: off in a file


def device_named(name: str) -> str:
    """The device: cpu, cuda (of several: cuda:1), or for auto a GPU where there is one; ValueError for another."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or auto, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: expected a GPU for {name!r}, but PyTorch finds none here")
    return name
