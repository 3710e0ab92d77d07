"""The operators check all their arguments at the call, for tensors with and without data."""

from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fastbptt
from test_operators import ALL

network = torch.ops.fastbptt.network
rnn_fwd, rnn_bwd = torch.ops.fastbptt.rnn_fwd, torch.ops.fastbptt.rnn_bwd
NAN, HUGE = float("nan"), 2**62


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


def arguments(gates: int = 3, layers: int = 2, directions: int = 1, **others) -> dict[str, object]:
    weights = []
    for layer in range(layers):
        for _ in range(directions):
            columns = 3 if layer == 0 else 4 * directions
            weights += [zeros(gates * 4, columns), zeros(gates * 4, 4)]
            weights += [zeros(gates * 4), zeros(gates * 4)]
    weights = [weight.requires_grad_() for weight in weights]
    return {
        "input": zeros(5, 2, 3),
        "hx": zeros(layers * directions, 2, 4),
        "cx": None,
        "weights": weights,
        "has_biases": True,
        "num_layers": layers,
        "bidirectional": directions == 2,
        "batch_sizes": None,
        "batch_first": False,
        "cell": {1: "tanh", 3: "gru", 4: "lstm"}[gates],
        "dropout": 0.0,
    } | others


BAD = [
    ({"k1": 0, "k2": 3}, "k2"),
    ({"k1": -1, "k2": 3}, "k1 must be 0"),
    ({"k1": 4, "k2": 3}, "k2 must be at least k1 = 4, got 3"),
    ({"last_only": True}, "last_only"),
    ({"k1": 2, "k2": 3, "directions": 2}, "k2 must be k1 = 2 for two directions"),
    ({"dropout": -3.0}, "dropout must be a probability, got -3"),
    ({"dropout": 1.5}, "dropout"),
    ({"dropout": NAN}, "dropout"),
    ({"num_layers": 0}, "num_layers must be positive, got 0"),
    ({"num_layers": -1}, "num_layers"),
    ({"num_layers": HUGE}, "weights"),
    ({"num_layers": 3}, "weights"),
    ({"bidirectional": True}, "weights|input"),
    ({"weights": []}, "weights"),
    ({"cell": "relu6"}, "cell"),
    ({"hx": zeros(1, 2, 4)}, "hx must have 3 dimensions, the first of size 2"),
    ({"hx": zeros(2, 3, 4)}, "hx must have shape"),
    ({"hx": zeros(2, 4)}, "hx"),
    ({"cx": zeros(2, 2, 4)}, "cx is for an LSTM only"),
    ({"kappa": zeros(5, 3)}, r"kappa must have shape \[5, 2\], got \[5, 3\]"),
    ({"kappa": zeros(5, 2, dtype=torch.float64)}, "kappa must have dtype"),
    ({"kappa": zeros(5, 2, device="meta")}, "kappa must be on"),
    ({"resets": zeros(5, 3, dtype=torch.bool)}, "resets must have shape"),
    ({"resets": zeros(5, 2)}, "resets must have dtype"),
    ({"input": zeros(())}, "input must have 3 dimensions"),
    ({"input": zeros(5, 3), "kappa": zeros(5, 2)}, "input must have 3 dimensions"),
    ({"input": zeros(5, 2, 3).to_sparse()}, "input must be a strided tensor, got layout Sparse"),
    ({"hx": zeros(2, 2, 4).to_sparse()}, "hx must be a strided tensor"),
    ({"batch_sizes": torch.tensor([2, 2])}, "packed input"),
    ({"input": zeros(4, 3), "batch_sizes": torch.tensor([2, 3])}, "batch_sizes"),
    ({"input": zeros(4, 3), "batch_sizes": torch.tensor([2.0, 2.0])}, "batch_sizes"),
    ({"input": zeros(4, 3), "batch_sizes": torch.tensor([2, 1])}, "batch_sizes"),
]


@pytest.mark.parametrize("bad, word", BAD, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("grad", [False, True])
def test_network(bad, word, grad):
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=word):
        network(**arguments(**bad))


def of_shapes(bad: dict[str, object]) -> bool:
    return "batch_sizes" not in bad and not any(
        isinstance(value, torch.Tensor) and (value.is_meta or value.is_sparse)
        for value in bad.values()
    )


@pytest.mark.parametrize("bad, word", [pair for pair in BAD if of_shapes(pair[0])], ids=str)
def test_network_without_data(bad, word):
    """Fakes, and the meta device, refuse what the kernels refuse."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values = arguments(**bad)
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                values[name] = mode.from_tensor(value) if type(value) is torch.Tensor else value
        values["weights"] = [
            mode.from_tensor(w) if type(w) is torch.Tensor else w for w in values["weights"]
        ]
        with pytest.raises(RuntimeError, match=word):
            network(**values)
    values = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in arguments(**bad).items()
    }
    values["weights"] = [weight.to("meta") for weight in values["weights"]]
    with pytest.raises(RuntimeError, match=word):
        network(**values)


@pytest.fixture(scope="module")
def backward_arguments():
    """Of a network's backward pass, whose operator is a tracer's alone."""
    calls = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.fastbptt.network_bwd.default:
                calls.append(args)
            return function(*args, **(kwargs or {}))

    net = fastbptt.LSTM(3, 2, num_layers=2, dropout=0.5)
    states = torch.zeros(2, 2, 2, requires_grad=True), torch.zeros(2, 2, 2, requires_grad=True)
    with Recording():
        output, ends = net(torch.randn(5, 2, 3), states, resets=torch.zeros(5, 2).bool())
        (output.sum() + ends[0].sum() + ends[1].sum()).backward()
    ((*given,),) = calls
    return given


NAMES = "grad_output grad_h_n grad_c_n hx cx batch_sizes resets kappa weights kept masks".split()


@pytest.mark.parametrize(
    ("name", "part", "shape"),
    [
        ("grad_output", None, (2, 5, 2)),
        ("grad_h_n", None, (2, 2**40, 2)),
        ("grad_c_n", None, (1, 2, 2)),
        ("grad_c_n", None, (4,)),
        ("hx", None, (2, 2**40, 2)),
        ("cx", None, (2, 3, 2)),
        ("resets", None, (5, 3)),
        ("kappa", None, (4, 2)),
        ("weights", 5, (8, 3)),
        ("weights", 4, None),
        ("kept", 2, (1, 11, 2)),
        ("kept", 5, (2, 5, 2)),
        ("kept", 7, None),
        ("masks", 0, (5, 2, 3)),
        ("masks", 0, None),
    ],
    ids=str,
)
def test_a_networks_backward_pass_refuses_without_data_what_it_refuses(
    backward_arguments, name, part, shape
):
    """The same, in the same words."""
    given, place = list(backward_arguments), NAMES.index(name)
    wrong = None if shape is None else torch.zeros([1] * len(shape)).expand(shape)
    if name == "resets":
        wrong = wrong.bool()
    if part is None:
        given[place] = wrong
    elif shape is None:
        given[place] = [*given[place], *given[place][part:]]
    else:
        given[place] = [*given[place]]
        given[place][part] = wrong
    with pytest.raises(
        RuntimeError, match=rf"{name}|(mask|weight_hh|c|output) must have shape"
    ) as real:
        torch.ops.fastbptt.network_bwd.default(*given)
    given = on_meta(given)
    with pytest.raises(RuntimeError) as fake:
        torch.ops.fastbptt.network_bwd.default(*given)
    first, second = (str(each.value).partition("\n")[0] for each in (real, fake))
    assert second == first


def on_meta(arguments):
    return tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, arguments)


def test_a_networks_backward_pass_without_data(backward_arguments):
    def sizes(given):
        return [d.shape for d in torch.ops.fastbptt.network_bwd.default(*given)]

    assert sizes(on_meta(backward_arguments)) == sizes(backward_arguments)
    elsewhere = list(backward_arguments)
    elsewhere[NAMES.index("resets")] = elsewhere[NAMES.index("resets")].to("meta")
    with pytest.raises(RuntimeError, match="resets must be on input's device cpu, got meta"):
        torch.ops.fastbptt.network_bwd.default(*elsewhere)


def test_packed_input_on_the_meta_device_without_a_state():
    """The batch sizes are real there, on the CPU."""
    packed = PackedSequence(zeros(6, 3, device="meta"), torch.tensor([3, 2, 1]))
    for cls in (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM):
        output, states = cls(3, 4, device="meta")(packed)
        assert output.data.shape == (6, 4)
        states = states if isinstance(states, tuple) else (states,)
        assert all(state.shape == (1, 3, 4) for state in states)


def test_any_argument_is_an_error_or_runs():
    """Whatever stands in an argument's place, the process lives."""
    choose = random.Random(0)
    tensors = [zeros(()), zeros(0), zeros(5, 2), zeros(5, 2, 3), zeros(2, 2, 4), zeros(1, 0, 4)]
    tensors += [zeros(5, 2, dtype=torch.bool), torch.tensor([2, 1]), torch.tensor([-1, HUGE])]
    tensors += [zeros(5, 2, 3, device="meta"), zeros(0, 2, 3), zeros(5, 0, 3), zeros(12, 4), None]
    pools = {
        bool: [False, True],
        int: [-HUGE, -1, 0, 1, 2, 3, 7, 2**63 - 1],
        float: [0.0, 0.5, 1.0, -3.0, NAN, float("inf")],
        str: ["tanh", "gru", "lstm", ""],
    }
    ints = {"k1": 0, "k2": 0, "last_only": False}
    ran = 0
    for _ in range(2000):
        gates = choose.choice([1, 3, 4])
        whole = arguments(gates, directions=choose.choice([1, 2]), **ints, recompute=False)
        whole |= {"resets": None, "kappa": None}
        for name in choose.sample(sorted(whole), choose.choice([1, 1, 2])):
            value = whole[name]
            if name == "weights":
                whole[name] = choose.sample(value, choose.randrange(len(value) + 1))
            else:
                whole[name] = choose.choice(pools.get(type(value), tensors))
        try:
            output, h_n, _ = network(**whole)
            if output.requires_grad:
                (output.sum() + h_n.sum()).backward()
            ran += 1
        except (RuntimeError, TypeError, NotImplementedError):
            pass
    assert ran > 200


def test_any_argument_of_a_layer_is_an_error_or_runs():
    choose = random.Random(0)
    base = arguments(3, layers=1)
    forward = {
        name: base[name]
        for name in ("input", "hx", "cx", "has_biases", "batch_sizes", "batch_first", "cell")
    } | {"weights": [weight.detach() for weight in base["weights"]]}
    output, h_n, _, c, gates = rnn_fwd(**forward, keep_gates=True)
    backward = forward | {
        "grad_output": output, "grad_h_n": h_n, "grad_c_n": None, "output": output, "c": c,
        "gates": gates, "needs": [*ALL[:2], False, True], "k1": 2, "k2": 3, "last_only": False,
        "resets": None, "kappa": None, "mask": None, "first_window": 0, "num_windows": 1,
        "grad_by_lane": False, "input_by_lane": False,
    }  # fmt: skip
    tensors = [zeros(()), zeros(0), zeros(5, 2), zeros(5, 2, 3), zeros(1, 2, 4), zeros(3, 4), None]
    tensors += [zeros(5, 2, dtype=torch.bool), torch.tensor([2, 1]), zeros(5, 2, 4, device="meta")]
    pools = {
        bool: [False, True],
        int: [-HUGE, -1, 0, 1, 2, 3, 7, 2**63 - 1],
        str: ["tanh", "gru", "lstm", ""],
    }
    ran = 0
    for operator, whole in ((rnn_fwd, {**forward, "keep_gates": True}), (rnn_bwd, backward)):
        for _ in range(1500):
            values = dict(whole)
            for name in choose.sample(sorted(values), choose.choice([1, 1, 2])):
                value = values[name]
                if isinstance(value, list):
                    values[name] = choose.sample(value, choose.randrange(len(value) + 1))
                else:
                    values[name] = choose.choice(pools.get(type(value), tensors))
            try:
                operator(**values)
                ran += 1
            except (RuntimeError, TypeError, NotImplementedError):
                pass
    assert ran > 200
