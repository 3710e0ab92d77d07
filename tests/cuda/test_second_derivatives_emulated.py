"""Second derivatives of modules by the emulated CUDA kernels."""

from __future__ import annotations

import pytest
import torch

import cuda_calls
from common import assert_matches
from test_second_derivatives import (  # noqa: F401  (run here once more, over the CUDA kernels)
    test_every_cell_and_window,
    test_forward_mode,
    test_gradients_share_no_memory,
    test_only_what_is_asked_for,
    test_random_calls,
)

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poisoned")


@pytest.mark.parametrize("call", cuda_calls.TWICE, ids=str)
def test_second_derivatives(call):
    expected = cuda_calls.second_derivatives_by_reference(call)
    assert_matches(cuda_calls.second_derivatives(call), expected, rtol=1e-10)


def test_the_kernels_are_the_emulated_ones():
    with torch.profiler.profile() as profile:
        cuda_calls.second_derivatives(cuda_calls.TWICE[0])
    ran = {event.name for event in profile.events()}
    assert {f"fastbptt_emulated::{name}" for name in ("rnn_jvp_steps", "rnn_bwd_jvp_steps")} <= ran
