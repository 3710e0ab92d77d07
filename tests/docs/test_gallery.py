"""The gallery's programs run, with few steps; `make docs` runs them at their own length."""

from __future__ import annotations

import runpy

import pytest
import torch

from common import DOCS

# The example programs have tests of their own.
PROGRAMS = [p for p in sorted(DOCS.glob("gallery/plot_*.py")) if p.name != "plot_6_examples.py"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_runs(program, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.setenv("GALLERY_STEPS", "4")
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(program), run_name="__main__")
        assert plt.get_fignums(), "it draws nothing"
    finally:
        torch.set_num_threads(threads)
        plt.close("all")
