"""The programs of docs/cells.md run, and what they assert holds."""

from __future__ import annotations

import pytest
import torch

from common import python_blocks
from fastbptt import cells

PREAMBLE, *PROGRAMS = python_blocks("cells.md")


def test_all_are_found():
    assert len(PROGRAMS) == 10
    assert PREAMBLE.startswith("import torch")


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_runs(program):
    torch.manual_seed(0)
    exec(PREAMBLE + program, {})


def test_every_cell_is_named():
    with open(cells.__path__[0] + "/../../docs/cells.md", encoding="utf-8") as page:
        text = page.read()
    assert all(name in text for name in cells.__all__)
