"""What a short run of the tests leaves out."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from selection import for_a_short_run


def items_of(*parameters, slow=None):
    mark = None if slow is None else SimpleNamespace(args=slow)
    names = [f"p{i}" for i in range(len(parameters))]
    return [
        SimpleNamespace(
            get_closest_marker=lambda name: mark,
            callspec=SimpleNamespace(params=dict(zip(names, values, strict=True))),
        )
        for values in itertools.product(*parameters)
    ]


@pytest.mark.parametrize("counts", [(2, 3, 4), (5, 5, 5, 2), (7, 1, 1)], ids=str)
def test_every_pair_of_values_is_left(counts):
    items = items_of(*(range(count) for count in counts))
    chosen = for_a_short_run(items)
    assert len(chosen) < len(items) or counts == (7, 1, 1)
    for i, j in itertools.combinations(range(len(counts)), 2):
        pairs = {(it.callspec.params[f"p{i}"], it.callspec.params[f"p{j}"]) for it in chosen}
        assert len(pairs) == counts[i] * counts[j]


def test_of_one_parameter_each_value_is_left():
    items = items_of(range(5))
    assert for_a_short_run(items) == items


def test_slow_tests():
    items = items_of(range(10))
    assert for_a_short_run(items_of(range(10), slow=())) == []
    for runs in range(1, 11):
        assert 1 <= len(for_a_short_run(items_of(range(10), slow=(runs,)))) <= runs
    del items[0].callspec
    assert for_a_short_run(items[:1]) == items[:1]
