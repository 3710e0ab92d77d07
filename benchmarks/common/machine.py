"""What a measurement was taken on, without which its numbers say nothing."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import fastbptt

from .files import ROOT
from .isa import family, held


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def cpu_model() -> str:
    """The processor's name; with family and model where the kernel tells, as names are vague."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (ln.partition(":") for ln in lines)}
    if name := fields.get("model name"):
        known = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
        return f"{name} ({', '.join(known)})" if known else name
    apple = _output("sysctl", "-n", "machdep.cpu.brand_string")
    return apple or platform.processor() or platform.machine()


def cores() -> int:
    """Processor cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def results_folder() -> Path:
    """Where results belong that were taken with the instruction set in use."""
    return ROOT / "benchmarks" / "results" / family(fastbptt._C.cpu_isa())


def facts() -> dict[str, str | int | float | None]:
    """The machine, the instruction sets in use, the threads, the versions and the date."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": fastbptt._C.cpu_isa(),
        "held_to": held(),  # the instruction set that our and the peers' environment names
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastbptt": fastbptt.__version__,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
