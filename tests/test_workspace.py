"""The memory of windows that overlap: what the limit says, whatever their number."""

from __future__ import annotations

import pytest

import fastbptt
from benchmarks.memory import allocated
from benchmarks.rows import Row

KIB = 1024


@pytest.fixture(autouse=True)
def limit_restored():
    before = fastbptt.get_workspace_limit()
    yield
    fastbptt.set_workspace_limit(before)


def taken_by(row: Row) -> int:
    return allocated(row, "fastbptt")["allocated"]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("cut", [fastbptt.TBPTT(8, 32), fastbptt.Sliding(16)], ids=str)
def test_memory_keeps_to_the_limit(cell, cut):
    whole = taken_by(Row(cell, 1000, 4, 32))
    taken = {}
    for limit in (1, 200 * KIB, 400 * KIB, 2**40):
        fastbptt.set_workspace_limit(limit)
        taken[limit] = taken_by(Row(cell, 1000, 4, 32, cut)) - whole
    assert taken[1] < 0  # one window at a time: less than all steps at once
    for limit in (200 * KIB, 400 * KIB):  # and some alignment
        assert limit / 2 < taken[limit] < 1.25 * limit
    assert taken[2**40] > taken[400 * KIB]


def test_a_limit_beyond_all_memory_is_none():
    fastbptt.set_workspace_limit(10**30)
    assert fastbptt.get_workspace_limit() >= 2**60
