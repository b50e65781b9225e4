"""The build: what is in a wheel, what stops it, and how a stale binary is noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from build_tree import ROOT, build_inplace, copy_tree, run_python
from fastgpt_kernels import source_hash

STATUS = "import fastgpt_kernels; print(fastgpt_kernels.cpu_status())"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    tree = copy_tree(folder / "tree")
    left_over = tree / "build" / f"lib.{sys.platform}" / "fastgpt" / "deleted_long_ago.py"
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    environment = {**os.environ, "FASTGPT_CUDA": "0", "FASTGPT_EMULATE_CUDA": "1"}  # the latter for no wheel
    result = subprocess.run(
        pip, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    (path,) = folder.glob("*.whl")
    assert not path.name.endswith("-any.whl"), "a wheel with a compiled module is for one platform"
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastgpt").rglob("*.py")}
    kernels = ROOT / "kernels"
    sources |= {path.relative_to(kernels).as_posix() for path in (kernels / "fastgpt_kernels").rglob("*.py")}
    compiled = {name for name in names if name.endswith(".so")}
    assert names - compiled == sources
    assert len(compiled) == 1
    assert compiled.pop().startswith("fastgpt_kernels/_cpu.")


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    info: Message = Parser().parsestr(metadata(wheel, "METADATA"))
    requires = info.get_all("Requires-Dist") or []
    assert [r for r in requires if "extra ==" not in r] == ["torch>=2.10"]
    assert set(info.get_all("Provides-Extra") or []) == {
        "cli",
        "train",
        "media",
        "tasks",
        "demos",
        "triton",
        "test",
        "lint",
        "all",
        "dev",
    }
    assert info["Requires-Python"] == ">=3.10"
    assert info["License-Expression"] == "MIT"
    assert "fastgpt = fastgpt.cli:main" in metadata(wheel, "entry_points.txt")


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_compiled_module_needs_torchs_libgomp_and_no_torch(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".so"))
    path = wheel.extract(name, tmp_path)
    needed = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    assert "[libgomp.so.1]" in needed
    assert "torch" not in needed
    assert "libc10" not in needed


def test_wheel_works_outside_a_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "kernels")
    assert run_python(tmp_path, STATUS) == "None"


def test_no_compiler(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    result = build_inplace(tree, CXX="no-such-compiler")
    assert result.returncode != 0
    last = result.stdout.strip().splitlines()[-1]
    assert "found no 'no-such-compiler': install g++" in last
    assert "build-essential" in last
    assert run_python(tree, STATUS).startswith("not built: run `make build`")


def test_a_compiler_that_cannot_do_it(tmp_path: Path) -> None:
    old = tmp_path / "old-g++"
    old.write_text(
        '#!/bin/sh\n[ "$1" = -dumpmachine ] && exec echo x86_64-linux-gnu\necho bad flag >&2; exit 1\n'
    )
    old.chmod(0o755)
    result = build_inplace(copy_tree(tmp_path / "tree"), CXX=str(old))
    assert result.returncode != 0
    assert "cannot compile for level generic: install g++ 11 or newer" in result.stdout
    assert "bad flag" in result.stdout


def test_stale_binary_is_refused_until_built_again(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree", ops=False)
    assert build_inplace(tree).returncode == 0
    assert run_python(tree, STATUS) == "None"
    source = tree / "csrc" / "cpu" / "probe.cpp"
    source.write_text(source.read_text() + "// changed\n")
    assert run_python(tree, STATUS).startswith("stale: ")
    load = "import fastgpt_kernels as k\ntry: k.load_cpu()\nexcept ImportError as error: print(error)"
    assert "run `make build`" in run_python(tree, load)
    result = build_inplace(tree)
    assert "probe.generic.o" in result.stdout
    assert "bind.o" not in result.stdout, "the binding does not depend on the kernels"
    assert run_python(tree, STATUS) == "None"
    assert "compile" not in build_inplace(tree).stdout, "nothing has changed"


def test_source_hash_follows_names_and_contents(tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    first = source_hash(csrc, "cpu")
    assert source_hash(ROOT / "csrc", "cpu") == first
    (csrc / "cpu" / "notes.txt").write_text("not a source")
    assert source_hash(csrc, "cpu") == first
    export = csrc / "common" / "export.h"
    os.utime(export)
    assert source_hash(csrc, "cpu") == first
    export.write_text(export.read_text() + "\n")
    changed = source_hash(csrc, "cpu")
    export.rename(csrc / "common" / "exports.h")
    assert len({first, changed, source_hash(csrc, "cpu")}) == 3


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("cpu/gelu.cpp", {"cpu"}),
        ("bind/cpu.cpp", {"cpu"}),
        ("cuda/gelu.cu", {"cuda"}),
        ("cuda/emulate.cpp", {"cuda"}),
        ("cuda/vector.h", {"cuda"}),
        ("bind/cuda.cpp", {"cuda"}),
        ("bind/functions.h", {"cpu", "cuda"}),
        ("bind/guard.h", {"cpu"}),
        ("common/dtype.h", {"cpu", "cuda"}),
    ],
)
def test_source_hash_of_each_module(tmp_path: Path, file: str, stale: set[str]) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = csrc / file
    source.write_text(source.read_text() + "\n")
    changed = {t for t in ("cpu", "cuda") if source_hash(csrc, t) != source_hash(ROOT / "csrc", t)}
    assert changed == stale


FAULTS = {
    "weak symbol shared(int)": """
inline int shared(int a) { return a * 3; }
namespace fg::FG_LEVEL { int (*keep)(int) = shared; }
""",
    "a static initialiser": """
namespace fg::FG_LEVEL {
__attribute__((noipa)) int at_import() { return 1; }
int value = at_import();
}
""",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_code_that_could_run_on_an_older_cpu_stops_the_build(tmp_path: Path, fault: str) -> None:
    tree = copy_tree(tmp_path / "tree", ops=False)
    source = tree / "csrc" / "cpu" / "probe.cpp"
    source.write_text(source.read_text() + FAULTS[fault])
    for _ in range(2):  # and a second attempt does not slip through
        result = build_inplace(tree)
        assert result.returncode != 0
        assert f"probe.generic.o: {fault}" in result.stdout
    assert not list((tree / "kernels").rglob("*.so"))


@pytest.mark.parametrize("brought", [True, False], ids=["torch's", "none"])
def test_without_pybind11_its_headers_are_those_in_torch(
    brought: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = tmp_path / "torch" / "include" / "pybind11"
    headers.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('looked up, never imported')")
    if brought:
        (headers / "pybind11.h").touch()
    program = (
        "import importlib.util, runpy, setuptools; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'pybind11' else find(name, *a)\n"
        "setuptools.setup = lambda **settings: None\n"
        "print(runpy.run_path('setup.py')['pybind11_include']())"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if brought:
        assert done.stdout.strip() == str(tmp_path / "torch" / "include"), done.stderr
    else:
        assert "pip install pybind11" in done.stderr
