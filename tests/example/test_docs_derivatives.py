"""The programs of docs/derivatives.md run, and what they assert holds."""

from __future__ import annotations

import pytest
import torch

from common import python_blocks

PREAMBLE, *PROGRAMS = python_blocks("derivatives.md")


def test_all_are_found():
    assert len(PROGRAMS) == 6
    assert PREAMBLE.startswith("import torch")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda text: text.splitlines()[0])
def test_runs(program):
    if "opacus" in program:
        pytest.importorskip("opacus")
    torch.manual_seed(0)
    exec(PREAMBLE + program, {})
