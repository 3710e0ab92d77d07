"""The comparison's picture: that everything is in it, and nothing covers anything."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.common.files import Record
from benchmarks.common.rows import BACKWARD, FORWARD, GRID, MODES, Row, select
from benchmarks.common.workload import CELLS
from benchmarks.cpu import plot
from benchmarks.cpu.bound import CACHE, PEAK
from benchmarks.cpu.figures import BAD
from benchmarks.cpu.peers import PEERS

MACHINE = {"cpu": "AMD EPYC (cpu family 25, model 17)", "cores": 2, "threads": 2, "isa": "avx512"}
MACHINE |= {"torch": "2.13.0+cpu", "torch_isa": "AVX512", "date": "2026-01-02T03:04"}


def quartiles(median: float) -> Record:
    return {"q1": 0.9 * median, "median": median, "q3": 1.1 * median}


def record(row: Row, mode: str, speedup: float = 3.0) -> Record:
    """As measure() would return it."""
    peers = [peer.label(row) for peer in PEERS if peer.applies(row) and mode in peer.modes]
    return row.described(mode) | {
        "error": None,
        "speedup": {peer: quartiles(speedup * (i + 1)) for i, peer in enumerate(peers)},
        "bound": {"by": CACHE if row.B == 1 else PEAK, "share": quartiles(0.8)},
    }


def results(cells: list[str], sizes=GRID) -> Record:
    records = [record(row, mode) for row in select(cells, sizes) for mode in row.modes(MODES)]
    return {"machine": MACHINE, "records": records}


@pytest.mark.parametrize("cells", [list(CELLS), ["gru"]], ids=len)
def test_the_whole_grid_is_drawn_and_no_label_covers_another(cells):
    figure = plot.draw(results(cells))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert len(figure.axes) == 3 * len(cells)
    labels = [*figure.texts, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        labels += [*axes.get_xticklabels(), *axes.texts]
        labels += [axes.title, axes._left_title, axes._right_title, axes.yaxis.label]
    boxes = {
        label: label.get_window_extent(renderer).padded(-1) for label in labels if label.get_text()
    }
    assert len(boxes) > 30 * len(cells)
    for (one, box), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(second), (one.get_text(), other.get_text())
    inside = figure.bbox.padded(1)
    assert all(inside.contains(*corner) for box in boxes.values() for corner in box.corners())


def test_rows_stand_in_the_order_of_b_h_and_t():
    figure = plot.draw(results(["rnn"]))
    speedups, shares, cut = figure.axes
    plain = [size for size in GRID if size.truncation is None and not size.resets]
    expected = [f"{H}\n{T}" for B, H, T in sorted((s.B, s.H, s.T) for s in plain)]
    assert [text.get_text() for text in shares.get_xticklabels()] == expected
    assert [text.get_text() for text in cut.get_xticklabels()][2:5] == [
        "TBPTT 8, 32\nT 1024\nB 4, H 128",
        "Sliding 16\nT 512\nB 4, H 128",
        "resets \nT 128\nB 8, H 128",
    ]
    assert speedups.get_ylim()[0] < 1 < speedups.get_ylim()[1]


def test_every_median_has_a_mark_and_its_mean():
    figure = plot.draw(results(["rnn"], [(128, 1, 64), (128, 1, 256)]))
    speedups, _ = figure.axes
    medians = [line.get_ydata()[0] for line in speedups.lines if line.get_marker() == "o"]
    assert sorted(medians) == [3.0] * 4, "torch.nn's, of two rows in two modes"
    assert speedups.get_title(loc="right") == "geometric mean 3.0× torch.nn, 6.0× JAX"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    marks = ["torch.nn", "JAX lax.scan", "ONNX Runtime", "hollow: forward alone"]
    assert legend == [*marks, *legend[4:]]
    assert legend[4:] == ["bound: W_hh once a step"]


def test_failures_are_said():
    found = results(["rnn"], [(128, 1, 64), (128, 1, 256)])
    kept = ("cell", "row", "size", "truncation", "resets", "mode")
    found["records"][1] = {k: found["records"][1][k] for k in kept} | {"error": "output is off"}
    speedups, shares = plot.draw(found).axes
    assert [text.get_text() for text in speedups.texts if text.get_color() == BAD] == ["FAILED"]
    assert len(shares.patches) == 2, "a band, and one bar"


def test_one_mode_alone_is_drawn(tmp_path):
    found = results(["lstm"], [(128, 1, 64)])
    for mode in (FORWARD, BACKWARD):
        chosen = [r for r in found["records"] if r["mode"] == mode]
        plot.write_plot({**found, "records": chosen}, tmp_path / "one.png")
        assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "one.png").unlink()
    plot.write_plot({**found, "records": []}, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
