"""The tables of the README and the pages are those of the results, and nothing else is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.common.files import ROOT
from benchmarks.pages import BLOCKS, SHOWN

RESULTS = ROOT / "benchmarks" / "results"


def block(name: str, text: str = "old") -> str:
    return f"<!-- benchmark:{name} -->\n{text}\n{readme.END}"


def test_pages_are_up_to_date(capsys):
    """After a measurement: python -m benchmarks.readme."""
    assert readme.main(["--check"]) == 0
    assert "README.md is up to date" in capsys.readouterr().out


def test_readme_is_one_screen():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") < 120
    assert {"short", "book"} <= set(readme.START.findall(text))


def test_a_page_gets_its_tables_between_their_markers(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"# Top\n{block('book')}\nbetween\n{block('short')}\nbottom\n")
    assert readme.main(["--check", str(page)]) == 1
    assert "old" in page.read_text()
    assert readme.main([str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# Top\n<!-- benchmark:book -->\n| tokens a second |")
    assert f"{readme.END}\nbetween\n<!-- benchmark:short -->\n| forward and backward |" in text
    assert text.endswith(f"\n{readme.END}\nbottom\n")
    assert "old" not in text
    assert readme.main(["--check", str(page)]) == 0
    assert readme.main([str(page)]) == 0
    assert page.read_text() == text
    assert "was up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs pairs"),
        ("<!-- benchmark:short -->", "needs pairs"),
        (readme.END + "<!-- benchmark:short -->", "needs pairs"),
        (2 * "<!-- benchmark:short -->" + 2 * readme.END, "needs pairs"),
        (block("nothing"), "no table 'nothing'"),
    ],
)
def test_other_markers_are_refused(text, message, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit):
        readme.main([str(page)])
    assert message in capsys.readouterr().err
    assert page.read_text() == text


@pytest.mark.parametrize(
    "name",
    [name for name in BLOCKS if name != "h100" and not name.startswith("science")],
)
@pytest.mark.parametrize("change", ["cut off", "failed", "foreign", "no rows"])
def test_tables_take_no_failed_or_partial_results(name, change, tmp_path):
    folder = tmp_path / SHOWN
    folder.mkdir()
    for path in (RESULTS / SHOWN).glob("*.json"):
        found = json.loads(path.read_text())
        if change == "cut off":
            found["complete"] = False
        elif change == "failed":
            found["records"][0]["error"] = "wrong"
        elif change == "no rows":
            found["records"] = []
        else:
            found = {"records": []}
        (folder / path.name).write_text(json.dumps(found))
    match = {"cut off": "cut off or", "failed": "FAILED", "foreign": "is no results"}
    with pytest.raises(ValueError, match=match.get(change, "no row in")):
        BLOCKS[name](tmp_path)


def test_a_row_that_failed_is_not_taken_from_a_gpus_run(tmp_path):
    """The run may be cut off, as long as the rows of the table are there."""
    folder = tmp_path / "gpu"
    folder.mkdir()
    found = json.loads((RESULTS / "gpu" / "gpu.json").read_text())
    assert "before all of its rows" in BLOCKS["h100"](RESULTS)
    for record in found["records"]:
        if record["row"] == "1024,16,64":
            record["error"] = "wrong"
    (folder / "gpu.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="no row .*1024,16,64"):
        BLOCKS["h100"](tmp_path)


def test_a_table_is_that_of_the_results(tmp_path):
    folder: Path = tmp_path / SHOWN
    folder.mkdir()
    found = json.loads((RESULTS / SHOWN / "book.json").read_text())
    found["records"][1]["tokens_per_s"]["fastbptt"]["median"] = 123456.7
    (folder / "book.json").write_text(json.dumps(found))
    assert "| GRU | " in BLOCKS["book"](tmp_path) and "| 123,457 |" in BLOCKS["book"](tmp_path)
