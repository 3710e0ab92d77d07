"""What the GPU is, what torch knows of it, and its clocks; JSON on the terminal.

python -m benchmarks.gpu.card
"""

from __future__ import annotations

import json
import subprocess

import torch

from ..common.files import Record

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


def facts() -> Record:
    """The card, its driver, and the versions of what computes on it."""
    found: Record = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
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
