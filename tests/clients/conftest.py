"""Every test of this folder starts from one seed, in float32 and with nothing to download."""

from __future__ import annotations

import os

# Read when the packages are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
