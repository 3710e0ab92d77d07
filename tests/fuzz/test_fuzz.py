"""A short run of the fuzzer, as a user starts it; `make fuzz` does longer ones."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages")
TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"


def test_some_rounds():
    command = [sys.executable, TOOL, "--calls=300", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout


WRITER = """
import itertools, pathlib, runpy, sys
note = runpy.run_path(sys.argv[1])["Note"](pathlib.Path(sys.argv[2]))
for number in itertools.count():
    note.write("é" * (number % 900), calls=number % 900)
"""


def test_a_note_is_read_whole_while_it_is_written(tmp_path):
    spec = importlib.util.spec_from_file_location("fuzz_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    path = tmp_path / "note"
    path.write_bytes(bytes(tool.NOTE_BYTES))
    note, seen = tool.Note(path), set()
    assert note.read() == {}
    with subprocess.Popen([sys.executable, "-c", WRITER, TOOL, path]) as writer:
        while len(seen) < 300 and writer.poll() is None:
            if found := note.read():
                assert len(found["what"]) == found["calls"]
                seen.add(found["calls"])
        writer.kill()
    assert len(seen) == 300
    last = note.read()
    assert len(last["what"]) == last["calls"], "whole after its writer was killed"
    note.write("x" * 100_000, calls=1)
    assert set(note.read()["what"]) == {"x"}
