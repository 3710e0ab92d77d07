"""The operators and the module alone, for pytest-benchmark: to watch one change against another.

    pytest benchmarks --benchmark-only

Comparisons with peers are benchmarks.compare's; here too nothing is timed that is wrong.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.contenders import contenders
from benchmarks.common.rows import BACKWARD, FORWARD, Row
from benchmarks.common.workload import CELLS, OURS, Results, Workload, check, tolerance
from fastbptt.truncation import Chunked

pytest.importorskip("pytest_benchmark")

SIZES = ((128, 1, 64), (128, 16, 256), (1024, 16, 128))
TRUNCATED_SIZES = ((1024, 1, 128, Chunked(32)), (1024, 16, 128, Chunked(32)))
FULL = [Row(cell, *size) for cell in CELLS for size in SIZES]
ROWS = [*FULL, *(Row(cell, *size) for cell in CELLS for size in TRUNCATED_SIZES)]
OPERATOR_CELLS = {"rnn": "tanh", "gru": "gru", "lstm": "lstm"}
Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def name(row: Row) -> str:
    return f"{row.cell} {row.label}"


def rnn_fwd(work: Workload, keep_gates: bool) -> Forward:
    weights, cell = list(work.weights.values()), OPERATOR_CELLS[work.row.cell]
    return torch.ops.fastbptt.rnn_fwd(
        work.input, None, None, weights, True, None, False, cell, keep_gates
    )


def expected(work: Workload) -> Results:
    """What the row's peer computes."""
    _, peer = contenders(work).values()
    return peer.results()


@pytest.mark.parametrize("row", FULL, ids=name)
def test_rnn_fwd(benchmark, row: Row) -> None:
    work = Workload(row, FORWARD)
    with torch.no_grad():
        output, h_n, c_n, *_ = rnn_fwd(work, keep_gates=False)
        found = {"output": output, "h_n": h_n, **({"c_n": c_n} if row.cell == "lstm" else {})}
        check(found, expected(work), tolerance(row), "torch")
        benchmark(rnn_fwd, work, keep_gates=False)


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_rnn_bwd(benchmark, row: Row) -> None:
    work = Workload(row, BACKWARD)
    output, _, _, c, gates = rnn_fwd(work, keep_gates=True)

    def call() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        return torch.ops.fastbptt.rnn_bwd(
            work.grad_output,
            None,
            None,
            work.input,
            output,
            c,
            gates,
            None,
            None,
            list(work.weights.values()),
            True,
            None,
            False,
            OPERATOR_CELLS[row.cell],
            [True, False, False, True],
            *(() if row.truncation is None else (row.truncation.k1, row.truncation.k2)),
        )

    dinput, _, _, dweights = call()
    found = {"dinput": dinput, **{f"d{k}": d for k, d in zip(work.weights, dweights, strict=True)}}
    wanted = expected(work)
    check(found, {name: wanted[name] for name in found}, tolerance(row), "torch")
    benchmark(call)


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_training_step(benchmark, row: Row) -> None:
    work = Workload(row, BACKWARD)
    step = contenders(work)[OURS]
    check(step.results(), expected(work), tolerance(row), "torch")

    def call() -> None:
        step.clear()
        step.run()

    benchmark(call)
