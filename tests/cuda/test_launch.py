"""Launches and what is asked before them, over a made-up CUDA runtime."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_launches(tmp_path):
    """The cases, and what each wants, are in emulation/test_launch.cpp."""
    program = tmp_path / "launch"
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
    ]
    command += [f"-I{ROOT}/csrc", f"-I{ROOT}/tests/emulation/fake_runtime"]
    command += [f"{ROOT}/tests/emulation/test_launch.cpp", "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
