"""Drop-in modules: torch.nn's constructors, parameters and calls, with truncation beside them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt import _C, ops
from fastbptt.boundaries import Boundaries, boundaries_of
from fastbptt.truncation import Truncation, as_truncation

__all__ = ["GRU", "LSTM", "RNN"]

# The dtypes that have kernels, by device. The meta device has the operators' fakes.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_KERNEL_DTYPES = {"cpu": _DTYPES, "meta": _DTYPES, "cuda": _DTYPES if _C.cuda_built() else ()}
_AUTOCAST_DEVICES = {"cpu", "cuda"}  # where the kernels compute in autocast's dtype
_FROM_MODULE: Any = object()  # "the truncation the module was made with"
_NO_BOUNDARIES = Boundaries()

# torch's own computation of each mode, where there is no kernel.
_TORCH = {
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
    "GRU": torch._VF.gru,
    "LSTM": torch._VF.lstm,
}


class _Recurrent(torch.nn.RNNBase):
    """What the recurrent modules share: the call, around the one operator that runs it.

    They derive from RNNBase rather than from torch.nn.RNN and its siblings because torch.compile
    refuses every instance of those.
    """

    truncation: Truncation | None
    recompute = False
    _num_states = 1  # initial states that a call takes: h, or h and c

    def __init__(self, mode: str, *args: Any, truncation: Truncation | int | None, **kwargs: Any):
        truncation = as_truncation(truncation)
        super().__init__(mode, *args, **kwargs)
        self.truncation = truncation

    @property
    def _cell(self) -> str:
        return self.mode.lower()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.truncation is not None:
            text += f", truncation={self.truncation}"
        return f"{text}, recompute=True" if self.recompute else text

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        truncation: Truncation | int | None = _FROM_MODULE,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs the network over a sequence; shapes as for the torch.nn module of the same name.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, [T, I], or a PackedSequence.
            hx: initial states [num_layers * directions, B, H] ([num_layers * directions, H] for an
                unbatched input); zeros if None.
            truncation: where this call's backward pass is cut, instead of the module's setting.
            resets: bool [T, B], [B, T] with ``batch_first``, or [T]; for a packed input [T, B] in
                its original order. Where it is true, the state that enters step t is zeros, in
                every layer, and the gradient is cut: each stretch between resets runs as if
                alone, in both directions of a bidirectional network.

        Returns:
            output: like ``input``, with H * directions features.
            h_n: final states, like ``hx``.

        Raises:
            TypeError, ValueError: ``truncation`` is no truncation or does not fit the input;
                ``resets`` is no bool tensor or does not fit.
            ValueError, RuntimeError: where torch.nn's module raises them.
            NotImplementedError: a truncation, resets or nonlinearity for which there is no kernel.
        """
        output, (h_n,) = self._call(input, None if hx is None else (hx,), truncation, resets)
        return output, h_n

    def _call(
        self,
        input: Tensor | PackedSequence,
        states: tuple[Tensor, ...] | None,
        truncation: Truncation | int | None,
        resets: Tensor | None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        cut = as_truncation(self.truncation if truncation is _FROM_MODULE else truncation)
        for state in states or ():
            if not isinstance(state, Tensor):
                raise TypeError(f"hx must hold a Tensor for each state, got {type(state).__name__}")
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if states is not None and sorted_indices is not None:
                states = tuple(state.index_select(1, sorted_indices) for state in states)
            output, states = self._run(data, batch_sizes, states, cut, resets, sorted_indices)
            if unsorted_indices is not None:
                states = tuple(state.index_select(1, unsorted_indices) for state in states)
            return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), states

        if not isinstance(input, Tensor):
            raise TypeError(
                f"input must be a Tensor or a PackedSequence, got {type(input).__name__}"
            )
        dims = input.dim()
        if dims not in (2, 3):
            name = type(self).__name__
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dims}D tensor instead")
        if states is not None and (states[0].dim() != dims or states[-1].dim() != dims):
            kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
            got = ", ".join(f"{state.dim()}-D" for state in states)
            names = " and ".join(("hx", "cx")[: len(states)])
            raise RuntimeError(
                f"For {kind} input, {names} should also be {dims}-D but got {got} tensor"
            )
        if dims == 3:
            return self._run(input, None, states, cut, resets)
        batch_dim = 0 if self.batch_first else 1
        states = None if states is None else tuple(state.unsqueeze(1) for state in states)
        input = input.unsqueeze(batch_dim)
        output, states = self._run(input, None, states, cut, resets, unbatched=True)
        return output.squeeze(batch_dim), tuple(state.squeeze(1) for state in states)

    def _run(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        states: tuple[Tensor, ...] | None,
        cut: Truncation | None,
        resets: Tensor | None,
        sorted_indices: Tensor | None = None,
        unbatched: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights = self._weights()
        self._check_input(input, batch_sizes, weights[0].dtype)
        if states is not None:
            self._check_states(input, batch_sizes, states)
        if not self._has_kernel(input):
            return self._run_torch(input, batch_sizes, states, cut, resets)
        dtype = _autocast_dtype(input) if torch._C._is_any_autocast_enabled() else None
        result_dtypes = None
        if dtype is not None:
            if input.device.type == "cpu":
                result_dtypes = self._autocast_results(input, batch_sizes, states, dtype)
            input, *weights = (_cast(tensor, dtype) for tensor in (input, *weights))
            if states is not None:
                states = tuple(_cast(state, dtype) for state in states)
        batch_first = self.batch_first and batch_sizes is None
        bounds = _NO_BOUNDARIES
        if cut is not None or resets is not None:
            bounds = boundaries_of(
                cut,
                resets,
                input,
                batch_sizes,
                sorted_indices,
                batch_first=batch_first,
                unbatched=unbatched,
                bidirectional=self.bidirectional,
            )
        output, h_n, c_n = ops.network(
            input,
            None if states is None else states[0],
            states[1] if states is not None and self._num_states == 2 else None,
            weights,
            self.bias,
            self.num_layers,
            self.bidirectional,
            batch_sizes,
            batch_first,
            self._cell,
            self.dropout if self.training else 0.0,
            bounds.k1,
            bounds.k2,
            bounds.last_only,
            self.recompute,
            bounds.resets,
            bounds.kappa,
        )
        if result_dtypes is not None:
            of_h, of_c = result_dtypes
            output, h_n, c_n = output.to(of_h), h_n.to(of_h), c_n.to(of_c)
        return output, ((h_n,) if self._num_states == 1 else (h_n, c_n))

    def _autocast_results(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        states: tuple[Tensor, ...] | None,
        dtype: torch.dtype,
    ) -> tuple[torch.dtype, torch.dtype] | None:
        """The dtypes of h and c under autocast on a CPU, as torch.nn's; None: those computed.

        On a CPU the products alone are autocast. What is added to a state afterwards has the wider
        dtype of the two, but for oneDNN's LSTM, which autocast gives all of its arguments. Where
        the processor cannot run oneDNN's in autocast's dtype, torch.nn.LSTM fails on float32; then
        results have autocast's dtype, as on other processors.
        """
        if input.dtype == torch.float64:
            return None
        onednn = batch_sizes is None and self.proj_size == 0 and _torch_asks_onednn(input)
        if self.mode == "LSTM" and not onednn:
            c = torch.promote_types((states[1] if states else input).dtype, dtype)
            return (dtype if self.proj_size > 0 else c), c
        if self.mode == "GRU":
            h = torch.promote_types((states[0] if states else input).dtype, dtype)
            return h, h
        return None

    def _check_input(
        self, input: Tensor, batch_sizes: Tensor | None, weight_dtype: torch.dtype
    ) -> None:
        # As RNNBase.check_input, which asks weights that functional_call may have replaced.
        if input.dtype != weight_dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight_dtype}). "
                f"Convert input: input.to({weight_dtype}), "
                f"or convert model: model.to({input.dtype})"
            )
        expected_dims = 3 if batch_sizes is None else 2
        if input.dim() != expected_dims:
            raise RuntimeError(f"input must have {expected_dims} dimensions, got {input.dim()}")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def _check_states(
        self, input: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...]
    ) -> None:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        batch = input.size(0 if self.batch_first else 1) if batch_sizes is None else None
        size = self.proj_size or self.hidden_size
        if states[0].shape == (layers, batch, size) and self._num_states == 1:
            return  # the common case, which need not take long
        expected = self.get_expected_hidden_size(input, batch_sizes)
        if self._num_states == 1:
            return self.check_hidden_size(states[0], expected)
        self.check_hidden_size(states[0], expected, "Expected hidden[0] size {}, got {}")
        expected = (*expected[:2], self.hidden_size)
        self.check_hidden_size(states[1], expected, "Expected hidden[1] size {}, got {}")

    def _weights(self) -> list[Tensor]:
        # Asked for by name at every call: a parametrization or functional_call may replace them.
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:
            return [getattr(self, name) for name in self._flat_weights_names]

    def _has_kernel(self, input: Tensor) -> bool:
        device = "cpu" if input.is_cpu else input.device.type  # is_cpu takes less time
        return input.dtype in _KERNEL_DTYPES.get(device, ()) and (
            device in _AUTOCAST_DEVICES or not torch._C._is_any_autocast_enabled()
        )

    def _run_torch(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        states: tuple[Tensor, ...] | None,
        cut: Truncation | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """torch.nn's own computation, where there is no kernel: slower, and without truncation."""
        name = type(self).__name__
        where = f"{str(input.dtype).removeprefix('torch.')} on {input.device.type}"
        if torch._C._is_any_autocast_enabled():
            where += " under autocast"
        if cut is not None:
            raise NotImplementedError(
                f"fastbptt.{name}: truncation={cut} has no kernel for {where}"
            )
        if resets is not None:
            raise NotImplementedError(f"fastbptt.{name}: resets have no kernel for {where}")
        if self.mode not in _TORCH:
            raise NotImplementedError(
                f"fastbptt.{name}: nonlinearity={self._cell!r} has no kernel for {where}"
            )
        warnings.warn(
            f"fastbptt.{name} has no kernel for {where}: torch.nn.{name} computes instead",
            stacklevel=7,  # the caller's line, beyond Module.__call__
        )
        if states is None:
            shape = self.get_expected_hidden_size(input, batch_sizes)
            shapes = (shape, (*shape[:2], self.hidden_size))[: self._num_states]
            states = tuple(input.new_zeros(shape) for shape in shapes)
        options = (
            self._weights(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
        )
        initial = states if self._num_states == 2 else states[0]
        run = _TORCH[self.mode]
        if batch_sizes is None:
            output, *final_states = run(input, initial, *options, self.batch_first)
        else:
            output, *final_states = run(input, batch_sizes, initial, *options)
        return output, tuple(final_states)


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
        _refuse_projection(kwargs)
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

    @property
    def _cell(self) -> str:
        return self.nonlinearity


class GRU(_Recurrent):
    """``torch.nn.GRU`` with fused kernels and truncated backpropagation through time.

    Each layer computes, for every step t of a sequence (Cho et al., "Learning phrase
    representations using RNN encoder-decoder", 2014; with the reset gate applied after the matrix
    product, as torch does),

        r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n_t = tanh(W_in x_t + b_in + r_t (W_hn h_{t-1} + b_hn))
        h_t = (1 - z_t) n_t + z_t h_{t-1}

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as for ``torch.nn.GRU``, in the same order.
        truncation: where backward passes are cut: None (full), an int k (short for
            ``Chunked(k)``), or a truncation object. Outputs do not depend on it.
        recompute: compute the gates' activations again in the backward pass rather than keep them:
            less memory for about a third more time.

    Raises:
        TypeError, ValueError: as torch.nn.GRU, and if ``truncation`` is no truncation.

    Parameters, their names, initialisation and ``state_dict`` are ``torch.nn.GRU``'s.
    """

    def __init__(
        self,
        *args: Any,
        truncation: Truncation | int | None = None,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, truncation=truncation, **kwargs)
        self.recompute = recompute


class LSTM(_Recurrent):
    """``torch.nn.LSTM`` with fused kernels and truncated backpropagation through time.

    Each layer computes, for every step t of a sequence (Hochreiter and Schmidhuber, "Long
    short-term memory", 1997; Gers et al., "Learning to forget", 2000),

        i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f_t c_{t-1} + i_t g_t
        h_t = o_t tanh(c_t),    or W_hr (o_t tanh(c_t)) with ``proj_size`` > 0 (Sak et al., 2014)

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as for ``torch.nn.LSTM``, in the same order.
        truncation: where backward passes are cut, in h and c alike: None (full), an int k (short
            for ``Chunked(k)``), or a truncation object. Outputs do not depend on it.
        recompute: compute the gates' activations again in the backward pass rather than keep them:
            less memory for about a third more time.

    Raises:
        TypeError, ValueError: as torch.nn.LSTM, and if ``truncation`` is no truncation.

    Parameters, their names, initialisation and ``state_dict`` are ``torch.nn.LSTM``'s.
    """

    _num_states = 2

    def __init__(
        self,
        *args: Any,
        truncation: Truncation | int | None = None,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__("LSTM", *args, truncation=truncation, **kwargs)
        self.recompute = recompute

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        truncation: Truncation | int | None = _FROM_MODULE,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Runs the network over a sequence; shapes as for ``torch.nn.LSTM``.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, [T, I], or a PackedSequence.
            hx: initial states (h_0, c_0), [num_layers * directions, B, H] each (h_0 has proj_size
                features if that is set; without B for an unbatched input); zeros if None.
            truncation: where this call's backward pass is cut, instead of the module's setting.
            resets: bool [T, B], [B, T] with ``batch_first``, or [T]; for a packed input [T, B] in
                its original order. Where it is true, both states that enter step t are zeros, in
                every layer, and the gradient is cut: each stretch between resets runs as if
                alone, in both directions of a bidirectional network.

        Returns:
            output: like ``input``, with H (or proj_size) * directions features.
            (h_n, c_n): final states, like ``hx``.

        Raises:
            TypeError, ValueError: ``truncation`` is no truncation or does not fit the input;
                ``resets`` is no bool tensor or does not fit.
            ValueError, RuntimeError: where torch.nn.LSTM raises them.
            NotImplementedError: a truncation or resets for which there is no kernel.
        """
        check_lstm_states(hx, packed=isinstance(input, PackedSequence))
        return self._call(input, hx, truncation, resets)  # type: ignore[return-value]


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants a call to compute in, as torch.nn does there; None: input's."""
    device = input.device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _torch_asks_onednn(input: Tensor) -> bool:
    """Whether torch hands an LSTM on a CPU to oneDNN; in 16 bits that depends on the processor."""
    if not torch._C._get_mkldnn_enabled() or input.numel() == 0:
        return False
    if input.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if input.dtype == torch.float16:
        return not torch.is_grad_enabled() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)  # autocast leaves float64


def check_lstm_states(hx: object, *, packed: bool = False) -> None:
    """Refuses what is no pair of states, with the exception types of torch.nn.LSTM."""
    wanted = "hx must be None or a pair of Tensors (h_0, c_0), got"
    if isinstance(hx, Tensor):
        error = TypeError if packed else RuntimeError
        raise error(f"{wanted} one Tensor of shape {tuple(hx.shape)}")
    if hx is not None and not isinstance(hx, tuple | list):
        raise TypeError(f"{wanted} {type(hx).__name__}")
    if hx is not None and len(hx) != 2:
        error = TypeError if len(hx) < 2 else RuntimeError
        raise error(f"{wanted} {len(hx)} of them")


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
