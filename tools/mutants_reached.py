"""A plugin of pytest's for tools/mutate.py: the mutants that each test comes by.

The library marks those of C++ in the file that FASTBPTT_MUTANTS_REACHED names, those of its child
processes too. Those of Python are marked here, as their lines run in this process: beside that file
lies one with the ending .lines, a list of paths, lines and numbers. With the ending .json is then
written for each test how many seconds it took and the numbers of its mutants.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

PATH = Path(os.environ["FASTBPTT_MUTANTS_REACHED"])
with PATH.open("r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
of_lines: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
for path, line, number in json.loads(PATH.with_suffix(".lines").read_text()):
    of_lines[path][line].append(number)
at_import: set[int] = set()
found: dict[str, tuple[float, list[int]]] = {}


def reached() -> list[int]:
    return [number for number, mark in enumerate(memory[:]) if mark]


def mark_lines(frame, event, argument):
    """What ``sys.settrace`` calls for each function, and for the lines of files with mutants."""
    path = frame.f_code.co_filename
    if path not in of_lines:
        return None
    for number in of_lines[path].get(frame.f_lineno, ()):
        memory[number] = 1
    return mark_lines


def trace() -> None:
    sys.settrace(mark_lines)
    threading.settrace(mark_lines)


trace()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    trace()  # a test may have ended it
    if not found:
        at_import.update(reached())
    memory[:] = bytes(len(memory))
    begin = time.monotonic()
    result = yield
    found[item.nodeid] = (time.monotonic() - begin, reached())
    return result


def pytest_sessionfinish():
    # What importing comes by, every test does.
    each = {
        name: (took, sorted(at_import.union(numbers))) for name, (took, numbers) in found.items()
    }
    PATH.with_suffix(".json").write_text(json.dumps(each))
