"""Builds `fastgpt_kernels._cpu` with ninja: every csrc/cpu/*.cpp once per SIMD level, and one binding.

Metadata is in pyproject.toml. Torch is neither needed nor looked for. Environment:

    CXX, CXXFLAGS, LDFLAGS   the compiler (default g++) and flags to add
    MAX_JOBS                 how many compilers at once (default: what ninja takes)
    FASTGPT_SANITIZE=1       AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`)
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("FASTGPT_SANITIZE", "0") not in ("", "0")

# Ascending: a CPU that runs a level runs those before it. `generic` is any architecture, the rest is x86-64.
LEVELS = {
    "generic": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}
COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# No contraction: kernels say `fma` where they mean it, so that levels differ only where their sources do.
KERNEL_FLAGS = ["-O3", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-fno-math-errno"]
SANITIZE_FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
NO_COMPILER = "install g++ 11 or newer (Debian: apt install build-essential; Fedora: dnf install gcc-c++)"


def compiler() -> list[str]:
    """The C++ compiler's command line; an error that says what to install if it cannot build the kernels."""
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(cxx[0]) is None:
        raise PlatformError(f"a C++ compiler is needed, found no '{cxx[0]}': {NO_COMPILER} or set CXX")
    return cxx


def levels_of(cxx: list[str]) -> list[str]:
    """The levels of the architecture `cxx` compiles for; it is tried whether it knows their flags and OpenMP."""
    target = subprocess.run([*cxx, "-dumpmachine"], capture_output=True, text=True).stdout
    levels = list(LEVELS) if target.startswith(("x86_64", "amd64")) else ["generic"]
    for level in levels:
        command = [*cxx, *COMMON_FLAGS, *KERNEL_FLAGS, *LEVELS[level], "-fsyntax-only", "-x", "c++", "-"]
        trial = subprocess.run(command, input="#include <omp.h>\n", capture_output=True, text=True)
        if trial.returncode != 0:
            message = f"{cxx[0]} cannot compile for level {level}: {NO_COMPILER}"
            raise PlatformError(f"{message}\n{trial.stderr.strip()}")
    return levels


def ninja() -> str:
    """The ninja executable: PyPI's, a build requirement, or the system's."""
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise PlatformError("fastgpt is built with ninja: pip install ninja")
    return found


def python_includes() -> list[str]:
    """Include flags of this Python and of pybind11."""
    if not importlib.util.find_spec("pybind11"):
        raise PlatformError("fastgpt is built with pybind11: pip install pybind11")
    import pybind11

    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").is_file():
        version = sysconfig.get_python_version()
        raise PlatformError(f"no Python.h in {include}: install Python's headers (python{version}-dev)")
    return [f"-I{include}", f"-I{pybind11.get_include()}"]


def source_hash() -> str:
    """`fastgpt_kernels.source_hash` of csrc: one definition for the build and for the check at import."""
    path = ROOT / "kernels" / "fastgpt_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("_hash", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.source_hash(ROOT / "csrc")


def tables_source(levels: list[str], ops: list[str]) -> str:
    """C++ for csrc/bind/tables.h: the exports of every (level, op), and the hash of the sources."""
    pairs = [(level, op) for level in levels for op in ops]
    declarations = [f"namespace fg::{x} {{ extern const ExportTable {op}_exports; }}" for x, op in pairs]
    rows = [f'    {{"{level}", &fg::{level}::{op}_exports}},' for level, op in pairs]
    names = ", ".join(f'"{level}"' for level in levels)
    lines = [
        "// Written by setup.py.",
        '#include "csrc/bind/tables.h"',
        *declarations,
        "namespace fg {",
        f'extern const char source_hash[] = "{source_hash()}";',
        f"extern const char* const levels[] = {{{names}, nullptr}};",
        "extern const LevelTable tables[] = {",
        *rows,
        "    {nullptr, nullptr},",
        "};",
        "}  // namespace fg",
    ]
    return "\n".join(lines) + "\n"


def build_cpu(output: Path) -> Path:
    """Compile and link `_cpu` in a directory under build/, where the next build finds the objects."""
    cxx, includes = compiler(), python_includes()
    levels = levels_of(cxx)
    sanitize_flags = SANITIZE_FLAGS if SANITIZE else []
    build_dir = Path("build", ("sanitize-" if SANITIZE else "") + output.name.removesuffix(".so"))
    (ROOT / build_dir).mkdir(parents=True, exist_ok=True)
    ops = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))

    rules = [f"builddir = {build_dir}"]  # paths are relative to the root: a moved tree keeps its objects
    rules += _rule("compile", [*cxx, "-MMD", "-MF", "$out.d", "$flags", "-c", "$in", "-o", "$out"])
    rules += _rule("link", [*cxx, "-shared", "$in", "-o", "$out", "$flags"])
    objects: list[str] = []

    def add_object(name: str, source: Path, flags: list[str]) -> None:
        objects.append(f"{build_dir}/{name}.o")
        flags = COMMON_FLAGS + flags + shlex.split(os.environ.get("CXXFLAGS", ""))
        rules.extend([f"build {objects[-1]}: compile {source}", f"  flags = {_quoted(flags)}"])

    level_objects: dict[str, list[str]] = {}
    for level in levels:
        for op in ops:
            flags = [*KERNEL_FLAGS, *LEVELS[level], *sanitize_flags, f"-DFG_LEVEL={level}"]
            add_object(f"{op}.{level}", Path("csrc", "cpu", f"{op}.cpp"), flags)
            level_objects.setdefault(level, []).append(objects[-1])
    tables = build_dir / "cpu_tables.cpp"
    _write_if_changed(ROOT / tables, tables_source(levels, ops))
    add_object("cpu_tables", tables, ["-I."])
    add_object("bind", Path("csrc", "bind", "cpu.cpp"), ["-O2", *includes])
    library = build_dir / output.name
    link_flags = ["-fopenmp", *sanitize_flags, *shlex.split(os.environ.get("LDFLAGS", ""))]
    rules += [f"build {library}: link {' '.join(objects)}", f"  flags = {_quoted(link_flags)}"]
    _write_if_changed(ROOT / build_dir / "build.ninja", "\n".join(rules) + "\n")

    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [ninja(), *jobs, "-f", str(build_dir / "build.ninja"), str(library)]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise CompileError("the C++ kernels do not compile: see the compiler's messages above")
    if not SANITIZE:  # the sanitizers add constructors and weak symbols of their own
        for level, paths in level_objects.items():
            check_level_objects(level, paths)
    return ROOT / library


def check_level_objects(level: str, objects: list[str]) -> None:
    """Nothing compiled for a level may run, or be linked, on a CPU without it.

    A weak symbol outside the level's namespace (an instantiated std template, an inline function) may be the
    copy the linker keeps for every level, and a static initialiser runs at import on every CPU.
    """
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        raise PlatformError("nm and readelf check the compiled kernels: install binutils")

    def output_of(*command: str) -> str:
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout

    faults = []
    for line in output_of("nm", "-AC", "--defined-only", *objects).splitlines():
        file, rest = line.split(":", 1)
        kind, name = rest.split(maxsplit=2)[1:]
        if kind in "WVu" and f"fg::{level}::" not in name:
            faults.append(f"{file}: weak symbol {name}")
    for path in objects:
        sections = output_of("readelf", "-SW", path)
        if ".init_array" in sections or ".ctors" in sections:
            faults.append(f"{path}: a static initialiser (.init_array)")
    if faults:
        raise CompileError(
            f"level {level}: this could run on a CPU without {level}; make it constexpr, or move it into "
            "fg::FG_LEVEL or an unnamed namespace:\n  " + "\n  ".join(faults)
        )


def _rule(name: str, command: list[str]) -> list[str]:
    text = " ".join(part if part.startswith("$") else _quoted([part]) for part in command)
    lines = [f"rule {name}", f"  command = {text}", f"  description = {name} $out"]
    return lines + (["  depfile = $out.d"] if "$out.d" in command else [])


def _quoted(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


class BuildExt(build_ext):
    """Hands each compiled module to its builder; setuptools still decides where the file belongs."""

    builders: ClassVar[dict[str, Callable[[Path], Path]]] = {"fastgpt_kernels._cpu": build_cpu}

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        (ROOT / "build").mkdir(exist_ok=True)
        with open(ROOT / "build" / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second build of this tree waits: both write the same objects
            library = self.builders[ext.name](output)
            output.unlink(missing_ok=True)  # a new file: processes that have the old one mapped keep it
            shutil.copy2(library, output)


class BuildPy(build_py):
    """Starts from an empty build/lib, or a wheel would carry modules that were deleted from the sources."""

    def run(self) -> None:
        if not self.editable_mode:
            for package in ("fastgpt", "fastgpt_kernels"):
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()


setup(
    packages=[*find_packages(".", include=["fastgpt", "fastgpt.*"]), *find_packages("kernels")],
    package_dir={"fastgpt_kernels": "kernels/fastgpt_kernels"},
    ext_modules=[Extension(name, sources=[]) for name in BuildExt.builders],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
