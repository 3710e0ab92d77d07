"""When a row's results are right: by their errors against float64, beside those of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..common.workload import Mismatch, Results


def errors_of(found: Results, truth: Results) -> dict[str, float]:
    """The largest error of each result against the truth.

    Raises:
        Mismatch: a result is missing or has another shape.
    """
    if found.keys() != truth.keys():
        raise Mismatch(f"results are {sorted(found)}, those of torch {sorted(truth)}")
    errors = {}
    for name, exact in truth.items():
        got = found[name]
        if got is None or exact is None or got.shape != exact.shape:
            raise Mismatch(f"{name} is {got if got is None else list(got.shape)}")
        errors[name] = (got.double() - exact).abs().max().item()
    return errors


def hold(
    errors: Mapping[str, float],
    peer: Mapping[str, float],
    ulps: Mapping[str, float],
    times: float = 1.0,
) -> float:
    """The rule of the tests: an error is at most twice torch's own, plus 4 ulp of the largest.

    ``times`` so much. Returns the most that any result has of what it is allowed.

    Raises:
        Mismatch: one has more, or is no number.
    """
    most = 0.0
    for name, error in errors.items():
        allowed = times * (2 * peer[name] + 4 * ulps[name])
        if not error <= allowed:  # a NaN is more too
            raise Mismatch(f"{name} is off by {error:.2g}, allowed is {allowed:.2g}")
        most = max(most, error / allowed if allowed > 0 else 0.0)
    return float(f"{most:.3g}")


def larger(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(value, other[name]) for name, value in one.items()}


def without_cudnn(call: Callable[[], Results]) -> Results:
    """torch's own loop over matrix products: cuDNN may leave tf32 unused where it is allowed."""
    allow_tf32 = torch.backends.cudnn.allow_tf32
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=allow_tf32):
        return call()
