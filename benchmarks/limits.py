"""What this machine can do at best, measured in the same run as what is compared with it.

Each is the best of several ways that PyTorch offers, by its p20 time. They are measurements, not data-sheet
figures: "fp32 peak" is the best fp32 matrix product measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastgpt.testing.timing import Step, measure

COPY_MIB = {"cpu": 384, "cuda": 2048}  # per buffer, beyond any last-level cache
SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}

NAMES = {
    "copy": "copy (bytes read + bytes written)",
    "read": "read",
    "float32": "best fp32 matrix product",
    "bfloat16": "best bf16 matrix product",
}


@dataclass(frozen=True)
class Limit:
    rate: float  # bytes/s or FLOP/s
    way: str


Limits = dict[str, Limit]


class LimitMeter:
    """Holds its buffers, so that measuring again and again costs no page faults."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        n = COPY_MIB[device.type] * 2**20 // 4
        source, target = torch.rand(n, device=device), torch.rand(n, device=device)
        self.work: dict[str, dict[str, tuple[Step, float]]] = {
            "copy": {
                "copy_": (lambda _: target.copy_(source), 8.0 * n),
                "mul(out=)": (lambda _: torch.mul(source, 1.5, out=target), 8.0 * n),
            },
            "read": {
                "sum": (lambda _: source.sum(), 4.0 * n),
                "amax": (lambda _: source.amax(), 4.0 * n),
                "dot": (lambda _: torch.dot(source, target), 8.0 * n),
            },
        }
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            sizes, ways = SQUARES[device.type], _worth_measuring(dtype, device)
            self.work[name] = {
                f"{m}x{m}x{m}{way}": (_product(m, dtype, device, way), 2.0 * m**3)
                for m in sizes
                for way in ways
            }

    def measure(self, seconds: float = 2.0) -> Limits:
        result: Limits = {}
        for name, ways in self.work.items():
            steps = {way: step for way, (step, _) in ways.items()}
            timings = measure(steps, self.device, seconds=seconds / len(self.work), min_rounds=3)
            rates = {way: ways[way][1] / timing.seconds.p20 for way, timing in timings.items()}
            best = max(rates, key=lambda way: rates[way])
            result[name] = Limit(rates[best], best)
        return result

    def steps(
        self, names: Iterable[str], measured: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, tuple[Step, float]]:
        """For each limit what measures it, in the way that was best in `measured` (of `to_json`), and its work."""
        return {name: self.work[name][measured[name]["way"]] for name in sorted(set(names))}


PLAIN, WIDENED = "", " in fp32"  # ways to multiply


def _worth_measuring(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Of the ways to multiply, those not far behind: without AVX-512, PyTorch's plain bf16 product is a loop that
    takes a hundred times as long as fp32, minutes at the sizes that are measured."""
    if dtype == torch.float32 or device.type != "cpu":
        return [PLAIN]
    steps = {way: _product(256, dtype, device, way) for way in (PLAIN, WIDENED)}
    taken = {way: timing.seconds.p20 for way, timing in measure(steps, device, seconds=0.1).items()}
    return [way for way in steps if taken[way] < 4 * min(taken.values())]


def _product(m: int, dtype: torch.dtype, device: torch.device, way: str) -> Callable[[int], object]:
    a, b = (torch.randn(m, m, device=device).to(dtype) for _ in range(2))
    out = torch.empty(m, m, dtype=dtype, device=device)
    if way == WIDENED:
        return lambda _: out.copy_(torch.mm(a.float(), b.float()))
    return lambda _: torch.mm(a, b, out=out)


def binding(moved: float, flops: float, dtype: str, rates: Mapping[str, float]) -> tuple[str, float]:
    """Which limit such work meets first, and the seconds that it takes there."""
    product = "float32" if dtype == "fp32" else "bfloat16"
    copying, computing = moved / rates["copy"], flops / rates[product]
    return ("copy", copying) if copying >= computing else (product, computing)


def to_json(limits: Limits, when: str) -> dict[str, Any]:
    return {"when": when, **{name: asdict(limit) for name, limit in limits.items()}}


def best(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The highest rate of each limit over the run's measurements (as `to_json` made them)."""
    return {name: max(entry[name]["rate"] for entry in measured) for name in NAMES}
