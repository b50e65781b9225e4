"""One part in a process of its own: `python -m benchmarks.gpu.part memory --out DIR --seconds 60`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.gpu import attention, checking, memory, races, sanitizer, training
from benchmarks.gpu.machine import machine as choose_machine
from benchmarks.gpu.record import Recorder
from benchmarks.suites import Budget

SUITES = {
    "small": memory.run_small,
    "memory": memory.run,
    "attention": attention.run,
    "decode": attention.run_decode,
    "training": training.run,
    "races": races.run,
    "sanitizer": sanitizer.run,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.part", description=__doc__)
    parser.add_argument(
        "names", metavar="name", help=f"one or several of {','.join(SUITES)}, or check-BACKEND-OP-SHARD"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args(arguments)
    budget = Budget(options.seconds)
    torch.manual_seed(0)
    machine = choose_machine(options.dry)
    for name in options.names.split(","):
        settings = {"suite": f"gpu-{name}", "seconds": options.seconds, "dry": options.dry}
        recorder = Recorder(options.out / f"{name}.jsonl", settings, machine.device)
        if name.startswith("check-"):
            _, backend, op, shard = name.split("-")
            checking.run(backend, op, shard, machine, recorder, budget)
        else:
            SUITES[name](machine, recorder, budget, options.full)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
