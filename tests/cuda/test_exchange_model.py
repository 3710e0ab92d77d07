"""The exchange between blocks cannot go wrong, in whatever order things happen; changes are found.

Every interleaving at small sizes is explored, by the model in test_exchange_model.cpp.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def explore(tmp_path_factory):
    """Runs the model; gives what it printed, and whether all went well."""
    program = tmp_path_factory.mktemp("exchange") / "model"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    command += [str(HERE / "test_exchange_model.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)

    def run(kernel: str, sizes: tuple[int, ...], *changes: str) -> tuple[str, bool]:
        arguments = [program, kernel, *map(str, sizes), *changes]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, 2), done.stderr
        return done.stdout, done.returncode == 0

    return run


# Blocks, warps of each, steps and groups of lanes; for the grid's kernel clusters before.
CLUSTER = [(1, 2, 4, 1), (2, 2, 6, 1), (2, 3, 4, 1), (3, 2, 3, 1), (4, 1, 3, 1)]
CLUSTER += [(1, 3, 4, 2), (2, 2, 4, 2), (3, 1, 3, 2)]
GRID = [(2, 1, 2, 5, 1), (3, 1, 2, 4, 1), (4, 1, 1, 3, 1), (1, 2, 2, 4, 1), (2, 2, 1, 4, 1)]
GRID += [(2, 2, 2, 3, 1), (2, 1, 2, 4, 2), (3, 1, 2, 3, 2), (1, 2, 2, 4, 2), (2, 2, 1, 3, 2)]


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [("cluster", sizes) for sizes in CLUSTER] + [("grid", sizes) for sizes in GRID],
    ids=str,
)
def test_every_order_of_events_is_right(explore, kernel, sizes):
    printed, right = explore(kernel, sizes)
    assert right, printed
    assert int(printed.split()[0]) > 50  # states


# What would be enough, and less than the kernel has.
ENOUGH = [
    ("one buffer of partial sums",),
    ("sums shared by the groups",),
    ("each warp waits for all flags", "no sync after flags"),
]


@pytest.mark.parametrize("sizes", [(2, 1, 2, 3, 2), (1, 2, 2, 3, 2), (2, 2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("changes", ENOUGH, ids=" and ".join)
def test_what_a_grid_could_do_without(explore, sizes, changes):
    printed, right = explore("grid", sizes, *changes)
    assert right, printed


FAULTS = [
    ("cluster", (2, 1, 3, 1), "one buffer", "lands in another phase"),
    ("cluster", (1, 2, 2, 1), "no sync after sums", "read sums .* reads nothing for 0"),
    ("cluster", (2, 2, 3, 1), "no sync after sums", "read sums .* reads nothing for 0"),
    ("cluster", (2, 2, 3, 1), "push before all have read", "reads 1 for 0|lands in another phase"),
    ("cluster", (2, 2, 3, 1), "no announcement", "deadlock"),
    ("cluster", (2, 1, 2, 1), "push at the last step", "lands in an ended block"),
    ("cluster", (2, 2, 3, 2), "push at the last step", "lands in an ended block"),
    ("cluster", (1, 2, 2, 2), "sums shared by the groups", "read sums .* reads 1 for 0"),
    ("cluster", (2, 2, 2, 2), "sums shared by the groups", "read sums .* reads 1 for 0"),
    ("cluster", (2, 1, 3, 2), "one buffer", "lands in another phase"),
    ("cluster", (2, 2, 3, 2), "no announcement", "deadlock"),
    ("grid", (2, 1, 1, 3, 1), "one buffer", "read x .* reads 1 for 0"),
    ("grid", (2, 1, 2, 3, 2), "one buffer", "read x .* reads 2 for 0"),
    ("grid", (2, 2, 1, 3, 1), "one buffer", "read x"),
    ("grid", (2, 1, 1, 3, 1), "no wait for the last block's flag", "read x .* reads 0 for 2"),
    ("grid", (2, 1, 2, 3, 2), "no wait for the last block's flag", "read x .* reads . for 5"),
    ("grid", (2, 2, 1, 3, 1), "no wait for the last block's flag", "read x .* reads 0 for 2"),
    ("grid", (2, 1, 2, 2, 1), "no sync after flags", "read x .* reads nothing for 1"),
    ("grid", (1, 1, 2, 2, 1), "no sync after the copy", "read x .* reads nothing for 0"),
    ("grid", (1, 1, 2, 2, 1), "no sync after sums", "read sums .* reads nothing for 0"),
    ("grid", (2, 1, 2, 2, 1), "no sync after x", "read x .* reads nothing for 1"),
    ("grid", (1, 2, 1, 2, 1), "no announcement", "deadlock"),
    ("grid", (2, 2, 1, 2, 2), "no announcement", "deadlock"),
]


@pytest.mark.parametrize(("kernel", "sizes", "fault", "message"), FAULTS, ids=str)
def test_faults_are_found(explore, kernel, sizes, fault, message):
    printed, right = explore(kernel, sizes, fault)
    first, *warps = printed.splitlines()
    assert not right and re.search(message, first), printed
    assert all(re.match(r"  block \d+ warp \d+: ", line) for line in warps) and warps
