"""The GPU benchmark's rows and how each is checked, planned and timed, on the CPU."""

from __future__ import annotations

import importlib
import json
import math
import os
from dataclasses import replace
from itertools import product

import pytest
import torch

from bench.gpu_runs import ROW, bench, record, session
from benchmarks.common import contenders, workload
from benchmarks.common.rows import BACKWARD, FORWARD
from benchmarks.common.workload import CELLS, Mismatch
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu import plans as gpu_plans
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu.rows import (
    BACKWARD_ALONE,
    KERNEL_VARIABLE,
    KERNELS,
    PRECISIONS,
    TWICE,
    GpuRow,
    Task,
)
from fastbptt.truncation import TBPTT, Chunked


def test_the_grid_is_whole_and_begins_with_the_most_telling_rows():
    rows = gpu_rows.grid()
    plain = [r for r in rows if r.truncation is None and not r.resets and not r.twice]
    wanted = product(CELLS, PRECISIONS, (64, 128, 256, 512, 768, 1024, 2048), (1, 16, 64))
    assert sorted((r.cell, r.precision, r.H, r.B) for r in plain) == sorted(wanted)
    assert len(set(rows)) == len(rows) and {row.T for row in plain} == {1024}
    first = {(r.cell, r.precision, r.B, r.H) for r in rows[:6]}
    assert first == set(product(("lstm", "rnn"), ("fp16",), (16,), (128, 256, 512)))
    second = {(r.cell, r.precision, r.B, r.H) for r in rows[6:18]}
    assert second == set(product(("lstm", "gru"), ("fp16", "bf16"), (16,), (768, 1024, 2048)))
    assert {(r.cell, r.precision) for r in rows[18:39]} == {
        ("lstm", "fp16"),
        *product(("lstm",), ("bf16", "fp32")),
        *product(("gru",), ("fp16", "bf16", "fp32")),
    }
    special = rows[39:66]
    assert {r.truncation for r in special} == {Chunked(64), None}
    assert all(r.truncation or r.resets or r.twice for r in special)
    assert [r.cell for r in special if r.twice] == ["lstm", "gru", "rnn"]
    assert {r.B for r in rows[-100:]} == {1, 64}


def test_filters_pick_measurements():
    picked = gpu_rows.tasks(gpu_rows.grid(), ["LSTM fp16 1024,16,256", "fp32 1024,1,512 chunked"])
    assert {task.name for task in picked} == {
        *(f"lstm fp16 1024,16,256 {mode}" for mode in (FORWARD, BACKWARD)),
        *(f"lstm fp16 1024,16,256 resets {mode}" for mode in (FORWARD, BACKWARD)),
        *(f"lstm fp16 1024,16,256 Chunked(k=64) {mode}" for mode in (BACKWARD, BACKWARD_ALONE)),
        *(
            f"{cell} fp32 1024,1,512 Chunked(k=64) {mode}"
            for cell in CELLS
            for mode in (BACKWARD, BACKWARD_ALONE)
        ),
    }
    assert len(picked) == 12


def test_other_packages_come_last_and_can_be_picked():
    others = {"TorchRL": (GpuRow("lstm", 8, 2, 4, resets=True),)}
    found = gpu_rows.tasks(gpu_rows.grid(), (), others)
    assert [task.name for task in found[-2:]] == [
        f"lstm fp32 8,2,4 resets {mode} TorchRL" for mode in (FORWARD, BACKWARD)
    ]
    assert gpu_rows.tasks(gpu_rows.grid(), ["torchrl"], others) == found[-2:]
    assert gpu_measure.identity(found[-1])["peer"] == "TorchRL"


def test_counts_are_of_both_products_and_of_what_must_move():
    row = GpuRow("gru", 5, 2, 8, precision="fp16")
    forward, both = (gpu_rows.counts(row, mode) for mode in (FORWARD, BACKWARD))
    assert forward == {"flops": 2 * 5 * 2 * 2 * 3 * 64, "bytes": 2 * (2 * 80 + 384), "steps": 5}
    assert both["flops"] == 3 * forward["flops"] and both["steps"] == 10
    chunked = GpuRow("gru", 6, 2, 8, Chunked(2))
    assert gpu_rows.counts(chunked, BACKWARD)["steps"] == 8
    assert gpu_rows.counts(chunked, BACKWARD_ALONE)["steps"] == 2
    twice = gpu_rows.counts(row, TWICE)
    assert twice["flops"] == 9 * forward["flops"] and twice["steps"] == 20


def test_lanes_are_sequences_and_backward_their_windows():
    row = GpuRow("gru", 1000, 3, 8)
    chunked, overlapping = (replace(row, truncation=cut) for cut in (Chunked(64), TBPTT(8, 64)))
    for each in (row, chunked, overlapping):
        assert each.lanes(backward=False) == 3
    assert row.lanes(backward=True) == 3
    assert chunked.lanes(backward=True) == 3 * 16
    assert overlapping.lanes(backward=True) == 3 * 125


def test_precision_and_kernel_are_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for name, matmul in (("tf32", "high"), ("fp32", "highest")):
        with gpu_rows.precision(name), gpu_rows.forced("resident"):
            assert torch.get_float32_matmul_precision() == matmul
            assert torch.backends.cudnn.allow_tf32 == (name == "tf32")
            assert os.environ[KERNEL_VARIABLE] == "resident"
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert KERNEL_VARIABLE not in os.environ


class FakeEvent:
    """An event of a device whose time passes only when a step says so."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


class FakeStep:
    def clear(self) -> None:
        FakeEvent.now += 100.0

    def run(self) -> None:
        FakeEvent.now += 0.25


def test_events_leave_clear_off_the_clock(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu_measure.sample_by_events(FakeStep(), 3) == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"truncation": Chunked(2)}, {"resets": True}], ids=str)
def test_peers_compute_in_the_dtype_of_the_row(options, dtype):
    work = workload.Workload(GpuRow("lstm", 6, 2, 8, **options), BACKWARD).to(dtype)
    (_, peer) = contenders.contenders(work).values()
    (_, exact) = contenders.contenders(work.to(torch.float64)).values()
    found, truth = peer.results(), exact.results()
    assert {t.dtype for t in found.values()} == {dtype}
    for name, error in gpu_measure.errors_of(found, truth).items():
        assert 0 < error < 20 * torch.finfo(dtype).eps * truth[name].abs().max(), name


@pytest.fixture
def picky(monkeypatch):
    """Ours listens to the variable: no cluster nor grid kernel, and a wrong resident one."""
    right = workload.ModuleStep.results

    def results(self):
        kernel = os.environ.get(KERNEL_VARIABLE)
        if not isinstance(self.module, CELLS[ROW.cell].ours) or kernel is None:
            return right(self)
        if kernel in ("cluster", "grid"):
            raise RuntimeError(f"{KERNEL_VARIABLE}={kernel}: there is none for H = 64\nmore")
        found = right(self)
        if kernel == "resident":
            found["output"][3, 1, 5] += 1e-3
        return found

    monkeypatch.setattr(workload.ModuleStep, "results", results)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_a_wrong_kernel_is_not_timed_and_a_missing_one_is_no_failure(picky, mode):
    record = bench().measure(Task(ROW, mode))
    assert record["absent"] == {
        kernel: f"{KERNEL_VARIABLE}={kernel}: there is none for H = 64"
        for kernel in ("cluster", "grid")
    }
    assert record["failed"].keys() == {"resident"}
    assert record["error"].startswith("resident: output is off by 0.001, allowed is ")
    assert set(record["ms"]) == {"fastbptt", "stepwise", "lane", "torch.nn.LSTM"}


def test_the_only_kernel_is_not_timed_twice(picky):
    record = bench(("stepwise", "cluster")).measure(Task(ROW, FORWARD))
    assert set(record["ms"]) == {"fastbptt", "torch.nn.LSTM"}
    assert set(record["accuracy"]) == {"fastbptt", "stepwise"}


def test_a_row_is_differentiated_twice_beside_torch_without_cudnn(monkeypatch):
    enabled, run = [], workload.TwiceStep.run

    def spied(self):
        enabled.append(torch.backends.cudnn.enabled)
        return run(self)

    monkeypatch.setattr(workload.TwiceStep, "run", spied)
    row = GpuRow("gru", 6, 2, 8, twice=True)
    record = bench(()).measure(Task(row, TWICE))
    assert record["error"] is None and enabled and not any(enabled)
    assert set(record["ms"]) == {"fastbptt", "torch.nn.GRU without cuDNN"}
    wrong = workload.Workload(row, BACKWARD)
    step = workload.TwiceStep(wrong, wrong.load(CELLS["gru"].torch))
    found = step.results()
    assert found.keys() == {"grad_output", "input", *wrong.weights}
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_a_kernel_that_hangs_is_named_and_left_out(monkeypatch):
    said = []
    made = gpu_measure.Bench(torch.device("cpu"), KERNELS, True, ("grid",), said.append)
    record = made.measure(Task(ROW, FORWARD))
    kernels = ["stepwise", "lane", "resident", "cluster"]
    assert said == ["torch.nn.LSTM", "fastbptt", *kernels, "the timing"]
    assert record["absent"] == {"grid": "left out: processes were lost with it"}
    assert "grid" not in record["ms"] and record["error"] is None


def test_plans_are_asked_for_each_pass_and_kernel(monkeypatch):
    asked = []

    def plan(like, cell, H, lanes, backward):
        asked.append((like.dtype, cell, H, lanes, backward))
        return json.dumps({"kernel": os.environ[KERNEL_VARIABLE], "cycles": 1650})

    monkeypatch.setattr(gpu_plans, "operator", lambda: plan)
    row = GpuRow("rnn", 6, 2, 8, Chunked(2))
    record = bench(("resident", "cluster")).measure(Task(row, BACKWARD))
    assert asked[:2] == [(torch.float32, "tanh", 8, n, back) for n, back in ((2, False), (6, True))]
    assert set(record["plan"]) == {"fastbptt", "resident", "cluster"}
    assert record["plan"]["cluster"]["backward"] == {"kernel": "cluster", "cycles": 1650}
    record = bench(()).measure(Task(row, BACKWARD_ALONE))
    assert set(record["plan"]["fastbptt"]) == {"backward"}


def test_a_plan_that_is_not_known_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_plans, "operator", lambda: None)
    found = bench(()).measure(Task(ROW, FORWARD))
    missing = "this build has no operator fastbptt::cuda_plan"
    assert found["plan"] == {"fastbptt": {"unknown": missing}} and found["error"] is None

    def refuses(*_):
        raise NotImplementedError("Could not run it on 'CPU'\nmore")

    monkeypatch.setattr(gpu_plans, "operator", lambda: refuses)
    other = bench(()).measure(Task(ROW, FORWARD))
    assert other["plan"]["fastbptt"] == {"unknown": "Could not run it on 'CPU'"}
    run = session(tmp_path)
    run.results["records"] = [found, found, other]
    run.write()
    report = (tmp_path / "gpu.md").read_text()
    assert report.count(f"Plans are not known: {missing}.") == 1


@pytest.fixture
def other(monkeypatch):
    """Another package: torch's module, and wrong by as much as the list says."""
    wrong = [0.0]

    def build(work):
        made = workload.ModuleStep(work, work.load(work.cell.torch))
        right = made.results

        def results():
            found = right()
            found["output"][0, 0, 0] += wrong[0]
            return found

        made.results = results
        return made

    rows = (GpuRow("gru", 6, 2, 8),)
    monkeypatch.setitem(gpu_peers.OTHERS, "Other", gpu_peers.Other("json", build, rows))
    return wrong


def test_another_package_is_held_to_the_same_and_is_no_failure_of_ours(other):
    assert gpu_peers.OTHERS["Other"].missing() is None
    (row,) = gpu_peers.OTHERS["Other"].rows
    record = bench().measure(Task(row, BACKWARD, "Other"))
    assert set(record["ms"]) == {"fastbptt", "Other"} and record["speedup"].keys() == {"fastbptt"}
    other[0] = 1e-3
    record = bench().measure(Task(row, BACKWARD, "Other"))
    assert record["skipped"].startswith("Other: ['output is off by 0.001")
    assert "ms" not in record and record["error"] is None


def test_what_is_not_installed_is_said(monkeypatch, tmp_path):
    one = gpu_peers.Other("no_such_package", None, ())
    assert one.missing() == "not installed"
    monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    assert gpu_peers.Other("json", None, ()).missing().startswith("cannot be imported: ZeroDiv")
    run = session(tmp_path)
    run.results["records"] = [record(fastbptt=1.0)]
    run.results["peers"] = {"TorchRL": "not installed", "FlashRNN": None}
    run.write()
    report = (tmp_path / "gpu.md").read_text()
    assert "TorchRL was not measured: not installed." in report and "FlashRNN" not in report


def test_a_fallback_to_torch_is_no_result(monkeypatch):
    monkeypatch.setattr("fastbptt.call.has_kernel", lambda input: False)
    record = bench(()).measure(Task(ROW, FORWARD))
    assert record["error"].startswith("fastbptt: warned: fastbptt.LSTM has no kernel")
    assert "ms" not in record


def test_a_row_without_memory_is_left_out(monkeypatch):
    def full(self, task, record):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_measure.Bench, "checked", full)
    record = bench().measure(Task(ROW, FORWARD))
    assert (record["error"], record["skipped"]) == (None, "out of memory")


def test_the_rule_is_twice_torchs_error():
    peer, ulps = {"output": 1e-3}, {"output": 1e-5}
    assert gpu_measure.hold({"output": 1e-3}, peer, ulps) == pytest.approx(1 / 2.04, rel=1e-2)
    assert gpu_measure.hold({"output": 2.04e-3}, peer, ulps) == pytest.approx(1)
    for error in (2.05e-3, math.nan):
        with pytest.raises(Mismatch, match="output is off by"):
            gpu_measure.hold({"output": error}, peer, ulps)
    right = {"output": torch.ones(2, 3).double(), "dx": torch.ones(2).double()}
    assert gpu_measure.errors_of(right, right) == {"output": 0, "dx": 0}
    for wrong in (None, torch.ones(3)):
        with pytest.raises(Mismatch, match="dx is"):
            gpu_measure.errors_of(right | {"dx": wrong}, right)


def test_kernels_can_be_asked_for_where_the_variable_is_read(monkeypatch):
    device = torch.device("cpu")
    assert gpu_rows.kernels(device) == ()
    module = CELLS["rnn"].ours

    def refuse(self, input):
        raise RuntimeError(f"{KERNEL_VARIABLE} must be auto, got {os.environ[KERNEL_VARIABLE]}")

    monkeypatch.setattr(module, "forward", refuse)
    assert gpu_rows.kernels(device) == KERNELS

    def lost(self, input):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(module, "forward", lost)
    with pytest.raises(RuntimeError, match="CUDA error"):
        gpu_rows.kernels(device)
