"""CUDA graphs and the streams that they are captured on, over a made-up CUDA runtime."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_graphs(tmp_path):
    """The cases, and what each wants, are in emulation/test_graph.cpp."""
    program = tmp_path / "graph"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT}/csrc", f"-I{ROOT}/tests/emulation/fake_graphs"]
    command += [f"{ROOT}/tests/emulation/test_graph.cpp", "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
