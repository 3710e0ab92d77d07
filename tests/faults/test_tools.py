"""Short runs of what looks for faults for hours: tools/soak.py, tools/mutate.py."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
import sys

import pytest

from benchmarks.common.files import ROOT

sys.path.append(str(ROOT / "tools"))

import mutants  # noqa: E402
import soak  # noqa: E402

SOURCE = """\
#include <cstdio>

int sum(const int* values, int count) {
  int total = 0, last = 0;
  for (int i = 0; i < count; ++i) {
    total += values[i];
  }
  if (count > 3) {
    last = 2 * total - count;
  }
  return total + last;
}

int main() {
  const int values[] = {1, 2, 3, 4, 50};
  std::printf("%d", sum(values, 4));
}
"""
PYTHON = """\
def f(x: int, names: list[str]) -> str:
    if not names and x >= 3:
        raise ValueError(f"x < {2 + 1} or names")
    return names[0] if names else str(x + 1)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_soak():
    command = [sys.executable, ROOT / "tools" / "soak.py", "--minutes=0", "--steps=8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 11 differ from the first pass" in done.stdout
    assert "\n0 bytes leaked: " in done.stdout


@pytest.mark.parametrize("leak, found", [(0, False), (20, True)])
def test_a_leak_is_told_from_what_passes_differ_by(leak, found, monkeypatch):
    choose, memory, passes = random.Random(0), soak.Memory(3600), 0
    allocated = lambda: 200_000_000 + choose.randrange(50_000) + leak * passes  # noqa: E731
    monkeypatch.setattr(soak, "allocated_bytes", allocated)
    monkeypatch.setattr(soak, "resident_bytes", lambda: 300_000_000)
    for passes in range(3700):
        memory.read(elapsed=passes)
    assert (memory.leaked() > 0) == found
    assert memory.report().startswith("0 bytes leaked") != found


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize("size, count", [(1000, 1000), (10**7, 1)])
def test_blocks_and_mappings_are_counted(size, count):
    malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
    malloc.argtypes, malloc.restype, free.argtypes = (
        [ctypes.c_size_t],
        ctypes.c_void_p,
        [ctypes.c_void_p],
    )
    before = soak.allocated_bytes()
    blocks = [malloc(size) for _ in range(count)]
    grown = soak.allocated_bytes() - before
    for block in blocks:
        free(block)
    assert size * count <= grown < 1.2 * size * count


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_mutants_of_cpp_are_switched_on_one_at_a_time_and_mark_where_they_are(tmp_path):
    numbered = dict(enumerate(mutants.of_cpp("sum.cpp", SOURCE)))
    (tmp_path / "mutant.h").write_text(mutants.HEADER)
    source = tmp_path / "sum.cpp"
    source.write_text('#include "mutant.h"\n' + mutants.with_all(SOURCE, numbered))
    subprocess.run(["c++", "-std=c++17", "-o", tmp_path / "sum", source], check=True)
    said = {}
    for number in (None, *numbered):
        switch = {} if number is None else {"FASTBPTT_MUTANT": str(number)}
        done = subprocess.run([tmp_path / "sum"], env=os.environ | switch, capture_output=True)
        mutant = numbered.get(number)
        said[mutant and (mutant.kind, mutant.line)] = int(done.stdout)
    assert said == {
        None: 10 + 16,
        ("bound", 5): 6 + 8,  # one value fewer
        ("index", 6): 59 + 114,  # each the next
        ("statement", 6): 0 - 4,
        ("condition", 8): 10,
        ("sign", 9): 10 + 24,
        ("statement", 9): 10,
        ("sign", 11): 10 - 16,
    }
    marks = tmp_path / "reached"
    for count, missing in (("4", set()), ("3", {("sign", 9), ("statement", 9)})):
        changed = source.read_text().replace("sum(values, 4)", f"sum(values, {count})")
        source.write_text(changed)
        subprocess.run(["c++", "-std=c++17", "-o", tmp_path / "sum", source], check=True)
        marks.write_bytes(bytes(4096))
        switch = {"FASTBPTT_MUTANTS_REACHED": str(marks)}
        subprocess.run([tmp_path / "sum"], env=os.environ | switch, stdout=subprocess.DEVNULL)
        reached = {number for number, mark in enumerate(marks.read_bytes()) if mark}
        not_reached = {(m.kind, m.line) for number, m in numbered.items() if number not in reached}
        assert not_reached == missing


def test_which_mutants_each_test_comes_by(tmp_path):
    """A plugin's table, of marks that a program makes in a file, and of lines that it runs."""
    marks = tmp_path / "reached"
    marks.write_bytes(bytes(8))
    (tmp_path / "it.py").write_text(
        "import threading\n"
        "three = 3\n"
        "def f(x):\n"
        "    if x:\n"
        "        return x + 1\n"
        "    return 0\n"
        "def g():\n"
        "    thread = threading.Thread(target=f, args=(0,))\n"
        "    thread.start()\n"
        "    thread.join()\n"
    )
    places = [(str(tmp_path / "it.py"), line, 2 + i) for i, line in enumerate((2, 5, 6))]
    marks.with_suffix(".lines").write_text(json.dumps(places))
    (tmp_path / "test_it.py").write_text(
        "import os, it\n"
        "def mark(number):\n"
        "    with open(os.environ['FASTBPTT_MUTANTS_REACHED'], 'r+b') as file:\n"
        "        file.seek(number)\n"
        "        file.write(b'\\1')\n"
        "mark(0)\n"
        "def test_one(): mark(1)\n"
        "def test_another(): pass\n"
        "def test_of_lines(): it.f(1)\n"
        "def test_in_a_thread(): it.g()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mutants_reached", "test_it.py"]
    path = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"FASTBPTT_MUTANTS_REACHED": str(marks), "PYTHONPATH": path}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "reached.json").read_text())
    numbers = {name.rpartition("::")[2]: of for name, (_, of) in found.items()}
    assert numbers == {
        "test_one": [0, 1, 2],
        "test_another": [0, 2],
        "test_of_lines": [0, 2, 3],
        "test_in_a_thread": [0, 2, 4],
    }


def test_mutants_of_python():
    found = list(mutants.of_python("f.py", PYTHON))
    texts = {PYTHON[: m.begin] + m.text + PYTHON[m.end :] for m in found}
    for old, new in (
        ("not names and x", "not names or x"),
        ("x >= 3", "x > 3"),
        ("x >= 3", "x >= 4"),
        ("x + 1", "x - 1"),
        ("x + 1", "x + 2"),
        ("names[0]", "names[1]"),
        ("if not names and x >= 3:", "if not (not names and x >= 3):"),
        ("if names else", "if not (names) else"),
    ):
        assert PYTHON.replace(old, new) in texts
    assert len(texts) == 8


def test_the_sources_have_places_of_every_kind():
    import mutate

    found = mutants.all_of(ROOT, mutate.sources(ROOT))
    of_cpp = {m.kind for m in found if m.is_cpp}
    assert of_cpp == set(mutants.CPP)
    assert {m.kind for m in found if not m.is_cpp} == {"operator", "number", "condition"}
    for mutant in found[::50]:
        text = (ROOT / mutant.path).read_text()
        changed = text[: mutant.begin] + mutant.text + text[mutant.end :]
        if not mutant.is_cpp:
            compile(changed, mutant.path, "exec")
