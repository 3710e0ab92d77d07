"""Recurrent nets for PyTorch with fused kernels and truncated backpropagation through time."""

import torch  # noqa: F401  (first: the extension links to its libraries)

from fastbptt import _C as _C
from fastbptt import reference
from fastbptt.convert import convert, revert
from fastbptt.functional import gru, lstm, rnn
from fastbptt.nn import GRU, LSTM, RNN
from fastbptt.truncation import Chunked

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Chunked",
    "convert",
    "gru",
    "lstm",
    "reference",
    "revert",
    "rnn",
]
