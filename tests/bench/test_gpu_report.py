"""The GPU benchmark's report: bounds, goals, and what it says of what went wrong."""

from __future__ import annotations

import pytest

from bench.gpu_runs import ROW, record, session
from benchmarks.common import workload
from benchmarks.common.rows import BACKWARD, FORWARD
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu.rows import BACKWARD_ALONE, KERNELS, GpuRow, Task
from fastbptt.truncation import Chunked


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
    sizes = {"blocks": 16, "lanes": 4, "waves": 1, "warps": 16, "shared_bytes": 2048}
    cluster = {"kernel": "cluster", "cycles": 1650, **sizes}
    grid = {**cluster, "kernel": "grid", "blocks": 128, "cluster": 2, "cycles": 3300}
    stepwise = {"kernel": "stepwise", "cycles": 0}
    timed["plan"] = {
        "fastbptt": {"forward": cluster, "backward": stepwise},
        "resident": {"forward": cluster},
        "stepwise": {"forward": grid},
    }
    run.results["records"] = [timed]
    run.results["probe"] = {"clock_mhz": 1650.0}
    run.write()
    words = "cluster: 16 blocks x 4 lanes, 1 waves, 16 warps, 2 KB"
    line = f"| rnn fp32 1000,2,64 | {BACKWARD} | fastbptt | forward {words}; backward stepwise | "
    report = (tmp_path / "gpu.md").read_text()
    assert line + "1, - | 0.5 |" in report and "| resident |" not in report
    words = "grid of clusters of 2: 128 blocks x 4 lanes, 1 waves, 16 warps, 2 KB"
    assert f"| stepwise | forward {words} | 2 | 0.5 |" in report


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
    kernels = "1 | not timed | FAILED | none | not timed"
    assert f"| rnn fp32 6,2,64 | forward | 1 | {kernels} | 1 | stepwise |" in report
    for table in report.split("\n\n"):
        if table.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_the_report_names_things_as_the_rest_does():
    assert gpu_report.OURS == workload.OURS
    modes = gpu_report.FORWARD, gpu_report.BACKWARD, gpu_report.BACKWARD_ALONE
    assert modes == (FORWARD, BACKWARD, BACKWARD_ALONE)
    assert gpu.MARK == gpu_measure.MARK
