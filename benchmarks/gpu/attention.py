"""Attention from 1k to 16k tokens against PyTorch's own backends and FlexAttention, and decoding.

16k tokens a batch and 2048 hidden, as in published figures. Operations: 4·B·H·Tq·Tk·D forward (two products), 2.5
times as many backward, half of both when causal. Judged on whole heads against the fp64 reference: the first head
and the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import contest
from benchmarks.gpu.contest import Contest, Function, Results
from benchmarks.gpu.machine import Gpu
from benchmarks.gpu.record import Recorder
from benchmarks.results import EAGER, Row
from benchmarks.suites import Budget
from fastgpt._core import registry
from fastgpt._core.spec import Cost
from fastgpt.testing.inputs import Problem

TOKENS, HIDDEN = 16384, 2048
LENGTHS = (4096, 16384, 1024, 8192, 2048)  # the most valuable first
WIDTHS = ((128, True), (64, True), (128, False), (64, False))  # head dim, causal
SDPA = {
    "sdpa flash": "FLASH_ATTENTION",
    "sdpa cudnn": "CUDNN_ATTENTION",
    "sdpa efficient": "EFFICIENT_ATTENTION",
}
FLEX = "flex compiled"
FLEX_SECONDS = 20.0  # about, to compile it forward and backward

# (batch, context, query tokens, K/V heads); 32 heads of 128
DECODE = tuple(
    (batch, context, queries, kv_heads)
    for queries in (1, 4)
    for kv_heads in (8, 32)
    for batch, context in (
        *((32, 8192), (1, 32768), (8, 8192), (32, 2048), (1, 8192)),
        *((8, 32768), (1, 2048), (8, 2048), (32, 32768)),
    )
)
DECODE_HEADS, DECODE_DIM = 32, 128


def run(machine: Gpu, recorder: Recorder, budget: Budget, full: bool) -> None:
    recorder.limits(machine.limits(), "start")
    shapes = [(length, width, causal) for width, causal in WIDTHS for length in LENGTHS]
    jobs = list(machine.sizes(shapes, [(20, 16, True)]))
    for done, (length, width, causal) in enumerate(jobs):
        name = f"attention {length} tokens, head dim {width}{', causal' if causal else ''}"
        if budget.left < 3.0 and not machine.dry:
            recorder.not_run(name, "this part's time is spent")
            continue
        seconds = 0.0 if machine.dry else min(max(0.4 * budget.left / (len(jobs) - done), 0.5), 3.0)
        with_flex = full or machine.dry or budget.allows_compiling(FLEX_SECONDS)
        recorder.rows(
            _guarded(name, recorder, partial(rows, length, width, causal, machine, seconds, with_flex))
        )
        if with_flex:
            budget.compiling += FLEX_SECONDS
    recorder.limits(machine.limits(), "end")


def run_decode(machine: Gpu, recorder: Recorder, budget: Budget, full: bool) -> None:
    recorder.limits(machine.limits(), "start")
    jobs = list(machine.sizes(DECODE, [(1, 40, 1, 1), (1, 33, 4, 2)]))
    for done, job in enumerate(jobs):
        name = "decode batch {}, context {}, {} queries, {} K/V heads".format(*job)
        if budget.left < 1.0 and not machine.dry:
            recorder.not_run(name, "this part's time is spent")
            continue
        seconds = 0.0 if machine.dry else min(max(0.4 * budget.left / (len(jobs) - done), 0.2), 1.0)
        recorder.rows(_guarded(name, recorder, partial(decode_rows, job, machine, seconds)))


def _guarded(name: str, recorder: Recorder, work: Callable[[], list[Row]]) -> list[Row]:
    try:
        return work()
    except torch.OutOfMemoryError as error:
        recorder.not_run(name, contest.reason(error))
        torch.cuda.empty_cache()
        return []


def rows(length: int, width: int, causal: bool, machine: Gpu, seconds: float, with_flex: bool) -> list[Row]:
    batch, heads = machine.sizes((TOKENS // length, HIDDEN // width), (1, 2))
    spec, draw = registry.get("attention"), machine.draw(0)
    q, k, v, dout = (_heads(draw.normal((batch, length, heads, width), torch.bfloat16)) for _ in range(4))
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "causal": causal}
    contenders, backend = contest.ours(machine, spec, inputs)
    contenders[EAGER] = sdpa
    for name, choice in SDPA.items():
        contenders[name] = _only(machine, choice, sdpa)
    notes = {}
    if with_flex:
        machine.forget_compiled()
        flex = machine.flex(length, causal)
        contenders[FLEX] = lambda q, k, v, causal: flex(q, k, v)
    else:
        notes[FLEX] = "this part's time for compiling is spent"
    forward = 4 * batch * heads * length * length * width // (2 if causal else 1)
    moved = batch * heads * length * width * 2
    cost = Cost(4 * moved, 8 * moved, forward, 5 * forward // 2)
    grads = {"out": dout}
    name = f"{batch}x{heads}x{length}x{width}{'-causal' if causal else ''}"
    judge = HeadsJudge(inputs, grads)
    made = Contest(spec, name, "bf16", inputs, grads, cost, contenders, judge, notes)
    return contest.run(made, machine, seconds, backend)


def decode_rows(job: tuple[int, int, int, int], machine: Gpu, seconds: float) -> list[Row]:
    """Forward alone; K and V as a cache keeps them, head by head."""
    batch, context, queries, kv_heads = job
    spec, draw, heads, width = registry.get("attention"), machine.draw(0), DECODE_HEADS, DECODE_DIM
    heads, width = machine.sizes((heads, width), (2, 16))
    q = _heads(draw.normal((batch, queries, heads, width), torch.bfloat16))
    k, v = (draw.normal((batch, kv_heads, context, width), torch.bfloat16) for _ in range(2))
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "causal": True}  # as a cache is used
    contenders, backend = contest.ours(machine, spec, inputs)
    mask = None
    if queries > 1:  # SDPA's own causality is aligned to the first key, not the last
        mask = torch.ones(queries, context, dtype=torch.bool, device=machine.device).tril(context - queries)
    cached = partial(sdpa_cached, mask)
    contenders[EAGER] = cached
    for name, choice in SDPA.items():
        contenders[name] = _only(machine, choice, cached)
    moved = 2 * batch * kv_heads * context * width * 2  # K and V, read once
    cost = Cost(moved, 0, 4 * batch * heads * queries * context * width, 0)
    name = f"{batch}x{heads}x{kv_heads}x{queries}x{context}x{width}-decode"
    judge = HeadsJudge(inputs, {})
    made = Contest(spec, name, "bf16", inputs, {}, cost, contenders, judge)
    return contest.run(made, machine, seconds, backend)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def sdpa_cached(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _only(machine: Gpu, backend: str, function: Function) -> Function:
    def call(**inputs: Any) -> Any:
        with machine.sdpa(backend):
            return function(**inputs)

    return call


class HeadsJudge:
    """The largest error in the first and in the last group of heads, as a fraction of its bound."""

    def __init__(self, inputs: dict[str, Any], grads: dict[str, Tensor]) -> None:
        self.inputs, spec = inputs, registry.get("attention")
        batch, self.heads, kv_heads = inputs["q"].shape[0], inputs["q"].shape[1], inputs["k"].shape[1]
        self.group = self.heads // kv_heads
        self.problems: dict[tuple[int, int], Problem] = {}
        for place in {(0, 0), (batch - 1, kv_heads - 1)}:
            q = self.part(inputs["q"], place)
            mine = {name: self.part(dy, place) for name, dy in grads.items()} or {"out": torch.zeros_like(q)}
            call = {name: self.part(value, place) for name, value in inputs.items()}
            self.problems[place] = Problem(spec, q.dtype, call, mine)
        torch.cuda.empty_cache()  # the exact scores were large

    def part(self, value: Any, place: tuple[int, int]) -> Any:
        """The query heads of one K/V head, or that head."""
        if not isinstance(value, Tensor):
            return value
        (b, g), size = place, self.group if value.shape[1] == self.heads else 1
        return value[b : b + 1, g * size : (g + 1) * size]

    def __call__(self, got: Results) -> float:
        for name, value in got.items():
            like = self.inputs["q" if name == "out" else name[1:]]
            if value.shape != like.shape or value.dtype != like.dtype:
                return math.inf
        return contest.largest(
            [
                comparison.ratio
                for place, problem in self.problems.items()
                for comparison in problem.compare({n: self.part(v, place) for n, v in got.items()}).values()
            ]
        )


def _heads(value: Tensor) -> Tensor:
    """[B, T, H, D] storage as [B, H, T, D]."""
    return value.transpose(1, 2)
