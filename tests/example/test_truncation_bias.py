"""The example ``truncation_bias.py``: the problem, the measures, and the command line."""

from __future__ import annotations

import math
import signal

import pytest
import torch

import fastbptt

# Before the examples: it lets them be imported.
from example_runs import assert_refused, interrupt, run_fixture, start

# isort: split
import truncation_bias
from truncation_bias_lib import bias, report, training
from truncation_bias_lib.modes import FULL, modes
from truncation_bias_lib.problem import (
    VARIANCE,
    Adder,
    draw,
    held_out_error,
    loss_of,
)
from truncation_bias_lib.training import Run, Settings, train

# One thread: on a busy machine, threads that wait for each other are slow.
TINY = (
    "--threads=1 --lengths 6 9 --reach=4 --hidden=4 --batch=3 --max-steps=12 --draws=2 --rounds=1"
).split()

run = run_fixture(truncation_bias.main, *TINY)


@pytest.fixture
def without_picture(monkeypatch):
    """Drawing takes longer than the rest of a tiny run."""
    monkeypatch.setattr(truncation_bias.picture, "draw", lambda *_: None)
    monkeypatch.setattr(truncation_bias, "save_picture", lambda *_, **__: None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the problem


@pytest.mark.parametrize("steps", [4, 5, 21])
def test_two_marks_in_the_first_half_and_their_sum(steps):
    inputs, targets = draw(steps, 400, generator())
    numbers, marks = inputs.unbind(-1)
    assert inputs.shape == (steps, 400, 2) and targets.shape == (steps, 400)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert set(marks.unique().tolist()) == {0.0, 1.0}
    assert (marks.sum(0) == 2).all() and (marks[steps // 2 :] == 0).all()
    assert (marks[: steps // 2].sum(1) > 0).all()  # each step of the first half is marked at times
    for b in range(10):
        first, second = marks[:, b].nonzero().flatten().tolist()
        expected = [
            (t >= first) * numbers[first, b] + (t >= second) * numbers[second, b]
            for t in range(steps)
        ]
        torch.testing.assert_close(targets[:, b], torch.stack(expected))


def test_always_answering_one_has_the_error_of_the_variance():
    _, targets = draw(10, 200_000, generator())
    error = loss_of(torch.ones_like(targets), targets, "last").item()
    assert error == pytest.approx(VARIANCE, rel=0.01)


def test_losses():
    answers, targets = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2)
    assert loss_of(answers, targets, "last").item() == (9 + 16) / 2
    assert loss_of(answers, targets, "every").item() == (1 + 4 + 9 + 16) / 4


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_gradient_reaches_the_first_step_before_training(cell):
    # Else full backpropagation would not learn either, and the comparison would show nothing.
    model = Adder(cell, 16, 50)
    inputs, targets = draw(50, 8, generator())
    inputs.requires_grad_()
    loss_of(model(inputs), targets, "last").backward()
    reach = inputs.grad.norm(dim=(1, 2))
    assert reach[0] > 1e-8 * reach[-1]


# ---- bias and deviation, against values worked out by hand


def linear_model() -> Adder:
    """h_t = u x_t + w h_{t-1} with u = 1, w = 1/2, where x is the number; the answer is h."""
    model = Adder("rnn", 1, 3)
    model.recurrent = fastbptt.RNN(2, 1, nonlinearity="identity", bias=False)
    with torch.no_grad():
        model.recurrent.weight_ih_l0.copy_(torch.tensor([[1.0, 0.0]]))
        model.recurrent.weight_hh_l0.fill_(0.5)
        model.readout.weight.fill_(1.0)
        model.readout.bias.zero_()
    return model


# x = 1, 0, 0, so h = 1, 1/2, 1/4. The loss is (h_2 - 3/4)^2: e = dloss / dh_2 = -1. With gates k_1
# and k_2, dloss/du = e (x_2 + k_2 w x_1 + k_1 k_2 w^2 x_0) = -k_1 k_2 / 4, and dloss/dw =
# e (h_1 + k_2 w h_0) = -(1 + k_2) / 2; the marker's weight gets nothing.
INPUTS = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).unsqueeze(1)
TARGETS = torch.full((3, 1), 0.75)
NORM = math.sqrt(1 + 1 / 16)


def of_linear_model(truncation: object, model: Adder | None = None) -> torch.Tensor:
    return bias.gradient(model or linear_model(), INPUTS, TARGETS, "last", truncation)


@pytest.mark.parametrize(
    ("truncation", "du", "dw"),
    [
        (None, -1 / 4, -1),
        (fastbptt.Chunked(1), 0, -1 / 2),
        (fastbptt.Chunked(2), 0, -1 / 2),  # cut between the second step and the third
        (fastbptt.TBPTT(1, 2), 0, -1),
        (fastbptt.Sliding(2), 0, -1),
        (fastbptt.Sliding(3), -1 / 4, -1),
        (fastbptt.Gated(torch.tensor([1.0, 2.0, 3.0])), -6 / 4, -4 / 2),
    ],
    ids=str,
)
def test_gradient_by_hand(truncation, du, dw):
    expected = torch.tensor([du, 0, dw], dtype=torch.float64)
    torch.testing.assert_close(of_linear_model(truncation), expected)


def test_bias_by_hand():
    full = of_linear_model(None).expand(5, -1)
    chunked = of_linear_model(fastbptt.Chunked(1)).expand(5, -1)
    expected = math.hypot(1 / 4, 1 / 2) / NORM
    assert bias.compare(full, full) == (0, 0, 0)
    assert bias.compare(chunked, full) == pytest.approx((expected, 0, 0))


def test_random_gates_have_the_deviation_worked_out_by_hand():
    # The gates are 0 or 2, with variance 1; their product has the variance 2 * 2 - 1 = 3.
    truncation = fastbptt.Randomized(pi=0.5, generator=generator())
    model = linear_model()
    draws = torch.stack([of_linear_model(truncation, model) for _ in range(2000)])
    found, error, deviation = bias.compare(draws, of_linear_model(None).expand(2000, -1))
    expected = math.sqrt(3 / 16 + 1 / 4) / NORM
    assert deviation == pytest.approx(expected, rel=0.1)
    assert error == pytest.approx(deviation / math.sqrt(2000))
    assert found < 3 * error


def test_bias_is_free_of_the_sequences_scatter():
    # Two draws: the truncated gradient is off by (1, 0) in both, whatever the sequences.
    full = torch.tensor([[3.0, 4.0], [-3.0, 12.0]], dtype=torch.float64)  # its mean: (0, 8)
    found, error, deviation = bias.compare(full + torch.tensor([1.0, 0.0]), full)
    assert (found, error) == (1 / 8, 0)
    assert deviation == pytest.approx(math.sqrt(2 * (9 + 16)) / 8)


def test_measure_of_full_is_zero_and_of_a_truncation_is_not():
    settings = Settings("gru", hidden=4, batch=3, lr=0.01, max_steps=1, seed=0)
    trained = train(settings, modes(4), FULL, 8, "last")
    found = {one.mode: one for one in bias.measure(settings, modes(4), trained, "start", 3)}
    assert found[FULL].bias == found[FULL].error == 0 and found[FULL].deviation > 0
    assert found["Chunked(4)"].bias > 0
    # With the loss at the last step alone and T a multiple of k1, all windows reach equally far.
    assert found["TBPTT(1, 4)"].bias == pytest.approx(found["Sliding(4)"].bias)


# ---- training


def test_all_modes_begin_alike_and_one_with_the_whole_reach_is_full():
    settings = Settings("gru", hidden=4, batch=3, lr=0.01, max_steps=20, seed=0)
    curves = {
        mode: train(settings, modes(8), mode, 8, "every").curve
        for mode in (FULL, "Chunked(8)", "Randomized(8)")
    }
    assert curves[FULL] == curves["Chunked(8)"] != curves["Randomized(8)"]
    assert len({curve[0] for curve in curves.values()}) == 1


def test_run_keeps_the_weights_halfway():
    settings = Settings("gru", hidden=16, batch=32, lr=0.01, max_steps=400, seed=0)
    run = train(settings, modes(4), FULL, 8, "last")
    assert run.reached == run.curve[-1][0] and run.curve[-1][1] < 0.02
    below = [error for _, error in run.curve if error < VARIANCE / 2]
    assert run.halfway_error == below[0]
    model = Adder("gru", 16, 8)
    held_out = draw(8, training.HELD_OUT, generator())
    for weights, error in ((run.start, run.curve[0][1]), (run.halfway, run.halfway_error)):
        model.load_state_dict(weights)
        assert held_out_error(model, *held_out) == pytest.approx(error)


def test_diverging_run_is_stopped_and_reported(monkeypatch):
    monkeypatch.setattr(training, "loss_of", lambda *_: torch.full((), math.nan).requires_grad_())
    monkeypatch.setattr(training, "clip_grad_norm_", lambda *_, **__: torch.tensor(math.nan))
    settings = Settings("gru", hidden=4, batch=3, lr=0.01, max_steps=20, seed=0)
    run = train(settings, modes(4), FULL, 8, "last")
    assert [step for step, _ in run.curve] == [0, 1] and run.reached is None
    assert "diverged |  not reached" in report.learning_table([run])


def test_table():
    runs = [
        Run(T, "last", mode, [(0, 0.2), (30, error)])
        for mode, error in (("full", 0.0123), ("Sliding(4)", 0.1))
        for T in (6, 12)
    ]
    assert report.learning_table(runs).splitlines() == [
        "| truncation | T = 6: error | T = 6: steps | T = 12: error | T = 12: steps |",
        "|------------|-------------:|-------------:|--------------:|--------------:|",
        "| full       |       0.0123 |           30 |        0.0123 |            30 |",
        "| Sliding(4) |       0.1000 |  not reached |        0.1000 |   not reached |",
    ]


# ---- the command line


def test_writes_tables_and_picture(run, tmp_path):
    status, out, _ = run()
    assert status == 0
    for mode in modes(4):
        assert out.count(f"\n| {mode} ") == 5
    assert out.count("T = 6: ") == 2 * 3 + 2 * 2 + 2
    assert (tmp_path / "out/truncation_bias.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["truncation_bias.png"]


@pytest.mark.slow(1)
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_other_cells(run, without_picture, cell):
    status, out, _ = run(f"--cell={cell}")
    assert status == 0 and out.startswith(f"adding problem: {cell.upper()}, H = 4")


@pytest.mark.slow
def test_seed_decides_on_everything_but_the_time(run, without_picture):
    tables = [run(f"--seed={seed}")[1].split("\n3. Time")[0] for seed in (1, 1, 2)]
    assert tables[0] == tables[1] != tables[2]


OPTIONS = {
    "length": ("--lengths 3", "--lengths: must be whole numbers of at least 4, but was '3'"),
    "lengths": ("--lengths 8 x", "--lengths: must be whole numbers of at least 4, but was 'x'"),
    "no length": ("--lengths", "--lengths: expected at least one argument"),
    "reach": ("--reach=1", "--reach: must be a whole number of at least 2, but was '1'"),
    "draws": ("--draws=1", "--draws: must be a whole number of at least 2, but was '1'"),
    "rounds": ("--rounds=0", "--rounds: must be a whole number of at least 1, but was '0'"),
    "hidden": ("--hidden=-4", "--hidden: must be a whole number of at least 1, but was '-4'"),
    "batch": ("--batch=1.5", "--batch: must be a whole number of at least 1, but was '1.5'"),
    "steps": ("--max-steps=0", "--max-steps: must be a whole number of at least 1, but was '0'"),
    "lr": ("--lr=nan", "--lr: must be a number above 0, but was 'nan'"),
    "seed": ("--seed=-1", "--seed: must be a whole number from 0 to 2**63 - 1, but was '-1'"),
    "cell": ("--cell=elman", "--cell: invalid choice: 'elman'"),
    "out a file": ("--out={tmp}/file", "--out: must be a folder that can be written to, but was"),
    "out has a folder": ("--out={tmp}/occupied", "truncation_bias.png is a folder"),
    "no such option": ("--quik", "unrecognized arguments: --quik"),
}


@pytest.mark.parametrize(("arguments", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_option(run, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    (tmp_path / "occupied/truncation_bias.png").mkdir(parents=True)
    assert_refused(run(*arguments.format(tmp=tmp_path).split(" ")), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_ends_cleanly(tmp_path):
    log = tmp_path / "out.log"
    process = start("truncation_bias.py", tmp_path / "out", *TINY, "--draws=1000000")
    status = interrupt(process, signal.SIGINT, lambda: "loss every: full" in log.read_text())
    log = log.read_text()
    assert status == 128 + signal.SIGINT and "Traceback" not in log
    assert "interrupted: no picture was written" in log
    assert not list((tmp_path / "out").iterdir())
