"""One instruction set for everything that is measured: ours and its peers held to the same.

A library chooses its instructions when it is loaded, so a program that is to be held starts anew,
with what tells each library in its environment.
"""

from __future__ import annotations

import os
import sys

OURS = "FASTBPTT_CPU_ISA"
# Per set: torch's own loops, oneDNN, MKL and XLA. ONNX Runtime has no such variable.
HELD = {
    "avx2": {
        OURS: "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    }
}


def held() -> str | None:
    """The set that this process's environment holds every library to, or None."""
    for isa, variables in HELD.items():
        if all(value in os.environ.get(name, "").split() for name, value in variables.items()):
            return isa
    return None


def hold(isa: str | None) -> None:
    """Starts this program anew, held to the set, unless it is already.

    Without a set it warns where FASTBPTT_CPU_ISA holds ours: the peers are free.
    """
    if isa is None:
        if OURS in os.environ and held() is None:
            print(f"warning: {OURS} holds our kernels alone, not the peers'", file=sys.stderr)
        return
    if held() == isa:
        return
    environment = dict(os.environ)
    for name, value in HELD[isa].items():
        if name == "XLA_FLAGS":  # the one that has room for others
            value = f"{environment.get(name, '')} {value}".strip()
        environment[name] = value
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def family(isa: str) -> str:
    """``avx512``, ``avx2`` or ``baseline``, for a name of ``fastbptt._C.cpu_isa``."""
    return isa.partition("_")[0]
