"""The operators of a layer's tangents: what tracers and counters know, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from test_operators import CASES, backward_arguments

rnn_jvp = torch.ops.fastbptt.rnn_jvp.default
rnn_bwd_jvp = torch.ops.fastbptt.rnn_bwd_jvp.default
rnn_bwd_apart = torch.ops.fastbptt.rnn_bwd_apart.default
every_case = pytest.mark.parametrize(
    "name", [name for name in CASES if "float16" not in name and "bfloat16" not in name]
)
SHARED = ("input", "output", "c", "gates", "hx", "cx", "weights", "has_biases", "batch_sizes")
LAYOUT = ("batch_first", "cell")


def arguments_of(name: str) -> dict[str, dict[str, object]]:
    """The arguments of each operator, at the same place."""
    given = backward_arguments(CASES[name])
    shared = {key: given[key] for key in (*SHARED, *LAYOUT)}
    shared = {k: tuple(w.detach() for w in v) if k == "weights" else v for k, v in shared.items()}
    grads = {key: given[key] for key in ("grad_output", "grad_h_n", "grad_c_n")}
    generator = torch.Generator().manual_seed(5)

    def like(tensor):
        if tensor is None:
            return None
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    along = {f"{key}_t": like(shared[key]) for key in ("input", "hx", "cx")}
    along["weights_t"] = [like(weight) for weight in shared["weights"]]
    jvp = shared | along
    kept = dict(zip(("output_t", "c_t", "gates_t"), operator_results(jvp), strict=True))
    grads_t = {f"{key}_t": like(grad) for key, grad in grads.items()}
    needs = [True, True, shared["hx"] is not None, shared["cx"] is not None, True]
    return {
        "rnn_jvp": jvp,
        "rnn_bwd_jvp": jvp | kept | grads | grads_t | {"needs": needs},
        "rnn_bwd_apart": shared | grads | {"needs": needs[1:], "groups": 1},
    }


def operator_results(jvp):
    output_t, _, _, c_t, gates_t = rnn_jvp(**jvp)
    return output_t, c_t, gates_t


@every_case
def test_opcheck(name):
    of = arguments_of(name)
    tests = ("test_schema", "test_faketensor")  # derivatives of their own they have none
    for operator in (rnn_jvp, rnn_bwd_jvp, rnn_bwd_apart):
        arguments = of[operator.name().split("::")[1]]
        torch.library.opcheck(operator, (), arguments, test_utils=tests)
    fewer = of["rnn_bwd_jvp"] | {"needs": [False] * 4 + [True], "input_t": None, "weights_t": []}
    torch.library.opcheck(rnn_bwd_jvp, (), fewer, test_utils=tests)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_flops(cell):
    """In products of all rows with the weights, p each of W_ih and of W_hh."""
    name = next(n for n, c in CASES.items() if c.cell == cell and not c.bidirectional)
    jvp = arguments_of(name)["rnn_jvp"]
    w_ih, w_hh = jvp["weights"][:2]
    rows = jvp["input"].shape[:-1].numel()
    p_ih, p_hh = 2 * rows * w_ih.numel(), 2 * rows * w_hh.numel()

    def count(operator, arguments) -> int:
        with FlopCounterMode(display=False) as counter:
            operator(**arguments)
        return counter.get_total_flops()

    assert count(rnn_jvp, jvp) == 2 * p_ih + 2 * p_hh
    assert count(rnn_jvp, jvp | {"weights_t": []}) == p_ih + p_hh
    both = arguments_of(name)["rnn_bwd_jvp"]
    assert count(rnn_bwd_jvp, both) == 5 * p_ih + 5 * p_hh
    assert count(rnn_bwd_jvp, both | {"needs": [False] * 5, "weights_t": []}) == 2 * p_hh
    apart = arguments_of(name)["rnn_bwd_apart"]
    assert count(rnn_bwd_apart, apart) == 2 * p_ih + 2 * p_hh


BAD = {
    "input_t": (lambda a: {"input_t": a["input"][..., :-1]}, "input_t must have shape"),
    "hx_t": (lambda a: {"hx_t": a["hx"].float()}, "hx_t must have input's dtype"),
    "weights_t": (lambda a: {"weights_t": [None]}, "weights_t must be empty or hold one for each"),
    "a weight": (
        lambda a: {"weights_t": [w.new_zeros(1) for w in a["weights"]]},
        r"weights_t\[0\] must have shape",
    ),
    "gates": (lambda a: {"gates": a["gates"][:0]}, "gates must be kept, got none"),
    "dtype": (lambda a: {"input": a["input"].half()}, "input must have dtype float32 or float64"),
    "output": (lambda a: {"output": a["output"][..., :-1]}, "output must have shape"),
    "no sequences": (
        lambda a: {"input": torch.zeros_like(a["input"][:, :0], layout=torch.sparse_coo)},
        "input must be a strided tensor",
    ),
}


def on(device, arguments):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("what", BAD)
def test_bad_tangents(what, device):
    name = next(n for n, c in CASES.items() if c.cell == "gru")
    arguments = on(device, arguments_of(name)["rnn_jvp"])
    change, message = BAD[what]
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        rnn_jvp(**arguments | change(arguments))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_gradients_and_groups(device):
    of = on(device, arguments_of(next(n for n, c in CASES.items() if c.cell == "gru")))
    grads, apart = of["rnn_bwd_jvp"], of["rnn_bwd_apart"]
    for change, message in (
        ({"needs": [True]}, "needs must hold 5 flags"),
        ({"output_t": grads["output_t"][..., :-1]}, "output_t must have shape"),
        ({"grad_output_t": grads["grad_output"][..., :-1]}, "grad_output_t must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            rnn_bwd_jvp(**grads | change)
    for change, message in (
        ({"groups": 0}, "groups must be positive, got 0"),
        ({"groups": 1000}, "each step must have as many sequences of each of 1000 groups"),
        ({"needs": [True]}, "needs must hold 4 flags"),
    ):
        with pytest.raises(RuntimeError, match=message):
            rnn_bwd_apart(**apart | change)


OPERATORS = {"rnn_jvp": rnn_jvp, "rnn_bwd_jvp": rnn_bwd_jvp, "rnn_bwd_apart": rnn_bwd_apart}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("what", ["input", "output", "c", "gates", "weights"])
def test_what_is_missing_is_named_without_data_too(operator, what):
    """The dispatcher lets None pass for a tensor."""
    arguments = arguments_of(next(n for n, c in CASES.items() if c.cell == "lstm"))[operator]
    for device in ("cpu", "meta"):
        given = on(device, arguments)
        given[what] = [] if what == "weights" else None
        with pytest.raises(RuntimeError, match=f"{what} must"):
            OPERATORS[operator](**given)


def test_meta_tensors_of_other_shapes_are_refused():
    arguments = arguments_of(next(n for n, c in CASES.items() if c.cell == "gru"))["rnn_bwd_jvp"]
    given = on("meta", arguments)
    states = [f"{name}_t" for name in ("grad_output", "grad_h_n", "hx")]
    for name in ("input_t", "output_t", "gates_t", "output", "grad_output", *states):
        with pytest.raises(RuntimeError, match=f"{name} must have shape"):
            rnn_bwd_jvp(**given | {name: given[name][..., :-1]})
    for name in ("gates_t", "grad_output_t", "hx_t"):
        with pytest.raises(RuntimeError, match=f"{name} must be on input's device cpu, got meta"):
            rnn_bwd_jvp(**arguments | {name: given[name]})
    weights = [*given["weights_t"]]
    weights[1] = given["weights"][1][:-1]
    with pytest.raises(RuntimeError, match=r"weights_t\[1\] must have shape"):
        rnn_bwd_jvp(**given | {"weights_t": weights})
    message = "weights_t must be empty or hold one for each of 4 weights, got 3"
    with pytest.raises(RuntimeError, match=message):
        rnn_bwd_jvp(**given | {"weights_t": given["weights_t"][:3]})
    for name in ("output_t", "c_t", "gates_t"):
        with pytest.raises(RuntimeError, match=f"{name} must be a tensor"):
            rnn_bwd_jvp(**given | {name: None})
