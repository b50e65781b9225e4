"""`python -m benchmarks [--suite quick|cpu|gpt2|patch|encoders]`; on stored runs `report FILE`, `readme FILE`,
`compare A B`; `offline` compiles the Triton kernels without a GPU, `tune` chooses their configurations on one,
`foreign` checks Liger-Kernel's kernels and PyTorch's ops.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # we only count allocations with it: no announcements

RESULTS = Path(__file__).resolve().parent / "results"
COMMANDS = ("report", "readme", "compare")


def main(arguments: list[str]) -> int:
    try:
        if arguments and arguments[0] in COMMANDS:
            return on_files(arguments)
        if arguments and arguments[0] == "offline":
            from benchmarks import offline

            return offline.main(arguments[1:])
        if arguments and arguments[0] == "tune":
            from benchmarks import tune

            return tune.main(arguments[1:])
        if arguments and arguments[0] == "foreign":
            if "cuda" not in arguments:  # before anything imports Triton
                os.environ.setdefault("TRITON_INTERPRET", "1")
            from benchmarks import foreign_table

            return foreign_table.main(arguments[1:])
        return run(arguments)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def run(arguments: list[str]) -> int:
    import torch

    import fastgpt
    from benchmarks import buffers, environment, report, suites

    options = parse(arguments)
    if options.allocator == "both":  # a process cannot go back: one for each
        return both_allocators(arguments, options.out)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    torch.manual_seed(0)
    if options.allocator == "keep":
        if not fastgpt.keep_large_blocks():
            print("keep_large_blocks has no effect here: the default allocator is measured")
        elif device.type == "cpu" and options.suite == "cpu":
            buffers.grow_heap()
    stamp = environment.stamp(device)
    print("\n".join(report.environment_lines(stamp)))

    chosen = suites.Options(
        device=device,
        suite=options.suite,
        dtypes=tuple(options.dtype or ("fp32", "bf16")),
        ops=tuple(options.op or ()),
        match=options.case,
        backends=tuple(options.backend or ()),
        budget=suites.BUDGETS[options.suite] if options.budget is None else options.budget,
        compiled=not options.no_compile,
    )
    result = suites.run(chosen, stamp, lambda rows, seen: print(report.progress(rows, seen), flush=True))
    path = result.save(options.out)
    print("\n" + report.limit_table(result))
    for line in result.not_run:
        print(f"not run: {line}")
    write_report(path)
    print(f"\n{path} and beside it the report, after {result.seconds:.0f} s")
    print(f"Slower than eager PyTorch beyond the noise:\n{report.verdict(result)}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    from benchmarks import gpt_step, suites
    from fastgpt._core import registry
    from fastgpt._core.spec import BACKENDS

    ops = [*(spec.name for spec in registry.ops()), gpt_step.OP]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=tuple(suites.BUDGETS), default="quick")
    parser.add_argument("--op", action="append", choices=ops, help="only this op (may be repeated)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases with TEXT in their names")
    parser.add_argument(
        "--dtype", action="append", choices=["fp32", "bf16", "fp16"], help="default: fp32 and bf16"
    )
    parser.add_argument(
        "--backend", action="append", choices=BACKENDS, help="time it beside the automatic choice"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--allocator",
        choices=["keep", "default", "both"],
        default="keep",
        help="keep: fastgpt.keep_large_blocks() for all contenders; both: one run each, compared",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="default: quick 270, cpu 3600, others 1800; what is left is listed",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    return parser.parse_args(arguments)


def both_allocators(arguments: list[str], out: Path) -> int:
    from benchmarks.compare import compare
    from benchmarks.results import load

    paths = []
    for allocator in ("default", "keep"):
        before = set(out.glob("*.json"))
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            *arguments,
            "--allocator",
            allocator,
        ]  # the last one counts
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
        paths += sorted(set(out.glob("*.json")) - before)
    print("\nFrom the default allocator to keep_large_blocks:")
    print(compare(load(paths[0]), load(paths[1])))
    return 0


def on_files(arguments: list[str]) -> int:
    from benchmarks import compare, report
    from benchmarks.results import load

    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, files in (("report", 1), ("readme", 1), ("compare", 2)):
        commands.add_parser(name).add_argument("file", nargs=files, type=Path)
    options = parser.parse_args(arguments)
    if options.command == "report":
        print("\n".join(map(str, write_report(options.file[0]))))
    elif options.command == "readme":
        print(report.readme(load(options.file[0])), end="")
    else:
        print(compare.compare(load(options.file[0]), load(options.file[1])))
    return 0


def write_report(path: Path) -> list[Path]:
    """Markdown and, where matplotlib is installed, a plot, beside the JSON file."""
    from benchmarks import report
    from benchmarks.results import load

    stored = load(path)
    written = [path.with_suffix(".md")]
    text = report.markdown(stored)
    try:
        report.plot(stored, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
        text = text.replace("\n\n## Limits", f"\n\n![fraction of the limit]({path.stem}.png)\n\n## Limits", 1)
    except ImportError:
        print("matplotlib is not installed: no plot")
    written[0].write_text(text)
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
