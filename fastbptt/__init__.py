"""Recurrent nets for PyTorch with fused kernels and truncated backpropagation through time."""

import torch  # noqa: F401  (first: the extension links to its libraries)

from fastbptt import _C, reference
from fastbptt.functional import rnn
from fastbptt.nn import RNN
from fastbptt.truncation import Chunked

__version__ = "0.1.0"
__all__ = ["RNN", "Chunked", "reference", "rnn"]
