"""The user's compiler, and the folder that keeps what it makes of cells."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cells.programs import gru, leaky
from fastbptt import _compiled

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch, tmp_path):
    """As in a new process, with a cache of its own."""
    monkeypatch.setenv("FASTBPTT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_compiled, "_layers", {})
    monkeypatch.setattr(_compiled, "_said", set())
    return monkeypatch


def check(layer):
    x, w = torch.ones(3, 2, 4), torch.eye(4)
    (h,), _, _ = layer.forward(
        _compiled.Arguments(x, w, w, None, None, [None], [torch.tensor(0.5)])
    )
    expected, state = [], torch.zeros(2, 4)
    for _ in range(3):
        state = state + 0.5 * (torch.tanh(1 + state) - state)
        expected.append(state)
    torch.testing.assert_close(h, torch.stack(expected))


SCRIPT = """
import sys
sys.path[:0] = ["tests"]
import torch
from cells.programs import leaky
from cells.test_compiler import check
from fastbptt import _compiled
print("ready", flush=True)
sys.stdin.readline()
check(_compiled.layer(leaky(), torch.float32))
"""


@pytest.mark.slow
def test_two_processes_on_a_cold_cache(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", SCRIPT],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, complained = process.communicate(timeout=180)
        assert process.returncode == 0, complained
    (library,) = (tmp_path / "cache").iterdir()  # nothing else is left
    made = library.stat().st_mtime_ns
    check(_compiled.layer(leaky(), torch.float32))
    assert library.stat().st_mtime_ns == made and library.stat().st_mode & stat.S_IRUSR


@pytest.mark.slow(1)
@pytest.mark.parametrize("damage", ["cut off", "empty", "changed"])
def test_a_damaged_library_is_compiled_anew(tmp_path, damage, nothing_is_known):
    check(_compiled.layer(leaky(), torch.float32))
    (library,) = (tmp_path / "cache").iterdir()
    whole = library.read_bytes()
    damaged = {"cut off": whole[:1000], "empty": b"", "changed": b"?" + whole[1:]}[damage]
    library.unlink()  # this process has loaded it
    library.write_bytes(damaged)
    nothing_is_known.setattr(_compiled, "_layers", {})
    check(_compiled.layer(leaky(), torch.float32))
    assert library.stat().st_size == len(whole)


@pytest.mark.parametrize("kind", ["fails", "missing", "makes nothing"])
def test_broken_compiler(tmp_path, kind, monkeypatch):
    compiler = tmp_path / "cxx"
    if kind != "missing":
        status = 3 if kind == "fails" else 0
        compiler.write_text(
            '#!/bin/sh\n[ "$1" = --version ] && exit 0\n'
            f"echo cannot make cells >&2\nexit {status}\n"
        )
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(RuntimeWarning, match="could not compile a cell") as warned:
        assert _compiled.layer(leaky(), torch.float32) is None
        assert _compiled.layer(gru(), torch.float32) is None
        assert _compiled.layer(gru(), torch.float32) is None
    (warning,) = warned
    assert str(compiler) in str(warning.message)
    assert ("cannot make cells" in str(warning.message)) == (kind != "missing")


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    message = "there is no C\\+\\+ compiler: none of c\\+\\+, g\\+\\+, clang\\+\\+"
    with pytest.warns(RuntimeWarning, match=message):
        assert _compiled.layer(leaky(), torch.float32) is None


def test_the_next_compiler_where_the_first_fails(tmp_path, monkeypatch):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.delenv("CXX", raising=False)
    check(_compiled.layer(leaky(), torch.float32))


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # no folder can be made below it, by root either
    monkeypatch.setenv("FASTBPTT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot keep compiled cells in") as warned:
        check(_compiled.layer(leaky(), torch.float32))
        assert _compiled.available(leaky(), torch.float64)
    (warning,) = warned
    assert "FASTBPTT_CACHE names another folder" in str(warning.message)


def test_xdg_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTBPTT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check(_compiled.layer(leaky(), torch.float32))
    assert [path.suffix for path in (tmp_path / "fastbptt").iterdir()] == [".so"]
