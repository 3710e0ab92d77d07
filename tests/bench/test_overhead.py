"""The benchmark of single calls: what it compares computes the same; no test depends on a speed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import overhead
from benchmarks.common.rows import BACKWARD

FAST = ["--rounds", "2", "--size", "2,5"]


@pytest.mark.parametrize("mode", list(overhead.MODES))
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_ours_agrees_with_torchs_cell_and_module(cell, mode):
    steps = overhead.build(cell, (2, 5), mode)  # raises where one is off
    name = f"torch.nn.{cell.upper()}"
    assert list(steps) == ["fastbptt", f"{name}Cell", name]
    for step in steps.values():
        found = step.results()
        gradients = ["dbias_hh", "dbias_ih", "dweight_hh", "dweight_ih"]
        states = ["c_n"] * (cell == "lstm") + ["h_n", "output"]
        assert sorted(found) == states[:-2] + gradients * (mode == BACKWARD) + states[-2:]
        assert all(value is not None and value.abs().max() > 0 for value in found.values())


def test_modes_are_what_they_say():
    for mode, (graph, inference) in {
        "forward, no_grad": (False, False),
        "forward, inference_mode": (False, True),
        "forward, with grad": (True, False),
    }.items():
        for step in overhead.build("gru", (1, 3), mode).values():
            output, _ = step.run()
            assert (output.requires_grad, output.is_inference()) == (graph, inference)
    assert torch.is_grad_enabled()


def test_overhead_writes_everything(tmp_path, capsys):
    assert overhead.main([*FAST, "--cells", "rnn", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert found["settings"]["command"] == (
        "python -m benchmarks.overhead --cells rnn --size 2,5 --rounds 2"
    )
    assert [record["mode"] for record in found["records"]] == list(overhead.MODES)
    for record in found["records"]:
        assert record["size"] == {"B": 2, "H": 5} and record["rounds"] == 2
        assert set(record["us"]) == {"fastbptt", *record["speedup"]}
        for ratio in record["speedup"].values():
            assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
    assert "T=1, B=2, H=5" in capsys.readouterr().out


@pytest.mark.parametrize("mode", list(overhead.MODES))
@pytest.mark.parametrize("cell", ["rnn", "gru"])  # torch's LSTM depends on the processor
def test_under_autocast(cell, mode):
    with overhead.autocast("bfloat16"):
        steps = overhead.build(cell, (2, 5), mode, "bfloat16")  # raises where one is off
        output, _ = steps["fastbptt"].run()
    wider = cell == "gru"  # the state that it adds to is float32
    assert output.dtype == (torch.float32 if wider else torch.bfloat16)
    record = overhead.measure(cell, (2, 5), mode, min_rounds=2, budget_s=0.0, dtype="bfloat16")
    assert record["error"] is None and set(record["us"]) == set(steps)


def test_what_is_wrong_is_not_timed(tmp_path, capsys, monkeypatch):
    class Wrong(torch.nn.GRUCell):
        def forward(self, *args):
            return super().forward(*args) + 1e-3

    monkeypatch.setattr(torch.nn, "GRUCell", Wrong)
    monkeypatch.setattr(overhead, "interleave", lambda *_, **__: pytest.fail("timed"))
    assert overhead.main([*FAST, "--cells", "gru", "--out", str(tmp_path)]) == 1
    assert "FAILED, not timed: output is off by" in capsys.readouterr().out
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert all("from torch.nn.GRUCell" in record["error"] for record in found["records"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1"], "must be B,H, got '1'"),
        (["--size", "1,x"], "must be an integer above 0, got 'x'"),
        (["--modes", "backward"], "invalid choice: 'backward'"),
        (["--out", __file__], "argument --out: cannot write to"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        overhead.main(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
