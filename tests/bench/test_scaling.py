"""The scaling benchmark: what it calls a cliff, and that it finds one."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import scaling
from benchmarks.common.files import Record
from benchmarks.common.workload import Mismatch
from benchmarks.cpu import scaling_plot, sweeps
from benchmarks.cpu.sweeps import Point, Sweep

SIZES = (4, 6, 8, 9, 12, 16)
SWEEP = Sweep("H", Point(3, 2, 1), (4, 8, 9, 16))
SMALL = (SWEEP, Sweep("layers", Point(3, 2, 4), (1, 2)), Sweep("T", Point(1, 1, 4), (1, 2, 4)))


def times(power: float = 2.0, rounds: int = 3, **factors: float) -> dict[int, list[float]]:
    """A power law, times a factor at some sizes; every round twice as slow as the one before."""
    return {
        size: [2.0**r * size**power * factors.get(f"at{size}", 1.0) for r in range(rounds)]
        for size in SIZES
    }


@pytest.mark.parametrize("power", [0.3, 1.0, 2.0, 3.0])
def test_a_power_law_has_no_excess(power):
    assert sweeps.interpolated(8, (4, 16), times(power)) == pytest.approx(times(power)[8])
    for size in SIZES[1:-1]:
        assert sweeps.worst_excess(size, times(power)).ratio.median == pytest.approx(1)
    smallest = sweeps.worst_excess(SIZES[0], times(power))
    assert smallest.ratio.median < 1 and len(smallest.neighbours) == 1
    assert sweeps.worst_excess(SIZES[-1], times(power)) is None


def test_excess_is_over_the_neighbours_of_the_same_round():
    found = sweeps.worst_excess(9, times(at9=1.8))
    assert found.ratio.q1 == pytest.approx(1.8) and found.ratio.q3 == pytest.approx(1.8)
    assert all(6 <= size <= 12 for size in found.neighbours)


def test_a_step_up_shows_at_its_first_size_and_at_the_next():
    # from 9 on everything costs double: 9 lies right behind the step, 12 further away
    found = {
        size: sweeps.worst_excess(size, times(at9=2.0, at12=2.0, at16=2.0)).ratio.median
        for size in (8, 9, 12)
    }
    assert found[8] < 1 and found[9] > sweeps.CLIFF and found[12] < found[9]


def test_a_size_that_costs_more_than_a_larger_one_is_in_excess():
    found = sweeps.worst_excess(4, times(at4=9.0))
    assert found.neighbours == (6,)
    assert found.ratio.median == pytest.approx(9 * 16 / 36)


def test_sweeps_change_one_axis_and_their_odd_sizes_stand_in_order():
    assert SWEEP.point(9) == Point(3, 2, 9)
    assert SWEEP.at == "T=3, B=2"
    assert Sweep("T", Point(1, 2, 4, 3), (1,)).at == "B=2, H=4, layers=3"
    assert {sweep.axis for sweep in sweeps.SWEEPS} == set(sweeps.AXES)
    for sweep in (*sweeps.SWEEPS, *sweeps.QUICK_SWEEPS):
        assert list(sweep.values) == sorted(set(sweep.values)), sweep
    assert max(sweeps.SWEEPS[0].values) == 100_000
    heights = next(sweep.values for sweep in sweeps.SWEEPS if sweep.axis == "H")
    assert {15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 2048} <= set(heights)


def test_multiply_adds_are_of_six_products_a_gate():
    assert Point(3, 2, 5, 2).multiply_adds == 6 * (3 * 2) * 5 * 5 * 2


def test_threads_are_set_off_the_clock(threads):
    steps = scaling.steps_of("gru", Point(3, 2, 4, 2), [1, 2])
    for count, step in steps.items():
        step.clear()
        assert torch.get_num_threads() == count
        step.run()
    torch.set_num_threads(threads)


@pytest.fixture
def fake_times(monkeypatch):
    """A cliff at H=9 on two threads, which are slower there than one, in every timing."""

    def interleave(steps, **_):
        return {
            (value, n): [value * (4.0 if (value, n) == (9, 2) else 2 / n)] * 3 for value, n in steps
        }

    monkeypatch.setattr(scaling, "interleave", interleave)


def test_a_cliff_and_a_loss_are_found_and_timed_again(fake_times):
    record = scaling.measure("rnn", SWEEP, [1, 2], min_rounds=1, budget_s=0.0)
    (cliff,) = record["cliffs"]
    assert (cliff["H"], cliff["threads"]) == (9, 2)
    assert cliff["excess"]["median"] == pytest.approx(4, rel=1e-3)
    (loss,) = record["losses"]
    assert (loss["H"], loss["ratio"]["median"]) == (9, pytest.approx(2))
    assert [point["H"] for point in record["points"]] == [4, 8, 9, 16]
    texts = scaling.findings([json.loads(json.dumps(record))])
    assert texts[0].startswith("cliff: rnn T=3, B=2, H=9, threads=2: 3.6e+04 ms, 4.00x what")
    assert texts[1].startswith("thread loss: rnn T=3, B=2, H=9: 3.6e+04 ms with two threads, 1.8e")
    assert len(texts) == 2


def test_what_does_not_show_again_is_not_reported(monkeypatch):
    seen = []

    def interleave(steps, **_):
        seen.append(set(steps))
        first = len(seen) == 1
        return {(v, n): [v * (4.0 if first and v == 9 and n == 2 else 2 / n)] for v, n in steps}

    monkeypatch.setattr(scaling, "interleave", interleave)
    record = scaling.measure("rnn", SWEEP, [1, 2], min_rounds=1, budget_s=0.0)
    assert not record["cliffs"] and not record["losses"]
    assert len(seen) == 2 and {(9, 1), (9, 2)} < seen[1] < seen[0]


def test_one_number_of_threads_has_no_losses(fake_times):
    record = scaling.measure("rnn", SWEEP, [2], min_rounds=1, budget_s=0.0)
    assert len(record["cliffs"]) == 1 and not record["losses"]


def run(folder, monkeypatch, *arguments: str) -> tuple[int, Record]:
    monkeypatch.setattr(scaling, "SWEEPS", SMALL)
    status = scaling.main(["--rounds", "2", "--budget", "0", "--out", str(folder), *arguments])
    return status, json.loads((folder / "scaling.json").read_text())


@pytest.mark.slow(1)
def test_scaling_writes_everything(tmp_path, monkeypatch, capsys, threads):
    status, found = run(tmp_path, monkeypatch, "--cells", "rnn", "lstm", "--upto", "9")
    assert status == 0 and found["complete"]
    assert torch.get_num_threads() == threads
    assert [(r["cell"], r["axis"]) for r in found["records"]] == [
        (cell, axis) for cell in ("rnn", "lstm") for axis in ("H", "layers", "T")
    ]
    assert [point["H"] for point in found["records"][0]["points"]] == [4, 8, 9]
    assert found["settings"]["command"] == (
        "python -m benchmarks.scaling --cells rnn lstm --rounds 2 --budget 0 --upto 9"
    )
    for record in found["records"]:
        assert record["error"] is None
        for point in record["points"]:
            assert all(0 < ms["q1"] <= ms["q3"] for ms in point["ms"].values())
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "H=8" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*")), "something partial was left behind"


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    def mismatch(*_):
        raise Mismatch("output is off by 1")

    monkeypatch.setattr(scaling, "check", mismatch)
    monkeypatch.setattr(scaling, "interleave", lambda *_, **__: pytest.fail("timed"))
    status, found = run(tmp_path, monkeypatch, "--cells", "gru", "--axes", "H")
    assert status == 1
    assert found["records"][0]["error"] == "output is off by 1"
    assert "FAILED, not timed: output is off by 1" in capsys.readouterr().out
    assert not (tmp_path / "scaling.png").exists()


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch):
    right = scaling.measure

    def interrupted(cell, sweep, *args, **kwargs):
        if sweep.axis == "layers":
            raise KeyboardInterrupt
        return right(cell, sweep, *args, **kwargs)

    monkeypatch.setattr(scaling, "measure", interrupted)
    status, found = run(tmp_path, monkeypatch, "--cells", "rnn")
    assert status == 130 and not found["complete"] and len(found["records"]) == 1


def test_the_plot_has_a_panel_an_axis_and_cell_and_rings_what_was_found(fake_times):
    settings = {"threads": [1, 2]}
    machine = {"cpu": "cpu", "cores": 2, "isa": "isa", "date": "2026-01-01T00:00"}
    records = [
        scaling.measure(cell, sweep, [1, 2], min_rounds=1, budget_s=0.0)
        for cell, sweep in (("rnn", SMALL[0]), ("rnn", SMALL[1]), ("gru", SMALL[0]))
    ]
    figure = scaling_plot.draw({"machine": machine, "settings": settings, "records": records})
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 3
    rings = [line for line in shown[0].lines if line.get_markerfacecolor() == "none"]
    assert len(rings) == 2 and all(line.get_xdata() == [9] for line in rings)


def test_values_are_picked_and_no_picture_is_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling.importlib.util, "find_spec", lambda _: None)
    words = ("--cells", "rnn", "--axes", "H", "layers", "--values", "4", "9")
    status, found = run(tmp_path, monkeypatch, *words)
    assert status == 0 and not (tmp_path / "scaling.png").exists()
    assert "no matplotlib: scaling.png is not drawn" in capsys.readouterr().err
    ((axis, points),) = [(r["axis"], r["points"]) for r in found["records"]]
    assert axis == "H" and [point["H"] for point in points] == [4, 9]


def test_bad_arguments_are_refused(tmp_path, capsys):
    for arguments, message in (
        (["--axes", "I"], "invalid choice: 'I'"),
        (["--threads", "0"], "must be an integer above 0"),
        (["--values", "100001"], "arguments --axes, --upto and --values: no size is left"),
        (["--out", __file__], "argument --out: cannot write to"),
    ):
        with pytest.raises(SystemExit):
            scaling.main(["--out", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
