"""Opacus: its validator, which looks the exact class up, and its replacement for LSTM and GRU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("opacus")

import fastbptt
from opacus.layers import DPGRU, DPLSTM
from opacus.validators import ModuleValidator
from swap import assert_same, converted

every_cell = pytest.mark.parametrize(
    "cls, replacement", [(torch.nn.LSTM, DPLSTM), (torch.nn.GRU, DPGRU)]
)


@every_cell
def test_validator(cls, replacement):
    """What it says of torch's module it says of ours, and it replaces ours by the same."""
    theirs = cls(4, 5, batch_first=True)
    ours = converted(theirs)
    expected = ModuleValidator.validate(theirs)
    assert len(expected) == 1
    assert [str(error) for error in ModuleValidator.validate(ours)] == [str(expected[0])]
    fixed = ModuleValidator.fix_and_validate(ours)
    assert type(fixed) is replacement
    x = torch.randn(2, 7, 4)
    assert_same(fixed(x), theirs(x))


@every_cell
def test_reverted(cls, replacement):
    theirs = cls(4, 5, batch_first=True)
    fixed = ModuleValidator.fix_and_validate(fastbptt.revert(converted(theirs)))
    assert type(fixed) is replacement
