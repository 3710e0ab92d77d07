"""The peers: each computes what ours computes, and one that is missing is left out and said."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from benchmarks import compare
from benchmarks.common import contenders, workload
from benchmarks.common.files import ROOT
from benchmarks.common.rows import BACKWARD, FORWARD, Row
from benchmarks.cpu import (
    compiled_loop,
    jax_scan,
    onnx_runtime,
    peers,
    results,
    torchrl_module,
)
from fastbptt.truncation import Chunked


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
@pytest.mark.parametrize("cut", [None, Chunked(5)])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_contenders_agree(cell, cut, mode):
    row = Row(cell, 12, 2, 8, cut)
    with torch.set_grad_enabled(mode == BACKWARD):
        steps = contenders.build(workload.Workload(row, mode))
        results = steps["fastbptt"].results()
    peer = f"torch.nn.{cell.upper()}" if cut is None else "detach() loop"
    assert list(steps) == ["fastbptt", peer]
    expected = ["output", "h_n", *(["c_n"] if cell == "lstm" else [])]
    if mode == BACKWARD:
        weights = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        expected += ["dinput", *(f"d{name}" for name in weights)]
    assert list(results) == expected


JAX_AGREES = """
import torch
from benchmarks.common import contenders, workload
from benchmarks.cpu import jax_scan, peers
from benchmarks.common.rows import BACKWARD, FORWARD, Chunked, Row
torch.set_num_threads(1)
sizes = [(12, 2, 8), (12, 2, 8, Chunked(5))]
cases = [(Row(cell, *size), BACKWARD) for cell in workload.CELLS for size in sizes]
for row, mode in [*cases, (Row("lstm", 12, 2, 8), FORWARD)]:
    with torch.set_grad_enabled(mode == BACKWARD):
        work = workload.Workload(row, mode)
        steps = contenders.build(work, peers.of_kinds([peers.JAX]))  # raises where one is off
    print(*steps, sep=", ")
print(jax_scan.facts())
"""


def test_jax_agrees_in_every_cell():
    # in a process of its own: JAX's threads would be in the way of tests that fork
    if importlib.util.find_spec("jax") is None:
        pytest.skip("needs jax, the bench-jax extra")
    command = [sys.executable, "-c", JAX_AGREES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *rows, facts = done.stdout.splitlines()
    assert len(rows) == 7 and all(row.endswith("fastbptt, JAX lax.scan") for row in rows)
    assert "'jax_threads': 'a pool of its own" in facts
    if sys.platform == "linux":
        assert ", 1 threads" in facts


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_onnx_runtime_agrees_in_inference(cell, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs the bench-onnx extra")
    monkeypatch.setattr(onnx_runtime, "held", lambda: None)
    onnx = peers.of_kinds([peers.ONNX])
    row = Row(cell, 7, 3, 5)
    with torch.no_grad():
        steps = contenders.build(workload.Workload(row, FORWARD), onnx)  # raises where it is off
    assert list(steps) == ["fastbptt", "ONNX Runtime"]
    found = steps["ONNX Runtime"].results()
    assert list(found) == ["output", "h_n", *(["c_n"] if cell == "lstm" else [])]
    assert list(contenders.contenders(workload.Workload(row, BACKWARD), onnx)) == ["fastbptt"]
    assert onnx_runtime.unavailable() is None and onnx_runtime.facts()["onnxruntime"]


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_torchrl_agrees_with_resets(cell, mode):
    pytest.importorskip("torchrl", reason="needs the bench-torchrl extra")
    with torch.set_grad_enabled(mode == BACKWARD):
        work = workload.Workload(Row(cell, 40, 3, 5, resets=True), mode)
        assert work.resets[1:].any()
        steps = contenders.build(work, peers.of_kinds([peers.TORCHRL]))  # raises where it is off
    assert list(steps) == ["fastbptt", "TorchRL"]
    assert torchrl_module.unavailable() is None and torchrl_module.facts()["torchrl"]


def test_torchrl_is_a_peer_where_there_are_resets():
    (peer,) = peers.of_kinds([peers.TORCHRL])
    assert peer.applies(Row("gru", 4, 2, 8, resets=True))
    assert not peer.applies(Row("gru", 4, 2, 8)) and not peer.applies(
        Row("rnn", 4, 2, 8, None, True)
    )


def test_a_peer_that_cannot_be_held_to_a_set_is_left_out(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(onnx_runtime, "held", lambda: "avx2")
    arguments = ["--cells", "gru", "--rows", "36,2,8", "--modes", FORWARD, "--rounds", "1"]
    arguments += ["--budget", "0", "--out", str(tmp_path)]
    assert compare.main(arguments) == 0
    said = capsys.readouterr().err
    assert "no ONNX Runtime among the peers: ONNX Runtime cannot be held to avx2" in said
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--peers", "onnx"])


def test_a_peer_that_computes_something_else_is_refused():
    def wrong(work):
        with torch.no_grad():
            work.weights["weight_ih_l0"][0, 0] += 0.1
        return workload.ModuleStep(work, work.load(work.cell.torch))

    other = contenders.Peer(peers.JAX, lambda row: True, lambda row: "other", wrong)
    with pytest.raises(workload.Mismatch, match="output is off by .* from other"):
        contenders.build(workload.Workload(Row("lstm", 12, 2, 8), BACKWARD), [other])


def test_a_missing_jax_is_said_and_skipped(tmp_path, capsys, monkeypatch):
    for name in ("jax", "onnxruntime", "torchrl.modules"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    sizes = ["--cells", "gru", "--rows", "36,2,8", "--modes", FORWARD]  # too long to compile
    tail = ["--rounds", "1", "--budget", "0", "--out", str(tmp_path)]
    assert compare.main([*sizes, *tail]) == 0
    said = capsys.readouterr().err
    assert "no JAX lax.scan among the peers: jax cannot be imported" in said
    assert "pip install 'fastbptt[bench-jax]'" in said
    assert "pip install 'fastbptt[bench-onnx]'" in said
    assert "pip install 'fastbptt[bench-torchrl]'" in said
    found = results.load(tmp_path / "compare.json")
    assert found["settings"]["peers"] == ["torch"]
    assert not {"jax", "onnxruntime", "torchrl"} & found["machine"].keys()
    with pytest.raises(SystemExit):
        compare.main([*sizes, "--peers", "jax", *tail])
    assert "argument --peers: jax cannot be imported" in capsys.readouterr().err


@pytest.fixture
def backend(monkeypatch):
    """Traces and differentiates ahead of time as always, but generates no code."""
    monkeypatch.setattr(compiled_loop, "BACKEND", "aot_eager")


@pytest.mark.slow(2)
@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_compiled_loop_agrees(cell, mode, backend):
    with torch.set_grad_enabled(mode == BACKWARD):
        work = workload.Workload(Row(cell, 4, 2, 8), mode)
        steps = contenders.build(work, peers.of_kinds([peers.COMPILE]))  # raises where it is off
    assert list(steps) == ["fastbptt", "torch.compile"]


def test_only_rows_of_few_steps_are_compiled():
    (peer,) = (p for p in peers.PEERS if p.kind == peers.COMPILE)
    assert peer.applies(Row("rnn", 35, 2, 8)) and not peer.applies(Row("rnn", 36, 2, 8))
    assert not peer.applies(Row("rnn", 4, 2, 8, Chunked(2)))
    assert not peer.applies(Row("rnn", 4, 2, 8, resets=True))


def test_a_compiler_that_fails_is_said_and_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compiled_loop, "BACKEND", "no_such_backend")
    arguments = ["--cells", "rnn", "--rows", "4,2,8", "--modes", FORWARD, "--rounds", "1"]
    arguments += ["--budget", "0", "--out", str(tmp_path)]
    for module in (jax_scan, onnx_runtime, torchrl_module):
        monkeypatch.setattr(module, "unavailable", lambda: "not this time")
    assert compare.main(arguments) == 0
    assert "no torch.compile among the peers: torch.compile does not" in capsys.readouterr().err
    assert results.load(tmp_path / "compare.json")["settings"]["peers"] == ["torch"]
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--peers", "compile"])
    assert "argument --peers: torch.compile does not work here" in capsys.readouterr().err
    assert compare.main([*arguments, "--quick"]) == 0
    assert "torch.compile" not in capsys.readouterr().err, "a quick run does not try it"
