"""`python3 -m benchmarks.gpu [--out DIR] [--budget SECONDS] [--part check,bench,tune,races] [--full] [--dry]`."""

from __future__ import annotations

import argparse
import functools
import math
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

from benchmarks.gpu import summary
from benchmarks.gpu.schedule import Outcome, Part, run_parts

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("check", "bench", "tune", "races")  # the most valuable first
BACKENDS = ("triton", "cuda")
CHECKED_TOGETHER = (
    25  # cases and dtypes for one process. What takes the time is Triton's compiler, on the host
)
REHEARSED = "gelu"  # the op that a rehearsal checks
ARCHIVE = "fastgpt-gpu.tar.gz"
# -v: the log of a run that is killed says what had passed.
PYTEST = (sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "tests/test_ops.py")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    began = time.monotonic()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.jsonl"), *out.glob("*.log"), *out.glob("*.json"), *out.glob("*.png")):
        old.unlink()
    environment = {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "KINETO_LOG_LEVEL": "99",
    }
    workers = min(max((os.cpu_count() or 2) - 2, 2), 12)
    if not options.dry:
        environment |= {"FASTGPT_TEST_DEVICE": "cuda"}
    else:
        environment |= {"TRITON_INTERPRET": "1", "FASTGPT_CUDA_EMULATION": "1", "OMP_NUM_THREADS": "1"}
    outcomes: list[Outcome] = []
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever limits our time still gets an archive
    try:
        if not options.dry:
            run_parts([build_part()], out, 600.0, environment, outcomes=outcomes)
        left = options.budget - (time.monotonic() - began)
        run_parts(parts_of(options, out), out, left, environment, workers, outcomes=outcomes)
    except KeyboardInterrupt:
        print("interrupted: reporting what there is")
    verdict = summary.verdict(out, outcomes)
    summary.write(out, outcomes, options.dry)
    archive(out)
    print(
        f"{out / ARCHIVE} after {time.monotonic() - began:.0f} s; the report is {out / 'report.md'}: {verdict}"
    )
    return 0 if verdict == summary.PROVEN else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu",
        description="Check, benchmark and tune the GPU kernels; leaves one archive.",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR")
    parser.add_argument("--budget", type=float, default=1500.0, metavar="SECONDS", help="of the whole run")
    parser.add_argument("--part", default=",".join(GROUPS), help="one or several of " + ", ".join(GROUPS))
    parser.add_argument("--full", action="store_true", help="fp32 too, and torch.compile at every shape")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU, at tiny shapes")
    options = parser.parse_args(arguments)
    options.part = options.part.split(",")
    for name in options.part:
        if name not in GROUPS:
            parser.error(f"--part: expected one or several of {', '.join(GROUPS)}, got {name!r}")
    return options


def build_part() -> Part:
    return Part("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 1.0, flag="")


def parts_of(options: argparse.Namespace, out: Path) -> list[Part]:
    """The parts that were asked for, with their shares of the time. The check's share ends when it is done."""
    flags = (["--dry"] if options.dry else []) + (["--full"] if options.full else [])
    together = "rehearsal" if options.dry else ""  # nothing is really timed there

    def part(name: str, share: float, group: str = together) -> Part:
        command = (sys.executable, "-m", "benchmarks.gpu.part", name, "--out", str(out), *flags)
        return Part(name, command, share, group=group)

    from fastgpt._core import registry

    ops = [REHEARSED] if options.dry else list(shards())
    checked = [
        f"check-{backend}-{op}-{shard}of{shards()[op]}"
        for op in ops
        for backend in BACKENDS
        for shard in range(shards()[op])
        if registry.is_written(op, backend) and not (options.dry and shard)
    ]
    by_group = {
        "check": [
            *(part(name, 0.30 / max(len(checked), 1), together or "check") for name in checked),
            *(matrix_part(op, options.dry, together or "check") for op in ops),
            *([] if options.dry else [large_part()]),
        ],
        "bench": [
            part("small", 0.05),
            part("attention", 0.20),
            part("memory", 0.15),
            part("training", 0.20),
            part("decode", 0.08),
        ],
        "tune": [tune_part(out, options.dry, together)],
        "races": [part("races", 0.06), part("sanitizer", 0.06)],
    }
    if options.dry:  # fewer processes: to start one is most of what it takes
        by_group["check"] = [part(",".join(checked), 1.0), matrix_part(REHEARSED, True, together)]
        by_group["bench"] = [part("small,memory,decode,attention,training", 1.0)]
        by_group["races"] = [part("races,sanitizer", 1.0)]
    return [one for name in GROUPS if name in options.part for one in by_group[name]]


@functools.cache
def shards() -> dict[str, int]:
    """Among how many processes the check of each op is split; the longest ops first."""
    from fastgpt._core import registry  # not before the build: it loads what was built
    from fastgpt.testing.inputs import dtypes_of

    jobs = {spec.name: sum(len(dtypes_of(case)) for case in spec.cases) for spec in registry.ops()}
    return {
        op: math.ceil(jobs[op] / CHECKED_TOGETHER) for op in sorted(jobs, key=jobs.__getitem__, reverse=True)
    }


def tune_part(out: Path, dry: bool, group: str) -> Part:
    command = [sys.executable, "-m", "benchmarks", "tune", "--out", str(out / "tables")]
    if dry:  # it has a rehearsal of its own, which does not interpret
        command = ["env", "-u", "TRITON_INTERPRET", *command, "--dry-run", "--op", "gelu"]
    return Part("tune", tuple(command), 0.10, flag="--budget", group=group)


def matrix_part(op: str, dry: bool, group: str) -> Part:
    """What the generated tests of an op look at beside the cases: NaN, infinity, any shape, which backend ran."""
    others = "".join(f" and not {other}" for other in shards() if other != op and op in other)
    chosen = "asked_for and triton" if dry else "not test_case and (triton or cuda or any_shape)"
    return Part(
        f"matrix-{op}", (*PYTEST, "-m", "not slow", "-k", f"{op}{others} and {chosen}"), 0.01, "", group
    )


def large_part() -> Part:
    """More than 2^31 elements: one after the other, for they take much of the memory."""
    return Part("large", (*PYTEST, "-m", "slow", "-k", "2_to_the_31"), 0.03, flag="")


def archive(out: Path) -> None:
    """Everything in `out` but older archives, under one folder."""
    with tarfile.open(out / ARCHIVE, "w:gz") as tar:
        for path in sorted(out.iterdir()):
            if path.name != ARCHIVE:
                tar.add(path, arcname=f"fastgpt-gpu/{path.name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
