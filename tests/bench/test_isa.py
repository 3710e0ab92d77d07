"""A program that is held to an instruction set: all libraries are, from before they are loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import fastbptt
from benchmarks import memory, overhead
from benchmarks.common import arguments, isa, machine
from benchmarks.common.files import ROOT

NAMES = {name for variables in isa.HELD.values() for name in variables}


@pytest.fixture
def free(monkeypatch):
    """No variable names a set; what would start a program anew says with what it would."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    started = []
    monkeypatch.setattr(isa.os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "some.program", "--isa", "avx2"])
    return started


def test_a_program_starts_anew_once_with_what_every_library_reads(free, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_other")
    assert isa.held() is None
    isa.hold("avx2")
    ((program, words, environment),) = free
    assert (program, words[1:]) == (sys.executable, sys.orig_argv[1:])
    assert environment["XLA_FLAGS"] == "--xla_other --xla_cpu_max_isa=AVX2"
    assert NAMES <= environment.keys()
    for name in NAMES:
        monkeypatch.setenv(name, environment[name])
    assert isa.held() == "avx2"
    isa.hold("avx2")
    assert len(free) == 1


def test_ours_held_alone_is_said(free, monkeypatch, capsys):
    isa.hold(None)
    assert not capsys.readouterr().err
    monkeypatch.setenv(isa.OURS, "avx2")
    isa.hold(None)
    assert "warning: FASTBPTT_CPU_ISA holds our kernels alone" in capsys.readouterr().err
    assert not free


@pytest.mark.usefixtures("isa")
def test_results_of_two_sets_lie_side_by_side():
    name = fastbptt._C.cpu_isa()
    folder = machine.results_folder()
    assert folder == ROOT / "benchmarks" / "results" / name.partition("_")[0]
    assert overhead._parser().get_default("out") == memory._parser().get_default("out") == folder


def test_results_with_a_number_of_threads_lie_in_a_folder_below(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "results_folder", lambda: tmp_path / "set")
    for words, expected in (
        ([], tmp_path / "set"),
        (["--threads", "1"], tmp_path / "set" / "threads_1"),
        (["--threads", "1", "--out", str(tmp_path)], tmp_path),
    ):
        parser = overhead._parser()
        args = parser.parse_args(words)
        arguments.begin(parser, args)
        assert args.out == expected and expected.is_dir()


@pytest.mark.slow
def test_a_held_program_says_so(tmp_path):
    if "avx2" not in fastbptt._C.cpu_isas():
        pytest.skip("needs AVX2")
    words = [*"-m benchmarks.overhead --isa avx2 --cells rnn --rounds 1 --modes".split()]
    words += ["forward, no_grad", "--size", "2,5", "--out", str(tmp_path)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, timeout=120)
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert found["settings"]["command"].endswith(" --isa avx2")
    facts = {"isa": "avx2", "held_to": "avx2", "torch_isa": "AVX2"}
    assert facts.items() <= found["machine"].items()
