"""What is measured on a GPU, the most telling rows first, and how a kernel is asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from fastbptt.truncation import Chunked

from ..common.rows import BACKWARD, FORWARD, MODES, Row
from ..common.workload import CELLS

BACKWARD_ALONE = "backward"  # the gradients, after a forward pass that is off the clock
TWICE = "double backward"  # forward, backward, and the gradients of the gradients
T, CHUNK = 1024, 64
TWICE_T = 128  # torch differentiates its loop over steps
BATCHES, HIDDEN = (16, 1, 64), (64, 128, 256, 512, 768, 1024, 2048)
PRECISIONS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "tf32": torch.float32,  # with the tensor cores' rounding of what is multiplied
}
KERNELS = ("stepwise", "lane", "resident", "cluster", "grid")
AUTO = "auto"  # the launcher's own choice
KERNEL_VARIABLE = "FASTBPTT_CUDA_KERNEL"  # read at every call: AUTO or one of KERNELS


@dataclass(frozen=True)
class GpuRow(Row):
    """A row of the benchmark in one precision."""

    precision: str = field(default="fp32", kw_only=True)
    twice: bool = field(default=False, kw_only=True)  # differentiated twice, and nothing else

    def modes(self, asked: Sequence[str] = MODES) -> list[str]:
        """Truncated rows have the backward pass alone too: it is what truncation changes."""
        if self.twice:
            return [TWICE]
        modes = super().modes(asked)
        return [*modes, BACKWARD_ALONE] if self.truncation is not None else modes

    def lanes(self, backward: bool) -> int:
        """Sequences that the recurrence takes side by side: backward, all windows of each."""
        if not backward or self.truncation is None:
            return self.B
        k = self.truncation.k if isinstance(self.truncation, Chunked) else self.truncation.k1
        return self.B * -(-self.T // k)


@dataclass(frozen=True)
class Task:
    """One thing to measure: a row in a mode, against torch's own or another package."""

    row: GpuRow
    mode: str
    peer: str | None = None  # the package

    @property
    def name(self) -> str:
        """What ``--filter`` looks into, such as ``lstm fp16 1024,16,256 forward``."""
        name = f"{self.row.cell} {self.row.precision} {self.row.label} {self.mode}"
        return name if self.peer is None else f"{name} {self.peer}"


def _urgency(row: GpuRow) -> int:
    """The group a row is measured in: a run that is cut off keeps the first ones."""
    if row.truncation is not None or row.resets or row.twice:
        return 3
    is_16_bit, is_gated = row.precision in ("fp16", "bf16"), row.cell != "rnn"
    if row.B == 16 and row.precision == "fp16" and row.cell != "gru" and row.H in (128, 256, 512):
        return 0  # where cuDNN is fastest
    if row.B == 16 and is_16_bit and is_gated and row.H >= 768:
        return 1  # where W_hh takes more than a cluster
    if row.B == 16 and row.precision != "tf32" and is_gated and row.H <= 512:
        return 2
    return 4 if row.B == 16 else 5


def grid() -> list[GpuRow]:
    """All rows: cells, precisions and sizes; truncation, resets and more at some of them."""
    rows = [
        GpuRow(cell, T, B, H, precision=precision)
        for B in BATCHES
        for H in HIDDEN
        for precision in PRECISIONS
        for cell in ("lstm", "rnn", "gru")
    ]
    for precision in ("fp16", "fp32"):
        for cell in ("lstm", "gru", "rnn"):
            for B, H in ((1, 512), (16, 256), (1, 128)):
                rows.append(GpuRow(cell, T, B, H, Chunked(CHUNK), precision=precision))
            rows.append(GpuRow(cell, T, 16, 256, resets=True, precision=precision))
            if precision == "fp32":  # 16 bits are differentiated twice in float32
                rows.append(GpuRow(cell, TWICE_T, 16, 256, precision=precision, twice=True))
    return sorted(rows, key=_urgency)


def tiny_grid() -> list[GpuRow]:
    """Every kind of row, at sizes that take no time."""
    rows = [GpuRow(cell, 6, 2, 64, precision=name) for cell in CELLS for name in PRECISIONS]
    rows.append(GpuRow("lstm", 6, 1, 64, Chunked(2), precision="fp16"))
    rows += [GpuRow(cell, 6, 2, 64, twice=True) for cell in CELLS]
    return [*rows, GpuRow("gru", 6, 2, 64, resets=True, precision="fp16")]


def tasks(
    rows: Sequence[GpuRow],
    filters: Sequence[str] = (),
    others: Mapping[str, Sequence[GpuRow]] = MappingProxyType({}),
) -> list[Task]:
    """The rows in all their modes, and then those of other packages, by their names.

    With filters, those whose name contains one of them.
    """
    found = [Task(row, mode) for row in rows for mode in row.modes()]
    found += [
        Task(row, mode, peer) for peer, own in others.items() for row in own for mode in row.modes()
    ]
    wanted = [text.lower() for text in filters]
    return [t for t in found if not wanted or any(text in t.name.lower() for text in wanted)]


def counts(row: GpuRow, mode: str) -> dict[str, int]:
    """What any program must do at least: operations, bytes to and from memory, dependent steps.

    Bytes: inputs and weights are read once, results written once, a pass. What a program keeps for
    its backward pass is its own choice, and not counted.
    """
    gates, size = CELLS[row.cell].gates, PRECISIONS[row.precision].itemsize
    sequence, weights = row.T * row.B * row.H, 2 * gates * row.H * row.H
    forward = {"flops": 2 * row.T * row.B * weights, "bytes": (2 * sequence + weights) * size}
    # reads x, output, grad_output and the weights; writes dx and the weights' gradients
    backward = {"flops": 2 * forward["flops"], "bytes": (4 * sequence + 2 * weights) * size}
    forward["steps"] = row.T
    backward["steps"] = row.T if row.truncation is None else row.truncation.k
    # The tangents of both passes: each product has one with a tangent of either factor.
    second = {name: forward[name] + backward[name] for name in forward}
    second["flops"] *= 2
    passes = {
        FORWARD: [forward],
        BACKWARD: [forward, backward],
        BACKWARD_ALONE: [backward],
        TWICE: [forward, backward, second],
    }[mode]
    return {name: sum(p[name] for p in passes) for name in forward}


def recurrent_bytes(row: GpuRow) -> int:
    """The size of W_hh: what has to stay on the chip for a step to be short."""
    return CELLS[row.cell].gates * row.H * row.H * PRECISIONS[row.precision].itemsize


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Calls within run this kernel, or fail where there is none."""
    before = os.environ.get(KERNEL_VARIABLE)
    os.environ[KERNEL_VARIABLE] = kernel
    try:
        yield
    finally:
        if before is None:
            del os.environ[KERNEL_VARIABLE]
        else:
            os.environ[KERNEL_VARIABLE] = before


@contextlib.contextmanager
def precision(name: str, cudnn: bool = True) -> Iterator[None]:
    """Lets torch round what it multiplies to tf32 within, or not; and have cuDNN, or not."""
    is_tf32, before = name == "tf32", torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=is_tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def no_such_kernel(error: Exception) -> bool:
    """Whether this is how a call says that it has not got the kernel that was asked for."""
    return KERNEL_VARIABLE in str(error)


def kernels(device: torch.device) -> tuple[str, ...]:
    """What can be asked for: nothing, in a build that does not listen to the variable.

    One that does refuses a kernel that nobody has.
    """
    module = CELLS["rnn"].ours(4, 4, device=device)
    with forced("no-such-kernel"):
        try:
            module(torch.zeros(1, 1, 4, device=device))
        except (RuntimeError, ValueError) as error:
            if not no_such_kernel(error):
                raise
            return KERNELS
    return ()
