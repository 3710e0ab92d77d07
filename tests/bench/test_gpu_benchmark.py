"""The GPU benchmark as a whole, on the CPU: what it runs, keeps and goes on after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from bench.gpu_runs import ROOT, ROW, session
from benchmarks.common import machine
from benchmarks.common.rows import BACKWARD, FORWARD
from benchmarks.common.workload import CELLS
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu import session as gpu_session
from benchmarks.gpu import user_cells
from benchmarks.gpu.cell_table import cell_table
from benchmarks.gpu.rows import BACKWARD_ALONE, KERNELS, PRECISIONS, TWICE, Task


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_dry_run_prints_what_it_does_not_run(dry):
    folder, said = dry
    found = json.loads((folder / "gpu.json").read_text())
    steps = {step["name"]: step["outcome"] for step in found["steps"]}
    assert steps == dict.fromkeys(["build", "probe", "tests", "sanitizer"], "printed") | {
        "cells": "passed",
        "scaling": "passed",
        "benchmark": "passed",
    }
    for part in (
        "FASTBPTT_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=",
        "setup.py build_ext --inplace",
        "OMP_NUM_THREADS=2",
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
    logs = {f"{step}.log" for step in gpu.STEPS if step not in ("cells", "scaling")}
    results = {"gpu.json", "gpu.md", "cpu_scaling.json"}
    assert written == results | logs, "nothing partial is left behind"
    assert len(written) <= 8, "no more than a machine that is lent gives back"


@pytest.mark.slow
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


@pytest.mark.slow
def test_dry_run_times_cells_from_functions(dry):
    cells = json.loads((dry[0] / "gpu.json").read_text())["cells"]
    assert [cell["row"].split()[0] for cell in cells] == [row.name for row in user_cells.ROWS]
    for cell in cells:
        assert cell["error"] is None and 0 <= cell["accuracy"] <= 1
        assert {"fastbptt", "plain loop"} <= set(cell["ms"])
    report = (dry[0] / "gpu.md").read_text()
    assert "| cell, T,B,H | fastbptt | graph | built in | plain loop |" in report
    assert all(f"| {cell['row']} | " in report for cell in cells)


def test_a_cell_that_computes_the_wrong_thing_is_not_timed(monkeypatch):
    row, device = user_cells.ROWS[0]._replace(T=3, B=2, H=4), torch.device("cpu")
    steps_of = user_cells.steps_of

    def wrong(row, dtype, device):
        steps = steps_of(row, dtype, device)
        if dtype == torch.float32:
            with torch.no_grad():
                steps["fastbptt"].input += 1e-3
        return steps

    assert user_cells.measure(row, device, dry_run=True)["error"] is None
    monkeypatch.setattr(user_cells, "steps_of", wrong)
    record = user_cells.measure(row, device, dry_run=True)
    assert "is off by" in record["error"] and not record["ms"]
    assert f"| {row.label} | {record['error']} |  |" in cell_table([record])
    assert cell_table([]) == ""


@pytest.mark.slow
def test_dry_run_ends_with_what_is_most_worth_reading(dry):
    *_, goal, build, probe, tests, sanitizer, cells, scaling, benchmark, last = dry[1].splitlines()
    assert goal.startswith("at least 5.0x the backward pass of Chunked at B = 1")
    assert [build, probe, tests, sanitizer] == [f"{name}: printed" for name in list(gpu.STEPS)[:4]]
    assert cells.startswith("cells: passed leaky 4,2,8: ")
    assert scaling == "scaling: passed 4 sizes"
    assert benchmark.startswith("benchmark: passed ") and last == f"written to {dry[0]}"


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_kernels_are_those_that_were_asked_for(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(gpu_measure, "emit", lambda kind, **content: lines.append((kind, content)))
    asked = ["cluster", "grid:cluster=2,lanes=4"]

    def measured(session, command, skip, lost):
        _, _, *words = command.words[1:]
        gpu_measure.main([*words, "--dry-run"])
        return "", skip

    monkeypatch.setattr(gpu, "measured", measured)
    run = session(tmp_path, kernels=asked, filter=["lstm fp16 6,2,64 forward"])
    gpu.benchmark(run, 10)
    records = [content["record"] for kind, content in lines if kind == "record"]
    assert records and all(set(asked) < set(record["ms"]) for record in records)
    assert "--kernels cluster grid:cluster=2,lanes=4" in run.results["settings"]["command"]


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
    assert [s["detail"] for s in found if s["outcome"] == "skipped"] == ["the build failed"] * 5


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
