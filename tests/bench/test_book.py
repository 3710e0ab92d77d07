"""The book's model trains the same with both layers; no test depends on a speed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import book


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_an_epoch_is_the_same_and_begins_anew(cell):
    epochs = book.build(cell)
    ours, theirs = (torch.tensor(epoch.run()) for epoch in epochs.values())
    assert len(ours) == book.SEGMENTS == 8
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    ours_again = next(iter(epochs.values()))
    assert torch.tensor(ours_again.run())[0] != ours[0]  # it has learnt
    ours_again.clear()
    assert torch.tensor(ours_again.run())[0] == ours[0]


def test_it_writes_what_it_measured(tmp_path, capsys):
    arguments = ["--cells", "gru", "--rounds", "1", "--budget", "0", "--out", str(tmp_path)]
    assert book.main(arguments) == 0
    found = json.loads((tmp_path / "book.json").read_text())
    (record,) = found["records"]
    assert record["printed"] == 99_504 and set(record["tokens_per_s"]) == {
        "fastbptt",
        "torch.nn.GRU",
    }
    assert "printed 99,504" in capsys.readouterr().out


def test_what_computes_something_else_is_not_timed(monkeypatch):
    def other(cell):
        epochs = build(cell)
        with torch.no_grad():
            epochs["fastbptt"].begin[0].add_(1)
            epochs["fastbptt"].clear()
        return epochs

    build = book.build
    monkeypatch.setattr(book, "build", other)
    monkeypatch.setattr(book, "interleave", lambda *_, **__: pytest.fail("timed"))
    assert "differ" in book.measure("rnn", min_rounds=1, budget_s=0)["error"]
