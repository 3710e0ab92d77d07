"""Errors in the midst of a team, whose threads wait for each other."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CPU = HERE.parents[1] / "csrc" / "cpu"


def test_they_come_out_and_nobody_waits(tmp_path):
    program = tmp_path / "errors"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-fopenmp", "-Wall", "-Werror"]
    command += [f"-I{CPU.parent}", str(HERE / "test_team_errors.cpp")]
    command += [str(CPU / "team.cpp"), str(CPU / "waves.cpp"), "-o", str(program), "-pthread"]
    subprocess.run(command, check=True, timeout=200)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
