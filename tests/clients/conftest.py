"""Every test of this folder starts from one seed."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
