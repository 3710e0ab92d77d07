"""The memory benchmark: what it counts, and its tables."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import memory
from benchmarks.common.rows import GRID, Row
from benchmarks.cpu import memory_grid
from fastbptt.truncation import Chunked


def test_peak_replays_allocations_without_the_results():
    log = [(1, 100), (2, 50), (1, -100), (1, 30), (3, 70), (2, -50)]
    assert memory.peak(log, {}) == 150
    # the last allocation at 1 and the one at 3 are results: the first at 1 is not
    assert memory.peak(log, {1: 30, 3: 70}) == 150
    assert memory.peak(log, {1: 10, 3: 70}) == 150
    assert memory.peak(log[3:5], {1: 10, 3: 70}) == 20
    assert memory.peak([], {}) == 0


def test_storages_count_views_once():
    output = torch.zeros(6, 2)
    found = memory.storages({"output": output, "h_n": output[-1:], "dhx": None})
    assert found == {output.data_ptr(): output.nbytes}
    one, other = torch.zeros(10).split([4, 6])
    assert memory.storages({"one": one}) == {one.data_ptr(): 16}
    assert memory.storages({"one": one, "other": other}) == {one.data_ptr(): 40}


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    found = memory.measure(Row("rnn", 40, 4, 32), "fastbptt", threads=1)
    assert 0 < found["allocated"] < 50 * (4 * 40 * 4 * 32)
    assert found["resident"] is None or found["resident"] < 2**27


def test_memory_prints_multiples_of_the_output(capsys, monkeypatch):
    monkeypatch.setattr(memory, "measure", lambda *_: {"allocated": 3 * 2**19, "resident": None})
    assert memory.main(["--row", "1024,2,128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "in outputs of 1 MiB" in lines[0]
    assert [line.split() for line in lines[2:]] == [
        [name, "1.50x", "unknown"] for name in ("fastbptt", "torch.nn.RNN")
    ]


def test_recompute_is_compared_in_memory_gradients_and_time(capsys, monkeypatch):
    times = [2.0], [3.0]
    sizes = {"fastbptt": 4 * 2**20, memory.RECOMPUTE: 2**20}
    monkeypatch.setattr(
        memory, "measure", lambda row, label, threads: dict(allocated=sizes[label], resident=None)
    )
    monkeypatch.setattr(
        memory, "interleave", lambda steps, **_: dict(zip(steps, times, strict=True))
    )
    assert memory.main(["--cell", "lstm", "--row", "1024,2,128", "--recompute"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in lines[2:4]] == ["4.00x", "1.00x"]
    assert lines[4] == "recompute / default, allocated: 0.25"
    assert lines[5].startswith("recompute / default, time: 1.50 ")
    assert lines[6].startswith("results and gradients are the same")


def test_recompute_with_other_gradients_is_refused(capsys, monkeypatch):
    def wrong(work):
        step = right(work)
        monkeypatch.setattr(step.module, "recompute", False)
        step.module.truncation = Chunked(5)
        return step

    right = memory._recomputing
    monkeypatch.setattr(memory, "measure", lambda *_: dict(allocated=1, resident=1))
    monkeypatch.setattr(memory, "_recomputing", wrong)
    monkeypatch.setattr(memory, "interleave", lambda *_, **__: pytest.fail("timed"))
    assert memory.main(["--cell", "gru", "--row", "12,2,8", "--recompute"]) == 1
    assert "FAILED, not timed: recompute=True: dinput is off by" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        memory.main(["--recompute"])
    assert "argument --recompute: needs --cell gru or lstm" in capsys.readouterr().err


def test_both_peaks_are_measured_with_and_without_the_results():
    row = Row("lstm", 40, 4, 32)
    found = memory.allocated(row, "fastbptt")
    results = sum(memory.storages(memory._step(row, "fastbptt").results()).values())
    assert found["allocated"] < found["allocated_peak"] <= found["allocated"] + results
    assert found["allocated_peak"] >= results
    if sys.platform == "linux":
        at_most = memory.resident(row, "fastbptt")
        assert at_most["resident_peak"] - at_most["resident"] == results


OURS = {"allocated": 30, "allocated_peak": 2**20, "resident": 2**22, "resident_peak": 2**23}
THEIRS = {"allocated": 60, "allocated_peak": 2**22, "resident": 5000, "resident_peak": None}


@pytest.fixture
def fake(monkeypatch):
    """Two processes' findings; the labels that were measured."""
    labels = []

    def measure(row, label, threads):
        labels.append(label)
        return OURS if label == "fastbptt" else THEIRS

    monkeypatch.setattr(memory, "measure", measure)
    return labels


def test_the_grid_is_measured_beside_torch(tmp_path, capsys, fake):
    assert memory.main(["--grid", "--filter", "rnn", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["complete"] and len(found["records"]) == len(GRID)
    assert found["settings"]["command"] == "python -m benchmarks.memory --grid --filter rnn"
    peers = {r["row"]: r["peer"] for r in found["records"]}
    assert (peers["128,1,64"], peers["128,8,128 resets"]) == ("torch.nn.RNN", "step loop")
    assert fake[:2] == ["fastbptt", "torch.nn.RNN"] and len(fake) == 2 * len(GRID)
    first = found["records"][0]
    assert first["bytes"] == {"fastbptt": OURS, "torch.nn.RNN": THEIRS}
    assert first["ratio"] == {  # below a mebibyte, and where it is unknown, there is no ratio
        "allocated": 0.5,
        "allocated_peak": 0.25,
        "resident": None,
        "resident_peak": None,
    }
    text = (tmp_path / "memory.md").read_text()
    assert "| 1 MiB | 4 MiB | **0.25** | 30 B | 60 B | **0.50** | - |" in text
    assert "rnn peak: 0.25 of theirs in the geometric mean of 17, at most 0.25" in text
    assert "cut off" not in text
    assert "1 MiB     4 MiB  0.25" in capsys.readouterr().out


def test_the_grid_keeps_what_it_has_when_it_is_cut_off(tmp_path, fake, monkeypatch):
    def interrupted(row, label, threads):
        if row.B == 16:
            raise KeyboardInterrupt
        return OURS

    monkeypatch.setattr(memory, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.main(["--grid", "--filter", "gru 128", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "memory.json").read_text())
    assert not found["complete"] and len(found["records"]) == 2
    assert "cut off" in (tmp_path / "memory.md").read_text()


def test_the_summary_is_the_mean_and_the_most():
    ratios = (("a", 0.25), ("b", 1.0), ("c", None))
    records = [
        {"cell": "gru", "row": row, "ratio": {"allocated_peak": ratio, "allocated": None}}
        for row, ratio in ratios
    ]
    (line,) = memory_grid.summary(records)
    assert line == "gru peak: 0.50 of theirs in the geometric mean of 2, at most 1.00 at b"


def test_bad_grids_are_refused(tmp_path, capsys):
    for arguments, message in (
        (["--filter", "9999"], "none of the rows is left"),
        (["--out", __file__], "cannot write to"),
    ):
        with pytest.raises(SystemExit):
            memory.main(["--grid", "--out", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
