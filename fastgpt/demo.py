"""The demo: one small GPT, trained three ways from the same seed on the same batches.

Reference, stock PyTorch and fused start from the same weights and take their steps in turn, so that
their losses must lie on one another and their speeds are measured under the same conditions. Compiled
stock PyTorch takes part now and then, for its speed alone.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt._core.memory import keeps_large_blocks
from fastgpt.generate import generate
from fastgpt.models.checkpoint import atomic_files, json_bytes
from fastgpt.models.gpt import GPT, GPTConfig
from fastgpt.models.stock_gpt import StockGPT
from fastgpt.train import checkpoint
from fastgpt.train.data import Batch, Corpus, batches, default_corpus, held_out_batches, make_corpus
from fastgpt.train.loop import Record, TrainConfig, held_out_loss, make_optimizer, train_step
from fastgpt.train.plot import Curve, loss_plot

SEQ_LENGTH = 128
VOCAB_SIZE = 1024
AGREEMENT = 1e-4  # nats a token, in fp32, at every step
WARMUP_ROUNDS = 3  # not timed
COMPILED_EVERY = 5  # rounds
AFTERWARDS = 6  # rounds' worth of time that evaluating, generating and saving take, with a margin
PLOT, RESULTS, MODEL = "losses.png", "results.json", "model"
PROMPT = "The "


@dataclass
class Contender:
    """One way to train the model, and what it has shown so far."""

    name: str
    model: nn.Module
    call: Callable[..., Tensor]  # the model, or its compiled form
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)  # by step

    def step(self, batch: Batch, step: int, config: TrainConfig) -> None:
        start = time.perf_counter()
        loss, _ = train_step(self.call, self.optimizer, [batch], step, config)
        self.seconds[step] = time.perf_counter() - start
        self.losses.append(loss)

    def tokens_per_s(self, config: TrainConfig) -> dict[str, float]:
        tokens = config.batch_size * SEQ_LENGTH
        timed = sorted(tokens / s for step, s in self.seconds.items() if step >= WARMUP_ROUNDS)
        return {
            "median": statistics.median(timed),
            "p20": timed[len(timed) // 5],
            "p80": timed[-1 - len(timed) // 5],
        }

    def speed_against(self, other: Contender) -> float:
        """The median over the rounds both took part in: what slows a whole round drops out."""
        rounds = [step for step in self.seconds if step >= WARMUP_ROUNDS and step in other.seconds]
        return statistics.median(other.seconds[step] / self.seconds[step] for step in rounds)


def run_demo(out: Path, steps: int, minutes: float, seed: int) -> int:
    """Run it all, print it, write it to `out`; 0 when the losses agree and the model has learned, else 1."""
    if steps <= WARMUP_ROUNDS:
        raise ValueError(f"steps: expected more than {WARMUP_ROUNDS} (that many warm up), got {steps}")
    deadline = time.perf_counter() + 60 * minutes
    config = TrainConfig(
        steps=steps, batch_size=8, lr=1e-3, min_lr=1e-4, warmup=max(1, steps // 10), seed=seed, log_every=20
    )
    checkpoint.check_can_save(out, (PLOT, RESULTS))
    checkpoint.check_can_save(out / MODEL)
    corpus = make_corpus(default_corpus(), vocab_size=VOCAB_SIZE, seq_length=SEQ_LENGTH)
    model_config = GPTConfig(corpus.tokenizer.vocab_size, 256, 4, 4, SEQ_LENGTH)
    fused, paths = make_paths(model_config, config, seed)
    parameters = sum(p.numel() for p in fused.parameters())
    print(
        f"Text: Python's language reference, {len(corpus.train):,} tokens to learn,"
        f" {len(corpus.held_out):,} held out.\n"
        f"Model: {parameters:,} parameters, {model_config.num_layers} layers of width {model_config.embedding_dim},"
        f" fp32, {config.batch_size} x {SEQ_LENGTH} tokens a step, {steps} steps, {torch.get_num_threads()} threads."
    )
    compiled, why_not = compiled_path(paths[1].model, config)
    records = train_interleaved(paths, compiled, corpus, config, deadline)
    results = summarize(paths, compiled, why_not, corpus, model_config, config, records)
    prompt = torch.tensor([corpus.tokenizer.encode(PROMPT)])
    sampled = generate(fused, prompt, max_new_tokens=120, temperature=0.8, top_k=50, seed=seed)
    results["text"] = corpus.tokenizer.decode(sampled[0].tolist())
    print(report(results))
    write(out, fused, corpus, paths, results, records)
    print(f"\nIn {out}: {PLOT}, {RESULTS}, and the trained model in {out / MODEL}. Try:")
    print(f'  fastgpt generate --model {out / MODEL} --prompt "{PROMPT}"')
    if keeps_large_blocks():
        print("Large freed blocks were kept, for every path alike: fastgpt.keep_large_blocks().")
    return 0 if results["agrees"] and results["below_unigram_entropy"] else 1


def make_paths(model_config: GPTConfig, config: TrainConfig, seed: int) -> tuple[GPT, list[Contender]]:
    torch.manual_seed(seed)
    fused = GPT(model_config)
    reference = GPT(GPTConfig(**{**asdict(model_config), "backend": "reference"}))
    stock = StockGPT(model_config)
    models: dict[str, nn.Module] = {"reference": reference, "stock PyTorch": stock, "fused": fused}
    for model in models.values():
        model.load_state_dict(fused.state_dict())
    return fused, [
        Contender(name, model, model, make_optimizer(model, config)) for name, model in models.items()
    ]


def compiled_path(stock: nn.Module, config: TrainConfig) -> tuple[Contender | None, str]:
    """torch.compile of a copy of the stock model, or None and the reason."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler for torch.compile"
    assert isinstance(stock, StockGPT)
    model = StockGPT(stock.config)
    model.load_state_dict(stock.state_dict())
    path = Contender("stock, compiled", model, torch.compile(model), make_optimizer(model, config))
    print("Compiling stock PyTorch (not timed) ...", flush=True)
    tokens = torch.zeros(config.batch_size, SEQ_LENGTH, dtype=torch.int64)
    try:
        path.call(tokens, tokens).backward()
    except Exception as error:  # torch.compile fails in many ways; the demo goes on without that figure
        return None, f"torch.compile failed: {type(error).__name__}"
    path.optimizer.zero_grad(set_to_none=True)
    return path, ""


def train_interleaved(
    paths: list[Contender], compiled: Contender | None, corpus: Corpus, config: TrainConfig, deadline: float
) -> list[Record]:
    """Every path takes step n before any takes step n + 1; who goes first changes from round to round.

    Stops early enough for what follows to end by the deadline too, however slow the machine is.
    """
    from tqdm import tqdm

    start = time.perf_counter()

    source = batches(corpus.train, config.batch_size, SEQ_LENGTH, config.seed)
    records: list[Record] = []
    with tqdm(total=config.steps, unit="round", dynamic_ncols=True, disable=None) as bar:
        for step in range(config.steps):
            batch = next(source)
            turn = list(paths)
            if compiled is not None and (step < WARMUP_ROUNDS or step % COMPILED_EVERY == 0):
                turn.append(compiled)
            for i in range(len(turn)):
                turn[(i + step) % len(turn)].step(batch, step, config)
            bar.update()
            now = time.perf_counter()
            late = step > WARMUP_ROUNDS and now + AFTERWARDS * (now - start) / (step + 1) > deadline
            late = late and step + 1 < config.steps
            if step == 0 or (step + 1) % config.log_every == 0 or step + 1 == config.steps or late:
                losses = {path.name: path.losses[-1] for path in paths}
                spread = max(losses.values()) - min(losses.values())
                records.append({"step": step + 1, **losses, "difference": spread})
                bar.write(
                    f"step {step + 1:4d}  "
                    + "  ".join(f"{name} {loss:.6f}" for name, loss in losses.items())
                    + f"  largest difference {spread:.1e}"
                )
            if late:
                bar.write("The time is up: stopping here (--minutes).")
                break
    return records


def summarize(
    paths: list[Contender],
    compiled: Contender | None,
    why_not: str,
    corpus: Corpus,
    model_config: GPTConfig,
    config: TrainConfig,
    records: list[Record],
) -> dict[str, Any]:
    windows = held_out_batches(corpus.held_out, config.batch_size, SEQ_LENGTH)
    held_out = {path.name: held_out_loss(path.model, windows, config) for path in paths}
    contenders = [*paths, *([compiled] if compiled else [])]
    rates = {path.name: path.tokens_per_s(config) for path in contenders}
    stock = next(path for path in paths if path.name == "stock PyTorch")
    differences = [max(row) - min(row) for row in zip(*(path.losses for path in paths), strict=True)]
    return {
        "model": model_config.to_dict(),
        "training": vars(config),
        "environment": {
            "cpu": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "unigram_entropy": corpus.unigram_entropy,
        "held_out": held_out,
        "largest_difference": max(differences),
        "agrees": max(differences) <= AGREEMENT,
        "below_unigram_entropy": held_out["fused"] < corpus.unigram_entropy,
        "tokens_per_s": rates,
        "against_stock": {path.name: path.speed_against(stock) for path in contenders},
        "not_measured": {"stock, compiled": why_not} if why_not else {},
        "logged": records,
        "losses": {path.name: path.losses for path in paths},
    }


def report(results: dict[str, Any]) -> str:
    entropy, difference = results["unigram_entropy"], results["largest_difference"]
    lines = ["", "path               tokens/s  (p20 to p80)         against stock   held-out loss"]
    for name, rate in results["tokens_per_s"].items():
        held_out = results["held_out"].get(name)
        lines.append(
            f"{name:<17} {rate['median']:>9,.0f}  ({rate['p20']:,.0f} to {rate['p80']:,.0f})".ljust(49)
            + f"{results['against_stock'][name]:>9.2f}x"
            + (f"{held_out:>16.4f}" if held_out is not None else "")
        )
    lines += [f"{name:<17} not measured: {reason}" for name, reason in results["not_measured"].items()]
    lines += [
        "",
        f"Losses {'agree' if results['agrees'] else 'DISAGREE'}: the largest difference at any step is"
        f" {difference:.1e} nats/token (allowed: {AGREEMENT:.0e}).",
        f"Held-out loss {results['held_out']['fused']:.3f} against a unigram entropy of {entropy:.3f} nats/token"
        + (": the model uses its context." if results["below_unigram_entropy"] else ": NOTHING LEARNED."),
        "",
        "The fused model writes:",
        results["text"],
    ]
    return "\n".join(lines)


def write(
    out: Path,
    fused: GPT,
    corpus: Corpus,
    paths: list[Contender],
    results: dict[str, Any],
    records: list[Record],
) -> None:
    styles = {
        "reference": "-",
        "stock PyTorch": "--",
        "fused": ":",
    }  # drawn over one another: all stay visible
    curves: list[Curve] = [
        (
            f"{path.name}: {results['tokens_per_s'][path.name]['median']:,.0f} tokens/s",
            range(1, len(path.losses) + 1),
            path.losses,
            styles[path.name],
        )
        for path in paths
    ]
    title = f"one GPT, three paths; largest difference {results['largest_difference']:.1e}"
    image = loss_plot(curves, title, ("unigram entropy", results["unigram_entropy"]))
    training = {"text": ["pydoc_data.topics"], "seq_length": SEQ_LENGTH, **results["training"]}
    checkpoint.save(str(out / MODEL), fused, corpus.tokenizer, training, records)
    with atomic_files(out) as put:
        put(PLOT, image)
        put(RESULTS, json_bytes(results))
