"""What ``torch.jit.script`` makes of the recurrent modules: TorchScript, and the operator in it.

TorchScript knows neither truncations nor one ``forward`` for Tensors and PackedSequences. So the
modules' ``forward`` has two forms here, one for each, in the part of Python that TorchScript has;
what ``forward`` asks of a truncation stands in them as constants, from the moment of scripting.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt import autocast
from fastbptt.truncation import Windowed, as_truncation

# TorchScript looks for attributes in an instance's __dict__. With this under a property's name it
# knows the property's type, and takes its value.
WEIGHTS = torch.jit.Attribute([], list[Tensor])


class Scriptable:
    """What a recurrent module shows to ``torch.jit.script``, beside torch.nn.RNNBase's own.

    A scripted module computes as the module did when it was scripted: the truncation is that of
    the module, and there are no ``resets`` nor a call's other keywords. As with torch.nn's, it is
    called from TorchScript, as a part of a scripted model.
    """

    __constants__ = [
        *torch.nn.RNNBase.__constants__,
        "recompute",
        "_cell",
        "_windows",
        "_unscriptable",
    ]
    __jit_ignored_attributes__ = ["truncation", "clip_grad"]
    __jit_unused_properties__ = [
        *torch.nn.RNNBase.__jit_unused_properties__,
        "__overloads__",
        "_cell",
        "_flat_weights",
        "_windows",
        "_unscriptable",
    ]

    @property
    def __overloads__(self) -> dict[str, list[str]]:
        if getattr(self.forward, "__func__", None) is not type(self)._scriptable_forward:
            return {}  # a subclass's own, which TorchScript takes as it is, or refuses
        return {"forward": ["_script_dense", "_script_packed"]}

    @__overloads__.setter
    def __overloads__(self, value: Any) -> None:
        pass  # scripting writes back what it has read

    @property
    def _windows(self) -> tuple[int, int, bool]:
        cut = as_truncation(self.truncation)
        return (cut.k1, cut.k2, cut.last_only) if isinstance(cut, Windowed) else (0, 0, False)

    @property
    def _unscriptable(self) -> str:
        """Why the module cannot be scripted, or nothing; no error, as tracing asks too."""
        name, cut = type(self).__name__, as_truncation(self.truncation)
        if cut is not None and not isinstance(cut, Windowed):
            return (
                f"fastbptt.{name}: truncation={cut} cannot be scripted; fastbptt.revert(model) "
                "gives torch.nn's modules, which can, without it"
            )
        if self.clip_grad is not None:
            return (
                f"fastbptt.{name}: clip_grad={self.clip_grad} cannot be scripted; set "
                "module.clip_grad = None before"
            )
        computed = [each for each in self._flat_weights_names if each not in self._parameters]
        if computed:  # they would stay what they are at the moment of scripting
            return (
                f"fastbptt.{name}: {', '.join(computed)} cannot be scripted, being computed from "
                "other parameters; torch.nn.utils.parametrize.remove_parametrizations ends that"
            )
        return ""

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_flat_weights", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self)["_flat_weights"] = WEIGHTS

    def __prepare_scriptable__(self) -> "Scriptable":
        if self._unscriptable:
            raise NotImplementedError(self._unscriptable)
        return self

    # From here on TorchScript.

    def _script_run(
        self, input: Tensor, batch_sizes: Tensor | None, h: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._unscriptable != "":
            raise NotImplementedError(self._unscriptable)  # a part of a ScriptModule comes here
        k1, k2, last_only = self._windows
        if self.bidirectional and k1 < k2:
            raise ValueError(
                "truncation has windows that overlap (k1 < k2), which a bidirectional network "
                "cannot have"
            )
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        if h is not None:
            self.check_hidden_size(h, expected, "Expected hidden[0] size {}, got {}")
        if c is not None:
            expected = (expected[0], expected[1], self.hidden_size)
            self.check_hidden_size(c, expected, "Expected hidden[1] size {}, got {}")
        weights = self._flat_weights
        dtype = autocast.product_dtype(input)
        wanted: tuple[torch.dtype, torch.dtype] | None = None
        if dtype is not None:
            last = c if c is not None else h if h is not None else input
            wanted = autocast.result_dtypes(
                self.mode, input, last.dtype, batch_sizes is not None, self.proj_size, dtype
            )
            weights = [autocast.cast(weight, dtype) for weight in weights]
            input = autocast.cast(input, dtype)
            if h is not None:
                h = autocast.cast(h, dtype)
            if c is not None:
                c = autocast.cast(c, dtype)
        output, h_n, c_n = torch.ops.fastbptt.network(
            input,
            h,
            c,
            weights,
            self.bias,
            self.num_layers,
            self.bidirectional,
            batch_sizes,
            self.batch_first and batch_sizes is None,
            self._cell,
            self.dropout if self.training else 0.0,
            k1,
            k2,
            last_only,
            self.recompute,
        )
        if wanted is not None:
            of_h, of_c = wanted
            return output.to(of_h), h_n.to(of_h), c_n.to(of_c)
        return output, h_n, c_n

    def _script_batched(
        self, input: Tensor, h: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A call with a Tensor, which may have no batch."""
        dims = input.dim()
        if dims != 2 and dims != 3:
            raise ValueError(f"Expected input to be 2D or 3D, got {dims}D tensor instead")
        for state in (h, c):
            if state is not None and state.dim() != dims:
                raise RuntimeError(
                    f"For {dims}-D input, hx should also be {dims}-D but got {state.dim()}-D tensor"
                )
        if dims == 3:
            return self._script_run(input, None, h, c)
        batch_dim = 0 if self.batch_first else 1
        if h is not None:
            h = h.unsqueeze(1)
        if c is not None:
            c = c.unsqueeze(1)
        output, h_n, c_n = self._script_run(input.unsqueeze(batch_dim), None, h, c)
        return output.squeeze(batch_dim), h_n.squeeze(1), c_n.squeeze(1)

    def _script_ordered(
        self, input: PackedSequence, h: Tensor | None, c: Tensor | None
    ) -> tuple[PackedSequence, Tensor, Tensor]:
        """A call with a PackedSequence; the states are in the order of the batch."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if sorted_indices is not None:
            if h is not None:
                h = h.index_select(1, sorted_indices)
            if c is not None:
                c = c.index_select(1, sorted_indices)
        output, h_n, c_n = self._script_run(data, batch_sizes, h, c)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            if self.mode == "LSTM":
                c_n = c_n.index_select(1, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n, c_n

    @torch.jit.export
    def _script_dense(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, h_n, _ = self._script_batched(input, hx, None)
        return output, h_n

    @torch.jit.export
    def _script_packed(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]:
        output, h_n, _ = self._script_ordered(input, hx, None)
        return output, h_n


class ScriptableLSTM:
    """The two forms for an LSTM, whose states are a pair."""

    @torch.jit.export
    def _script_dense(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = hx if hx is not None else (None, None)
        output, h_n, c_n = self._script_batched(input, h, c)
        return output, (h_n, c_n)

    @torch.jit.export
    def _script_packed(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        h, c = hx if hx is not None else (None, None)
        output, h_n, c_n = self._script_ordered(input, h, c)
        return output, (h_n, c_n)
