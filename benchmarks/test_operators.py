"""The operators and the module alone, for pytest-benchmark: to watch one change against another.

    pytest benchmarks --benchmark-only

Comparisons with peers are benchmarks.compare's; here too nothing is timed that is wrong.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders import OURS, Results, Workload, check, modules, tolerance
from benchmarks.rows import BACKWARD, FORWARD, Row
from fastbptt.truncation import Chunked

pytest.importorskip("pytest_benchmark")

FULL = [Row("rnn", *size) for size in ((128, 1, 64), (128, 16, 256), (1024, 16, 128))]
ROWS = [*FULL, Row("rnn", 1024, 1, 128, Chunked(32)), Row("rnn", 1024, 16, 128, Chunked(32))]


def expected(work: Workload) -> Results:
    """What the row's peer computes."""
    _, peer = modules(work).values()
    return peer.results()


@pytest.mark.parametrize("row", FULL, ids=lambda row: row.label)
def test_rnn_fwd(benchmark, row: Row) -> None:
    work = Workload(row, FORWARD)
    weights = list(work.weights.values())

    def call() -> tuple[torch.Tensor, ...]:
        return torch.ops.fastbptt.rnn_fwd(
            work.input, None, None, weights, True, None, False, "tanh", True
        )

    with torch.no_grad():
        output, h_n, *_ = call()
        check({"output": output, "h_n": h_n}, expected(work), tolerance(row), "torch")
        benchmark(call)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_rnn_bwd(benchmark, row: Row) -> None:
    work = Workload(row, BACKWARD)
    wanted = expected(work)
    weights = list(work.weights.values())
    chunk = 0 if row.truncation is None else row.truncation.k

    empty = work.input.new_empty(0, work.input[..., 0].numel(), 0)

    def call() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        return torch.ops.fastbptt.rnn_bwd(
            work.grad_output,
            None,
            None,
            work.input,
            wanted["output"],
            empty.new_empty(0, empty.size(1), row.H),
            empty,
            None,
            None,
            weights,
            True,
            None,
            False,
            "tanh",
            chunk,
            [True, False, False, True],
        )

    dinput, _, _, dweights = call()
    found = {"dinput": dinput, **{f"d{k}": d for k, d in zip(work.weights, dweights, strict=True)}}
    gradients = {name: wanted[name] for name in wanted if name not in ("output", "h_n")}
    check(found, gradients, tolerance(row), "torch")
    benchmark(call)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_training_step(benchmark, row: Row) -> None:
    work = Workload(row, BACKWARD)
    step = modules(work)[OURS]
    check(step.results(), expected(work), tolerance(row), "torch")

    def call() -> None:
        step.clear()
        step.run()

    benchmark(call)
