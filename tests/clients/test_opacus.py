"""Opacus: its validator and fixer, which look a module's exact class up in their tables."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("opacus")

from opacus import GradSampleModule
from opacus.layers import DPGRU, DPLSTM
from opacus.validators import ModuleValidator

import fastbptt
from clients.swap import assert_same, converted

every_cell = pytest.mark.parametrize(
    "theirs, ours, replacement",
    [(torch.nn.LSTM, fastbptt.LSTM, DPLSTM), (torch.nn.GRU, fastbptt.GRU, DPGRU)],
)


@pytest.fixture
def registered(theirs, ours, monkeypatch):
    """What a program with both libraries says once: what is torch's modules' is ours' too."""
    for table in (ModuleValidator.VALIDATORS, ModuleValidator.FIXERS):
        monkeypatch.setitem(table, ours, table[theirs])


@every_cell
def test_registered(theirs, ours, replacement, registered):
    """It says of ours what it says of torch's module, and puts the same in place of it."""
    model = torch.nn.Sequential(theirs(4, 5, batch_first=True))
    expected = [str(error) for error in ModuleValidator.validate(model)]
    assert len(expected) == 1
    assert [str(error) for error in ModuleValidator.validate(converted(model))] == expected
    assert_fixed(converted(model), model, replacement)


@every_cell
def test_reverted(theirs, ours, replacement):
    """The other way, with nothing registered."""
    model = torch.nn.Sequential(theirs(4, 5, batch_first=True))
    assert_fixed(fastbptt.revert(converted(model)), model, replacement)


def assert_fixed(model: torch.nn.Module, expected: torch.nn.Module, replacement: type) -> None:
    fixed = ModuleValidator.fix_and_validate(model)
    assert type(fixed[0]) is replacement
    x = torch.randn(2, 7, 4)
    assert_same(fixed(x), expected(x))


@every_cell
def test_neither(theirs, ours, replacement):
    """Then the validator does not know ours, and a gradient per sample is an error, never wrong."""
    model = GradSampleModule(converted(theirs(4, 5, batch_first=True)))
    with pytest.raises(RuntimeError, match="functorch"):
        model(torch.randn(2, 7, 4))[0].sum().backward()
