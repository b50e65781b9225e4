"""`python3 -m benchmarks.gpu [--out DIR] [--budget SECONDS] [--part check,bench,tune,races] [--full] [--dry]`."""

from __future__ import annotations

import argparse
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
# Op: (the stem of its kernels' files, among how many processes its check is split); the longest first. What takes
# the time is Triton's compiler, on the host.
OPS = {
    "attention": ("attention", 6),
    "attention_varlen": ("attention", 3),
    "attention_qkv": ("attention", 2),
    "softmax": ("softmax", 3),
    "layer_norm": ("layer_norm", 2),
    "gelu": ("gelu", 1),
}
BACKENDS = ("triton", "cuda")
ARCHIVE = "fastgpt-gpu.tar.gz"


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
    summary.write(out, outcomes, options.dry)
    archive(out)
    print(f"{out / ARCHIVE} after {time.monotonic() - began:.0f} s; the report is {out / 'report.md'}")
    return 0 if all(outcome.ok for outcome in outcomes) and summary.all_proven(out) else 1


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

    checked = [
        f"check-{backend}-{op}-{shard}of{shards}"
        for op, (stem, shards) in OPS.items()
        for backend in BACKENDS
        for shard in range(shards)
        if is_written(backend, stem) and (op == "gelu" or not options.dry)
    ]
    by_group = {
        "check": [
            *(part(name, 0.30 / max(len(checked), 1), together or "check") for name in checked),
            matrix_part(options.dry, together or "check"),
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
    return [one for name in GROUPS if name in options.part for one in by_group[name]]


def is_written(backend: str, stem: str) -> bool:
    """Whether `backend` has a module of that name: looked up without importing anything that could fail."""
    return (ROOT / "kernels" / "fastgpt_kernels" / backend / f"{stem}.py").is_file()


def tune_part(out: Path, dry: bool, group: str) -> Part:
    command = [sys.executable, "-m", "benchmarks", "tune", "--out", str(out / "tables")]
    if dry:  # it has a rehearsal of its own, which does not interpret
        command = ["env", "-u", "TRITON_INTERPRET", *command, "--dry-run", "--op", "gelu"]
    return Part("tune", tuple(command), 0.10, flag="--budget", group=group)


def matrix_part(dry: bool, group: str) -> Part:
    """What the generated tests look at beside the cases: NaN, infinity, any shape, which backend ran."""
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_ops.py")
    chosen = "not test_case and (triton or cuda or any_shape)" if not dry else "asked_for and gelu-triton"
    return Part("matrix", (*command, "-k", chosen), 0.05, flag="", group=group)


def archive(out: Path) -> None:
    """Everything in `out` but older archives, under one folder."""
    with tarfile.open(out / ARCHIVE, "w:gz") as tar:
        for path in sorted(out.iterdir()):
            if path.name != ARCHIVE:
                tar.add(path, arcname=f"fastgpt-gpu/{path.name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
