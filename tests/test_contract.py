"""The layering and the file names that DESIGN promises, read from the sources."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import fastgpt_kernels
import pytest
from op_cases import OPS

import fastgpt
from fastgpt._core import registry
from fastgpt._core.spec import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "fastgpt_kernels"

# What a package may import of the two packages of this repository; a longer prefix beats a shorter one.
_MODEL = ("fastgpt.models", "fastgpt.nn", "fastgpt.ops", "fastgpt._core.dispatch", "fastgpt._core.validate")
ALLOWED: dict[str, tuple[str, ...]] = {
    "fastgpt_kernels": ("fastgpt_kernels",),
    "fastgpt.reference": ("fastgpt.reference",),
    "fastgpt._core": ("fastgpt._core", "fastgpt.reference.common", "fastgpt_kernels"),
    "fastgpt._core.registry": (
        "fastgpt._core",
        "fastgpt.reference.common",
    ),  # kernels by name, when asked for
    "fastgpt.ops": ("fastgpt.ops", "fastgpt._core", "fastgpt.reference"),
    "fastgpt.positions": ("fastgpt.ops", "fastgpt._core.dispatch", "fastgpt._core.validate"),
    "fastgpt.nn": ("fastgpt.ops", "fastgpt.positions", "fastgpt._core.dispatch", "fastgpt._core.validate"),
    "fastgpt.models": _MODEL,
    "fastgpt.decoding": (*_MODEL, "fastgpt_kernels.cpu.decode"),
    "fastgpt.sampling": (),
    "fastgpt.generate": (*_MODEL, "fastgpt._core", "fastgpt.decoding", "fastgpt.sampling"),
    "fastgpt.interop": ("fastgpt.interop", "fastgpt.ops"),
    "fastgpt.train": (*_MODEL, "fastgpt._core", "fastgpt.train", "fastgpt.generate"),
    "fastgpt.tasks": (*_MODEL, "fastgpt.decoding", "fastgpt.generate", "fastgpt.train", "fastgpt.tasks"),
    "fastgpt.demos": (*_MODEL, "fastgpt.generate", "fastgpt.train", "fastgpt.tasks", "fastgpt.demos"),
    "fastgpt.testing": (
        "fastgpt.testing",
        "fastgpt.ops",
        "fastgpt._core",
        "fastgpt.reference",
        "fastgpt_kernels.memory",
    ),
}
SOURCES = sorted([*(ROOT / "fastgpt").rglob("*.py"), *KERNELS.rglob("*.py")])


def module_name(path: Path) -> str:
    base = KERNELS.parent if path.is_relative_to(KERNELS) else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever it does; `from a import b` is a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", SOURCES, ids=[module_name(path) for path in SOURCES])
def test_nothing_imports_upward(path: Path) -> None:
    module = module_name(path)
    rules = [package for package in ALLOWED if inside(module, package)]
    if not rules:  # the top: command line, demo, the package itself
        return
    allowed = ALLOWED[max(rules, key=len)]
    for name in imports(path):
        if inside(name, "fastgpt") or inside(name, "fastgpt_kernels"):
            assert any(inside(name, package) for package in allowed), f"{module} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=[module_name(path) for path in SOURCES])
def test_the_engine_needs_torch_alone(path: Path) -> None:
    """References, kernels, core, ops, nn, models and the harness: the standard library and torch."""
    module = module_name(path)
    above = (
        "fastgpt.cli",
        "fastgpt.__main__",
        "fastgpt.demo",
        "fastgpt.demos",
        "fastgpt.train",
        "fastgpt.tasks",
    )
    if any(inside(module, top) for top in above):
        return
    # Of the files of models, and imported where they are read or written.
    files = {"safetensors", "huggingface_hub", "gensim"}
    extras = files if inside(module, "fastgpt.models") else set()
    if module == "fastgpt.interop.attention":  # when a model of transformers is patched
        extras = {"transformers"}
    if module == "fastgpt.testing.cases":  # a decorator of tests, where pytest is at work already
        extras = {"pytest"}
    if inside(module, "fastgpt_kernels.triton"):  # imported where there is a GPU, or to be proven
        extras = {"triton", "numpy"} if module.endswith(".interpreter") else {"triton"}
    for name in imports(path):
        top = name.partition(".")[0]
        assert top in {"fastgpt", "fastgpt_kernels", "torch", *extras, *sys.stdlib_module_names}, (
            f"{module} imports {name}"
        )
        if inside(module, "fastgpt.reference"):
            assert top in {"torch", "fastgpt", *sys.stdlib_module_names}


def test_backends_never_import_one_another() -> None:
    for path in KERNELS.rglob("*.py"):
        own = path.relative_to(KERNELS).parts[0]
        for name in imports(path):
            for backend in BACKENDS:
                assert own == backend or not inside(name, f"fastgpt_kernels.{backend}"), (
                    f"{path} imports {name}"
                )


def test_csrc_knows_neither_torch_nor_python() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".cpp", ".h", ".cu", ".cuh"):
            continue
        included = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text())
        assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))], path
        if not path.is_relative_to(ROOT / "csrc" / "bind"):
            assert not [name for name in included if name.startswith(("pybind11", "Python.h"))], path


@pytest.mark.parametrize("op", OPS)
def test_the_same_stem_everywhere(op: str) -> None:
    stem = registry.get(op).stem
    expected = [
        ROOT / "fastgpt" / "reference" / f"{op}.py",
        ROOT / "fastgpt" / "ops" / f"{op}.py",
        KERNELS / "torch" / f"{stem}.py",
    ]
    assert [path for path in expected if not path.is_file()] == []
    # A kernel is a launcher and its source, or neither; a launcher may also be of PyTorch's products and other ops.
    launcher, source = KERNELS / "cpu" / f"{stem}.py", ROOT / "csrc" / "cpu" / f"{stem}.cpp"
    composed = launcher.is_file() and "fastgpt_kernels.products" in imports(launcher)
    assert launcher.is_file() == source.is_file() or composed
    assert (KERNELS / "cuda" / f"{stem}.py").is_file() == (ROOT / "csrc" / "cuda" / f"{stem}.cu").is_file()
    assert hasattr(fastgpt.ops, op)
    assert op in fastgpt.ops.__all__


def written_parameters(path: Path, function: str) -> list[str]:
    """Names of the parameters of a function, from the source."""
    (found,) = (
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    assert not found.args.defaults
    return [arg.arg for arg in found.args.args]


@pytest.mark.parametrize("op", OPS)
def test_every_backend_has_the_same_functions(op: str) -> None:
    spec = registry.get(op)
    op = spec.stem
    reference = importlib.import_module(f"fastgpt.reference.{op}")
    names = ["supports", *(f"{op}_{entry}" for entry in spec.entries)]
    for backend in BACKENDS:
        module = registry.module(op, backend)
        assert isinstance(module, ModuleType) or module  # the reason
        if not registry.is_written(op, backend):
            continue
        for name in names:
            expected = [p.name for p in inspect.signature(getattr(reference, name)).parameters.values()]
            if isinstance(module, ModuleType):
                found = inspect.signature(getattr(module, name)).parameters.values()
                assert [p.name for p in found] == expected, f"{backend} {name}"
                assert all(p.default is p.empty for p in found), f"{backend} {name}"
            else:  # cannot be imported here: no GPU, nothing compiled
                assert written_parameters(KERNELS / backend / f"{op}.py", name) == expected, (
                    f"{backend} {name}"
                )
    for entry, declared in spec.entries.items():
        expected = [
            p.name for p in inspect.signature(getattr(reference, f"{op}_{entry}")).parameters.values()
        ]
        inputs = declared.schema.partition("->")[0].strip(" ()").split(", ")
        assert [part.split()[-1] for part in inputs] == expected
        assert [p.name for p in inspect.signature(declared.fake).parameters.values()] == expected


@pytest.mark.parametrize("op", OPS)
def test_public_function_reference_and_prepare_agree(op: str) -> None:
    """One signature: `backend` is all that the public function adds, and only by keyword."""
    spec = registry.get(op)
    public = inspect.signature(spec.function).parameters
    assert public["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    without = [(p.name, p.kind, p.default) for p in public.values() if p.name != "backend"]
    for other in (spec.reference, spec.prepare):
        assert [(p.name, p.kind, p.default) for p in inspect.signature(other).parameters.values()] == without
    assert spec.gradients == tuple(name for name in public if name in spec.gradients)
    assert spec.function is getattr(fastgpt.ops, op)
    assert spec.function.__doc__
    assert spec.reference.__doc__


@pytest.mark.parametrize("op", OPS)
def test_cases_have_names_of_their_own(op: str) -> None:
    names = [case.name for case in registry.get(op).cases]
    assert len(names) == len(set(names))


def test_public_names() -> None:
    for name in fastgpt.__all__:
        assert getattr(fastgpt, name) is not None
    assert callable(fastgpt.testing.check)
    with pytest.raises(AttributeError):
        _ = fastgpt.no_such_name


def test_the_cpu_kernels_are_here() -> None:
    """Without them the tests of the cpu backend would quietly not exist."""
    assert fastgpt_kernels.cpu_status() is None
    assert all(isinstance(registry.module(op, "cpu"), ModuleType) for op in ("layer_norm", "gelu", "softmax"))
