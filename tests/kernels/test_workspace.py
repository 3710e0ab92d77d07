"""The memory that the kernels work in, and what the limit says of windows that overlap."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import fastbptt
from benchmarks.common.rows import Row
from benchmarks.memory import allocated, log_of
from common import Case, assert_matches, step

KIB = 1024


pytestmark = pytest.mark.usefixtures("workspace_limit_restored")


def taken_by(row: Row) -> int:
    return allocated(row, "fastbptt")["allocated"]


@pytest.mark.slow(3)
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


def test_a_short_sequence_takes_little():
    T, H = 32, 64
    packed = 2 * H * H * 4
    block = T * ((H + 16) * 4 + 2 * 8)  # one, of padded rows and where they lie
    by_tiles = T * H * 4  # the block's d as the weights' gradients read it
    products = T * 64 * 4  # the rows of one panel
    assert taken_by(Row("rnn", T, 1, H)) <= packed + block + by_tiles + products + 2 * KIB


def test_a_limit_beyond_all_memory_is_none():
    fastbptt.set_workspace_limit(10**30)
    assert fastbptt.get_workspace_limit() >= 2**60


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_a_thread_keeps_its_workspace(cell):
    case = Case(20, 8, 16, 64, cell=cell, dtype=torch.float32)
    module, data = case.module(), case.data()

    def taken() -> tuple[int, dict]:
        log, results = log_of(lambda: step(module, *data))
        return sum(size for _, size in log if size > 0), results

    fastbptt._C.release_workspace()
    first, expected = taken()
    again, results = taken()
    fastbptt._C.release_workspace()
    anew, _ = taken()
    assert anew == first and first - again >= 2 * module.weight_hh_l0.nbytes  # packed, each way
    assert_matches(results, expected, rtol=0)


def test_a_large_workspace_is_not_kept():
    module = fastbptt.RNN(2400, 2400)  # 46 MB of weights, packed for so many rows
    call = partial(module, torch.zeros(310, 1, 2400))
    with torch.no_grad():
        logs = [log_of(call)[0] for _ in range(2)]
    for log in logs:
        assert max(size for _, size in log) > 40e6
        assert sum(size for _, size in log) < 3.2e6  # all is released but the results
