"""This tree against another commit: two packages, one each process, held to the same results."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import against
from benchmarks.common.files import ROOT
from benchmarks.cpu import revisions

FAST = ["--threads", "1", "--rounds", "2", "--budget", "0"]
ROW = ["--cells", "rnn", "--rows", "6,2,8"]

# Its outputs are off by a thousandth with gradients, and by one rounding without.
WRONG = """
import torch
_forward = RNN.forward
def _wrong(self, *args, **kwargs):
    output, state = _forward(self, *args, **kwargs)
    return output * (1.001 if torch.is_grad_enabled() else 1 + 2**-23), state
RNN.forward = _wrong
"""


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A copy of this package, in place of another commit's."""
    folder = tmp_path / "other"
    (folder / "fastbptt").mkdir(parents=True)
    for path in (ROOT / "fastbptt").iterdir():
        if path.suffix == ".so":
            (folder / "fastbptt" / path.name).symlink_to(path)
        elif path.is_file():
            shutil.copy(path, folder / "fastbptt" / path.name)
    monkeypatch.setattr(against, "commit_of", lambda revision: "0123456789abcdef")
    monkeypatch.setattr(against, "built", lambda commit: folder)
    return folder


def run(folder: Path, *words: str) -> tuple[int, dict]:
    status = against.main(["some-revision", *FAST, *words, "--out", str(folder)])
    return status, json.loads((folder / "against.json").read_text())


def append(folder: Path, text: str) -> None:
    with (folder / "fastbptt" / "__init__.py").open("a") as file:
        file.write(text)


@pytest.mark.slow
def test_both_are_timed_and_say_whose_package_they_run(other, tmp_path, capsys):
    status, found = run(tmp_path, *ROW)
    assert status == 0 and found["complete"] and found["against"] == "0123456789abcdef"
    assert [record["mode"] for record in found["records"]] == ["forward", "forward+backward"]
    for record in found["records"]:
        assert record["rounds"] == 2 and record["same_bits"]
        assert record["ms"].keys() == {"here", "there"}
        assert 0 < record["speedup"]["q1"] <= record["speedup"]["q3"]
    said = capsys.readouterr().out
    assert f"here: {ROOT}, kernels " in said and f"there: {other}, kernels " in said
    assert "rnn forward+backward: " in said


@pytest.mark.slow
def test_uses_are_timed_too(other, tmp_path):
    words = ["--suites", "stacks", "steps", "--cells", "gru", "--modes", "forward"]
    status, found = run(tmp_path, *words, "--filter", "stacks", "1,1,64 auto")
    assert status == 0
    assert [record["row"] for record in found["records"]] == [
        "stacks 128,1,128-128-128",
        "steps 16 x 1,1,64 autocast bfloat16",
    ]


@pytest.mark.slow
def test_what_computes_something_else_is_refused_and_what_rounds_otherwise_is_said(
    other, tmp_path, capsys
):
    append(other, WRONG)
    status, found = run(tmp_path, *ROW)
    rounded, wrong = found["records"]
    assert status == 1
    assert "ms" in rounded and rounded["same_bits"] is False
    assert "ms" not in wrong
    assert wrong["error"].startswith("output is off by 0.001 from the other commit")
    rounds, fails = capsys.readouterr().out.splitlines()[-4:-2]
    assert rounds.endswith("rounding differs") and "FAILED, not timed: output is off" in fails


@pytest.mark.slow
def test_a_package_that_does_not_import_is_said(other, tmp_path, capsys):
    append(other, "\nraise ImportError('too old')\n")
    status, found = run(tmp_path, *ROW)
    assert (status, found["records"], found["complete"]) == (2, [], False)
    assert f"error: the process of {other} ended with status 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-revision"], "git knows no commit 'no-such-revision'"),
        (["HEAD", "--suites", "stacks", "--rows", "1,1,1"], "takes the place of --rows"),
        (["HEAD", "--suites", "busy"], "invalid choice: 'busy'"),
        (["HEAD", "--filter", "9999"], "nothing is left"),
        (["HEAD", "--out", __file__], "argument --out: cannot write to"),
    ],
)
def test_bad_arguments_are_refused(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(against, "built", lambda commit: pytest.fail("built"))
    with pytest.raises(SystemExit):
        against.main(["--out", str(tmp_path), *words])
    assert message in capsys.readouterr().err


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose second commit does not build; FOLDER in it."""

    def git(*words: str) -> None:
        names = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *names, *words], cwd=root, check=True, capture_output=True)

    root = tmp_path / "repository"
    (root / "fastbptt").mkdir(parents=True)
    (root / "fastbptt" / "__init__.py").write_text("")
    script = root / "setup.py"
    script.write_text("import sys\nopen('fastbptt/made', 'w').write(' '.join(sys.argv[1:]))\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    script.write_text("import sys\nprint('no such header')\nsys.exit(3)\n")
    git("commit", "-qam", "two")
    monkeypatch.setattr(revisions, "ROOT", root)
    monkeypatch.setattr(revisions, "FOLDER", root / "build")
    return root


def test_a_commit_is_built_once_and_the_tree_stays_as_it_is(repository):
    folder = revisions.built(revisions.commit_of("HEAD~1"))
    made = folder / "fastbptt" / "made"
    assert made.read_text() == "build_ext --inplace"
    assert not (repository / "fastbptt" / "made").exists()
    made.write_text("kept")
    assert revisions.built(revisions.commit_of("HEAD~1")) == folder
    assert made.read_text() == "kept"
    kept = {path.name for path in (repository / "build").iterdir()}
    assert kept == {folder.name, f"{folder.name}.log"}, "nothing temporary is left"


def test_a_commit_that_does_not_build_is_said(repository):
    with pytest.raises(revisions.NotBuilt, match="failed with status 3, see .*log") as error:
        revisions.built(revisions.commit_of("HEAD"))
    assert "no such header" in Path(str(error.value).rpartition("see ")[2]).read_text()
    assert len(list((repository / "build").iterdir())) == 1, "the log alone is left"
