"""``python -m fastbptt`` says what a bug report needs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastbptt
from common import python
from fastbptt import __main__ as program


def test_it_says_what_runs_and_how_fast():
    command = [sys.executable, "-m", "fastbptt"]
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # as other tests run beside it
    done = subprocess.run(command, env=one, capture_output=True, text=True, timeout=120, check=True)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["fastbptt"].startswith(fastbptt.__version__)
    assert lines["torch"].startswith(torch.__version__)
    assert lines["kernels"].startswith(fastbptt._C.cpu_isa())
    assert "kernels" in lines["CUDA"] and lines["threads"] == "1"
    assert "OMP_NUM_THREADS=1" in lines["settings"]
    assert "ms, torch.nn" in lines["timing"] and "times as fast" in lines["timing"]


def test_one_openmp():
    """A process has torch's library alone, unless another package brings its own."""
    if sys.platform != "linux":
        pytest.skip("the system does not tell")
    done = python("from fastbptt.__main__ import openmp_runtimes; print(*openmp_runtimes())")
    assert len(done.stdout.split()) == 1


def test_without_timing(capsys, monkeypatch):
    monkeypatch.setattr(program, "timing", lambda: pytest.fail("timed"))
    monkeypatch.setenv("FASTBPTT_VERBOSE", "0")
    assert program.main(["--no-timing"]) == 0
    text = capsys.readouterr().out
    assert "FASTBPTT_VERBOSE=0" in text and f"threads    {torch.get_num_threads()}" in text


def test_a_second_openmp_is_told(capsys, monkeypatch):
    monkeypatch.setattr(program, "openmp_runtimes", lambda: ["libgomp.so.1", "libomp.so"])
    assert program.main(["--no-timing"]) == 0
    assert "more than one OpenMP" in capsys.readouterr().out
