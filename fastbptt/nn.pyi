"""The modules for type checkers and editors: what constructors take, and what calls return."""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt.truncation import Truncation

__all__ = ["GRU", "LSTM", "RNN"]

_Cut = Truncation | int | None
_Pair = tuple[Tensor, Tensor]
_Device = torch.device | str | int | None

_NOT_GIVEN: Any

class defaults:
    truncation: Truncation | None

class _Recurrent(torch.nn.RNNBase):
    truncation: Truncation | None
    clip_grad: float | None
    recompute: bool
    _run_call: Callable[..., Any]
    @property
    def _cell(self) -> str: ...
    def _weights(self) -> list[Tensor]: ...

class _WithOneState(_Recurrent):
    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = ...,
        *,
        truncation: _Cut = ...,
        resets: Tensor | None = ...,
        return_states: Literal[False] = ...,
        reset_to: Tensor | None = ...,
        clip_grad: float | None = ...,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = ...,
        *,
        truncation: _Cut = ...,
        resets: Tensor | None = ...,
        return_states: Literal[True],
        reset_to: Tensor | None = ...,
        clip_grad: float | None = ...,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = ...,
        *,
        truncation: _Cut = ...,
        resets: Tensor | None = ...,
        return_states: Literal[False] = ...,
        reset_to: Tensor | None = ...,
        clip_grad: float | None = ...,
    ) -> tuple[PackedSequence, Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = ...,
        *,
        truncation: _Cut = ...,
        resets: Tensor | None = ...,
        return_states: Literal[True],
        reset_to: Tensor | None = ...,
        clip_grad: float | None = ...,
    ) -> tuple[PackedSequence, Tensor, Tensor]: ...
    __call__ = forward

class RNN(_WithOneState, torch.nn.RNN):
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu", "identity"] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        truncation: _Cut = ...,
        clip_grad: float | None = None,
    ) -> None: ...

class GRU(_WithOneState, torch.nn.GRU):
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        truncation: _Cut = ...,
        recompute: bool = False,
        clip_grad: float | None = None,
    ) -> None: ...

class LSTM(_Recurrent, torch.nn.LSTM):
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        truncation: _Cut = ...,
        recompute: bool = False,
        clip_grad: float | None = None,
    ) -> None: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: _Pair | None = ...,
        *,
        truncation: _Cut = ...,
        resets: Tensor | None = ...,
        return_states: Literal[False] = ...,
        reset_to: _Pair | None = ...,
        clip_grad: float | None = ...,
    ) -> tuple[Tensor, _Pair]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: _Pair | None = ...,
        *,
        truncation: _Cut = ...,
        resets: Tensor | None = ...,
        return_states: Literal[True],
        reset_to: _Pair | None = ...,
        clip_grad: float | None = ...,
    ) -> tuple[Tensor, _Pair, _Pair]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: _Pair | None = ...,
        *,
        truncation: _Cut = ...,
        resets: Tensor | None = ...,
        return_states: Literal[False] = ...,
        reset_to: _Pair | None = ...,
        clip_grad: float | None = ...,
    ) -> tuple[PackedSequence, _Pair]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: _Pair | None = ...,
        *,
        truncation: _Cut = ...,
        resets: Tensor | None = ...,
        return_states: Literal[True],
        reset_to: _Pair | None = ...,
        clip_grad: float | None = ...,
    ) -> tuple[PackedSequence, _Pair, _Pair]: ...
    __call__ = forward
