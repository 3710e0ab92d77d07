"""``python -m benchmarks.science``: runs, goes on where it was, and its results make the pages."""

from __future__ import annotations

import json

import pytest
import torch

import fastbptt
from benchmarks import readme
from benchmarks.common.files import ROOT
from benchmarks.pages import BLOCKS
from benchmarks.science import __main__ as science
from benchmarks.science import experiments, oracle
from benchmarks.science.tables import TABLES

NAMES = [experiment.name for experiment in experiments.EXPERIMENTS]


def perform(name: str, out, **options: bool) -> dict:
    (experiment,) = (each for each in experiments.EXPERIMENTS if each.name == name)
    options = {"quick": True, "again": False, **options}
    science.perform(experiment, out, "python -m benchmarks.science --quick", **options)
    return json.loads((out / f"{name}.json").read_text())


@pytest.fixture
def fast(monkeypatch):
    """The influences, two windows and one random segment."""

    def some(quick):
        parts = experiments._influence_parts(quick)
        return [parts[0], *parts[1:3], *(part for part in parts if part.get("seed") == 1)]

    experiment = experiments.Experiment(
        "influence", some, experiments._run_influence, experiments._draw_influence
    )
    monkeypatch.setattr(experiments, "EXPERIMENTS", (experiment,))


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on(fast, tmp_path, monkeypatch):
    whole = perform("influence", tmp_path)
    assert whole["complete"] and len(whole["records"]) == 5
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}

    begun = {**whole, "complete": False, "records": whole["records"][:2]}
    (tmp_path / "influence.json").write_text(json.dumps(begun))
    runs = []
    run = experiments._run_influence
    monkeypatch.setattr(
        experiments,
        "EXPERIMENTS",
        tuple(
            experiments.Experiment(
                e.name, e.parts, lambda part: runs.append(part) or run(part), e.draw
            )
            for e in experiments.EXPERIMENTS
        ),
    )
    resumed = perform("influence", tmp_path)
    assert len(runs) == 3 and resumed["complete"]
    strip = [{k: v for k, v in r.items() if k != "cpu_s"} for r in resumed["records"]]
    assert strip == [{k: v for k, v in r.items() if k != "cpu_s"} for r in whole["records"]]

    resumed["machine"]["cpu"] = "another"
    (tmp_path / "influence.json").write_text(json.dumps(resumed))
    perform("influence", tmp_path)
    assert len(runs) == 3 + 5
    perform("influence", tmp_path, again=True)
    assert len(runs) == 3 + 5 + 5


def test_every_table_is_on_the_page():
    assert set(TABLES) == set(NAMES)
    names = {f"science-{table.__name__}" for tables in TABLES.values() for table in tables}
    assert names <= set(BLOCKS)
    page = (ROOT / "docs" / "science.md").read_text(encoding="utf-8")
    assert set(readme.START.findall(page)) == names


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_results_are_whole(name):
    results = json.loads((science.RESULTS / f"{name}.json").read_text())
    (experiment,) = (each for each in experiments.EXPERIMENTS if each.name == name)
    parts = experiment.parts(False)
    assert results["complete"] and len(results["records"]) == len(parts)
    for part, record in zip(parts, results["records"], strict=True):
        assert part.items() <= record.items()
    text = "\n\n".join(table(science.RESULTS) for table in TABLES[name])
    assert (science.RESULTS / f"{name}.md").read_text() == f"{text}\n"


@pytest.mark.parametrize("name", NAMES)
def test_results_that_were_cut_off_make_no_table(name, tmp_path):
    results = json.loads((science.RESULTS / f"{name}.json").read_text())
    (tmp_path / f"{name}.json").write_text(json.dumps({**results, "complete": False}))
    with pytest.raises(ValueError, match="cut off"):
        TABLES[name][0](tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_each(name):
    (experiment,) = (each for each in experiments.EXPERIMENTS if each.name == name)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        record = experiment.run(experiment.parts(True)[-1])
    finally:
        torch.set_num_threads(before)
    assert record and json.loads(json.dumps(record)) is not None
    results = json.loads((science.RESULTS / f"{name}.json").read_text())
    assert set(record) <= set(results["records"][-1])
    assert experiment.draw(results["records"]).get_axes()


def test_tangents_are_the_full_gradient():
    torch.manual_seed(0)
    net, symbols = oracle.Net(), torch.randint(oracle.SYMBOLS, (12, 3))
    exact = oracle.by_tangents(net, symbols)
    torch.testing.assert_close(oracle.by_backward(net, symbols, None), exact)
    cut = oracle.by_backward(net, symbols, fastbptt.Chunked(2))
    assert (cut - exact).norm() > 0.01 * exact.norm()
