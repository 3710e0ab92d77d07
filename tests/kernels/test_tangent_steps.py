"""The CPU's steps of tangent passes, by themselves, against autograd through a loop."""

from __future__ import annotations

import pytest

import tangent_calls

pytestmark = pytest.mark.usefixtures("isa", "poisoned")


@pytest.mark.slow(20)
@pytest.mark.parametrize("steps", tangent_calls.cases(), ids=str)
def test_steps(steps):
    tangent_calls.check_forward(steps, "cpu")
    tangent_calls.check_backward(steps, "cpu")
    tangent_calls.check_backward_of_values(steps, "cpu")
