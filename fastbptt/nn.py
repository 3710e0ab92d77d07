"""Drop-in modules: torch.nn's constructors, parameters and calls, with truncation beside them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt import autograd
from fastbptt.truncation import Truncation, as_truncation

__all__ = ["RNN"]

_KERNEL_DTYPES = (torch.float32, torch.float64)
_FROM_MODULE: Any = object()  # "the truncation the module was made with"


class _Recurrent(torch.nn.RNNBase):
    """What the recurrent modules share: the call, around the one autograd node that runs it.

    They derive from RNNBase rather than from torch.nn.RNN and its siblings because torch.compile
    refuses every instance of those.
    """

    truncation: Truncation | None

    def __init__(self, mode: str, *args: Any, truncation: Truncation | int | None, **kwargs: Any):
        truncation = as_truncation(truncation)
        super().__init__(mode, *args, **kwargs)
        self.truncation = truncation

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.truncation is None else f"{text}, truncation={self.truncation}"

    def _weights(self) -> list[Tensor]:
        # Asked for by name at every call: a parametrization or functional_call may replace them.
        parameters = self._parameters
        return [
            parameters[name] if name in parameters else getattr(self, name)
            for name in self._flat_weights_names
        ]

    def _has_kernel(self, input: Tensor) -> bool:
        return (
            input.device.type in ("cpu", "meta")
            and input.dtype in _KERNEL_DTYPES
            and not torch._C._is_any_autocast_enabled()
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        truncation: Truncation | int | None = _FROM_MODULE,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs the network over a sequence; shapes as for the torch.nn module of the same name.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, [T, I], or a PackedSequence.
            hx: initial states [num_layers * directions, B, H] ([num_layers * directions, H] for an
                unbatched input); zeros if None.
            truncation: where this call's backward pass is cut, instead of the module's setting.

        Returns:
            output: like ``input``, with H * directions features.
            h_n: final states, like ``hx``.

        Raises:
            ValueError, RuntimeError: as torch.nn's module raises them.
            NotImplementedError: a truncation or nonlinearity for which there is no kernel.
        """
        cut = as_truncation(self.truncation if truncation is _FROM_MODULE else truncation)
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None and sorted_indices is not None:
                hx = hx.index_select(1, sorted_indices)
            output, h_n = self._run(data, batch_sizes, hx, cut)
            if unsorted_indices is not None:
                h_n = h_n.index_select(1, unsorted_indices)
            return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n

        dims = input.dim()
        if dims not in (2, 3):
            name = type(self).__name__
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dims}D tensor instead")
        if hx is not None and hx.dim() != dims:
            kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {dims}-D but got {hx.dim()}-D tensor"
            )
        if dims == 3:
            return self._run(input, None, hx, cut)
        batch_dim = 0 if self.batch_first else 1
        hx = None if hx is None else hx.unsqueeze(1)
        output, h_n = self._run(input.unsqueeze(batch_dim), None, hx, cut)
        return output.squeeze(batch_dim), h_n.squeeze(1)

    def _run(
        self, input: Tensor, batch_sizes: Tensor | None, hx: Tensor | None, cut: Truncation | None
    ) -> tuple[Tensor, Tensor]:
        self.check_input(input, batch_sizes)
        if hx is not None:
            self.check_hidden_size(hx, self.get_expected_hidden_size(input, batch_sizes))
        if not self._has_kernel(input):
            return self._run_torch(input, batch_sizes, hx, cut)
        net = autograd.Network(
            num_layers=self.num_layers,
            directions=2 if self.bidirectional else 1,
            has_biases=self.bias,
            batch_first=self.batch_first and batch_sizes is None,
            nonlinearity=self.nonlinearity,
            dropout=self.dropout if self.training else 0.0,
            chunk=0 if cut is None else cut.k,
        )
        return autograd.run(net, input, hx, batch_sizes, self._weights())

    def _run_torch(
        self, input: Tensor, batch_sizes: Tensor | None, hx: Tensor | None, cut: Truncation | None
    ) -> tuple[Tensor, Tensor]:
        """torch.nn's own computation, where there is no kernel: slower, and without truncation."""
        name = type(self).__name__
        where = f"{str(input.dtype).removeprefix('torch.')} on {input.device.type}"
        if torch._C._is_any_autocast_enabled():
            where += " under autocast"
        if cut is not None:
            raise NotImplementedError(f"fastbptt.{name}: truncation={cut} has no kernel for {where}")
        implementations = {"RNN_TANH": torch._VF.rnn_tanh, "RNN_RELU": torch._VF.rnn_relu}
        if self.mode not in implementations:
            raise NotImplementedError(
                f"fastbptt.{name}: nonlinearity={self.nonlinearity!r} has no kernel for {where}"
            )
        warnings.warn(
            f"fastbptt.{name} has no kernel for {where}: torch.nn.{name} computes instead",
            stacklevel=4,
        )
        if hx is None:
            shape = self.get_expected_hidden_size(input, batch_sizes)
            hx = torch.zeros(shape, dtype=input.dtype, device=input.device)
        options = (
            self._weights(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
        )
        run = implementations[self.mode]
        if batch_sizes is None:
            return run(input, hx, *options, self.batch_first)
        return run(input, batch_sizes, hx, *options)


class RNN(_Recurrent):
    """``torch.nn.RNN`` with fused kernels and truncated backpropagation through time.

    Each layer computes, for every step t of a sequence (Elman, "Finding structure in time", 1990),

        h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    with phi the hyperbolic tangent, the rectifier, or the identity.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
            bidirectional, device, dtype: as for ``torch.nn.RNN``, in the same order;
            ``nonlinearity`` may also be ``"identity"``.
        truncation: where backward passes are cut: None (full), an int k (short for
            ``Chunked(k)``), or a truncation object. Outputs do not depend on it.

    Raises:
        TypeError, ValueError: as torch.nn.RNN, and if ``truncation`` is no truncation.

    Parameters, their names, initialisation and ``state_dict`` are ``torch.nn.RNN``'s.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        truncation: Truncation | int | None = None,
        **kwargs: Any,
    ):
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        # RNNBase knows two modes, by which it sizes the weights alike.
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "identity": "RNN_TANH"}
        if nonlinearity not in modes:
            raise ValueError(
                f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh', 'relu' or 'identity'."
            )
        super().__init__(
            modes[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            *args,
            truncation=truncation,
            **kwargs,
        )
        self.nonlinearity = nonlinearity
        if nonlinearity == "identity":
            self.mode = "RNN_IDENTITY"
