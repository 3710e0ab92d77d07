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


@pytest.mark.parametrize(
    ("place", "shape", "word"),
    [
        (0, (2, 5, 2), r"grad_output must have shape \[5, 2, 2\], got \[2, 5, 2\]"),
        (1, (2, 2**40, 2), r"grad_h_n must have shape \[2, 2, 2\], got \[2, 1099511627776, 2\]"),
        (2, (1, 2, 2), r"grad_c_n must have shape \[2, 2, 2\], got \[1, 2, 2\]"),
        (2, (4,), r"grad_c_n must have shape \[2, 2, 2\], got \[4\]"),
    ],
    ids=str,
)
def test_gradients_without_data(place, shape, word):
    """Of a network's backward pass, whose operator is a tracer's alone."""
    calls = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.fastbptt.network_bwd.default:
                calls.append(args)
            return function(*args, **(kwargs or {}))

    net = fastbptt.LSTM(3, 2, num_layers=2)
    with Recording():
        net(torch.randn(5, 2, 3))[0].sum().backward()
    ((*given,),) = calls
    given = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, given)
    assert [d.shape for d in torch.ops.fastbptt.network_bwd.default(*given)][3] == (8, 3)
    given[place] = torch.empty(shape, device="meta")
    with pytest.raises(RuntimeError, match=word):
        torch.ops.fastbptt.network_bwd.default(*given)


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
