"""Interleaved timing: on a noisy machine only ratios taken side by side mean anything."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

MIN_SAMPLE_S = 2e-3  # shorter steps are repeated until a sample is about this long

# A pool's threads spin for some milliseconds after their last work, on cores that the next step
# needs if it has another pool: measured, up to a third of a JAX step's time after one of torch's.
# So a step that is not long runs untimed until they sleep, and its own are awake.
LEAD_S = 5e-3
LONG_S = 0.1


class Step(Protocol):
    """One thing to time: ``run`` alone is on the clock, ``clear`` undoes what it left behind."""

    def clear(self) -> None: ...

    def run(self) -> object: ...


@dataclass(frozen=True)
class Quartiles:
    """The lower quartile, the median and the upper quartile of a sample."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Quartiles by linear interpolation between the values; of one value, that value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def rounded(self, scale: float = 1.0) -> dict[str, float]:
        """As in a record: times ``scale``, five digits."""
        return {name: float(f"{scale * value:.5g}") for name, value in asdict(self).items()}


def ninth_decile(values: Sequence[float]) -> float:
    """The 90th percentile, by linear interpolation; of one value, that value."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1] if values[1:] else values[0]


def paired_ratios(above: Sequence[float], below: Sequence[float]) -> Quartiles:
    """Quartiles of above / below, each pair taken in the same round."""
    return Quartiles.of([a / b for a, b in zip(above, below, strict=True)])


def sample(step: Step, calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds a call of ``step.run``, over some calls; ``step.clear`` is off the clock."""
    total = 0.0
    for _ in range(calls):
        step.clear()
        start = clock()
        step.run()
        total += clock() - start
    return total / calls


def lead_in(
    step: Step, clock: Callable[[], float] = time.perf_counter, seconds: float = LEAD_S
) -> None:
    """Runs ``step`` until other steps' threads have gone to sleep."""
    start = clock()
    while clock() - start < seconds:
        step.clear()
        step.run()


def seconds_a_call(step: Step, clock: Callable[[], float] = time.perf_counter) -> float:
    """About how long ``step`` takes."""
    first = sample(step, 1, clock)
    if first > LONG_S:
        return first
    seconds = sample(step, 1, clock)  # the first call paid for what later ones find ready
    return seconds if seconds > LEAD_S else min(seconds, sample(step, 5, clock))


def orders(names: Iterable[str]) -> Iterator[list[str]]:
    """The names round after round, in changing order; none follows itself into the next round."""
    order, shuffle = list(names), random.Random(0).shuffle
    while True:
        yield order.copy()
        last = order[-1]
        shuffle(order)
        while len(order) > 1 and order[0] == last:
            shuffle(order)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python's collector stays off the clock."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    steps: Mapping[str, Step],
    *,
    min_rounds: int,
    budget_s: float,
    min_sample_s: float = MIN_SAMPLE_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times all steps round after round: seconds a call, one value a step and round.

    A round takes one sample of every step. It goes on until the budget is spent, and for
    ``min_rounds`` at least. The order changes from round to round, and no step follows itself
    from one round into the next. Finding out how long a long step takes is its first sample.
    """
    length = {name: seconds_a_call(step, clock) for name, step in steps.items()}
    calls = {name: math.ceil(min_sample_s / max(length[name], 1e-7)) for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    was_round = max(length.values()) > LONG_S  # then that was a round, but for the short ones
    with no_collection():
        start = clock()
        for name in steps if was_round else ():
            if length[name] < LONG_S:
                lead_in(steps[name], clock)
                seconds[name].append(sample(steps[name], calls[name], clock))
            else:
                seconds[name].append(length[name])
        for rounds, order in enumerate(orders(steps), int(was_round)):
            if rounds >= min_rounds and clock() - start >= budget_s:
                break
            for name in order:
                if length[name] < LONG_S:
                    lead_in(steps[name], clock)
                seconds[name].append(sample(steps[name], calls[name], clock))
    return seconds
