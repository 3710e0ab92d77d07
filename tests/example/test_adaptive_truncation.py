"""The example ``adaptive_truncation.py``: the task, its costs, a run, and the command line."""

from __future__ import annotations

import re

import pytest
import torch

import fastbptt

# Before the examples: it lets them be imported.
from example_runs import assert_refused, run_fixture

# isort: split
import adaptive_truncation
from adaptive_truncation_lib import report
from adaptive_truncation_lib.task import BATCH, STEPS, TASKS, Copier
from adaptive_truncation_lib.training import (
    K_MAX,
    MEASURED,
    SETTINGS,
    Run,
    bias_of,
    cost_of,
    train,
    truncation_of,
)

run = run_fixture(adaptive_truncation.main, "--updates=2", "--seeds=1", "--every=1")


FIXED, VARIABLE = TASKS


def test_task():
    inputs, target = TASKS[FIXED].draw(3, torch.Generator().manual_seed(0))
    assert inputs.shape[:2] == (STEPS, 3) and target.shape == (STEPS - 10, 3)
    assert (inputs.argmax(-1)[:-10] == target).all() and (inputs.sum(-1) == 1).all()


def test_task_of_several_lags():
    inputs, target = TASKS[VARIABLE].draw(40, torch.Generator().manual_seed(0))
    assert inputs.shape == (STEPS, 40, TASKS[VARIABLE].inputs) and target.shape == (STEPS - 10, 40)
    symbols, told = inputs[..., :6].argmax(-1), inputs[..., 6:]
    assert (told == told[0]).all() and (told.sum(-1) == 1).all()
    lags = 5 + told[0].argmax(-1)
    assert set(lags.tolist()) == set(range(5, 11))
    for column, lag in enumerate(lags.tolist()):
        assert (symbols[10 - lag : STEPS - lag, column] == target[:, column]).all()


def test_cost_is_that_of_the_windows():
    """Counted on windows written out: the losses of 5 steps, and what they reach back."""
    for k in (2, 10, 30):
        cut = truncation_of(k)
        assert isinstance(cut, fastbptt.TBPTT) and cut.k2 - cut.k1 == k - 1
        backward = 0
        for first in range(0, STEPS, 5):
            begin, end = max(0, first - (k - 1)), min(first + 5, STEPS)
            backward += end - begin
        assert cost_of(k) == STEPS + backward


def test_bias():
    torch.manual_seed(0)
    model = Copier(TASKS[FIXED])
    data = model.task.draw(2, torch.Generator().manual_seed(0))
    assert bias_of(model, STEPS, *data) == pytest.approx(0, abs=1e-5)
    assert bias_of(model, 2, *data) > 1e-3


def test_run():
    fixed = train(FIXED, "K = 10", 0, 3, 1)
    assert fixed.cost == 3 * cost_of(10) and len(fixed.losses) == 3 and not fixed.chosen
    chosen = train(FIXED, "tolerance 0.1 at once", 0, 3, 2)
    assert chosen.losses[0] == fixed.losses[0]  # the same weights and sequences
    assert [update for update, _, _ in chosen.chosen] == [0, 2]
    (_, first, bound), (_, second, _) = chosen.chosen
    assert bound <= 0.1
    measured = 2 * MEASURED / BATCH * STEPS * (1 + K_MAX)
    assert chosen.cost == 2 * cost_of(first) + cost_of(second) + measured
    assert [update for update, _ in chosen.checks] == [0]
    falling = train(FIXED, "tolerance 0.9", 0, 2, 1)
    assert [k for _, k, _ in falling.chosen] == [28, 26]


def test_table():
    runs = [
        Run(FIXED, "K = 30", 0, [1.0, 0.5], cost=2 * cost_of(30)),
        Run(
            FIXED, "tolerance 0.5", 0, [0.4, 0.2], [(0, 3, 0.4)], [(0, 0.3), (1, 0.6)], cost_of(30)
        ),
    ]
    _, fixed, chosen = report.rows(runs)
    assert fixed == (FIXED, "K = 30", "0.750", "", "369", "100%", "")
    assert chosen == (FIXED, "tolerance 0.5", "0.300", "3 to 3", "184", "50%", "1 of 2")


def test_program(run, tmp_path):
    status, out, _ = run(f"--task={VARIABLE}")
    assert status == 0
    assert all(re.search(rf"\| +{VARIABLE} \| +{setting} \|", out) for setting in SETTINGS)
    assert (tmp_path / "out" / "adaptive_truncation.png").stat().st_size > 10_000


def test_bad_input(run):
    assert_refused(run("--every=0"), "argument --every: must be a whole number of at least 1")
