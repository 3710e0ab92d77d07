"""The benchmark of uses: what is compared computes the same, and what is wrong is not timed."""

from __future__ import annotations

import dataclasses
import json
import os
import time

import pytest
import torch

from benchmarks import uses
from benchmarks.common.rows import BACKWARD, FORWARD
from benchmarks.common.workload import CELLS, OURS, ModuleStep
from benchmarks.cpu import networks, surroundings
from benchmarks.cpu.networks import SUITES, Use

FAST = {"min_rounds": 1, "budget_s": 0.0}


def tiny(use: Use) -> Use:
    """The same in small: fewer steps, and widths of which those that differ still do."""
    widths = tuple(4 + width % 7 for width in use.widths)
    return dataclasses.replace(use, T=min(use.T, 5), B=min(use.B, 3), widths=widths)


TINY = {(name, tiny(use)) for name, suite in SUITES.items() for use in suite}
TINY = sorted(TINY, key=str)


@pytest.mark.slow(2)
@pytest.mark.parametrize("use", [use for _, use in TINY], ids=lambda use: use.label)
def test_every_use_agrees_with_torch(use):
    for _, cell, mode in ((use, cell, mode) for cell in use.cells for mode in use.modes):
        if use.dtype and cell == "lstm" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            continue  # torch's own depends on the processor
        record = uses.measure("suite", use, cell, mode, [1, 2], **FAST)
        assert record["error"] is None, (cell, mode)
        assert record["use"] == use.label
        assert record["ms"].keys() == {OURS, "torch.nn"}
        for times in record["ms"].values():
            assert times.keys() == {"1", "2"}
            assert all(0 < t["q1"] <= t["median"] <= t["p90"] for t in times.values())
        assert record["speedup"].keys() == {"1", "2"}
        assert all(value > 0 for value in record["under_one"].values())


def test_a_peer_that_cannot_run_is_named_with_its_reason(monkeypatch):
    def fail(self):
        raise RuntimeError("no kernel for this\nsee elsewhere")

    monkeypatch.setattr(ModuleStep, "results", fail)
    record = uses.measure("steps", tiny(SUITES["steps"][0]), "rnn", FORWARD, [1], **FAST)
    assert record["error"] == "torch.nn does not run: no kernel for this"
    assert "FAILED" in uses.terminal_line(record)


def test_suites_are_what_they_say():
    labels = {name: [use.label for use in suite] for name, suite in SUITES.items()}
    assert len(labels["steps"]) == 16
    assert {"16 x 1,1,64", "16 x 1,16,1024 autocast bfloat16"} <= set(labels["steps"])
    assert labels["stacks"] == ["128,1,128-128-128"]
    assert labels["bidirectional"] == ["128,1,128 bidirectional"]
    assert labels["awd-lstm"] == ["70,8,400-1152-1152-400", "70,32,400-1152-1152-400"]
    assert "128,16,256 2 busy" in labels["busy"]


def test_networks_are_of_the_modules_that_a_program_has():
    def modules(use):
        return list(networks.Network(use, torch.nn.LSTM).layers)

    (stack,) = modules(Use(3, 2, (4, 4, 4, 4)))
    assert (stack.num_layers, stack.hidden_size) == (3, 4)
    chain = modules(Use(3, 2, (5, 8, 8, 5)))
    assert [(m.input_size, m.hidden_size, m.num_layers) for m in chain] == [
        (5, 8, 1),
        (8, 8, 1),
        (8, 5, 1),
    ]
    (both,) = modules(Use(3, 2, (4, 4), bidirectional=True))
    assert both.bidirectional


def test_single_steps_are_calls_of_their_own_that_go_on_from_the_state():
    use = Use(5, 2, (4, 4), stepwise=True)
    _, theirs = networks.build(use, "gru", FORWARD)
    module, seen = theirs.module.layers[0], []
    module.register_forward_pre_hook(lambda _, args: seen.append(args))
    found = theirs.results()
    assert [tuple(x.shape) for x, _ in seen] == [(1, 2, 4)] * 5
    expected, _ = module(theirs.input)
    torch.testing.assert_close(found["output"], expected.detach())


def test_packed_sequences_have_different_lengths():
    use = Use(40, 9, (4, 4), ragged=True)
    sizes = networks.Network(use, torch.nn.RNN).batch_sizes.tolist()
    assert len(sizes) == 40 and sizes[:10] == [9] * 10 and sizes[-1] >= 1
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 4


def test_busy_processes_compute_and_are_ended():
    with surroundings.busy(2) as processes:
        assert len({process.pid for process in processes}) == 2
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)
    with pytest.raises(RuntimeError), surroundings.busy(1) as processes:
        raise RuntimeError("what is measured fails")
    assert processes[0].poll() is not None


def test_a_busy_process_ends_when_its_parent_does():
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:  # dies without a word to its own
        with surroundings.busy(1) as processes:
            os.write(writer, f"{processes[0].pid}\n".encode())
            time.sleep(0.5)
            os._exit(0)
    pid = int(os.read(reader, 100))
    os.waitpid(parent, 0)
    end = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether there is such a process, and more of it than its entry."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def small(monkeypatch):
    """Suites of small uses."""
    chosen = {"stacks": (Use(4, 1, (5, 5, 5)),), "busy": (Use(4, 2, (5, 5), busy=1),)}
    monkeypatch.setattr(uses, "SUITES", chosen)
    monkeypatch.setattr(networks, "SUITES", chosen)


def test_uses_writes_everything(tmp_path, capsys, small):
    words = ["--cells", "rnn", "--rounds", "1", "--budget", "0", "--threads", "2"]
    assert uses.main([*words, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "uses.json").read_text())
    assert found["complete"] and found["settings"]["threads"] == [1, 2]
    assert [(r["suite"], r["use"], r["mode"]) for r in found["records"]] == [
        ("stacks", "4,1,5-5", FORWARD),
        ("stacks", "4,1,5-5", BACKWARD),
        ("busy", "4,2,5 1 busy", FORWARD),
        ("busy", "4,2,5 1 busy", BACKWARD),
    ]
    lines = [ln for ln in (tmp_path / "uses.md").read_text().splitlines() if ln.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 * (2 + 2)
    said = capsys.readouterr().out
    assert "stacks, rnn, threads=2: " in said and "busy, rnn: threads bring " in said
    assert uses.main([*words, "--filter", "1 BUSY forward+", "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "uses.json").read_text())["records"]) == 1


def test_what_is_wrong_is_not_timed(tmp_path, capsys, small, monkeypatch):
    right = ModuleStep.results

    def wrong(self):
        found = right(self)
        if isinstance(self.module.layers[0], CELLS["gru"].ours):
            found["output"] = found["output"] + 1e-2
        return found

    monkeypatch.setattr(ModuleStep, "results", wrong)
    monkeypatch.setattr(uses, "interleave", lambda *_, **__: pytest.fail("timed"))
    words = ["--cells", "gru", "--suites", "stacks", "--threads", "1", "--out", str(tmp_path)]
    assert uses.main(words) == 1
    assert "FAILED, not timed: output is off by" in capsys.readouterr().out
    assert "| FAILED |" in (tmp_path / "uses.md").read_text()


def test_bad_arguments_are_refused(tmp_path, capsys):
    for arguments, message in (
        (["--suites", "gym"], "invalid choice: 'gym'"),
        (["--threads", "0"], "must be an integer above 0"),
        (["--filter", "9999"], "nothing is left"),
        (["--out", __file__], "argument --out: cannot write to"),
    ):
        with pytest.raises(SystemExit):
            uses.main(["--out", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
