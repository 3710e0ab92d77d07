"""What runs of a test with many combinations of parameters, where not all of them are asked for."""

from __future__ import annotations

import itertools


def for_a_short_run(items):
    """Of the items of one test, those that do for a short run."""
    if slow := items[0].get_closest_marker("slow"):
        (runs,) = slow.args or (0,)
        return items[:: -(-len(items) // runs)] if runs else []
    return _covering(items) if hasattr(items[0], "callspec") else items


def _covering(items):
    """A few items that have every pair of values of two of the test's parameters.

    Most faults need no more than two parameters to show (Kuhn, Wallace and Gallo 2004, "Software
    fault interactions and implications for software testing"). Greedily: always the item with the
    most pairs that no other has yet.
    """
    pairs_of = []
    for item in items:
        values = [(name, id(value)) for name, value in item.callspec.params.items()]
        pairs_of.append(set(itertools.combinations(values, min(2, len(values)))))
    missing, kept = set().union(*pairs_of), []
    while missing:
        best = max(range(len(items)), key=lambda i: len(pairs_of[i] & missing))
        missing -= pairs_of[best]
        kept.append(items[best])
    return kept
