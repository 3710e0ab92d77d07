"""Drop-in modules: torch.nn's constructors, parameters and calls, with truncation beside them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt import capture, dynamo
from fastbptt._options import as_clip_grad, options_of
from fastbptt.call import call_of_module, check_lstm_states, run
from fastbptt.script import WEIGHTS, Scriptable, ScriptableLSTM
from fastbptt.truncation import Truncation, as_truncation

__all__ = ["GRU", "LSTM", "RNN"]


class _NotGiven:
    """The default of a keyword of a call: the module's setting then, or nothing of the kind.

    torch.onnx's older exporter looks for defaults with ``!=``, and passes them all by position.
    """

    def __ne__(self, other: object) -> bool:
        return other is not inspect.Parameter.empty

    def __repr__(self) -> str:
        return "<not given>"


_NOT_GIVEN: Any = _NotGiven()


class defaults:  # noqa: N801  (a place for values, not a type)
    """What a constructor takes where it is not told."""

    truncation: Truncation | None = None


class _FlatWeights(list):
    """The weights in torch.nn's order, to read: a call takes them by their names."""

    def __init__(self, owner: torch.nn.Module, weights: Iterable[Tensor | None]):
        super().__init__(weights)
        self._owner = type(owner).__name__

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(
            f"fastbptt.{self._owner} takes its weights by name: set weight_hh_l0 and the like, "
            f"not _flat_weights[{index!r}]"
        )


def _check_options(
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    *_: Any,
    **__: Any,
) -> None:
    """What torch.nn's constructors check, but those of older versions do not."""
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not isinstance(size, int):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero, got {size}")
    for name, flag in (("bias", bias), ("batch_first", batch_first)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")


class _Recurrent(Scriptable, torch.nn.RNNBase):
    """What the recurrent modules share; in front of torch.nn's class, whose instances they are."""

    truncation: Truncation | None = None  # of a state saved by a class that had none
    recompute = False
    clip_grad: float | None = None

    def __init__(
        self,
        *args: Any,
        truncation: Truncation | int | None = _NOT_GIVEN,
        clip_grad: float | None = None,
        **kwargs: Any,
    ):
        truncation = defaults.truncation if truncation is _NOT_GIVEN else as_truncation(truncation)
        clip_grad = as_clip_grad(clip_grad)
        takes_nonlinearity = isinstance(self, torch.nn.RNN)  # as its fourth argument
        _check_options(*(args[:3] + args[4:] if takes_nonlinearity else args), **kwargs)
        super().__init__(*args, **kwargs)
        self.truncation = truncation
        self.clip_grad = clip_grad

    @property
    def _cell(self) -> str:
        return self.mode.lower()

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read the weights where they lie.

        torch.nn's, on a GPU, lays them out for cuDNN, which does not know all of these cells.
        """

    def extra_repr(self) -> str:
        return super().extra_repr() + self._extra_settings()

    def _extra_settings(self) -> str:
        """What the constructor takes beside torch.nn's arguments, for ``repr``."""
        text = "" if self.truncation is None else f", truncation={self.truncation}"
        text += "" if self.clip_grad is None else f", clip_grad={self.clip_grad}"
        return f"{text}, recompute=True" if self.recompute else text

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        truncation: Truncation | int | None = _NOT_GIVEN,
        resets: Tensor | None = _NOT_GIVEN,
        return_states: bool = _NOT_GIVEN,
        reset_to: Tensor | None = _NOT_GIVEN,
        clip_grad: float | None = _NOT_GIVEN,
    ) -> tuple:
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
            return_states: whether to return every state of every step too.
            reset_to: what the state is at a reset instead of zeros, with gradients:
                [num_layers * directions, B, H] like ``hx``, or with 1 for B, or for each step
                [num_layers * directions, T, B, H] ([num_layers * directions, B, T, H] with
                ``batch_first``, without B for an unbatched input; for a packed input time first,
                in its original order). Values of step t are those of a reset there, between the
                steps t - 1 and t, which the reverse direction crosses from t to t - 1.
            clip_grad: c > 0 clamps to [-c, c] each number of the gradient that passes from the
                state of a step to that of the one before, or to ``hx`` or ``reset_to``; it is
                clamped first and then multiplied by a truncation's kappa. None: the module's
                setting. (Graves, "Generating sequences with recurrent neural networks", 2013.)

        Returns:
            output: like ``input``, with H * directions features.
            h_n: final states, like ``hx``.
            states, with ``return_states``: [num_layers * directions, T, B, H]
                ([num_layers * directions, B, T, H] with ``batch_first``; without B for an unbatched
                input; [num_layers * directions, N, H] for a packed one, with rows like its data).

        Raises:
            TypeError, ValueError: ``truncation`` is no truncation or does not fit the input;
                ``resets`` is no bool tensor or does not fit; ``reset_to`` is no tensor or does not
                fit, or goes without resets; ``clip_grad`` is no positive number.
            ValueError, RuntimeError: where torch.nn's module raises them.
            NotImplementedError: a truncation, resets or nonlinearity for which there is no kernel;
                ``return_states`` or ``reset_to`` in an export to ONNX.
        """
        initial, options = None if hx is None else (hx,), (return_states, reset_to, clip_grad)
        output, *states = self._call(input, initial, truncation, resets, *options)
        return output, *(each for (each,) in states)

    _scriptable_forward = forward

    def _call(
        self,
        input: Tensor | PackedSequence,
        states: tuple[Tensor, ...] | None,
        truncation: Truncation | int | None,
        resets: Tensor | None,
        return_states: bool,
        reset_to: Tensor | tuple[Tensor, ...] | None,
        clip_grad: float | None,
    ) -> tuple:
        cut = self.truncation if truncation is _NOT_GIVEN else truncation
        if cut is not None:
            cut = as_truncation(cut)
        resets = None if resets is _NOT_GIVEN else resets
        bound = self.clip_grad if clip_grad is _NOT_GIVEN else as_clip_grad(clip_grad)
        options = None
        if return_states is not _NOT_GIVEN or reset_to is not _NOT_GIVEN or bound is not None:
            return_states = False if return_states is _NOT_GIVEN else return_states
            reset_to = None if reset_to is _NOT_GIVEN else reset_to
            options = options_of(return_states, reset_to, bound, resets)
        return self._run_call(call_of_module(self, input, states, cut, resets, options))

    _run_call = staticmethod(run)  # an instance may have another

    # torch.nn computes with a list of its own beside the weights' names, and so has to keep the two
    # in step. Here a call asks the names, and the list is made of them.
    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return _FlatWeights(self, (getattr(self, n, None) for n in self._flat_weights_names))

    @_flat_weights.setter
    def _flat_weights(self, weights: Iterable[Tensor | None]) -> None:
        current = self._flat_weights
        weights = list(weights)
        for index, (weight, named) in enumerate(zip(weights, current, strict=False)):
            if weight is not named and self._flat_weights_names[index] in self._parameters:
                current[index] = weight  # which says why it cannot be
        vars(self)["_flat_weights"] = WEIGHTS

    def __setattr__(self, name: str, value: Any) -> None:
        super(torch.nn.RNNBase, self).__setattr__(name, value)  # whose own keeps them in step

    def _weights(self) -> list[Tensor]:
        # Asked for by name at every call: a parametrization or functional_call may replace them.
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:
            return [getattr(self, name) for name in self._flat_weights_names]


capture.make_leaves(_Recurrent)
dynamo.let_in(_Recurrent)


class RNN(_Recurrent, torch.nn.RNN):
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
        clip_grad: c > 0 clamps the gradient that passes from a step to the one before to [-c, c],
            as ``forward`` says; None: it is as it is. Outputs do not depend on it.

    Raises:
        TypeError, ValueError: as torch.nn.RNN, and if ``truncation`` is no truncation or
            ``clip_grad`` no positive number.

    Parameters, their names, initialisation and ``state_dict`` are ``torch.nn.RNN``'s.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        truncation: Truncation | int | None = _NOT_GIVEN,
        clip_grad: float | None = None,
        **kwargs: Any,
    ):
        if nonlinearity not in ("tanh", "relu", "identity"):
            raise ValueError(
                f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh', 'relu' or 'identity'."
            )
        # torch's knows two, whose weights have the same sizes.
        known = "tanh" if nonlinearity == "identity" else nonlinearity
        options = {"truncation": truncation, "clip_grad": clip_grad}
        super().__init__(input_size, hidden_size, num_layers, known, *args, **options, **kwargs)
        if nonlinearity == "identity":
            self.nonlinearity = nonlinearity
            self.mode = "RNN_IDENTITY"

    @property
    def _cell(self) -> str:
        return self.nonlinearity


class GRU(_Recurrent, torch.nn.GRU):
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
        clip_grad: c > 0 clamps the gradient that passes from a step to the one before to [-c, c],
            as ``forward`` says; None: it is as it is. Outputs do not depend on it.
        recompute: compute the gates' activations again in the backward pass rather than keep them:
            less memory for about a third more time.

    Raises:
        TypeError, ValueError: as torch.nn.GRU, and if ``truncation`` is no truncation or
            ``clip_grad`` no positive number.

    Parameters, their names, initialisation and ``state_dict`` are ``torch.nn.GRU``'s.
    """

    def __init__(
        self,
        *args: Any,
        truncation: Truncation | int | None = _NOT_GIVEN,
        recompute: bool = False,
        clip_grad: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, truncation=truncation, clip_grad=clip_grad, **kwargs)
        self.recompute = recompute


class LSTM(_Recurrent, torch.nn.LSTM):
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
        clip_grad: c > 0 clamps the gradient that passes from a step to the one before to [-c, c],
            as ``forward`` says; None: it is as it is. Outputs do not depend on it.
        recompute: compute the gates' activations again in the backward pass rather than keep them:
            less memory for about a third more time.

    Raises:
        TypeError, ValueError: as torch.nn.LSTM, and if ``truncation`` is no truncation or
            ``clip_grad`` no positive number.

    Parameters, their names, initialisation and ``state_dict`` are ``torch.nn.LSTM``'s.
    """

    def __init__(
        self,
        *args: Any,
        truncation: Truncation | int | None = _NOT_GIVEN,
        recompute: bool = False,
        clip_grad: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, truncation=truncation, clip_grad=clip_grad, **kwargs)
        self.recompute = recompute

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        truncation: Truncation | int | None = _NOT_GIVEN,
        resets: Tensor | None = _NOT_GIVEN,
        return_states: bool = _NOT_GIVEN,
        reset_to: tuple[Tensor, Tensor] | None = _NOT_GIVEN,
        clip_grad: float | None = _NOT_GIVEN,
    ) -> tuple:
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
            return_states, reset_to, clip_grad: as for :class:`RNN`; ``reset_to`` is a pair, of h
                and c, and both gradients are clamped.

        Returns:
            output: like ``input``, with H (or proj_size) * directions features.
            (h_n, c_n): final states, like ``hx``.
            (h, c), with ``return_states``: every state of every step, as for :class:`RNN`.

        Raises:
            TypeError, ValueError: as for :class:`RNN`.
            ValueError, RuntimeError: where torch.nn.LSTM raises them.
            NotImplementedError: as for :class:`RNN`.
        """
        check_lstm_states(hx, packed=isinstance(input, PackedSequence))
        options = (return_states, reset_to, clip_grad)
        return self._call(input, hx, truncation, resets, *options)

    _scriptable_forward = forward
    _script_dense = ScriptableLSTM._script_dense
    _script_packed = ScriptableLSTM._script_packed
