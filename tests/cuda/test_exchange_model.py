"""The exchange in persistent kernels cannot go wrong, in whatever order things happen.

Every order at small sizes is explored, by the model in test_exchange_model.cpp. It has the kernels'
operations in their order, and their buffers: a change to either belongs there too.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Clusters, blocks of each, warps, those that have a pair of a unit and a lane, groups of lanes and
# steps; then kAhead and kPlaceSteps.
Sizes = tuple[int, int, int, int, int, int, int, int]

KERNELS = ["forward", "backward", "grid-forward", "grid-backward"]
BOTH, ON_GRID, BACKWARD = KERNELS[:2], KERNELS[2:], KERNELS[1::2]


@pytest.fixture(scope="module")
def explore(tmp_path_factory):
    """Runs the model; gives what it printed, and whether all went well."""
    program = tmp_path_factory.mktemp("exchange") / "model"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{HERE.parents[1] / 'csrc'}"]
    command += [str(HERE / "test_exchange_model.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)

    def run(kernel: str, sizes: Sizes, *changes: str) -> tuple[str, bool]:
        arguments = [program, kernel, *map(str, sizes), *changes]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, 2), done.stderr
        return done.stdout, done.returncode == 0

    return run


# --- What is right --------------------------------------------------------------------------------

# Of one cluster: one block and more, one group and more, warps without a pair; the kernels' own
# kAhead and kPlaceSteps.
TEAMS = [(1, 1, 2, 2, 1, 8, 2, 3), (1, 1, 3, 3, 2, 8, 2, 3), (1, 1, 4, 3, 4, 5, 2, 3)]
TEAMS += [(1, 2, 1, 1, 1, 8, 2, 3), (1, 2, 2, 2, 1, 8, 3, 4), (1, 2, 3, 2, 2, 8, 2, 3)]
TEAMS += [(1, 3, 2, 2, 4, 8, 3, 4), (1, 4, 4, 3, 1, 8, 2, 3), (1, 8, 2, 2, 2, 4, 2, 3)]
TEAMS += [(1, 2, 2, 2, 8, 4, 3, 4), (1, 1, 2, 2, 2, 40, 3, 8), (1, 2, 2, 2, 1, 40, 3, 8)]
TEAMS_OF_GRIDS = [(2, 1, 2, 2, 1, 8, 2, 3), (3, 1, 3, 2, 2, 8, 2, 3), (6, 1, 2, 2, 2, 4, 2, 3)]
TEAMS_OF_GRIDS += [(2, 2, 2, 2, 1, 8, 2, 3), (2, 2, 3, 2, 2, 8, 2, 3), (3, 2, 2, 2, 4, 4, 2, 3)]
TEAMS_OF_GRIDS += [(2, 2, 2, 2, 1, 40, 3, 8)]
RIGHT = [
    (kernel, sizes)
    for kernel in KERNELS
    for sizes in TEAMS + (TEAMS_OF_GRIDS if kernel.startswith("grid") else [])
]


@pytest.mark.parametrize(("kernel", "sizes"), RIGHT, ids=str)
def test_every_order_of_events_is_right(explore, kernel, sizes):
    printed, right = explore(kernel, sizes)
    assert right, printed
    clusters, blocks, warps, _pairs, groups, steps, *_ = sizes
    turns = clusters * blocks * warps * groups * steps
    assert int(printed.split()[0]) > 4 * turns  # states: of that many operations a turn at least


# Few enough orders that all of them can be looked at.
FEW_ORDERS = {
    "forward": [(1, 1, 2, 2, 1, 5, 1, 2), (1, 1, 2, 2, 2, 3, 2, 3), (1, 2, 1, 1, 1, 4, 1, 2)],
    "backward": [(1, 1, 3, 2, 1, 4, 2, 3), (1, 2, 1, 1, 1, 5, 2, 3), (1, 2, 1, 1, 2, 2, 2, 3)],
    "grid-forward": [(2, 1, 1, 1, 1, 5, 1, 2), (1, 1, 2, 2, 2, 3, 2, 3), (3, 1, 1, 1, 1, 3, 1, 2)],
    "grid-backward": [
        (2, 1, 1, 1, 2, 3, 2, 3),
        (1, 2, 1, 1, 1, 5, 2, 3),
        (1, 1, 2, 2, 2, 3, 2, 3),
    ],
}
FOR_ALL = ["inputs waited for a turn later", "one slot of inputs fewer", "no wait for inputs"]
FOR_ALL += ["no sync after the product", "places of one time only", "fetch before the barrier"]


@pytest.mark.parametrize(
    ("kernel", "sizes"), [(k, sizes) for k in KERNELS for sizes in FEW_ORDERS[k]], ids=str
)
def test_orders_that_are_left_out_make_no_difference(explore, kernel, sizes):
    printed, right = explore(kernel, sizes)
    in_full, right_in_full = explore(kernel, sizes, "every order")
    assert right and right_in_full, printed + in_full
    assert int(in_full.split()[0]) > 2 * int(printed.split()[0])
    for change in FOR_ALL:
        found = explore(kernel, sizes, change)[1], explore(kernel, sizes, change, "every order")[1]
        assert found[0] == found[1], change


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ahead", [2, 3])
def test_more_steps_have_places_than_are_fetched_ahead(explore, kernel, ahead):
    """As tiling.h asserts of kPlaceSteps and kAhead."""
    assert explore(kernel, (1, 1, 2, 2, 1, 10, ahead, ahead + 1))[1]
    printed, right = explore(kernel, (1, 1, 2, 2, 1, 10, ahead, ahead))
    assert not right and printed.startswith("read a place to fetch by (step 0, group 0) reads")


# --- What could be done without, and what not -----------------------------------------------------

# One cluster of one block, or more; then more clusters. One group, or two by turns.
ALONE, ALONE_BY_TURNS = (1, 1, 3, 2, 1, 8, 2, 3), (1, 1, 3, 2, 2, 8, 2, 3)
TEAM, TEAM_BY_TURNS = (1, 2, 3, 2, 1, 8, 2, 3), (1, 2, 3, 2, 2, 8, 2, 3)
GRID, GRID_BY_TURNS = (2, 1, 3, 2, 1, 8, 2, 3), (3, 1, 3, 2, 2, 8, 2, 3)
PAIRS, PAIRS_BY_TURNS = (2, 2, 3, 2, 1, 8, 2, 3), (2, 2, 3, 2, 2, 8, 2, 3)
CLUSTERS = [ALONE, ALONE_BY_TURNS, TEAM, TEAM_BY_TURNS]
GRIDS = [GRID, GRID_BY_TURNS, PAIRS, PAIRS_BY_TURNS]


def spread(rows):
    """Kernels, sizes (None: all) and what follows, of each row: for each of both."""
    return [
        (kernel, sizes, *rest)
        for kernels, all_sizes, *rest in rows
        for kernel in kernels
        for sizes in all_sizes or (GRIDS if kernel in ON_GRID else CLUSTERS)
    ]


ENOUGH = [
    # Another turn's barriers are there.
    (["forward"], [ALONE_BY_TURNS], ["no sync before x"]),
    (["backward"], [ALONE_BY_TURNS], ["no sync after the product"]),
    (["grid-backward"], [GRID_BY_TURNS], ["no sync after the product"]),
    (["backward"], CLUSTERS[::2], ["inputs waited for behind the barrier"]),
    (["grid-backward"], GRIDS[::2], ["inputs waited for behind the barrier"]),
    # Between the last use of inputs and the copies of others is a barrier.
    ([*ON_GRID, "backward"], None, ["one slot of inputs fewer"]),
    ([*ON_GRID, "backward"], None, ["fetch before the barrier"]),
    # The product follows the cell.
    (["backward"], None, ["x shared by the groups"]),
    (["grid-backward"], None, ["each group's product behind its cell"]),
    # Flags say more than that x is there: a block has begun, and has added the partial sums up.
    (["grid-backward"], [PAIRS, PAIRS_BY_TURNS], ["no cluster barrier at the start"]),
    (["grid-backward"], [PAIRS, PAIRS_BY_TURNS], ["one buffer at a time"]),
    (ON_GRID, None, ["each warp waits for all flags", "no sync after the flags"]),
]


@pytest.mark.parametrize(("kernel", "sizes", "changes"), spread(ENOUGH), ids=str)
def test_what_could_be_done_without(explore, kernel, sizes, changes):
    printed, right = explore(kernel, sizes, *changes)
    assert right, printed


NOT_YET = "reads (nothing|254) for"  # 254: padding
OTHERS = r"reads \d+ for"
INPUTS = "read inputs .*"
NO_INPUTS = f"{INPUTS} {NOT_YET}"
FAULTS = [
    # A block's warps miss one another.
    (KERNELS, None, "no wait for inputs", NO_INPUTS),
    (KERNELS, None, "inputs waited for a turn later", NO_INPUTS),
    (KERNELS[::2], None, "inputs waited for behind the barrier", NO_INPUTS),
    (["backward"], CLUSTERS[1::2], "inputs waited for behind the barrier", f"{INPUTS} {OTHERS}"),
    (["grid-backward"], GRIDS[1::2], "inputs waited for behind the barrier", NO_INPUTS),
    (BACKWARD, None, "no wait for the first inputs", NO_INPUTS),
    (BACKWARD, None, "no sync after the first inputs", NO_INPUTS),
    (["forward"], None, "one slot of inputs fewer", f"{INPUTS} {OTHERS}"),
    (["forward"], CLUSTERS[1::2], "fetch before the barrier", f"{INPUTS} {OTHERS}"),
    (KERNELS, None, "places of one time only", f"read a place to fetch by .* {OTHERS}"),
    (BOTH, CLUSTERS[:2], "no sync at the start", f"read (a place to fetch by|x) .* {NOT_YET}"),
    (ON_GRID, GRIDS[:2], "no sync at the start", f"read a place to fetch by .* {NOT_YET}"),
    (KERNELS[::2], None, "no sync after the product", f"read (inputs|sums) .* {NOT_YET}"),
    (["backward"], [ALONE, *CLUSTERS[2:]], "no sync after the product", f"read sums .* {NOT_YET}"),
    (["grid-backward"], [GRID, *GRIDS[2:]], "no sync after the product", f"read sums .* {NOT_YET}"),
    (["forward"], CLUSTERS[1::2], "sums shared by the groups", "read sums .* reads 1 for 0"),
    (["backward"], [ALONE_BY_TURNS], "sums shared by the groups", "read sums .* reads 3 for 2"),
    (["grid-backward"], GRIDS[1:2], "sums shared by the groups", "read sums .* reads 3 for 2"),
    (["forward"], [ALONE], "no sync before x", "read x .* reads 0 for 1"),
    (["backward"], None, "no sync to publish", f"read x .* {NOT_YET}"),
    # The blocks of a cluster do.
    (BOTH, CLUSTERS[2:], "one buffer at a time", "(push|partial sum) .* lands in another phase"),
    (BOTH, CLUSTERS[2:], "no cluster barrier at the start", "lands in another phase"),
    (BOTH, CLUSTERS[2:], "no announcement", "deadlock"),
    (["forward"], CLUSTERS[2:], "no wait for x", f"read x .* {NOT_YET}"),
    (["forward"], CLUSTERS[::2], "push before all have read", "read (x|sums) .* reads 1 for 0"),
    (["forward"], CLUSTERS[2:], "push at the last step", "push .* lands in an ended block"),
    (["backward"], CLUSTERS[2:], "no wait for partial sums", f"read partial sums .* {NOT_YET}"),
    (["backward"], CLUSTERS[2:], "send before all have added", f"read sums .* {NOT_YET}"),
    (["backward"], CLUSTERS[2:], "sums sent at the last step", "partial sum .* in an ended block"),
    (["grid-backward"], GRIDS[2:], "no announcement", "deadlock"),
    (["grid-backward"], GRIDS[2:], "no wait for partial sums", f"read partial sums .* {NOT_YET}"),
    (["grid-backward"], GRIDS[2:], "send before all have added", f"read sums .* {NOT_YET}"),
    (["grid-backward"], GRIDS[2:], "sums sent at the last step", "partial sum .* an ended block"),
    # Those of a grid do.
    (ON_GRID, None, "one buffer of x", f"read global x .* {OTHERS}"),
    (ON_GRID, None, "no wait for the last block's flag", f"read global x .* {NOT_YET}"),
    (ON_GRID, None, "flag before the barrier", f"read global x .* {NOT_YET}"),
    (ON_GRID, None, "no sync after the flags", f"read global x .* {NOT_YET}"),
    (ON_GRID, None, "no sync after the copy", f"read x .* {NOT_YET}"),
    (ON_GRID, None, "no sync to publish", f"read (global x|inputs) .* {NOT_YET}"),
]


@pytest.mark.parametrize(("kernel", "sizes", "change", "message"), spread(FAULTS), ids=str)
def test_faults_are_found(explore, kernel, sizes, change, message):
    printed, right = explore(kernel, sizes, change)
    first, *warps = printed.splitlines()
    assert not right and re.search(message, first), printed
    assert all(re.match(r"  block \d+ warp \d+: ", line) for line in warps) and warps
