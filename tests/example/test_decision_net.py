"""The example ``decision_net.py``: the task, the network, the measures, and the command line."""

from __future__ import annotations

import math

import pytest
import torch

# Before the examples: it lets them be imported.
from example_runs import assert_refused, run_fixture

# isort: split
import decision_net
from decision_net_lib import fixed_points, task, training
from decision_net_lib.network import ALPHA, DecisionNet
from decision_net_lib.task import DECISION, DELAY, FIXATION, LEFT, RIGHT, STEPS, STIMULUS, draw
from fastbptt import _cell_network, _loops

# One thread: on a busy machine, threads that wait for each other are slow.
TINY = "--threads=1 --units=10 --batch=3 --steps=3 --trials=2 --rounds=1".split()

run = run_fixture(decision_net.main, *TINY)


@pytest.fixture(autouse=True)
def by_loops(monkeypatch):
    """Compiling a cell takes longer than a tiny run."""
    monkeypatch.setattr(_cell_network, "unroll_of", lambda *_: _loops.unroll)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(units: int = 10, noise: float = 0.1) -> DecisionNet:
    torch.manual_seed(0)
    return DecisionNet(units, noise)


# ---- the task


def test_trials(monkeypatch):
    monkeypatch.setattr(task, "SIGMA", 0.0)
    trials = draw(torch.tensor([0.5, -0.25, 0.0]), generator())
    cue, left, right = trials.inputs.unbind(-1)
    assert trials.inputs.shape == (STEPS, 3, 3) and STEPS == FIXATION + STIMULUS + DELAY + DECISION
    assert (cue[:-DECISION] == 1).all() and not cue[-DECISION:].any()
    shown = slice(FIXATION, FIXATION + STIMULUS)
    assert (right - left)[shown].unique(dim=0).tolist() == [[0.5, -0.25, 0.0]]
    assert ((left + right)[shown] == 1).all()
    assert not left[:FIXATION].any() and not right[FIXATION + STIMULUS :].any()
    assert (trials.choices[:-DECISION] == task.FIXATE).all()
    assert trials.choices[-1, :2].tolist() == [RIGHT, LEFT]


def test_noise_and_coins():
    trials = draw(torch.zeros(2000), generator())
    noise = trials.inputs[FIXATION : FIXATION + STIMULUS, :, 1:] - 0.5
    assert noise.std().item() == pytest.approx(task.SIGMA, rel=0.01)
    assert (trials.choices[-1] == RIGHT).float().mean().item() == pytest.approx(0.5, abs=0.05)


# ---- the network


def test_dales_law_holds_through_training():
    model = net()
    training.train(model, 3, 4, 0.1, 0)
    weight = model.recurrent.weight_hh_l0
    assert (weight[:, :8] >= 0).all() and (weight[:, 8:] <= 0).all()
    assert (weight != 0).sum() == 90 and not weight.diagonal().any()


def test_excitation_and_inhibition_are_balanced():
    weight = net(200).recurrent.weight_hh_l0
    excitation, inhibition = weight[:, :160].sum(), weight[:, 160:].sum()
    assert (excitation + inhibition).abs() < 0.2 * excitation
    assert torch.linalg.eigvals(weight).abs().max().item() == pytest.approx(1, abs=0.05)


def test_the_loop_and_a_step_are_the_same_network():
    model = net().double()
    inputs = draw(torch.tensor([0.1, -0.5]), generator()).inputs.double()
    noise = model.draw_noise(inputs).double()
    torch.testing.assert_close(model(inputs, noise), model.by_loop(inputs, noise))
    model.eval()
    _, rates = model(inputs)
    torch.testing.assert_close(model.step(rates[9, 1], inputs[10, 1]), rates[10, 1])
    cost = training.compare(net(), 2, 1, 0)
    assert cost.difference < 1e-4 and cost.ours > 0 and cost.loop > 0


def test_noise_moves_a_unit_alone_by_its_standard_deviation():
    model = net(noise=0.1)
    rate, rates = torch.zeros(10), []
    for noise in model.draw_noise(torch.empty(4000, 1, 3))[:, 0]:
        rate = rate + ALPHA * (noise - rate)
        rates.append(rate)
    expected = 0.1 * math.sqrt(2 / (2 - ALPHA))
    assert torch.stack(rates).std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_it_learns():
    model = net(50, 0.05)
    training.train(model, 200, 32, 5e-3, 0)
    curve = training.psychometric(model, 20, 0)
    assert sum(curve.right[-2:]) / 2 - sum(curve.right[:2]) / 2 > 0.3


# ---- what is measured


def test_fit_finds_slope_and_bias():
    x = torch.tensor(task.COHERENCES).double()
    slope, bias = training._fit(x, torch.sigmoid(12 * (x - 0.05)))
    assert slope == pytest.approx(12, rel=0.02) and bias == pytest.approx(0.05, abs=0.002)
    curve = training.Curve([], slope, bias, torch.empty(0))
    share = 1 / (1 + math.exp(-slope * curve.threshold))
    assert share == pytest.approx(0.75)


def test_fixed_point_by_hand():
    """Without connections each rate goes to its own input, by 1 - alpha in a step."""
    model, x = net(), torch.tensor([1.0, 0.5, 0.0])
    recurrent = model.recurrent
    with torch.no_grad():
        recurrent.parametrizations.weight_hh_l0.original.zero_()
    (point,) = fixed_points.find(model, x, torch.rand(5, 10))
    expected = recurrent.weight_ih_l0 @ x + recurrent.bias_ih_l0 + recurrent.bias_hh_l0
    torch.testing.assert_close(point.rate.float(), torch.relu(expected))
    torch.testing.assert_close(point.eigenvalues.abs(), torch.full((10,), 1 - ALPHA).double())
    assert point.is_stable
    assert point.time_constant == pytest.approx(-task.DT / math.log(1 - ALPHA))


def test_unstable_fixed_point():
    """Two units that excite each other by g > 1 rest where their input is 1 - g times the rate."""
    model = net()
    with torch.no_grad():
        for parameter in model.recurrent.parameters():
            parameter.zero_()
        weight = model.recurrent.parametrizations.weight_hh_l0.original
        weight[0, 1] = weight[1, 0] = 1.5
        model.recurrent.bias_ih_l0[:2] = -0.5
    points = fixed_points.find(model, torch.zeros(3), torch.rand(20, 10) + 0.5)
    rates = {tuple(point.rate[:2].round(decimals=6).tolist()): point for point in points}
    assert rates.keys() >= {(1.0, 1.0)} and not rates[1.0, 1.0].is_stable
    assert rates[1.0, 1.0].eigenvalues[0].real.item() == pytest.approx(1 + 0.5 * ALPHA)


# ---- the command line


def test_writes_tables_and_picture(run, tmp_path):
    status, out, _ = run()
    assert status == 0
    assert "-51.2%" in out and "by a loop over steps" in out and "a training step: " in out
    assert (tmp_path / "out/decision_net.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["decision_net.png"]


def test_seed_decides_on_everything_but_the_time(run, monkeypatch):
    monkeypatch.setattr(decision_net.picture, "draw", lambda *_: None)
    monkeypatch.setattr(decision_net, "save_picture", lambda *_, **__: None)
    tables = [
        [line for line in run(f"--seed={seed}")[1].splitlines() if line.startswith("|")]
        for seed in (1, 1, 2)
    ]
    assert tables[0] == tables[1] != tables[2]


OPTIONS = {
    "units": ("--units=4", "--units: must be a whole number of at least 5, but was '4'"),
    "batch": ("--batch=1.5", "--batch: must be a whole number of at least 1, but was '1.5'"),
    "steps": ("--steps=0", "--steps: must be a whole number of at least 1, but was '0'"),
    "noise": ("--noise=-1", "--noise: must be a number above 0, but was '-1'"),
    "lr": ("--lr=nan", "--lr: must be a number above 0, but was 'nan'"),
    "seed": ("--seed=-1", "--seed: must be a whole number from 0 to 2**63 - 1, but was '-1'"),
    "out a file": ("--out={tmp}/file", "--out: must be a folder that can be written to, but was"),
    "out has a folder": ("--out={tmp}/occupied", "decision_net.png is a folder"),
    "no such option": ("--quik", "unrecognized arguments: --quik"),
}


@pytest.mark.parametrize(("arguments", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_option(run, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    (tmp_path / "occupied/decision_net.png").mkdir(parents=True)
    assert_refused(run(arguments.format(tmp=tmp_path)), message)
    assert not (tmp_path / "out").exists()
