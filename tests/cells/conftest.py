"""Networks of cells by plain loops, by compiled steps or by a GPU's kernels, emulated.

And a cache of compiled cells for tests.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from common import refuse_loops
from emulation import user_cells
from fastbptt import _cell_network, _compiled, _compiler, _loops

# Kept between runs, since compiling takes the time.
os.environ.setdefault("FASTBPTT_CACHE", str(Path(__file__).parents[2] / "build" / "cells"))


@pytest.fixture
def compiler():
    """Skips a test of compiled cells where nothing compiles them."""
    if not any(map(shutil.which, _compiler.COMPILERS)):
        pytest.skip("no C++ compiler")


@pytest.fixture
def plain(monkeypatch):
    """Runs the test's networks by plain loops."""
    monkeypatch.setattr(_cell_network, "unroll_of", lambda *_: _loops.unroll)


@pytest.fixture
def compiled(monkeypatch, compiler):
    """Runs them by compiled steps, and fails where a network falls back to loops."""
    refuse_loops(monkeypatch)


@pytest.fixture
def kernels(monkeypatch, compiler):
    """Makes the kernels of a GPU of cells, which run on tensors of the CPU."""

    def make(program, dtype, recurrent, _):
        return user_cells.layer(program, dtype, recurrent)

    monkeypatch.setattr(_compiled, "variant", lambda _: "emulated")
    monkeypatch.setattr(_compiled, "_make", make)


@pytest.fixture
def emulated(kernels, compiled):
    """Runs the test's networks by such kernels."""


@pytest.fixture(params=["compiled", "emulated"])
def compiled_steps(request):
    """Runs the test's networks by compiled steps, of the CPU and of a GPU."""
    request.getfixturevalue(request.param)
    return request.param


@pytest.fixture(params=["plain", "compiled", "emulated"])
def steps(request):
    """Runs the test's networks all ways."""
    request.getfixturevalue(request.param)
    return request.param
