"""The benchmark of derivatives: what it compares computes the same; no test depends on a speed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import derivatives
from benchmarks.common.rows import Size

FAST = ["--rounds", "1", "--budget", "0.01", "--sizes", "3,2,4"]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("kind", derivatives.KINDS)
def test_ours_agrees(kind, cell):
    record = derivatives.measure(kind, cell, Size(4, 3, 5), min_rounds=1, budget_s=0.0)
    assert record["error"] is None
    assert record["size"] == "4,3,5"
    assert ("cost" in record) == (kind == "twice")
    lines = derivatives.terminal_lines(record)
    assert lines[0].startswith(f"{kind:<10} {cell:<5} 4,3,5")


def test_second_derivatives_are_those_asked_for():
    calls, _ = derivatives.twice("gru", Size(3, 2, 4))
    found = calls["fastbptt"].run()
    assert sorted(found) == [
        "bias_hh_l0",
        "bias_ih_l0",
        "grad_output",
        "input",
        "weight_hh_l0",
        "weight_ih_l0",
    ]
    assert all(value.abs().max() > 0 for value in found.values())


def test_gradients_are_kept_apart():
    calls, _ = derivatives.per_sample("lstm", Size(3, 5, 4))
    assert all(value.shape[0] == 5 for value in calls["fastbptt"].run().values())
    calls, _ = derivatives.ensemble("gru", Size(3, 2, 4))
    for value in calls["fastbptt"].run().values():
        assert value.shape[0] == derivatives.NETWORKS
        assert (value[0] - value[1]).abs().max() > 0


def test_what_differs_is_not_timed(monkeypatch):
    def off(cell, size):
        calls, row = derivatives.ensemble(cell, size)
        name = next(iter(calls))
        right = calls[name].run
        calls[name] = derivatives.Call(lambda: {k: 1.1 * v for k, v in right().items()})
        return calls, row

    monkeypatch.setitem(derivatives.BUILD, "ensemble", off)
    record = derivatives.measure("ensemble", "rnn", Size(3, 2, 4), min_rounds=1, budget_s=0.0)
    assert "off by" in record["error"] and "ms" not in record
    assert "FAILED" in derivatives.terminal_lines(record)[0]


def test_command(tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = [*FAST, "--cells", "rnn", "--kinds", "twice", "--out", str(tmp_path)]
    assert derivatives.main([*arguments, "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    (record,) = json.loads((tmp_path / "derivatives.json").read_text())["records"]
    assert (record["kind"], record["cell"], record["size"]) == ("twice", "rnn", "3,2,4")
    assert "torch.nn.RNN" in capsys.readouterr().out


def test_sizes_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        derivatives.main(["--sizes", "8,2,4,2", "--out", str(tmp_path)])
    assert "without a truncation" in capsys.readouterr().err
