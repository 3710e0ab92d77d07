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

# Clusters, blocks of each, warps, those that have a pair of a unit and a lane, those that work
# behind the others, steps; then kAhead and kPlaceSteps.
Sizes = tuple[int, int, int, int, int, int, int, int]

KERNELS = ["forward", "backward", "grid-forward", "grid-backward"]
BOTH, ON_GRID, FORWARD, BACKWARD = KERNELS[:2], KERNELS[2:], KERNELS[::2], KERNELS[1::2]


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

# Of one cluster: one block and more; warps that have a pair, work behind, do both, or neither; the
# kernels' own kAhead and kPlaceSteps.
TEAMS = [(1, 1, 2, 2, 2, 8, 2, 4), (1, 1, 3, 2, 1, 8, 2, 4), (1, 1, 4, 3, 3, 5, 2, 4)]
TEAMS += [(1, 1, 5, 2, 2, 8, 3, 5), (1, 1, 1, 1, 1, 8, 2, 5), (1, 1, 3, 2, 2, 40, 3, 8)]
TEAMS += [(1, 2, 1, 1, 1, 8, 2, 4), (1, 2, 2, 2, 1, 8, 3, 5), (1, 2, 3, 2, 2, 8, 2, 4)]
TEAMS += [(1, 2, 4, 2, 1, 8, 2, 4), (1, 3, 2, 2, 2, 8, 3, 5), (1, 4, 4, 3, 2, 8, 2, 4)]
TEAMS += [(1, 8, 2, 2, 1, 4, 2, 4), (1, 2, 3, 2, 1, 40, 3, 8)]
TEAMS_OF_GRIDS = [(2, 1, 2, 2, 2, 8, 2, 4), (3, 1, 3, 2, 1, 8, 2, 4), (6, 1, 2, 2, 1, 4, 2, 4)]
TEAMS_OF_GRIDS += [(2, 2, 2, 2, 1, 8, 2, 4), (2, 2, 3, 2, 2, 8, 2, 4), (3, 2, 4, 2, 1, 4, 2, 4)]
TEAMS_OF_GRIDS += [(2, 2, 3, 2, 1, 40, 3, 8)]
RIGHT = [
    (kernel, sizes)
    for kernel in KERNELS
    for sizes in TEAMS + (TEAMS_OF_GRIDS if kernel.startswith("grid") else [])
]


@pytest.mark.slow(25)
@pytest.mark.parametrize(("kernel", "sizes"), RIGHT, ids=str)
def test_every_order_of_events_is_right(explore, kernel, sizes):
    printed, right = explore(kernel, sizes)
    assert right, printed
    clusters, blocks, warps, _pairs, _behind, steps, *_ = sizes
    of_steps = clusters * blocks * warps * steps
    assert int(printed.split()[0]) > 4 * of_steps  # states: of that many operations a step at least


# Few enough orders that all of them can be looked at.
FEW_ORDERS = {
    "forward": [(1, 1, 2, 2, 2, 5, 1, 3), (1, 1, 2, 1, 1, 6, 2, 4), (1, 2, 1, 1, 1, 4, 1, 3)],
    "backward": [(1, 1, 2, 2, 2, 5, 1, 3), (1, 1, 3, 2, 1, 4, 2, 4), (1, 2, 1, 1, 1, 5, 2, 4)],
    "grid-forward": [(2, 1, 1, 1, 1, 5, 1, 3), (1, 1, 2, 2, 2, 4, 2, 4), (3, 1, 1, 1, 1, 3, 1, 3)],
    "grid-backward": [
        (2, 1, 1, 1, 1, 4, 2, 4),
        (1, 2, 1, 1, 1, 5, 2, 4),
        (1, 1, 2, 2, 2, 4, 2, 4),
    ],
}
FOR_ALL = ["inputs waited for a step later", "one slot of inputs fewer", "no wait for inputs"]
FOR_ALL += ["no sync after the product", "places of one time only", "fetch before the barrier"]
FOR_ALL += ["one buffer of results", "results stored without a barrier", "places a step earlier"]


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
@pytest.mark.parametrize("behind", [1, 2])
def test_more_steps_have_places_than_are_fetched_ahead(explore, kernel, ahead, behind):
    """As tiling.h asserts of kPlaceSteps and kAhead."""
    assert explore(kernel, (1, 1, 2, 2, behind, 12, ahead, ahead + 2))[1]
    printed, right = explore(kernel, (1, 1, 2, 2, behind, 12, ahead, ahead + 1))
    assert not right and printed.startswith("read a place to fetch by (step 1) reads nothing")


# --- What could be done without, and what not -----------------------------------------------------

# One cluster of one block, or more; then more clusters. Warps of one block do either of both, pairs
# or what is behind; or some of them both, of which two are behind.
ALONE, ALONE_BOTH = (1, 1, 3, 2, 1, 8, 2, 4), (1, 1, 3, 3, 2, 8, 2, 4)
TEAM, TEAM_BOTH = (1, 2, 3, 2, 1, 8, 2, 4), (1, 2, 2, 2, 2, 8, 2, 4)
GRID, GRID_BOTH = (2, 1, 3, 2, 1, 8, 2, 4), (3, 1, 2, 2, 2, 8, 2, 4)
PAIRS, PAIRS_BOTH = (2, 2, 3, 2, 1, 8, 2, 4), (2, 2, 2, 2, 2, 8, 2, 4)
CLUSTERS = [ALONE, ALONE_BOTH, TEAM, TEAM_BOTH]
GRIDS = [GRID, GRID_BOTH, PAIRS, PAIRS_BOTH]
OF_TWO = [ALONE_BOTH, TEAM_BOTH], [GRID_BOTH, PAIRS_BOTH]  # behind


def spread(rows):
    """Kernels, sizes (None: all) and what follows, of each row: for each of both."""
    return [
        (kernel, sizes, *rest)
        for kernels, all_sizes, *rest in rows
        for kernel in kernels
        for sizes in all_sizes or (GRIDS if kernel in ON_GRID else CLUSTERS)
    ]


ENOUGH = [
    # What a grid's barrier before its flag is for, it is for what is behind too.
    (["grid-forward"], None, ["one slot of inputs fewer"]),
    (["grid-forward"], None, ["results stored without a barrier"]),
    (["grid-forward"], None, ["no sync at the end"]),
    (["grid-forward"], GRIDS[::2], ["fetch before x is there"]),
    (["grid-forward"], None, ["push before all have read"]),
    # Between the last use of inputs and copies of others is a barrier, or a wait for all pushes.
    ([*ON_GRID, "backward"], None, ["fetch before the barrier"]),
    (["forward"], [ALONE, ALONE_BOTH, TEAM], ["fetch before the barrier"]),
    # One thread computes the places that it stores by.
    (BOTH, CLUSTERS[::2], ["places a step earlier"]),
    (ON_GRID, GRIDS[::2], ["places a step earlier"]),
    # Each sends sums after it has waited for its copies, and all sums are waited for.
    (["backward"], [TEAM_BOTH], ["inputs waited for behind the barrier"]),
    (["grid-backward"], [PAIRS_BOTH], ["inputs waited for behind the barrier"]),
    # The flag says more than that x is there: a block has begun, and has added the partial sums up.
    (ON_GRID, [PAIRS, PAIRS_BOTH], ["no cluster barrier at the start"]),
    (["grid-backward"], [PAIRS, PAIRS_BOTH], ["one buffer at a time"]),
    (["grid-backward"], [PAIRS, PAIRS_BOTH], ["one buffer of partial sums"]),
    (ON_GRID, None, ["each warp waits for the flag", "no sync after the flag"]),
]


@pytest.mark.parametrize(("kernel", "sizes", "changes"), spread(ENOUGH), ids=str)
def test_what_could_be_done_without(explore, kernel, sizes, changes):
    printed, right = explore(kernel, sizes, *changes)
    assert right, printed


NOT_YET = "reads (nothing|254) for"  # 254: padding
OTHERS = r"reads \d+ for"
INPUTS, RESULTS = "read inputs .*", "read results .*"
NO_INPUTS = f"{INPUTS} {NOT_YET}"
PLACES, FETCH_PLACES = "read a place( to store by)? .*", "read a place to fetch by .*"
FAULTS = [
    # A block's warps miss one another.
    (KERNELS, None, "no wait for inputs", NO_INPUTS),
    (KERNELS, None, "inputs waited for a step later", NO_INPUTS),
    (FORWARD, None, "inputs waited for behind the barrier", NO_INPUTS),
    (["backward"], CLUSTERS[:3], "inputs waited for behind the barrier", NO_INPUTS),
    (["grid-backward"], GRIDS[:3], "inputs waited for behind the barrier", NO_INPUTS),
    (BACKWARD, None, "no wait for the first inputs", NO_INPUTS),
    (BACKWARD, None, "no sync after the first inputs", NO_INPUTS),
    ([*BOTH, "grid-backward"], None, "one slot of inputs fewer", f"{INPUTS} {OTHERS}"),
    (["forward"], None, "fetch before x is there", f"{INPUTS} {OTHERS}"),
    (["forward"], [TEAM_BOTH], "fetch before the barrier", f"{FETCH_PLACES} {NOT_YET}"),
    (["grid-forward"], OF_TWO[1], "fetch before x is there", f"{FETCH_PLACES} {NOT_YET}"),
    (KERNELS, None, "places of one time only", f"{PLACES} {OTHERS}"),
    (BOTH, OF_TWO[0], "places a step earlier", f"read a place to store by .* {OTHERS}"),
    (ON_GRID, OF_TWO[1], "places a step earlier", f"read a place to store by .* {OTHERS}"),
    (KERNELS, None, "places a step later", f"{FETCH_PLACES} {NOT_YET}"),
    ([*BOTH, "grid-backward"], None, "results stored without a barrier", f"{RESULTS} {NOT_YET}"),
    (KERNELS, None, "results stored a step later", f"{RESULTS} {OTHERS}"),
    (KERNELS, None, "one buffer of results", f"{RESULTS} {OTHERS}"),
    (["forward"], None, "no sync at the end", f"{RESULTS} {OTHERS}"),
    (FORWARD, None, "sums over the biases", "read biases .* reads 0 for 253"),
    (BOTH, [ALONE_BOTH], "no sync at the start", f"{FETCH_PLACES} {NOT_YET}"),
    (ON_GRID, [GRID_BOTH], "no sync at the start", f"{FETCH_PLACES} {NOT_YET}"),
    (["forward"], [ALONE], "no sync at the start", f"read x .* {NOT_YET}"),
    (["grid-forward"], [GRID], "no sync at the start", f"read x .* {NOT_YET}"),
    (KERNELS, None, "no sync after the product", f"read (inputs|sums) .* {NOT_YET}"),
    (["forward"], CLUSTERS[:2], "no sync before x", "read x .* reads 0 for 1"),
    (["backward"], None, "no sync to publish", f"read x .* {NOT_YET}"),
    # The blocks of a cluster do.
    (BOTH, CLUSTERS[2:], "one buffer at a time", "(push|partial sum) .* lands in another phase"),
    (["forward"], CLUSTERS[2:], "one buffer of pushed x", f"read x .* {OTHERS}"),
    (["backward"], CLUSTERS[2:], "one buffer of partial sums", f"read partial sums .* {OTHERS}"),
    (BOTH, CLUSTERS[2:], "no cluster barrier at the start", "lands in another phase"),
    (BOTH, CLUSTERS[2:], "no announcement", "deadlock"),
    (["forward"], CLUSTERS[2:], "no wait for x", f"read x .* {NOT_YET}"),
    (["forward"], None, "push before all have read", "read (x|sums) .* reads 1 for 0"),
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
    (ON_GRID, None, "the flag waited for one short", f"read global x .* {NOT_YET}"),
    (ON_GRID, None, "flag before the barrier", f"read global x .* {NOT_YET}"),
    (ON_GRID, None, "no sync after the flag", f"read global x .* {NOT_YET}"),
    (ON_GRID, None, "no sync after the copy", f"read x .* {OTHERS}"),
    (ON_GRID, None, "no sync to publish", f"read global x .* {NOT_YET}"),
]


@pytest.mark.parametrize(("kernel", "sizes", "change", "message"), spread(FAULTS), ids=str)
def test_faults_are_found(explore, kernel, sizes, change, message):
    printed, right = explore(kernel, sizes, change)
    first, *warps = printed.splitlines()
    assert not right and re.search(message, first), printed
    assert all(re.match(r"  block \d+ warp \d+: ", line) for line in warps) and warps
