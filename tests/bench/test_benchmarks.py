"""The benchmark's own logic, at sizes that take no time; no test here depends on a speed."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from dataclasses import dataclass

import pytest
import torch

import fastbptt
from benchmarks import compare
from benchmarks.common import contenders, rows, timing, workload
from benchmarks.common.rows import BACKWARD, FORWARD, GRID, Row
from benchmarks.cpu import results, tables
from fastbptt.truncation import TBPTT, Chunked, Sliding

RNN = ["--cells", "rnn"]
TINY = Row("rnn", 12, 2, 8)
TINY_CHUNKED = Row("rnn", 12, 2, 8, Chunked(5))
FAST = ["--rounds", "2", "--budget", "0", "--peers", "torch"]


@dataclass
class FakeClock:
    """Time that passes only when a step says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeStep:
    """A step that takes the given seconds, and writes its name into a log."""

    name: str
    clock: FakeClock
    seconds: float
    log: list[str]
    dirty: bool = False

    def clear(self) -> None:
        self.clock.now += 100.0  # off the clock: would show in every time
        self.dirty = False

    def run(self) -> None:
        assert not self.dirty, "run twice without clear"
        self.dirty = True
        self.log.append(self.name)
        self.clock.now += self.seconds


def fake_steps(**seconds: float) -> tuple[dict[str, FakeStep], FakeClock, list[str]]:
    clock, log = FakeClock(), []
    return {name: FakeStep(name, clock, s, log) for name, s in seconds.items()}, clock, log


@pytest.fixture
def broken(monkeypatch):
    """Ours has one element of one gradient wrong, by a thousandth of the largest."""
    right = workload.ModuleStep.results

    def wrong(self):
        found = right(self)
        if isinstance(self.module, workload.CELLS["rnn"].ours) and "dweight_hh_l0" in found:
            gradient = found["dweight_hh_l0"]
            gradient[3, 5] += 1e-3 * gradient.abs().max()
        return found

    monkeypatch.setattr(workload.ModuleStep, "results", wrong)


def test_quartiles_interpolate():
    assert timing.Quartiles.of([4.0, 1.0, 3.0, 2.0]) == timing.Quartiles(1.75, 2.5, 3.25)
    assert timing.Quartiles.of([7.0]) == timing.Quartiles(7.0, 7.0, 7.0)


def test_ratios_are_paired_by_round():
    # a machine that slows down threefold changes no paired ratio, though it triples every time
    assert timing.paired_ratios([2.0, 6.0, 4.0], [1.0, 3.0, 2.0]) == timing.Quartiles(2, 2, 2)
    assert timing.paired_ratios([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == timing.Quartiles(1.5, 2, 2.5)
    with pytest.raises(ValueError):
        timing.paired_ratios([1.0, 2.0], [1.0])


def test_sample_is_seconds_a_call_without_clear():
    steps, clock, log = fake_steps(ours=0.25)
    assert timing.sample(steps["ours"], 4, clock) == pytest.approx(0.25)
    assert log == ["ours"] * 4


@pytest.mark.parametrize(("seconds", "calls"), [(0.5, 1), (0.003, 1), (0.0004, 3), (1e-5, 100)])
def test_short_steps_are_repeated_to_fill_a_sample(seconds, calls):
    steps, clock, log = fake_steps(ours=seconds)
    assert timing.seconds_a_call(steps["ours"], clock) == pytest.approx(seconds)
    before = len(log)
    timing.interleave(steps, min_rounds=5, budget_s=0.0, min_sample_s=1e-3, clock=clock)
    calibration, lead = (0, 0) if seconds == 0.5 else (before, 5)  # a call of clear leads in enough
    assert len(log) - before - calibration - lead in (5 * calls, 5 * calls + 5)


def test_short_steps_lead_in_until_other_threads_sleep():
    steps, clock, log = fake_steps(short=0.001, long=0.2)
    steps["short"].clear = lambda: setattr(steps["short"], "dirty", False)  # takes no time
    timing.interleave(steps, min_rounds=3, budget_s=0.0, clock=clock)
    runs = [len(list(group)) for name, group in itertools.groupby(log) if name == "short"]
    # finding out; a sample to complete the round that this was of the long one, and one of the
    # next round; one of the last: each after LEAD_S
    assert all(abs(n - k * (5 + 2)) <= k for n, k in zip(runs, (1, 2, 1), strict=True)), runs
    assert log.count("long") == 3


def test_rounds_interleave_and_change_their_order():
    steps, clock, log = fake_steps(ours=1.0, peer=3.0, bound=0.5)
    seconds = timing.interleave(steps, min_rounds=12, budget_s=0.0, clock=clock)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(steps, 12)
    assert seconds["peer"] == pytest.approx([3.0] * 12)
    timed = log[-36:]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(order) == sorted(steps) for order in rounds)
    assert len(set(rounds)) > 2
    assert all(a != b for a, b in zip(timed, timed[1:], strict=False)), "a step follows itself"


def test_rounds_go_on_until_the_budget_is_spent():
    steps, clock, _ = fake_steps(ours=1.0, peer=3.0)
    few = timing.interleave(steps, min_rounds=3, budget_s=0.0, clock=clock)
    many = timing.interleave(steps, min_rounds=3, budget_s=204.0 * 7, clock=clock)
    assert (len(few["ours"]), len(many["ours"])) == (3, 1 + 7)  # 1: finding out how long they take


def test_sizes_are_read_and_written():
    assert rows.parse_size("128,16,256") == (128, 16, 256, None, False)
    assert rows.parse_size("9,1,4,3") == (9, 1, 4, Chunked(3), False)
    assert all(rows.parse_size(rows.format_size(size)) == size for size in GRID)
    assert rows.parse_size("9,1,4,2,5") == (9, 1, 4, TBPTT(2, 5), False)
    assert rows.parse_size("9,1,4,1,5") == (9, 1, 4, Sliding(5), False)
    assert rows.parse_size("9,1,4,resets") == (9, 1, 4, None, True)
    with pytest.raises(ValueError, match="k2 must be at least k1"):
        rows.parse_size("9,1,4,5,2")
    for text in (
        "",
        "1,2",
        "1,2,3,4,5,6",
        "1,2,3,4,resets",
        "1,2,resets",
        "0,1,1",
        "1,-1,1",
        "1,1.5,1",
        "a,b,c",
    ):
        with pytest.raises(ValueError, match="must be T,B,H or T,B,H,k"):
            rows.parse_size(text)


def test_filters_pick_rows_by_name():
    picked = rows.select(["rnn"], GRID, ["CHUNKED", "35,32"])
    assert [row.label for row in picked] == [
        "35,32,256",
        "1024,1,128 Chunked(k=32)",
        "1024,16,128 Chunked(k=32)",
    ]
    assert len(rows.select(["rnn"], GRID)) == len(GRID)


def test_full_gradients_differ_from_truncated_ones_by_more_than_the_tolerance():
    full, cut = (
        contenders.contenders(workload.Workload(row, BACKWARD))["fastbptt"].results()
        for row in (TINY, TINY_CHUNKED)
    )
    with pytest.raises(workload.Mismatch, match="^dinput is off by"):
        workload.check(full, cut, workload.tolerance(TINY), "peer")


def test_check_names_what_is_wrong():
    right = {"output": torch.tensor([1.0, -2.0]), "dx": torch.tensor([3.0])}
    workload.check(right, right, 0.0, "peer")
    for key, value, message in (
        ("dx", torch.tensor([3.01]), "dx is off by 0.0033 from peer, allowed is 0.001"),
        ("dx", torch.tensor([math.nan]), "dx is off by nan"),
        ("dx", torch.tensor([3.0, 3.0]), r"dx is \[2\], that of peer \[1\]"),
        ("dx", None, "dx is None"),
        ("dw", torch.tensor([3.0]), "results are"),
    ):
        with pytest.raises(workload.Mismatch, match=message):
            workload.check({**right, key: value}, right, 1e-3, "peer")


def test_a_warning_of_ours_is_no_result(monkeypatch):
    forward = workload.CELLS["rnn"].ours.forward

    def warns(self, *args, **kwargs):
        warnings.warn("falls back to torch", stacklevel=2)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(workload.CELLS["rnn"].ours, "forward", warns)
    with pytest.raises(workload.Mismatch, match="fastbptt warned: falls back to torch"):
        contenders.build(workload.Workload(TINY, BACKWARD))


def test_compare_writes_everything(tmp_path, capsys):
    sizes = ["--rows", "12,2,8", "12,2,8,5"]
    assert compare.main(["--cells", "rnn", *sizes, *FAST, "--out", str(tmp_path)]) == 0
    found = results.load(tmp_path / "compare.json")
    assert found["complete"]
    assert [(r["row"], r["mode"]) for r in found["records"]] == [
        ("12,2,8", FORWARD),
        ("12,2,8", BACKWARD),
        ("12,2,8 Chunked(k=5)", BACKWARD),
    ]
    assert {r["rounds"] for r in found["records"]} == {2}
    for record in found["records"]:
        (speedup,) = record["speedup"].values()
        assert 0 < speedup["q1"] <= speedup["median"] <= speedup["q3"]
        assert set(record["ms"]) == {"fastbptt", "sgemm", *record["speedup"]}
    facts = {"isa": fastbptt._C.cpu_isa(), "threads": torch.get_num_threads()}
    assert facts.items() <= found["machine"].items()
    again = (
        "python -m benchmarks.compare --cells rnn --peers torch "
        "--rows 12,2,8 12,2,8,5 --rounds 2 --budget 0"
    )
    assert found["settings"]["command"] == again
    assert {(s["mode"], s["peer"], s["rows"]) for s in found["summary"]} == {
        (FORWARD, "torch.nn.RNN", 1),
        (BACKWARD, "torch.nn.RNN", 1),
        (BACKWARD, "detach() loop", 1),
    }
    markdown = (tmp_path / "compare.md").read_text()
    assert "| 12,2,8 Chunked(k=5) | `detach() loop` |" in markdown
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "geometric mean" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*")), "something partial was left behind"


def test_a_wrong_result_is_refused(tmp_path, capsys, broken, monkeypatch):
    timed = []
    interleave = results.interleave
    monkeypatch.setattr(
        results, "interleave", lambda *args, **kw: timed.append(1) or interleave(*args, **kw)
    )
    assert compare.main([*RNN, "--rows", "12,2,8", *FAST, "--out", str(tmp_path)]) == 1
    forward, backward = results.load(tmp_path / "compare.json")["records"]
    assert forward["error"] is None
    assert backward["error"].startswith("dweight_hh_l0 is off by 0.001 from torch.nn.RNN")
    assert "ms" not in backward
    assert len(timed) == 1, "only the row that is right is timed"
    assert "FAILED, not timed: dweight_hh_l0" in capsys.readouterr().out
    assert "FAILED" in (tmp_path / "compare.md").read_text()


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch):
    def interrupted(row, mode, **settings):
        if mode == BACKWARD:
            raise KeyboardInterrupt
        return results.measure(row, mode, **settings)

    monkeypatch.setattr(compare, "measure", interrupted)
    assert compare.main([*RNN, "--rows", "12,2,8", *FAST, "--out", str(tmp_path)]) == 130
    found = results.load(tmp_path / "compare.json")
    assert len(found["records"]) == 1
    assert not found["complete"]
    assert "cut off" in (tmp_path / "compare.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "must be an integer above 0, got '0'"),
        (["--threads", "two"], "must be an integer above 0, got 'two'"),
        (["--rows", "1,2"], "must be T,B,H or T,B,H,k"),
        (["--cells", "elman"], "invalid choice: 'elman'"),
        (["--peers", "keras"], "invalid choice: 'keras'"),
        (["--modes", "backward"], "invalid choice: 'backward'"),
        (["--filter", "9999"], "none of the rows is left"),
        (["--budget", "-1"], "must be seconds from 0"),
        (["--budget", "nan"], "must be seconds from 0"),
        (["--out", __file__], "argument --out: cannot write to"),
    ],
)
def test_bad_arguments_are_refused_before_any_timing(
    arguments, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(compare, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(SystemExit) as exit:
        compare.main(["--out", str(tmp_path), *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def record(row: str, median: float, mode: str = BACKWARD, peer: str = "p") -> results.Record:
    speedup = {peer: {"median": median}}
    return dict(cell="rnn", row=row, mode=mode, error=None, speedup=speedup)


def test_summary_is_geometric_mean_and_least():
    records = [
        record("a", 2.0),
        record("b", 8.0),
        record("a", 5.0, FORWARD),
        record("a", 3.0, peer="q"),
    ]
    records.append({"cell": "rnn", "row": "c", "mode": BACKWARD, "error": "wrong"})
    found = {(s["mode"], s["peer"]): s for s in results.summarise(records)}
    assert set(found) == {(FORWARD, "p"), (BACKWARD, "p"), (BACKWARD, "q")}
    expected = {"rows": 2, "geometric_mean": 4.0, "least": 2.0, "least_row": "a"}
    assert expected.items() <= found[BACKWARD, "p"].items()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The results of a tiny comparison, and the folder that holds them."""
    folder = tmp_path_factory.mktemp("results")
    assert compare.main([*RNN, "--rows", "12,2,8", *FAST, "--out", str(folder)]) == 0
    return results.load(folder / "compare.json"), folder


def test_tables_show_failures_and_several_peers(measured):
    found = json.loads(json.dumps(measured[0]))
    forward, backward = found["records"]
    for key in ("ms", "speedup", "reach"):
        backward[key]["other"] = backward[key]["torch.nn.RNN"]
    found["records"][0] = {k: forward[k] for k in ("cell", "row", "size", "truncation", "mode")}
    found["records"][0]["error"] = "output is off"
    table = tables.markdown_table(found).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert [line.split(" | ")[1:3] for line in table[2:]] == [
        ["`torch.nn.RNN`", "FAILED"],
        ["`other`", "FAILED"],
    ]


def test_tables_leave_room_for_a_peer_of_one_mode(measured):
    found = json.loads(json.dumps(measured[0]))
    forward, backward = found["records"]
    for key in ("ms", "speedup"):
        forward[key]["other"] = forward[key]["torch.nn.RNN"]
    table = tables.markdown_table(found).splitlines()
    assert len({line.count("|") for line in table}) == 1
    fields = [field.strip() for field in table[3].split("|")[2:-1]]
    assert fields[0] == "`other`"
    assert all(fields[1:4])
    assert not any(fields[4:])
