"""Every peer on the CPU: torch's own ways and other libraries'."""

from __future__ import annotations

from collections.abc import Container

from fastbptt.truncation import Chunked

from ..common.contenders import TORCH, TORCH_PEERS, Peer
from ..common.rows import FORWARD
from ..common.workload import ModuleStep, Workload
from . import compiled_loop, jax_scan, onnx_runtime, torchrl_module

_, JAX, COMPILE, ONNX, TORCHRL = PEER_KINDS = (TORCH, "jax", "compile", "onnx", "torchrl")
# Those that may be missing, and who knows why.
OPTIONAL = {
    JAX: jax_scan,
    COMPILE: compiled_loop,
    ONNX: onnx_runtime,
    TORCHRL: torchrl_module,
}


def _compiled_loop(work: Workload) -> ModuleStep:
    module = work.load(work.cell.torch)
    return ModuleStep(work, module, compiled_loop.forward(work.row.cell, module))


PEERS = (
    *TORCH_PEERS,
    Peer(
        kind=JAX,
        applies=lambda row: (
            not row.resets and (row.truncation is None or isinstance(row.truncation, Chunked))
        ),
        label=lambda row: jax_scan.LABEL,
        build=jax_scan.ScanStep,
    ),
    Peer(
        kind=COMPILE,
        applies=lambda row: (
            row.truncation is None and not row.resets and row.T <= compiled_loop.MAX_STEPS
        ),
        label=lambda row: compiled_loop.LABEL,
        build=_compiled_loop,
    ),
    Peer(
        kind=ONNX,
        applies=lambda row: row.truncation is None and not row.resets,
        label=lambda row: onnx_runtime.LABEL,
        build=onnx_runtime.SessionStep,
        modes=(FORWARD,),
    ),
    Peer(
        kind=TORCHRL,
        applies=lambda row: row.resets and row.cell in torchrl_module.CELLS,
        label=lambda row: torchrl_module.LABEL,
        build=torchrl_module.RolloutStep,
    ),
)


def of_kinds(kinds: Container[str]) -> list[Peer]:
    """The peers of these kinds."""
    return [peer for peer in PEERS if peer.kind in kinds]
