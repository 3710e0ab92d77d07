"""A plugin of pytest's for tools/mutate.py: the mutants of C++ that each test comes by.

The library marks them in the file that FASTBPTT_MUTANTS_REACHED names, those of its child processes
too. Beside that file, with the ending .json, is then written for each test how many seconds it took
and the numbers of its mutants.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from pathlib import Path

import pytest

PATH = Path(os.environ["FASTBPTT_MUTANTS_REACHED"])
with PATH.open("r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
at_import: set[int] = set()
found: dict[str, tuple[float, list[int]]] = {}


def reached() -> list[int]:
    return [number for number, mark in enumerate(memory[:]) if mark]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
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
