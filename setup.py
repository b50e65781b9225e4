"""Builds the compiled modules of `fastgpt_kernels` with ninja.

    _cpu            csrc/cpu/*.cpp, once per SIMD level
    _cuda           csrc/cuda/*.cu by nvcc, where there is one
    _cuda_emulated  the same sources by the C++ compiler, for tests: only in place, and only when asked for

Metadata is in pyproject.toml. Torch is neither needed nor looked for. Environment:

    CXX, CXXFLAGS, LDFLAGS   the compiler (default g++) and flags to add
    NVCC, CUDA_HOME          where nvcc is (default: on PATH); NVCCFLAGS: flags to add
    FASTGPT_CUDA             0: no _cuda, 1: an error if there is no nvcc, auto (default): _cuda if there is one
    FASTGPT_CUDA_ARCHS       what _cuda is compiled for (default: 80;90a;100); newer GPUs compile the last one's PTX
    FASTGPT_EMULATE_CUDA=1   build _cuda_emulated as well
    MAX_JOBS                 how many compilers at once (default: what ninja takes)
    FASTGPT_SANITIZE=1       AddressSanitizer and UndefinedBehaviorSanitizer in _cpu (`make sanitize`)
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
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
EMULATED = "fastgpt_kernels._cuda_emulated"
EMULATE = os.environ.get("FASTGPT_EMULATE_CUDA", "0") not in ("", "0")
SANITIZE = os.environ.get("FASTGPT_SANITIZE", "0") not in ("", "0")

# Ascending: a CPU that runs a level runs those before it. `generic` is any architecture, the rest is x86-64.
LEVELS = {
    "generic": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"],
}
COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# No contraction: kernels say `fma` where they mean it, so that levels differ only where their sources do.
KERNEL_FLAGS = ["-O3", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-fno-math-errno"]
DEFAULT_CUDA_ARCHS = "80;90a;100"
CUDA_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
EMULATION_FLAGS = [
    "-O2",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-DFG_HOST_EMULATION",
    "-DFG_LEVEL=cuda",
]
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
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").is_file():
        version = sysconfig.get_python_version()
        raise PlatformError(f"no Python.h in {include}: install Python's headers (python{version}-dev)")
    return [f"-I{include}", f"-I{pybind11_include()}"]


def pybind11_include() -> str:
    """Where pybind11's headers are: its own package, or those that torch brings along."""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return str(pybind11.get_include())
    torch = importlib.util.find_spec("torch")  # not imported: that takes seconds
    for folder in (torch and torch.submodule_search_locations) or []:
        if Path(folder, "include", "pybind11", "pybind11.h").is_file():
            return str(Path(folder, "include"))
    raise PlatformError("fastgpt is built with pybind11: pip install pybind11")


def source_hash(target: str) -> str:
    """`fastgpt_kernels.source_hash` of csrc: one definition for the build and for the check at import."""
    path = ROOT / "kernels" / "fastgpt_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("_hash", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.source_hash(ROOT / "csrc", target)


def tables_source(target: str, levels: list[str], ops: list[str]) -> str:
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
        f'extern const char source_hash[] = "{source_hash(target)}";',
        f"extern const char* const levels[] = {{{names}, nullptr}};",
        "extern const LevelTable tables[] = {",
        *rows,
        "    {nullptr, nullptr},",
        "};",
        "}  // namespace fg",
    ]
    return "\n".join(lines) + "\n"


class Recipe:
    """A build.ninja and what it builds, in a directory under build/ where the next build finds the objects."""

    def __init__(self, output: Path, compile_command: list[str], link_command: list[str]) -> None:
        prefix = "sanitize-" if SANITIZE else ""
        self.directory = Path("build", prefix + output.name.removesuffix(".so"))
        self.library = self.directory / output.name
        self.objects: list[str] = []
        (ROOT / self.directory).mkdir(parents=True, exist_ok=True)
        # Paths are relative to the root: a moved tree keeps its objects.
        self.lines = [f"builddir = {self.directory}"]
        self.lines += _rule(
            "compile", [*compile_command, "-MMD", "-MF", "$out.d", "$flags", "-c", "$in", "-o", "$out"]
        )
        self.lines += _rule("link", [*link_command, "-shared", "$in", "-o", "$out", "$flags"])

    def add(self, name: str, source: Path, flags: list[str]) -> str:
        """Compile `source` to the object `name`."""
        self.objects.append(f"{self.directory}/{name}.o")
        self.lines += [f"build {self.objects[-1]}: compile {source}", f"  flags = {_quoted(flags)}"]
        return self.objects[-1]

    def add_tables(self, target: str, levels: list[str], ops: list[str], flags: list[str]) -> None:
        """Compile the tables of kernels that the binding reads."""
        source = self.directory / f"{target}_tables.cpp"
        _write_if_changed(ROOT / source, tables_source(target, levels, ops))
        self.add(f"{target}_tables", source, [*flags, "-I."])

    def build(self, link_flags: list[str]) -> Path:
        """Run ninja; the library's path."""
        link = f"build {self.library}: link {' '.join(self.objects)}"
        lines = [*self.lines, link, f"  flags = {_quoted(link_flags)}"]
        _write_if_changed(ROOT / self.directory / "build.ninja", "\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [ninja(), *jobs, "-f", str(self.directory / "build.ninja"), str(self.library)]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise CompileError("the kernels do not compile: see the compiler's messages above")
        return ROOT / self.library


def build_cpu(output: Path) -> Path:
    """`_cpu`: every csrc/cpu/*.cpp once per SIMD level."""
    cxx, includes = compiler(), python_includes()
    levels = levels_of(cxx)
    sanitize_flags = SANITIZE_FLAGS if SANITIZE else []
    ops = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    recipe = Recipe(output, cxx, cxx)
    level_objects: dict[str, list[str]] = {}
    for level in levels:
        for op in ops:
            flags = [*COMMON_FLAGS, *KERNEL_FLAGS, *LEVELS[level], *sanitize_flags, f"-DFG_LEVEL={level}"]
            source = Path("csrc", "cpu", f"{op}.cpp")
            item = recipe.add(f"{op}.{level}", source, [*flags, "-Icsrc/common", *extra])
            level_objects.setdefault(level, []).append(item)
    recipe.add_tables("cpu", levels, ops, [*COMMON_FLAGS, *extra])
    recipe.add("bind", Path("csrc", "bind", "cpu.cpp"), [*COMMON_FLAGS, "-O2", *includes, *extra])
    library = recipe.build(["-fopenmp", *sanitize_flags, *shlex.split(os.environ.get("LDFLAGS", ""))])
    if not SANITIZE:  # the sanitizers add constructors and weak symbols of their own
        for level, paths in level_objects.items():
            check_level_objects(level, paths)
    return library


def nvcc() -> str | None:
    """nvcc's path, by NVCC, CUDA_HOME or PATH; None where there is none."""
    if os.environ.get("NVCC"):
        return shutil.which(os.environ["NVCC"])
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None) or shutil.which("nvcc")


def cuda_archs() -> list[str]:
    """nvcc's flags for FASTGPT_CUDA_ARCHS: machine code for each, and PTX of the last portable one for newer GPUs."""
    archs = (os.environ.get("FASTGPT_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS).replace(",", ";").split(";")
    archs = [arch.strip().replace(".", "") for arch in archs if arch.strip()]
    for arch in archs:
        if re.fullmatch(r"\d{2,3}[af]?", arch) is None:
            message = f"expected a list such as '{DEFAULT_CUDA_ARCHS}', got {arch!r}"
            raise PlatformError(f"FASTGPT_CUDA_ARCHS: {message}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = [arch for arch in archs if arch.isdigit()]
    return flags + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in portable[-1:]]


def build_cuda(output: Path) -> Path:
    """`_cuda`: every csrc/cuda/*.cu by nvcc, for the architectures of FASTGPT_CUDA_ARCHS."""
    cxx, includes, archs = compiler(), python_includes(), cuda_archs()
    found = nvcc()
    if found is None:
        raise PlatformError("FASTGPT_CUDA=1 needs nvcc: install the CUDA toolkit, or set CUDA_HOME or NVCC")
    ops = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    command = [found, "-ccbin", cxx[0]]
    flags = [*CUDA_FLAGS, *shlex.split(os.environ.get("NVCCFLAGS", ""))]
    recipe = Recipe(output, command, [*command, "-cudart", "static"])
    for op in ops:
        recipe.add(op, Path("csrc", "cuda", f"{op}.cu"), [*flags, *archs, "-DFG_LEVEL=cuda"])
    recipe.add_tables("cuda", ["cuda"], ops, flags)
    recipe.add("bind", Path("csrc", "bind", "cuda.cpp"), [*flags, *includes])
    # The runtime's symbols stay inside: torch brings a CUDA runtime of its own.
    return recipe.build(["-Xlinker", "--exclude-libs=ALL"])


def build_cuda_emulated(output: Path) -> Path:
    """`_cuda_emulated`: the same sources compiled for the host, for tests."""
    cxx, includes = compiler(), python_includes()
    ops = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    flags = [*COMMON_FLAGS, *EMULATION_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    recipe = Recipe(output, cxx, cxx)
    for op in ops:
        recipe.add(op, Path("csrc", "cuda", f"{op}.cu"), ["-x", "c++", *flags])
    recipe.add("emulate", Path("csrc", "cuda", "emulate.cpp"), flags)
    recipe.add_tables("cuda", ["cuda"], ops, flags)
    recipe.add("bind", Path("csrc", "bind", "cuda.cpp"), [*flags, *includes])
    return recipe.build(shlex.split(os.environ.get("LDFLAGS", "")))


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


def modules() -> list[str]:
    """The compiled modules that the environment asks for."""
    cuda = os.environ.get("FASTGPT_CUDA") or "auto"
    if cuda not in ("0", "1", "auto"):
        raise PlatformError(f"FASTGPT_CUDA: expected 0, 1 or auto, got {cuda!r}")
    names = ["fastgpt_kernels._cpu"]
    if cuda == "1" or (cuda == "auto" and nvcc() is not None):
        names.append("fastgpt_kernels._cuda")
    return [*names, EMULATED] if EMULATE else names


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

    builders: ClassVar[dict[str, Callable[[Path], Path]]] = {
        "fastgpt_kernels._cpu": build_cpu,
        "fastgpt_kernels._cuda": build_cuda,
        EMULATED: build_cuda_emulated,
    }

    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.inplace:  # a test's module is in no wheel
            self.extensions = [ext for ext in self.extensions if ext.name != EMULATED]

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
    ext_modules=[Extension(name, sources=[]) for name in modules()],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
