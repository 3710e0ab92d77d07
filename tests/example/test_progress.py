"""The examples' progress: a bar on a terminal, a few lines in a file."""

from __future__ import annotations

import sys

import pytest
from tqdm import tqdm

import example_runs  # noqa: F401  (finds the examples)
from shared_lib.progress import Lines, progress


@pytest.mark.parametrize(("lines", "expected"), [(0, []), (1, [300]), (3, [100, 200, 300])])
def test_a_file_gets_so_many_lines(lines, expected, capsys):
    with progress(range(300), desc="training", unit="update", lines=lines) as bar:
        for i in bar:
            bar.set_postfix(loss=f"{i}", refresh=False)
    wanted = [f"training: {n} of 300 updates, loss={n - 1}" for n in expected]
    assert capsys.readouterr().err.splitlines() == wanted


def test_a_loop_that_ends_early_says_where(capsys):
    with progress(range(10)) as bar:
        for i in bar:
            if i == 4:
                break
    assert capsys.readouterr().err == "4 of 10 steps\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(total=3, desc="x") as bar:
        assert isinstance(bar, tqdm)
        bar.update(3)
    assert [i for i in progress(range(2))] == [0, 1]
    assert isinstance(progress(total=3, disable=True), Lines)
