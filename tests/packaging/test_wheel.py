"""What a wheel for several versions of torch rests on. Wheels themselves: tools/wheel_test.py."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import setup
from fastbptt import _builds

ROOT = Path(__file__).parents[2]
THIS = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture
def package(tmp_path):
    """A package that finds its _C module as fastbptt does, with builds for some torch."""

    def run(*versions, cuda=None):
        folder = tmp_path / "fastbptt"
        folder.mkdir()
        (folder / "__init__.py").write_text(
            "from fastbptt import _builds\nfrom fastbptt import _C\n"
        )
        shutil.copy(_builds.__file__, folder)
        for version in versions:
            build = folder / "_builds" / f"torch-{version}"
            build.mkdir(parents=True)
            (build / "_C.py").write_text(f"print('for torch {version}')\n")
        program = f"import torch; torch.version.cuda = {cuda!r}; import fastbptt"
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    return run


def test_build_for_the_torch_that_is_there(package):
    done = package("2.1", THIS, "2.98")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"for torch {THIS}\n"


@pytest.mark.parametrize("cuda, chosen", [(None, ""), ("13.2", "+cu13"), ("12.8", "")])
def test_build_with_the_cuda_that_is_there(package, cuda, chosen):
    """One without the CUDA kernels where there is none of torch's CUDA."""
    done = package("2.1", THIS, f"{THIS}+cu13", cuda=cuda)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"for torch {THIS}{chosen}\n"


def test_no_build_for_the_torch_that_is_there(package):
    done = package("2.98", "2.9", "2.9+cu13")
    assert done.returncode != 0
    error = done.stderr.strip().splitlines()[-1]
    for words in ("ImportError", "for torch 2.9, 2.98,", torch.__version__, "pip install"):
        assert words in error


def test_none_in_a_checkout():
    assert _builds.versions() == []


def included(source: Path, seen: set[Path]) -> set[str]:
    """The headers from outside of csrc that a file includes, and what it includes."""
    outside = set()
    for bracket, name in re.findall(r'^#include ([<"])([^>"]+)', source.read_text(), re.M):
        path = ROOT / "csrc" / name
        if bracket == "<":
            outside.add(name)
        elif path not in seen:
            seen.add(path)
            outside |= included(path, seen)
    return outside


@pytest.mark.parametrize("source", setup.KERNEL_SOURCES)
def test_kernels_know_nothing_of_torch(source):
    """A wheel has them once for all its versions."""
    found = included(ROOT / source, set())
    assert found
    assert not [name for name in found if re.match("torch/|ATen/|c10/|Python.h|pybind11/", name)]


def test_wheels_sources_are_all_there_are():
    """As they are named there, or a part of just one that is."""
    on_disk = [path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.cpp")]
    named = [source for source in setup.SOURCES + setup.CUDA_SOURCES if source.endswith(".cpp")]
    parts = [
        str(Path(source).parent / part)
        for source in named
        for part in re.findall(r'^#include "(.+\.cpp)"$', (ROOT / source).read_text(), re.MULTILINE)
    ]
    assert sorted(map(str, on_disk)) == sorted(named + parts)


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs binutils")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of ELF's symbols")
def test_no_symbol_is_newer_than_the_platform(tmp_path):
    """auditwheel refuses a wheel with one that tools/older_libraries.cpp does not stand in for."""
    compiler = os.environ.get("CXX", "c++").split()
    limits = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}

    def run(*command):
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    first: dict[str, tuple[str, tuple[int, ...]]] = {}  # where a symbol first was
    for library in ("libstdc++.so.6", "libc.so.6", "libm.so.6"):
        path = run(*compiler, f"-print-file-name={library}").strip()
        for line in run("objdump", "--dynamic-syms", path).splitlines():
            match = re.search(r"\b(GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)?\s+(\S+)$", line)
            if match and "*UND*" not in line:
                version = (match[1], tuple(map(int, match[2].split("."))))
                first[match[3]] = min(version, first.get(match[3], version))
    shim = tmp_path / "shim.o"
    source = ROOT / "tools" / "older_libraries.cpp"
    run(*compiler, "-std=c++17", "-fPIC", "-c", "-o", shim, source)
    lines = run("objdump", "--syms", shim).splitlines()
    stood_in = {line.split()[-1] for line in lines if ".hidden" in line and "*UND*" not in line}

    # The kernels' library alone has no part in torch's, where newer ones are found too.
    needed = set()
    for source in setup.KERNEL_SOURCES:
        if "/isa_" in source:
            continue  # loops over numbers, which take long to compile
        out = tmp_path / "kernels.o"
        run(
            *compiler,
            *setup.COMPILE_FLAGS,
            "-std=c++20",
            "-Icsrc",
            "-fPIC",
            "-c",
            "-o",
            out,
            source,
        )
        lines = run("objdump", "--syms", out).splitlines()
        needed |= {line.split()[-1] for line in lines if "*UND*" in line} & first.keys()
    assert needed
    newer = {name for name in needed if first[name][1] > limits[first[name][0]]}
    assert newer <= stood_in
