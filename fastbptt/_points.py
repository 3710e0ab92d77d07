"""A network at a place where derivatives of it are taken, and its passes there, below autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbptt import _C as _C  # loading it registers the operators

OptionalTensors = Sequence[Tensor | None]
NOTHING = (None, None, None)  # of output, h_n and c_n

network_fwd = torch.ops.fastbptt.network_fwd.default
network_bwd = torch.ops.fastbptt.network_bwd.default
rnn_fwd = torch.ops.fastbptt.rnn_fwd.default
network_second = torch.ops.fastbptt.network_second.default
rnn_bwd_apart = torch.ops.fastbptt.rnn_bwd_apart.default


@dataclass(frozen=True)
class Net:
    """What a network is besides its tensors; as the operators' arguments of these names.

    Attributes:
        num_weights: of all layers and directions.
        needs: of a pass that gives gradients, whose: input, hx, cx and each weight.
        groups: the gradients of weights are kept apart for so many groups of sequences, where it
            is more than 1: sequence i belongs to group i % groups.
    """

    has_biases: bool
    num_layers: int
    bidirectional: bool
    batch_first: bool
    cell: str
    k1: int
    k2: int
    last_only: bool
    num_weights: int
    needs: tuple[bool, ...] = ()
    groups: int = 1

    def but(self, **changes: Any) -> Net:
        """The same with changes; itself where they change nothing, which takes less time."""
        if all(getattr(self, name) == value for name, value in changes.items()):
            return self
        return replace(self, **changes)

    @property
    def num_results(self) -> int:
        """Output, h_n and, of an LSTM, c_n."""
        return 3 if self.cell == "lstm" else 2

    @property
    def has_gates(self) -> bool:
        """Whether the backward pass needs activations besides the output."""
        return self.cell in ("gru", "lstm")

    @property
    def overlaps(self) -> bool:
        """Whether windows overlap."""
        return self.k2 > self.k1


class Layer(NamedTuple):
    """One layer's part of a point."""

    input: Tensor
    output: Tensor
    c: Tensor
    gates: Tensor
    hx: Tensor | None
    cx: Tensor | None
    weights: tuple[Tensor, ...]


class Point(NamedTuple):
    """Where derivatives are taken, with what the forward pass gave there.

    Attributes:
        net: the rest of the network.
        batch_sizes, resets, kappa: as the operators take them.
        primals: input, hx, cx (or None), and the weights.
        kept: output, then c, then gates of each layer; gates may be empty.
        masks: of the dropout before each layer but the first, or none.
    """

    net: Net
    batch_sizes: Tensor | None
    resets: Tensor | None
    kappa: Tensor | None
    primals: tuple[Any, ...]
    kept: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]

    @property
    def boundaries(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The arguments of an operator that say what a row of the input is."""
        return self.batch_sizes, self.resets, self.kappa

    def states(self, tensors: OptionalTensors, i: int) -> list[Tensor | None]:
        """Layer i's part of [num_layers * directions, B, ...] tensors."""
        count = 2 if self.net.bidirectional else 1
        return [None if t is None else t[i * count : (i + 1) * count] for t in tensors]

    def weights(self, tensors: OptionalTensors, i: int) -> tuple[Any, ...]:
        """Layer i's part of what there is for each weight."""
        count = self.net.num_weights // self.net.num_layers
        return tuple(tensors[i * count : (i + 1) * count])

    def masked(self, tensor: Tensor | None, i: int) -> Tensor | None:
        """What has come up to layer i, or goes down from it, behind the dropout before it."""
        if tensor is None or i == 0 or not self.masks:
            return tensor
        return tensor * self.masks[i - 1]

    def layer(self, i: int) -> Layer:
        """What layer i computed with and gave."""
        L = self.net.num_layers
        input = self.masked(self.primals[0] if i == 0 else self.kept[i - 1], i)
        hx, cx = self.states(self.primals[1:3], i)
        return Layer(
            input,  # type: ignore[arg-type]
            *(self.kept[part * L + i] for part in range(3)),  # type: ignore[arg-type]
            hx,
            cx,
            self.weights(self.primals[3:], i),
        )

    def by_layer(self) -> list[Tensor]:
        """Input, output, c and gates of each layer, as the network's operators take them."""
        return [tensor for i in range(self.net.num_layers) for tensor in self.layer(i)[:4]]

    def has_all_gates(self) -> bool:
        """Whether no activation has to be computed again."""
        first = self.kept[2 * self.net.num_layers]
        return not self.net.has_gates or first.shape[0] > 0

    def num_sequences(self) -> int:
        """B."""
        if self.batch_sizes is not None:
            return int(self.batch_sizes[0])
        return self.primals[0].shape[0 if self.net.batch_first else 1]


def in_dtype(tensors: OptionalTensors, dtype: torch.dtype) -> list[Tensor | None]:
    """The tensors in a dtype: themselves where it is theirs."""
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]


def forward_pass(point: Point) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """h_n, c_n and what is to be kept; what the point has kept is not looked at."""
    net, masks = point.net, point.masks
    input, hx, cx, *weights = point.primals
    if not masks:
        output, h_n, c_n, below, c, gates, _ = network_fwd(
            input,
            hx,
            cx,
            weights,
            net.has_biases,
            net.num_layers,
            net.bidirectional,
            point.batch_sizes,
            net.batch_first,
            net.cell,
            0.0,
            point.resets,
        )
        return h_n, c_n, (*below, output, *c, *gates)
    layers = []
    for i in range(net.num_layers):
        of_layer = rnn_fwd(
            point.masked(input, i),
            *point.states((hx, cx), i),
            point.weights(weights, i),
            net.has_biases,
            point.batch_sizes,
            net.batch_first,
            net.cell,
            True,
            point.resets,
        )
        input = of_layer[0]
        layers.append(of_layer)
    outputs, h_n, c_n, c, gates = zip(*layers, strict=True)
    return torch.cat(h_n), torch.cat(c_n), (*outputs, *c, *gates)


def second_pass(
    point: Point,
    grads: OptionalTensors,
    grads_t: OptionalTensors,
    tangents: OptionalTensors,
    needs: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The tangents of the results along those of the primals, and of the gradients.

    The latter for each primal, where they are needed. Windows must not overlap; every loss counts.

    Args:
        point: where.
        grads: the gradients of the results, and grads_t their tangents.
        tangents: those of the primals.
        needs: for each primal.
    """
    net = point.net
    _, hx, cx, *weights = point.primals
    results = network_second(
        grads,
        grads_t,
        tangents,
        hx,
        cx,
        *point.boundaries,
        weights,
        point.by_layer(),
        point.masks,
        net.has_biases,
        net.num_layers,
        net.bidirectional,
        net.batch_first,
        net.cell,
        net.k1,
        needs,
    )
    of_primals = [t if n else None for t, n in zip(results[3:], needs, strict=True)]
    return results[: net.num_results], of_primals


def _stacked(of_states: list[list[Tensor]], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of hx and cx, from those of each layer."""
    of_kind = zip(*of_states, strict=True)
    return [torch.cat(s) if n else None for s, n in zip(of_kind, needs[1:3], strict=True)]


def apart_pass(point: Point, grads: OptionalTensors, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the primals, with those of weights kept apart by group.

    Windows must not overlap; every loss counts; gates must be there.
    """
    net = point.net
    of_weights: list[Tensor | None] = []
    of_states: list[list[Tensor]] = []
    d = grads[0]
    for i in reversed(range(net.num_layers)):
        d, *states, d_weights = rnn_bwd_apart(
            d,
            *point.states(grads[1:], i),
            *point.layer(i),
            net.has_biases,
            point.batch_sizes,
            net.batch_first,
            net.cell,
            [i > 0 or needs[0], needs[1], needs[2], any(point.weights(needs[3:], i))],
            net.groups,
            net.k1,
            point.resets,
            point.kappa,
        )
        d = point.masked(d, i) if i > 0 else d
        of_states.insert(0, states)
        of_weights = [*d_weights, *of_weights]
    return [d if needs[0] else None, *_stacked(of_states, needs), *of_weights]


def without_windows(point: Point) -> Point:
    """The same with the cuts between windows alone: every loss counts."""
    net = point.net.but(k2=point.net.k1, last_only=False)
    return point if net is point.net else point._replace(net=net)
