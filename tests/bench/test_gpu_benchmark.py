"""The GPU benchmark's own logic, on the CPU: what it runs, keeps, refuses and reports."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from benchmarks.common import contenders, machine, workload
from benchmarks.common.rows import BACKWARD, FORWARD
from benchmarks.common.workload import CELLS, Mismatch
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import card as gpu_card
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu import plans as gpu_plans
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import session as gpu_session
from benchmarks.gpu import steps as gpu_steps
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

ROOT = Path(__file__).parents[2]
ROW = GpuRow("lstm", 6, 2, 64, precision="fp16")


def command(*words: object) -> list[str]:
    return ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable}


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder that a dry run wrote, and what it said."""
    folder = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        command("--dry-run", "--out", folder),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,  # a busy machine takes ten times as long as one that is not
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_dry_run_measures_every_kind_of_row(dry):
    found = json.loads((dry[0] / "gpu.json").read_text())
    assert found["complete"] and found["measurements"] == len(found["records"])
    kinds = {(r["cell"], r["precision"], r["mode"]) for r in found["records"]}
    assert kinds >= set(product(CELLS, PRECISIONS, (FORWARD, BACKWARD)))
    assert ("lstm", "fp16", BACKWARD_ALONE) in kinds and ("lstm", "fp32", TWICE) in kinds
    assert found["peers"].keys() == gpu_peers.OTHERS.keys()
    assert {r["peer"] for r in found["records"]} >= {"torch.nn.RNN", "detach() loop", "step loop"}
    for record in found["records"]:
        assert record["error"] is None and record["rounds"] == 2
        assert set(record["ms"]) == {"fastbptt", *KERNELS, record["peer"]}
        assert set(record["speedup"]) == set(record["accuracy"]) == {"fastbptt", *KERNELS}
        for ratio in record["speedup"].values():
            assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
        assert set(record["plan"]) == {"fastbptt", *KERNELS}
        assert all(plan["unknown"] for plan in record["plan"].values())
        assert all(0 < share <= 1 for share in record["accuracy"].values())


def test_dry_run_prints_what_it_does_not_run(dry):
    folder, said = dry
    found = json.loads((folder / "gpu.json").read_text())
    steps = {step["name"]: step["outcome"] for step in found["steps"]}
    assert steps == dict.fromkeys(["build", "probe", "tests", "sanitizer"], "printed") | {
        "scaling": "passed",
        "benchmark": "passed",
    }
    for part in (
        "FASTBPTT_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=",
        "setup.py build_ext --inplace",
        "OMP_NUM_THREADS=4",
        "-m pytest tests/cuda/test_cuda.py",
        "--tool memcheck --error-exitcode 9 --kernel-name kns=fastbptt",
        "--tool racecheck",
        "arch=compute_90,code=sm_90 benchmarks/gpu/probe.cu",
    ):
        assert part in said, part
    cases = (folder / "sanitizer.log").read_text().splitlines()
    for kernel, cell in product(KERNELS, CELLS):
        assert any(case.startswith(f"{kernel} {cell} torch.float32 H=") for case in cases)
    assert any(case.endswith("H=33 Chunked(k=4) resets twice") for case in cases)
    written = {path.name for path in folder.iterdir()}
    logs = {f"{step}.log" for step in gpu.STEPS if step != "scaling"}
    results = {"gpu.json", "gpu.md", "cpu_scaling.json"}
    assert written == results | logs, "nothing partial is left behind"
    assert len(written) <= 8, "no more than a machine that is lent gives back"


def test_dry_run_times_the_cpu_kernels_by_threads(dry):
    whole = json.loads((dry[0] / "cpu_scaling.json").read_text())
    threads = [n for n in (1, 2, 4, 8, 16) if n <= machine.cores()]
    assert whole["complete"] and whole["settings"]["threads"] == threads
    sizes = json.loads((dry[0] / "gpu.json").read_text())["cpu_threads"]
    assert [size["size"] for size in sizes] == [
        f"T=32, B={B}, H={H}" for B in (1, 16) for H in (2, 4)
    ]
    assert {int(n) for size in sizes for n in size["ms"]} == set(threads)
    assert "| rnn | T=32, B=16, H=4 | " in (dry[0] / "gpu.md").read_text()


def test_dry_run_ends_with_what_is_most_worth_reading(dry):
    *_, goal, build, probe, tests, sanitizer, scaling, benchmark, last = dry[1].splitlines()
    assert goal.startswith("at least 5.0x the backward pass of Chunked at B = 1")
    assert [build, probe, tests, sanitizer] == [f"{name}: printed" for name in list(gpu.STEPS)[:4]]
    assert scaling == "scaling: passed 4 sizes"
    assert benchmark.startswith("benchmark: passed ") and last == f"written to {dry[0]}"


def test_dry_run_reports_in_words_that_it_is_one(dry):
    report = (dry[0] / "gpu.md").read_text()
    assert "A dry run" in report and "cut off" not in report
    assert "| lstm fp16: B,H | forward ms |" in report
    for line in report.splitlines():
        if line.startswith("| lstm | fp16 | 6,1,64 Chunked(k=2) | backward |"):
            assert "`" not in line and "(arithmetic)" in line
            break
    else:
        pytest.fail("the row of the backward pass alone is missing")


def test_an_interruption_leaves_what_was_found(tmp_path):
    words = command("--dry-run", "--steps", "benchmark", "--out", tmp_path)
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if json.loads((tmp_path / "gpu.json").read_text())["records"]:
                break
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert 1 <= len(found["records"]) < found["measurements"] and not found["complete"]
    assert found["steps"][-1]["outcome"] == "interrupted"
    assert "The run was cut off" in (tmp_path / "gpu.md").read_text()
    log = (tmp_path / "benchmark.log").read_text()
    assert "Traceback" not in log


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


def test_facts_of_the_card(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *driver*--id=GPU-7b) echo 580.1 ;;\n'
        "*) echo 1980, 1980, 2619, 41, 99.5 ;; esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    card = argparse.Namespace(
        name="A card", major=9, minor=0, multi_processor_count=132, total_memory=2**36, uuid="7b"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    found = gpu_card.facts()
    wanted = {"name": "A card", "capability": "9.0", "driver": "580.1", "memory_gib": 64.0}
    assert wanted.items() <= found.items()
    assert found["clocks"]["sm_mhz"] == "1980" and found["clocks"]["watts"] == "99.5"
    script.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_card.clocks() == {}
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    compiler.chmod(0o755)
    assert gpu_card.facts()["toolkit"] == "13.0.88"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    assert gpu_card.toolkit() is None


def test_the_report_says_what_it_was_measured_with(tmp_path):
    run = session(tmp_path)
    versions = {"driver": "580.1", "cuda": "13.0", "toolkit": "13.0.88", "torch": "2.11.0"}
    run.results["card"] = {"name": "A card", "clocks": {"sm_max_mhz": "1980"}, **versions}
    timed = record(fastbptt=1.0)
    run.results["records"] = [timed | {"clocks": {"sm_mhz": "1755"}}, timed, timed | {"clocks": {}}]
    run.write()
    head = (tmp_path / "gpu.md").read_text().split("\n\n")[:3]
    assert head == [
        "# fastbptt on A card",
        "driver 580.1, CUDA 13.0, toolkit 13.0.88, torch 2.11.0",
        "SM clock, MHz: 1755 (at most 1980)",
    ]


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


def bench(kernels=KERNELS) -> gpu_measure.Bench:
    return gpu_measure.Bench(torch.device("cpu"), kernels, dry_run=True)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_a_wrong_kernel_is_not_timed_and_a_missing_one_is_no_failure(picky, mode):
    record = bench().measure(Task(ROW, mode))
    assert record["absent"] == {
        kernel: f"{KERNEL_VARIABLE}={kernel}: there is none for H = 64"
        for kernel in ("cluster", "grid")
    }
    assert record["failed"].keys() == {"resident"}
    assert record["error"].startswith("resident: output is off by 0.001, allowed is ")
    assert set(record["ms"]) == {"fastbptt", "stepwise", "torch.nn.LSTM"}


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
    assert said == ["torch.nn.LSTM", "fastbptt", "stepwise", "resident", "cluster", "the timing"]
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


def test_cases_hold_every_pair_in_few_runs():
    factors = (KERNELS, list(CELLS), gpu_cases.DTYPES, gpu_cases.CUTS, gpu_cases.HIDDEN)
    cases = list(gpu_cases.pairwise(factors))
    for (i, one), (j, other) in combinations(enumerate(factors), 2):
        assert {(case[i], case[j]) for case in cases} == set(product(one, other))
    assert len(cases) < 20
    assert {case[:2] for case in cases} == set(product(KERNELS, CELLS))


def test_cases_end_at_a_moment_however_late_they_began(monkeypatch, capsys):
    monkeypatch.setattr(gpu_cases, "run", lambda *_: None)
    gpu_cases.main(["--dry-run", "--deadline", str(time.monotonic() - 1)])
    assert re.fullmatch(r"0 of \d\d cases\n", capsys.readouterr().out)
    gpu_cases.main(["--dry-run", "--deadline", str(time.monotonic() + 100)])
    done, _, of, _ = capsys.readouterr().out.splitlines()[-1].split()
    assert done == of


def test_cases_fail_with_the_kernel(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_cases, "run", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_cases.main(["--dry-run"])


def session(folder: Path, budget: float = 100, **options) -> gpu_session.Session:
    chosen = {"filter": [], "steps": None, "skip": 0, "dry_run": False, **options}
    made = gpu_session.Session(argparse.Namespace(out=folder, budget=budget, **chosen))
    made.results["card"] = {"name": "a card", "capability": "9.0"}
    return made


# A gpu_measure of four measurements, of which one can go wrong.
MEASURE = """
import json, os, sys, time
identity = {identity!r}
skip = int(sys.argv[sys.argv.index("--skip") + 1])
def emit(kind, **content):
    print("@ " + json.dumps(dict(kind=kind, **content)), flush=True)
print("a library says hello")
emit("facts", machine=dict(cpu="x"), kernels=["resident", "grid"], measurements=4)
without = sys.argv[sys.argv.index("--without") + 1 :] if "--without" in sys.argv else []
for index in range(skip, 4):
    emit("begin", index=index, record=identity, patience_s=None)
    {wrong}
    emit("record", record=dict(identity, failed=dict(), absent=dict(), error=None))
emit("end", complete=True)
"""


def measure_with(monkeypatch, wrong: str) -> None:
    identity = gpu_measure.identity(Task(ROW, FORWARD))
    script = MEASURE.format(identity=identity, wrong=wrong)
    monkeypatch.setattr(
        gpu, "python", lambda *words: gpu_session.Command([sys.executable, "-c", script, *words])
    )


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("if index == 1: os.abort()", f"ended with status -{signal.SIGABRT:d}"),
        ("if index == 1: time.sleep(60)", "silent for 1 s"),
    ],
)
def test_a_lost_process_costs_one_row(tmp_path, monkeypatch, wrong, reason):
    measure_with(monkeypatch, wrong)
    monkeypatch.setattr(gpu, "STALL_S", 1.0)
    run = session(tmp_path)
    run.step("benchmark", 1.0, gpu.benchmark)
    errors = [record["error"] for record in run.results["records"]]
    assert errors == [None, f"its process {reason}, see benchmark.log", None, None]
    (step,) = run.results["steps"]
    assert (step["outcome"], run.failed()) == ("failed", True)
    assert step["detail"] == "4 of 4 measured, 1 failed, 1 lost with their process"
    assert json.loads((tmp_path / "gpu.json").read_text())["complete"]
    assert "its process" in (tmp_path / "gpu.md").read_text()
    assert "a library says hello" in (tmp_path / "benchmark.log").read_text()


def test_a_kernel_that_ends_two_processes_is_left_out(tmp_path, monkeypatch):
    dies = 'emit("at", contender="grid") or "grid" in without or os.abort()'
    measure_with(monkeypatch, dies)
    run = session(tmp_path)
    run.step("benchmark", 1.0, gpu.benchmark)
    errors = [record["error"] for record in run.results["records"]]
    said = f"its process ended with status -{signal.SIGABRT:d} at grid, see benchmark.log"
    assert errors == [said, said, None, None]
    assert run.results["steps"][0]["detail"].endswith(
        "2 lost with their process, then without grid"
    )


def test_a_row_can_ask_for_patience(tmp_path, monkeypatch):
    slow = 'emit("begin", index=index, record=identity, patience_s=20.0); time.sleep(1)'
    measure_with(monkeypatch, slow)
    monkeypatch.setattr(gpu, "STALL_S", 0.5)
    run = session(tmp_path)
    run.step("benchmark", 1.0, gpu.benchmark)
    assert [record["error"] for record in run.results["records"]] == [None] * 4


def test_a_measurement_that_cannot_begin_is_not_tried_for_ever(tmp_path, monkeypatch):
    measure_with(monkeypatch, "sys.exit(0)")
    monkeypatch.setattr(gpu, "MAX_RESTARTS", 1)
    run = session(tmp_path)
    run.step("benchmark", 1.0, gpu.benchmark)
    assert run.results["steps"][0]["outcome"] == "failed"
    assert len(run.results["records"]) == 2
    monkeypatch.setattr(
        gpu, "python", lambda *_: gpu_session.Command([sys.executable, "-c", "1 / 0"])
    )
    run = session(tmp_path)
    run.step("benchmark", 1.0, gpu.benchmark)
    (step,) = run.results["steps"]
    assert step["detail"] == "the process ended with status 1, see benchmark.log"
    assert "ZeroDivisionError" in (tmp_path / "benchmark.log").read_text()


def test_the_end_of_the_budget_is_no_failure(tmp_path, monkeypatch):
    measure_with(monkeypatch, "time.sleep(60 * (index == 2))")
    for module in (gpu, gpu_session):
        monkeypatch.setattr(module, "RESERVE_S", 1.0)
    run = session(tmp_path, budget=4)
    start = time.monotonic()
    run.step("benchmark", 1.0, gpu.benchmark)
    assert time.monotonic() - start < 8
    (step,) = run.results["steps"]
    assert (step["outcome"], run.failed()) == ("cut off", False)
    assert len(run.results["records"]) == 2


def test_a_step_that_breaks_is_recorded_and_the_next_goes_on(tmp_path, capsys):
    run = session(tmp_path, steps=["build", "probe"])

    def breaks(*_):
        raise OSError("disk full")

    run.step("build", 0.3, breaks)
    run.step("tests", 0.3, breaks)
    run.step("probe", 0.3, lambda *_: ("passed", "fine"))
    limits = [step["limit_s"] for step in run.results["steps"]]
    assert limits == [pytest.approx(30, abs=1)] * 3, "a share of what is left"
    run.deadline = time.monotonic() + 50
    run.step("sanitizer", 0.3, breaks)
    assert run.results["steps"].pop()["limit_s"] == pytest.approx(15, abs=1)
    run.deadline = time.monotonic()
    run.step("build", 0.3, breaks)
    found = [(s["outcome"], s["detail"]) for s in run.results["steps"]]
    assert found == [
        ("failed", "OSError: disk full"),
        ("skipped", "not asked for"),
        ("passed", "fine"),
        ("cut off", "no time left"),
    ]
    assert run.failed() and run.outcome("build") == "failed"
    assert "== build: failed, OSError: disk full" in capsys.readouterr().out


def test_a_program_that_takes_too_long_ends_with_its_children(tmp_path):
    run = session(tmp_path)
    script = "sleep 60 & echo $!; wait"
    assert run.call(gpu_session.Command(["bash", "-c", script]), tmp_path / "a.log", 0.5) is None
    child = int((tmp_path / "a.log").read_text().splitlines()[-1])
    end = time.monotonic() + 5
    while time.monotonic() < end and running(child):
        time.sleep(0.05)
    assert not running(child)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_gpu_is_said_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "card_facts", lambda: {"name": None})
    with pytest.raises(SystemExit) as exit:
        gpu.main(["--out", str(tmp_path)])
    assert exit.value.code == 2
    assert "torch sees no GPU; --dry-run runs without one" in capsys.readouterr().err


def test_nothing_older_is_measured_when_the_build_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "card_facts", lambda: {"name": "a card", "capability": "9.0"})
    called = []

    def step(name, outcome):
        return lambda *_: called.append(name) or (outcome, "")

    outcomes = {"build": "failed", "probe": "passed"}
    steps = {name: (step(name, outcomes.get(name)), 0.1) for name in gpu.STEPS}
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert called == ["build", "probe"]
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert [s["detail"] for s in found if s["outcome"] == "skipped"] == ["the build failed"] * 4


def test_the_last_step_asked_for_has_all_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "card_facts", lambda: {"name": "a card", "capability": "9.0"})
    limits = {}

    def step(session, limit_s):
        limits[len(limits)] = limit_s
        return "passed", ""

    monkeypatch.setattr(gpu, "STEPS", {name: (step, 0.1) for name in gpu.STEPS})
    gpu.main(["--out", str(tmp_path), "--steps", "build", "--budget", "100"])
    assert list(limits.values()) == [pytest.approx(100 - gpu_session.RESERVE_S, abs=1)]
    gpu.main(["--out", str(tmp_path), "--steps", "tests", "build", "--budget", "100"])
    assert limits[1] == pytest.approx(10, abs=1) and limits[2] > 90


def scripted(monkeypatch, run: gpu_session.Session, answers: list[tuple[int | None, str]]) -> list:
    """Programs that answer with a status and lines for the log; their commands."""
    commands = []

    def call(command, log, limit_s):
        status, text = answers[len(commands)]
        commands.append(str(command))
        with log.open("a") as file:
            file.write(text)
        return status

    monkeypatch.setattr(run, "call", call)
    return commands


PASSES = (
    "tests/cuda/test_cuda.py::test_a[lstm] PASSED\n===== 1 passed, 2 deselected in 3.10s =====\n"
)
FAILS = "[gw0] FAILED tests/cuda/test_cuda.py::test_a\n"


@pytest.mark.parametrize(
    ("answers", "outcome", "detail"),
    [
        ([(0, PASSES), (0, PASSES)], "passed", "1 passed, 2 deselected"),
        ([(0, PASSES), (1, FAILS)], "failed", "not lstm: 1 failed"),
        ([(0, PASSES), (None, "a PASSED\nb PASSED\n")], "cut off", "2 passed (cut off)"),
        ([(None, FAILS), (0, PASSES)], "failed", "lstm: 1 failed (cut off)"),
        ([(5, ""), (0, PASSES)], "passed", "lstm: none"),
        ([(4, ""), (4, "")], "failed", "none"),
    ],
)
def test_test_outcomes(tmp_path, monkeypatch, answers, outcome, detail):
    run = session(tmp_path)
    commands = scripted(monkeypatch, run, answers)
    found = gpu_steps.tests(run, 50)
    assert found[0] == outcome and detail in found[1]
    assert "-k lstm" in commands[0] and "-k 'not lstm'" in commands[1]
    assert all(command.startswith("OMP_NUM_THREADS=4 ") for command in commands)


CLEAN = "cluster rnn\n12 of 14 cases\n========= ERROR SUMMARY: 0 errors\n"
WRONG = "cluster rnn\n14 of 14 cases\n========= ERROR SUMMARY: 3 errors\n"
NO_RACES = (
    "14 of 14 cases\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
)
RACES = "14 of 14 cases\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
NOTHING = "0 of 14 cases\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("memcheck", "racecheck", "outcome"),
    [
        ((0, CLEAN), (0, NO_RACES), "passed"),
        ((0, CLEAN), (9, RACES), "hazards"),
        ((9, WRONG), (9, RACES), "failed"),
        ((9, WRONG), (0, NO_RACES), "failed"),
        ((0, CLEAN), (9, "its own error"), "failed"),
        ((0, CLEAN), (1, RACES), "failed"),
        ((0, CLEAN), (None, "cluster rnn\n"), "cut off"),
        ((0, NOTHING), (0, NO_RACES), "cut off"),
        ((0, "14 of 14 cases\n"), (0, NO_RACES), "cut off"),
    ],
)
def test_sanitizer_outcomes(tmp_path, monkeypatch, memcheck, racecheck, outcome):
    """What racecheck reports is for a reader; what it did not get to is no verdict."""
    run = session(tmp_path)
    monkeypatch.setattr(gpu_steps, "tool", lambda name: f"/bin/{name}")
    scripted(monkeypatch, run, [memcheck, racecheck])
    run.step("sanitizer", 0.5, gpu_steps.sanitizer)
    assert run.results["steps"][0]["outcome"] == outcome
    assert run.failed() == (outcome == "failed")


def test_sanitizer_says_when_its_cases_have_to_end(tmp_path, monkeypatch):
    run = session(tmp_path)
    monkeypatch.setattr(gpu_steps, "tool", lambda name: f"/bin/{name}")
    commands = scripted(monkeypatch, run, [(0, CLEAN), (9, RACES)])
    now = time.monotonic()
    assert gpu_steps.sanitizer(run, 80)[1] == (
        "memcheck: 0 errors, 12 of 14 cases; "
        "racecheck: 2 hazards displayed (2 errors, 0 warnings), 14 of 14 cases"
    )
    assert commands[0].startswith("PYTORCH_NO_CUDA_MEMORY_CACHING=1 /bin/compute-sanitizer")
    ends = [float(command.rpartition(" --deadline ")[2]) - now for command in commands]
    spare = gpu_steps.CASES_END_S
    assert ends == [pytest.approx(40 - spare, abs=1), pytest.approx(80 - spare, abs=1)]
    monkeypatch.setattr(gpu_steps, "tool", lambda name: None)
    assert gpu_steps.sanitizer(run, 80) == ("skipped", "no compute-sanitizer")


def test_scaling_keeps_the_sweeps_before_its_end(tmp_path, monkeypatch):
    run = session(tmp_path)

    def call(command, log, limit_s, needs_gpu):
        folder = Path(command.words[command.words.index("--out") + 1])
        point = {"H": 64, "ms": {"1": {"q1": 1.0, "median": 2.0, "q3": 3.0}}}
        records = [{"cell": "lstm", "at": "T=32, B=1", "points": [point]}]
        (folder / "scaling.json").write_text(json.dumps({"records": records}))
        assert not needs_gpu
        return next(answers)

    answers = iter((None, 0, 1))
    monkeypatch.setattr(run, "call", call)
    for outcome in ("cut off", "passed", "failed"):
        run.step("scaling", 0.5, gpu_steps.scaling)
        assert run.results["steps"][-1]["outcome"] == outcome
        kept = json.loads((tmp_path / "cpu_scaling.json").read_text())
        assert kept["records"][0]["points"]
    assert run.results["cpu_threads"] == [
        {"cell": "lstm", "size": "T=32, B=1, H=64", "ms": {"1": 2.0}}
    ]


READINGS = """{
"clusters_at_once_with_100_kb_16": 7.000,
"cluster_push_512_bytes_ns_16": null,
"block_exchange_ns_128": 40.5,
"""


def test_probe_keeps_what_it_read_before_it_failed(tmp_path, monkeypatch):
    run = session(tmp_path)
    monkeypatch.setattr(gpu_steps, "tool", lambda name: f"/bin/{name}")
    commands = scripted(monkeypatch, run, [(0, ""), (1, READINGS)])
    assert gpu_steps.probe(run, 30) == ("failed", "status 1, see probe.log")
    found = {"clusters_at_once_with_100_kb_16": 7, "block_exchange_ns_128": 40.5}
    assert run.results["probe"] == found
    assert "arch=compute_90,code=sm_90 " in commands[0]
    run.results["card"]["capability"] = "8.0"
    (tmp_path / "probe.log").unlink()
    scripted(monkeypatch, run, [(0, ""), (None, READINGS)])
    assert gpu_steps.probe(run, 30) == ("cut off", "2 readings")
    assert run.results["probe"] == found
    commands = scripted(monkeypatch, run, [(1, "no such header")])
    assert gpu_steps.probe(run, 30)[0] == "failed"
    assert "arch=compute_80,code=sm_80" in commands[0]


def test_the_probe_compiles_without_warnings(tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("needs nvcc")
    words = [compiler, "-std=c++17", "--threads=2", "-I", str(ROOT / "csrc")]
    words += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ("80", "90")]
    words += ["-Xcompiler", "-Wall,-Wextra,-Werror", "-Werror", "all-warnings"]
    words += ["-o", str(tmp_path / "probe"), str(ROOT / "benchmarks" / "gpu" / "probe.cu")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr, done.stderr


def record(row: GpuRow = ROW, mode: str = FORWARD, **speedups: float) -> dict:
    found = gpu_measure.identity(Task(row, mode))
    ratios = {n: {"q1": r, "median": r, "q3": r} for n, r in speedups.items()}
    times = dict.fromkeys([*speedups, found["peer"]], {"q1": 1.0, "median": 1.0, "q3": 1.0})
    rest = {"failed": {}, "absent": {}, "accuracy": {}, "error": None, "rounds": 5}
    return found | rest | {"ms": times, "speedup": ratios}


PROBE = {
    "block_exchange_ns_128": 40.0,
    "block_exchange_ns_1024": 90.0,
    "cluster_exchange_ns_8": 700.0,
    "cluster_push_512_bytes_ns_8": 500.0,
    "cluster_push_32768_bytes_ns_8": 300.0,
    "grid_counter_ns_132": 1200.0,
}


def test_a_step_is_bound_by_the_exchange_its_weights_need():
    assert gpu_report.step_ns(PROBE, 128 * 1024) == 40
    assert gpu_report.step_ns(PROBE, 8 * 448 * 1024) == 500
    assert gpu_report.step_ns(PROBE, 5 * 448 * 1024) == 500
    assert gpu_report.step_ns(PROBE, 17 * 448 * 1024) == 1200
    assert gpu_report.step_ns({}, 128) is None


def test_the_bound_is_the_largest_of_its_terms():
    row = GpuRow("rnn", 1024, 16, 128, precision="fp16")
    entry = record(row)
    results = {"ceilings": {"bytes": 2e12, "fp16": 5e14}, "probe": PROBE}
    assert gpu_report.bound(entry, results) == (pytest.approx(0.04096), "steps")
    results["probe"] = None
    assert gpu_report.bound(entry, results)[1] == "memory"
    results["ceilings"]["fp16"] = 1e10
    assert gpu_report.bound(entry, results)[1] == "arithmetic"
    assert gpu_report.bound(entry, {"ceilings": None, "probe": None}) is None


def test_goals_judge_the_fastest_kernel():
    at = {"T": 1024, "B": 16, "H": 256}
    records = [
        record(GpuRow("lstm", **at, precision="fp16"), fastbptt=1.1, cluster=1.4, stepwise=0.2),
        record(GpuRow("lstm", **at, precision="fp16"), BACKWARD, fastbptt=1.2),
        record(GpuRow("gru", 1024, 1, 512, precision="tf32"), fastbptt=2.9),
        record(GpuRow("rnn", 1024, 1, 128, Chunked(64)), BACKWARD_ALONE, fastbptt=6.0),
        record(GpuRow("rnn", 1024, 1, 128, Chunked(64)), BACKWARD, fastbptt=2.0),
    ]
    found = [(g["rows"], g["reached"], g["least"]) for g in gpu_report.judge(records)]
    assert found == [(3, 3, 1.2), (2, 1, 1.2), (1, 0, 2.9), (1, 1, 6.0)]
    summary = gpu_report.summarise(records)
    assert {"launcher": 1.1, "best": 1.4, "least_row": "1024,16,256"}.items() <= summary[0].items()


def test_plans_stand_beside_what_was_measured(tmp_path):
    run = session(tmp_path)
    timed = record(GpuRow("rnn", 1000, 2, 64), BACKWARD, fastbptt=2.0, stepwise=1.0)
    sizes = {"blocks": 16, "lanes": 4, "groups": 1, "waves": 1, "warps": 16, "shared_bytes": 2048}
    cluster = {"kernel": "cluster", "cycles": 1650, **sizes}
    stepwise = {"kernel": "stepwise", "cycles": 16500}
    timed["plan"] = {
        "fastbptt": {"forward": cluster, "backward": stepwise},
        "resident": {"forward": cluster},
    }
    run.results["records"] = [timed]
    run.results["probe"] = {"clock_mhz": 1650.0}
    run.write()
    words = "cluster: 16 blocks x 4 lanes, 1 groups, 1 waves, 16 warps, 2 KB"
    line = f"| rnn fp32 1000,2,64 | {BACKWARD} | fastbptt | forward {words}; backward stepwise | "
    report = (tmp_path / "gpu.md").read_text()
    assert line + "1, 10 | 0.5 |" in report and "| resident |" not in report


def test_the_report_shows_failures_and_what_was_left_out(tmp_path):
    run = session(tmp_path)
    wrong = record(fastbptt=1.0) | {"error": "resident: output is off", "failed": {"resident": ""}}
    lost = gpu_measure.identity(Task(ROW, BACKWARD)) | {"error": "its process ended"}
    full = gpu_measure.identity(Task(GpuRow("gru", 6, 2, 64), FORWARD))
    timed = record(GpuRow("rnn", 6, 2, 64), fastbptt=2.0, stepwise=3.0)
    timed["absent"], timed["failed"] = {"cluster": "none"}, {"resident": "off"}
    run.results["records"] = [wrong, lost, full | {"error": None, "skipped": "no memory"}, timed]
    run.results["kernels"] = list(KERNELS)
    run.write()
    report = (tmp_path / "gpu.md").read_text()
    assert "- lstm fp16 6,2,64 forward: resident: output is off" in report
    assert "- lstm fp16 6,2,64 forward+backward: its process ended" in report
    assert "| 2,64 | no memory |" in report and "| FAILED |" in report
    line = "| rnn fp32 6,2,64 | forward | 1 | 1 | FAILED | none | not timed | 1 | stepwise |"
    assert line in report
    for table in report.split("\n\n"):
        if table.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_the_report_names_things_as_the_rest_does():
    assert gpu_report.OURS == workload.OURS
    modes = gpu_report.FORWARD, gpu_report.BACKWARD, gpu_report.BACKWARD_ALONE
    assert modes == (FORWARD, BACKWARD, BACKWARD_ALONE)
    assert gpu.MARK == gpu_measure.MARK
