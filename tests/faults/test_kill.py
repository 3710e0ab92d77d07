"""A training run that is killed at any moment goes on from its last checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
TOOL = Path(__file__).parents[2] / "tools" / "kill_training.py"


@pytest.mark.slow
def test_a_few_kills():
    """`make kills` does a hundred."""
    done = subprocess.run(
        [sys.executable, TOOL, "--kills=2"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "to the bit" in done.stdout
