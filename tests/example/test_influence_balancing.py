"""The example ``influence_balancing.py``: the influences, who arrives, and the command line."""

from __future__ import annotations

import pytest
import torch

# Before the examples: it lets them be imported.
from example_runs import assert_refused, run_fixture

# isort: split
import influence_balancing
from influence_balancing_lib import chain
from influence_balancing_lib.chain import Chain, influence, learn_by_segments, learn_by_windows

run = run_fixture(influence_balancing.main, "--windows=12", "--segments=3", "--seeds=2")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_at_rest():
    net = Chain()
    losses, state = net(net.at_rest(), 3)
    torch.testing.assert_close(state, net.at_rest())
    torch.testing.assert_close(losses, torch.full((3,), 8.0, dtype=torch.float64))  # (-3 - 1)^2/2


@pytest.mark.parametrize(
    ("steps", "known"), [(1, 1.0), (10, 10.0), (20, 16.5), (30, 9.9), (50, -4.8), (100, -6.0)]
)
def test_influences(steps, known):
    """Those known, and those of powers of the matrix."""
    found = influence(steps)
    assert round(found, 1) == known
    net = Chain()
    power, expected = net.signs.clone(), 0.0
    for _ in range(steps):
        expected += float(power[0])
        power = net.layer.weight_hh_l0 @ power
    assert found == pytest.approx(expected, rel=1e-12)


def test_short_windows_go_the_wrong_way():
    one = learn_by_windows(1, 3000)
    assert not one.diverged and round(one.losses[-1]) == 207 and one.theta > 3
    for window in (10, 20):
        assert learn_by_windows(window, 1100).diverged


@pytest.mark.slow(1)
@pytest.mark.parametrize(("window", "known"), [(50, "2.9e-07"), (100, "3.2e-09")])
def test_long_windows_arrive(window, known):
    assert learn_by_windows(window, 3000).outcome == known


@pytest.mark.parametrize("seed", range(2))
def test_randomized_arrives_by_small_steps_only(seed):
    assert learn_by_segments(chain.RANDOM, 1e-4, 100, seed).diverged
    small = learn_by_segments(chain.RANDOM, 1e-5, 200, seed)
    assert small.losses[-1] < 1e-3 and small.theta == pytest.approx(-1 / 6, abs=0.01)
    assert learn_by_segments("Sliding(16)", 1e-5, 100, seed).diverged


def test_program(run, tmp_path):
    status, out, _ = run()
    assert status == 0
    assert "| 20 |                +16.5 |" in out.replace("|  20", "| 20")
    assert "Randomized(mean_length=16)" in out and "at most" in out
    assert (tmp_path / "out" / "influence_balancing.png").stat().st_size > 10_000


def test_bad_input(run):
    assert_refused(run("--windows=0"), "argument --windows: must be a whole number of at least 1")
