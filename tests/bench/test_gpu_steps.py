"""The GPU benchmark's steps before its measurements: what they run, and what they make of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import time
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from bench.gpu_runs import ROOT, scripted, session
from benchmarks.common.workload import CELLS
from benchmarks.gpu import card as gpu_card
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu.rows import KERNELS


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
    assert all(command.startswith("OMP_NUM_THREADS=2 ") for command in commands)


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


@pytest.mark.slow
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
