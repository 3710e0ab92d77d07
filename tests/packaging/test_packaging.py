"""What is installed and shipped: metadata, the typing marker, sources, and the import itself."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fastbptt
from fastbptt import _compiler, _nvrtc

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, without anything that was built from them."""
    copy = tmp_path_factory.mktemp("packaging") / "fastbptt"
    hidden = shutil.ignore_patterns(".?*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=hidden)
    return copy


def python(*args, cwd, **env):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_version_is_the_same_everywhere():
    (declared,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert importlib.metadata.version("fastbptt") == declared
    assert fastbptt.__version__ == declared


def test_metadata():
    metadata = importlib.metadata.metadata("fastbptt")
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.10"
    requirements = importlib.metadata.requires("fastbptt")
    assert [r for r in requirements if "extra ==" not in r] == ["torch>=2.6"]


def test_wheel_ships_python_the_typing_marker_and_headers_for_cells_only(checkout, tmp_path):
    done = python("setup.py", "-q", "build_py", "--build-lib", tmp_path, cwd=checkout)
    assert done.returncode == 0, done.stderr
    shipped = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    stubs = {str(path.relative_to(ROOT)) for path in (ROOT / "fastbptt").glob("*.pyi")}
    assert stubs and stubs <= shipped
    shipped -= stubs
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fastbptt").rglob("*.py")}
    native = {f"fastbptt/_include/{header}" for header in _compiler.HEADERS + _nvrtc.HEADERS}
    assert shipped == sources | native | {"fastbptt/py.typed"}


@pytest.mark.slow
def test_cell_compiled_against_what_is_shipped(checkout, tmp_path):
    """With no checkout around."""
    done = python("setup.py", "-q", "build_py", "--build-lib", tmp_path, cwd=checkout)
    assert done.returncode == 0, done.stderr
    extension = Path(fastbptt._C.__file__)
    shutil.copy(extension, tmp_path / "fastbptt" / extension.name)
    script = (
        "import torch; from fastbptt import _compiled, _compiler; from programs import leaky; "
        "assert 'fastbptt/_include' in str(_compiler.headers()); "
        "assert _compiled.available(leaky(), torch.float32)"
    )
    paths = os.pathsep.join(map(str, (tmp_path, ROOT / "tests" / "cells")))
    done = python(
        "-W",
        "error",
        "-c",
        script,
        cwd=tmp_path,
        PYTHONPATH=paths,
        FASTBPTT_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr


def test_sdist_ships_everything_a_build_needs(checkout, tmp_path):
    done = python("setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=checkout)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as tar:
        shipped = {name.partition("/")[2] for name in tar.getnames()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert native | {"setup.py", "pyproject.toml", "LICENSE", "fastbptt/py.typed"} <= shipped


def test_unknown_instruction_set_is_an_error_at_import(tmp_path):
    done = python("-c", "import fastbptt", cwd=tmp_path, FASTBPTT_CPU_ISA="bogus")
    assert done.returncode != 0
    error = done.stderr.strip().splitlines()[-1]
    for word in ("FASTBPTT_CPU_ISA", "bogus", "avx512", "avx2", "baseline"):
        assert word in error
