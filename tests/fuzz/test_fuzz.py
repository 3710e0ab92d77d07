"""A short run of the fuzzer, as a user starts it; `make fuzz` does longer ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages")
TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"


def test_some_rounds():
    command = [sys.executable, TOOL, "--calls=300", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout
