"""The machine's limits beside which ours is measured: their counts; no test depends on a speed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastbptt
from benchmarks import compare
from benchmarks.common import timing, workload
from benchmarks.common.rows import BACKWARD, FORWARD, Row
from benchmarks.cpu import (
    bound,
    peak,
    results,
    tables,
)
from benchmarks.cpu.bound import CACHE, LARGE, PEAK, SGEMM
from fastbptt.truncation import TBPTT, Chunked, Sliding

CUTS = [(None, 6), (Chunked(5), 6), (TBPTT(4, 8), 5 + 20 / 12), (Sliding(3), 5 + 33 / 12)]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize(("cut", "backward"), CUTS, ids=lambda value: str(value))
def test_sgemm_does_the_same_flops(cell, cut, backward):
    row = Row(cell, 12, 2, 8, cut)
    gates = workload.CELLS[cell].gates
    for mode, count in ((FORWARD, 2), (BACKWARD, backward)):
        limit = bound.Bound(row, mode, gates)
        with FlopCounterMode(display=False) as counter:
            limit.steps[SGEMM].run()
        assert counter.get_total_flops() == pytest.approx(count * gates * 2 * (12 * 2) * 8 * 8)
        assert limit.flops == counter.get_total_flops()


def test_windows_are_counted_as_the_brute_force_runs_them():
    # windows of 8 steps every 4 over 10: 0..3, 0..7, 4..9
    assert bound.product_rows(Row("rnn", 10, 3, 8, TBPTT(4, 8)), BACKWARD) == (50 + 4 + 8 + 6) * 3


def test_weights_are_read_once_a_step_of_each_pass():
    resets = torch.zeros(12, 2, dtype=torch.bool)
    resets[[0, 5], [0, 0]] = resets[4, 1] = True  # stretches of 5 and 7, and of 4 and 8
    for cut, given, forward, backward in (
        (None, None, 12, 12),
        (Chunked(5), None, 12, 5),
        (Chunked(50), None, 12, 12),
        (Sliding(3), None, 12, 3),
        (None, resets, 8, 8),
        (Chunked(5), resets, 8, 5),
    ):
        row = Row("rnn", 12, 2, 8, cut, given is not None)
        assert bound.weight_reads(row, FORWARD, given) == forward
        assert bound.weight_reads(row, BACKWARD, given) == forward + backward


def test_the_cache_is_read_in_buffers_of_a_cores_share(monkeypatch):
    monkeypatch.setattr(bound.CacheStep, "BYTES", 2**16)
    step = bound.CacheStep(16, 3, threads=2)
    assert step.buffer.untyped_storage().nbytes() == 4 * (3 * 16 * 16) // 2
    assert step.bytes == step.buffer.numel() * 4 <= 2**16
    assert step.run() == step.buffer.numel(), "every value is read, as often as it is counted"
    assert bound.CacheStep(1, 1, threads=8).buffer.shape[0] >= 8


class FakePeak:
    """A peak that takes no compiler; its times are the test's."""

    flops = 1000

    def __init__(self, threads: int) -> None:
        pass


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one, and without what one has compiled before."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    peak._library.cache_clear()
    yield
    peak._library.cache_clear()


@pytest.mark.parametrize("by", [PEAK, LARGE])
def test_the_bound_is_the_longer_of_both_times(by, monkeypatch, request):
    if by == PEAK:
        monkeypatch.setattr(bound, "PeakStep", FakePeak)
    else:
        request.getfixturevalue("no_compiler")
    limit = bound.Bound(Row("rnn", 10, 1, 16), BACKWARD, 1)
    flops = 2 * 6 * 10 * 16 * 16
    assert list(limit.steps) == [SGEMM, CACHE, LARGE] + [PEAK] * (by == PEAK)
    calls = limit.peak.flops / flops  # a call of the peak's step is so many rows
    reads = limit.cache.bytes / limit.read  # and one of the cache's so many
    seconds = {SGEMM: [1.0, 2.0], CACHE: [3 * reads, 6 * reads], LARGE: [4.0, 8.0]}
    found = limit.record([4.0, 8.0], seconds | {by: [calls, 2 * calls]})
    assert (found["by"], found["peak_by"]) == (CACHE, by)
    assert found["share"]["median"] == found["cache_share"]["median"] == 0.75
    assert found["peak_share"]["median"] == 0.25
    assert found["cache_ms"]["median"] == 4500 and found["sgemm_ms"]["median"] == 1500
    assert found["peak_ms"]["median"] == 1500
    assert found["peak_gflops"]["q3"] == pytest.approx(0.875e-9 * flops, rel=1e-4)
    if by == PEAK:
        expected = flops / limit.steps[LARGE].flops
        assert found["large_share"]["median"] == pytest.approx(expected, rel=1e-4)
    found = limit.record([4.0, 8.0], seconds | {by: [3.5 * calls, 7 * calls]})
    assert (found["by"], found["share"]["median"]) == (by, 0.875)
    assert found["cache_share"]["median"] == 0.75


def test_the_peak_is_of_the_kernels_vectors_and_of_every_thread(isa, tmp_path, monkeypatch):
    monkeypatch.setattr(peak, "FOLDER", tmp_path / "build")
    peak._library.cache_clear()
    steps = [peak.PeakStep(threads) for threads in (1, 2)]
    peak._library.cache_clear()
    lanes = {"avx512": 16, "avx2": 8, "baseline": 4}[peak.family(isa)]
    assert steps[0].library.fma_flops(10) == 2 * 12 * lanes * 10
    assert steps[1].flops == 2 * steps[0].flops
    (library,) = (tmp_path / "build").iterdir()
    assert library.name.startswith(f"peak-{peak.family(isa)}-")
    before = library.stat().st_mtime_ns
    steps.append(peak.PeakStep(1))
    assert library.stat().st_mtime_ns == before, "what is compiled is compiled once"
    for step in steps:
        step.iterations = 2000
        step.clear()
        step.run()


def test_more_multiply_adds_take_longer():
    """So the compiler has neither left out nor merged what is counted."""
    step = peak.PeakStep(1)
    few, many = (_least_seconds(step, iterations) for iterations in (2000, 200_000))
    assert many > 20 * few


def _least_seconds(step: peak.PeakStep, iterations: int) -> float:
    step.iterations = iterations
    return min(timing.sample(step, 1) for _ in range(20))


def test_without_a_compiler_a_large_product_is_the_peak_and_is_named(no_compiler, tmp_path, capsys):
    assert "no C++ compiler 'no-such-compiler'" in peak.unavailable()
    arguments = ["--cells", "gru", "--rows", "40,16,256", "--modes", BACKWARD, "--rounds", "1"]
    arguments += ["--budget", "0", "--peers", "torch", "--out", str(tmp_path)]
    assert compare.main(arguments) == 0
    said = capsys.readouterr()
    assert "the peak is not measured, a large sgemm is in its place" in said.err
    assert "% of large sgemm in the geometric mean of 1" in said.out
    (record,) = results.load(tmp_path / "compare.json")["records"]
    assert record["bound"]["peak_by"] == record["bound"]["by"] == LARGE
    assert record["bound"]["peak_share"] == record["bound"]["large_share"]
    assert "for there was no compiler" in (tmp_path / "compare.md").read_text()


def test_a_compiler_that_fails_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(peak, "FOLDER", tmp_path)
    peak._library.cache_clear()
    assert peak.unavailable() == "false does not compile peak.cpp: nothing said"
    peak._library.cache_clear()
    assert not list(tmp_path.iterdir())


def test_records_have_the_bound_and_tables_show_it():
    row = Row("gru", 12, 1, 8)
    record = results.measure(row, BACKWARD, peers=["torch"], min_rounds=1, budget_s=0.0)
    assert set(record["ms"]) == {"fastbptt", "torch.nn.GRU", SGEMM}
    found = record["bound"]
    assert found["by"] in (PEAK, CACHE) and found["share"]["median"] > 0
    assert record["isa"] == fastbptt._C.cpu_isa()
    assert record["threads"] == torch.get_num_threads()
    (line,) = tables.terminal_lines(record)
    shares = [f"{100 * found[key]['median']:.0f}%" for key in ("share", "peak_share")]
    shares.append(f"{100 * found['large_share']['median']:.0f}%")
    assert line.split()[-4:] == [shares[0], found["by"], *shares[1:]]
    table = tables.markdown_table({"records": [record]})
    assert table.splitlines()[-1].endswith(
        f" {shares[0]} {found['by']} | {shares[1]} | {shares[2]} |"
    )


def share(row: str, value: float, B: int, H: int, **changes: object) -> results.Record:
    base = {"cell": "rnn", "row": row, "mode": BACKWARD, "error": None, "truncation": None}
    base |= {"resets": False, "size": {"B": B, "H": H}}
    shares = {"share": {"median": value}, "peak_share": {"median": value / 2}, "peak_by": PEAK}
    base["bound"] = shares
    return base | changes


def test_shares_are_summarised_by_groups_of_rows():
    records = [
        share("a", 0.5, 16, 256),
        share("b", 0.8, 64, 512),
        share("c", 0.1, 16, 128),
        share("d", 0.3, 1, 256),
        share("e", 0.01, 1, 256, truncation="Chunked(k=2)"),
        share("f", 0.01, 16, 256, resets=True),
        {"cell": "rnn", "row": "g", "mode": BACKWARD, "error": "wrong"},
    ]
    many, one = sorted(results.summarise_shares(records), key=lambda s: -s["rows"])
    assert (many["group"], many["rows"], many["least_row"]) == ("B >= 16, H >= 256", 2, "a")
    assert many["geometric_mean"] == pytest.approx(0.1**0.5, rel=1e-4)
    assert (one["group"], one["rows"], one["least"]) == ("B = 1", 1, 0.3)
    assert tables.terminal_shares([many, one]) == [
        "rnn forward+backward, B >= 16, H >= 256: 32% of the FMA peak in the geometric mean of 2, "
        "least 25% at a",
        "rnn forward+backward, B = 1: 30% of the bound in the geometric mean of 1, least 30% at d",
    ]
