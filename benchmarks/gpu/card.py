"""What the GPU is, what torch knows of it, and its clocks; JSON on the terminal.

python -m benchmarks.gpu.card
"""

from __future__ import annotations

import json
import re
import subprocess

import torch

from ..common.files import Record
from .session import tool

_CLOCKS = {
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
}


def _nvidia_smi(fields: list[str]) -> list[str]:
    """Values of the first card that torch sees, or none where they cannot be read."""
    which = "0"
    if torch.cuda.is_available():
        which = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, f"--id={which}"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in done.stdout.splitlines()[0].split(",")]


def clocks() -> Record:
    """Megahertz, temperature and power at this moment; nothing where they cannot be read."""
    values = _nvidia_smi(list(_CLOCKS.values()))
    return dict(zip(_CLOCKS, values, strict=True)) if len(values) == len(_CLOCKS) else {}


def toolkit() -> str | None:
    """The version of the compiler that builds for the card."""
    if (nvcc := tool("nvcc")) is None:
        return None
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r"release .*V([0-9.]+)", done.stdout)
    return version and version[1]


def facts() -> Record:
    """The card, its driver, and the versions of what computes on it."""
    found: Record = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "toolkit": toolkit(),
        "cudnn": torch.backends.cudnn.version(),
        "name": None,
    }
    if not torch.cuda.is_available():
        return found
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": ", ".join(_nvidia_smi(["driver_version"])) or None,
        "clocks": clocks(),
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
