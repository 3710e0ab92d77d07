"""Recurrent nets for PyTorch with fused kernels and truncated backpropagation through time."""

from fastbptt import _builds as _builds  # first: it finds the _C module for this torch

# isort: split
from fastbptt import _C as _C
from fastbptt import _network_bwd as _network_bwd  # the operator's derivatives are registered
from fastbptt import _tangent_fakes as _tangent_fakes
from fastbptt import cells, diagnostics, reference
from fastbptt import flops as flops  # its formulas are registered
from fastbptt import quantize as quantize  # so that torch.ao.quantization knows the modules
from fastbptt.adaptive import AdaptiveTruncation
from fastbptt.boundaries import resets_from_dones
from fastbptt.cell import cell
from fastbptt.convert import convert, revert
from fastbptt.functional import gru, lstm, rnn
from fastbptt.nn import GRU, LSTM, RNN
from fastbptt.normalization import layer_norm
from fastbptt.ops import get_workspace_limit, set_workspace_limit
from fastbptt.patch import patch
from fastbptt.recurrent import Recurrent
from fastbptt.truncation import TBPTT, Chunked, Gated, Randomized, Sliding

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "TBPTT",
    "AdaptiveTruncation",
    "Chunked",
    "Gated",
    "Randomized",
    "Recurrent",
    "Sliding",
    "cell",
    "cells",
    "convert",
    "diagnostics",
    "get_workspace_limit",
    "gru",
    "layer_norm",
    "lstm",
    "patch",
    "reference",
    "resets_from_dones",
    "revert",
    "rnn",
    "set_workspace_limit",
]
