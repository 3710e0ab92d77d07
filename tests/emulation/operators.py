"""The emulated CUDA operators in the place of the CPU's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

import fastbptt


@contextlib.contextmanager
def emulated_operators() -> Iterator[None]:
    """Runs the devices' own operators on CPU tensors by the CUDA kernels, in modules too."""
    library = torch.library.Library("fastbptt", "IMPL")
    limit = fastbptt._C.stack_limit()
    fastbptt._C.set_stack_limit(0)  # what runs a whole stack is the CPU's own
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in ("rnn_fwd", "rnn_bwd", "rnn_jvp_steps", "rnn_bwd_jvp_steps"):
                emulated = getattr(torch.ops.fastbptt_emulated, name).default
                library.impl(name, emulated, "CPU")
        yield
    finally:
        library._destroy()
        fastbptt._C.set_stack_limit(limit)
