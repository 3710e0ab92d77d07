"""Networks of the shipped cells against hand-written steps, on every layout and truncation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import brute
import by_hand
import fastbptt
from by_hand import assert_equal
from common import parts
from fastbptt import TBPTT, Chunked, Gated, Randomized, Sliding, cells
from shipped import SHIPPED, uniform

T, B, I, H = 6, 3, 2, 4


@dataclass
class Net:
    """A network of a shipped cell and its data: x, the states and the inputs per step, leaves."""

    name: str
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True

    def __post_init__(self):
        shipped = SHIPPED[self.name]
        generator = torch.Generator().manual_seed(3)
        torch.default_generator.manual_seed(4)

        def given(value):
            shapes = {"unit": (H,), "gate": (shipped.cell.gates, H)}
            if value not in shapes:
                return value
            return torch.nn.Parameter(uniform(generator, *shapes[value]))

        self.step = shipped.step
        self.module = fastbptt.Recurrent(
            shipped.cell,
            I,
            H,
            self.layers,
            bias=self.bias,
            bidirectional=self.bidirectional,
            dtype=torch.float64,
            **{name: given(value) for name, value in shipped.extras.items()},
        )
        count = self.layers * (2 if self.bidirectional else 1)
        self.x = (2 * uniform(generator, T, B, I) - 1).requires_grad_()
        self.hx = [
            (2 * uniform(generator, count, B, H) - 1).requires_grad_()
            for _ in range(shipped.cell.states)
        ]
        self.resets = uniform(generator, T, B) < 0.3
        names = {a: v for a, v in shipped.extras.items() if isinstance(v, str)}
        names = {a: v for a, v in names.items() if v not in ("unit", "gate")}
        self.inputs, self.arguments = {}, names
        for keyword in names.values():
            value = uniform(generator, count, T, B, H) + 0.1
            value = (value < 0.6).double() if keyword in shipped.masks else value
            self.inputs[keyword] = value.requires_grad_()

    @property
    def leaves(self):
        there = {"x": self.x, **self.inputs, **dict(self.module.named_parameters())}
        return there | {f"hx{i}": state for i, state in enumerate(self.hx)}

    def gradients(self, output, last, every):
        """Outputs and gradients by name; a loss in the states, too."""
        return by_hand.gradients(self.leaves, output, last, every)


MODES = {
    "full": None,
    "chunked": Chunked(2),
    "int": 4,
    "windows": TBPTT(2, 4),
    "last": TBPTT(2, 3, "last"),
    "chunks' last": TBPTT(3, 3, "last"),
    "sliding": Sliding(3),
    "gated": Gated(torch.tensor([0.5, 1.0, 0.25, 2.0, 0.0, 0.75])),
    "randomized": Randomized(pi=0.6, per_sequence=True),
}
OVERLAPPING = ("windows", "last", "sliding")  # a network in both directions has none


@pytest.mark.slow(15)
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("mode", MODES)
def test_against_windows_by_hand(name, mode, steps):
    for layers in (1, 2):
        for bidirectional in (False, True):
            truncation = MODES[mode]
            if bidirectional and mode in OVERLAPPING:
                continue
            net = Net(name, layers, bidirectional)
            for resets in (None, net.resets):
                hx = net.hx[0] if len(net.hx) == 1 else tuple(net.hx)
                output, last, every = net.module(
                    net.x,
                    hx,
                    truncation=truncation,
                    resets=resets,
                    return_states=True,
                    **net.inputs,
                )
                got = net.gradients(output, parts(last), parts(every))
                inputs = {a: net.inputs[keyword] for a, keyword in net.arguments.items()}
                want = brute.run(net.module, net.step, net.x, net.hx, truncation, resets, inputs)
                assert_equal(got, net.gradients(*want))


@pytest.mark.slow(15)
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(
    "mode, bidirectional",
    [(m, both) for m in MODES for both in (False, True) if not (both and m in OVERLAPPING)],
)
def test_packed_is_each_sequence_by_hand(name, mode, bidirectional, steps):
    net = Net(name, 2, bidirectional, bias=False)
    lengths, truncation = (3, 6, 5), MODES[mode]
    packed = pack_padded_sequence(net.x, lengths, enforce_sorted=False)
    hx = net.hx[0] if len(net.hx) == 1 else tuple(net.hx)
    options = {"truncation": truncation, "resets": net.resets, "return_states": True}
    output, last, every = net.module(packed, hx, **options, **net.inputs)

    def padded(states):
        """[L*D, N, H] of the packed rows as [L*D, T, B, H]."""
        each = [pad_packed_sequence(output._replace(data=s))[0] for s in states]
        return torch.stack(each)

    got = net.gradients(
        pad_packed_sequence(output)[0], parts(last), [padded(each) for each in parts(every)]
    )
    runs = []
    for b, n in enumerate(lengths):
        its = brute.run(
            net.module,
            net.step,
            net.x[:n, b : b + 1],
            [state[:, b : b + 1] for state in net.hx],
            by_hand.of_sequence(truncation, n, b),
            net.resets[:n, b : b + 1],
            {a: net.inputs[k][:, :n, b : b + 1] for a, k in net.arguments.items()},
        )
        runs.append(its[:3])
    assert_equal(got, net.gradients(*by_hand.joined(runs, T)))


@pytest.mark.slow(10)
@pytest.mark.parametrize("name", SHIPPED)
def test_gradcheck(name, plain):
    net = Net(name, 2)
    names = list(net.leaves)

    def call(*leaves):
        given = dict(zip(names, leaves, strict=True))
        hx = tuple(given.pop(f"hx{i}") for i in range(len(net.hx)))
        x, inputs = given.pop("x"), {keyword: given.pop(keyword) for keyword in net.inputs}
        results = torch.func.functional_call(
            net.module, given, (x, hx if len(hx) > 1 else hx[0]), {"resets": net.resets, **inputs}
        )
        return (results[0], *parts(results[1]))

    leaves = [leaf.detach().clone().requires_grad_() for leaf in net.leaves.values()]
    if name.startswith("held"):  # its mask is a choice, and gets no gradient
        leaves[names.index("mask")].requires_grad_(False)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


PEERS = {"elman": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_built_in_cells_equal_torchs(name, bidirectional, bias, steps):
    net = Net(name, 2, bidirectional, bias)
    options = {"bias": bias, "bidirectional": bidirectional, "dtype": torch.float64}
    peer = PEERS[name](I, H, 2, **options)
    peer.load_state_dict(net.module.state_dict())
    peer_net = Net(name, 2, bidirectional, bias)
    peer_net.module = peer
    results = []
    for each in (net, peer_net):
        hx = each.hx[0] if len(each.hx) == 1 else tuple(each.hx)
        output, last = each.module(each.x, hx)
        results.append(each.gradients(output, parts(last), []))
    assert_equal(*results)


def test_every_cell_is_shown():
    assert set(SHIPPED) == set(cells.__all__) - {"Bernoulli", "Normal"}
    assert {s.cell for s in SHIPPED.values()} == {getattr(cells, name) for name in SHIPPED}
