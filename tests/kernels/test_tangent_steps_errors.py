"""What the operators of the steps of tangent passes refuse, on any device, before they read."""

from __future__ import annotations

import pytest
import torch

T, B, H = 3, 2, 4


def common(cell: str) -> dict[str, object]:
    gates = {"gru": 3, "lstm": 4}.get(cell, 1)
    N, none = T * B, 0 if cell == "tanh" else T * B
    return {
        "output": torch.randn(N, H),
        "c": torch.randn(N if cell == "lstm" else 0, H),
        "gates": torch.rand(none, 4 * H),
        "before": torch.randn(none, H),
        "gate": None,
        "w_hh": torch.randn(gates * H, H),
        "w_hr": None,
        "batch_sizes": None,
        "T": T,
        "batch_first": False,
        "reverse": False,
        "cell": cell,
    }


def forward(cell: str) -> dict[str, object]:
    columns = 1 if cell == "tanh" else 4
    others = {"projected": None, "hx_t": None, "cx_t": None}
    return common(cell) | others | {"pre": torch.randn(T * B, columns * H)}


def backward(cell: str) -> dict[str, object]:
    names = ("d_output", "d_h_n", "d_c_n")
    grads = {name + end: None for name in names for end in ("", "_t")}
    kept = {f"{name}_t": None for name in ("output", "c", "gates", "before")}
    return common(cell) | grads | kept | {"needs_states": True}


PASSES = {
    "forward": (torch.ops.fastbptt.rnn_jvp_steps.default, forward),
    "backward": (torch.ops.fastbptt.rnn_bwd_jvp_steps.default, backward),
}
BOTH = [
    ("gru", {"T": 0}, "T must be positive, got 0"),
    ("gru", {"T": 4}, "output must have as many rows for each of 4 steps, got 6"),
    ("gru", {"output": torch.randn(T * B, 0)}, "output must have 2 dimensions and columns"),
    ("gru", {"output": torch.randn(T * B)}, "output must have 2 dimensions and columns"),
    ("gru", {"output": torch.randn(0, H)}, "gates must have shape"),
    ("gru", {"output": torch.randn(T * B, H).half()}, "must have dtype float32 or float64"),
    ("gru", {"gates": torch.randn(T * B, H)}, "gates must have shape"),
    ("gru", {"before": torch.randn(T, H)}, "before must have shape"),
    ("gru", {"gate": torch.randn(T)}, "gate must have shape"),
    ("gru", {"w_hh": torch.randn(5, H)}, "w_hh must have shape"),
    ("gru", {"w_hr": torch.randn(H, H)}, "w_hr is for an LSTM only"),
    ("gru", {"batch_sizes": torch.tensor([2, 2, 1])}, "a packed input must have sum"),
    ("gru", {"batch_sizes": torch.tensor([3, 3])}, "T must be 2 as in batch_sizes, got 3"),
    ("lstm", {"c": torch.randn(T, H)}, "c must have shape"),
    ("lstm", {"c": torch.randn(T * B, H + 1)}, "c must have 4 columns without w_hr, got 5"),
    ("lstm", {"w_hr": torch.randn(H, H + 1)}, "w_hr must have shape"),
    ("tanh", {"cell": "elman"}, "cell must be an Elman cell's nonlinearity"),
]
ONE = {
    "forward": [
        ("gru", {"pre": torch.randn(T * B, 3 * H)}, "pre must have shape"),
        ("gru", {"projected": torch.randn(T * B, H)}, "projected goes with w_hr"),
        ("gru", {"hx_t": torch.randn(B, H + 1)}, "hx_t must have shape"),
        ("gru", {"w_hh": torch.randn(6 * H, H)}, "w_hh must have shape"),
        ("lstm", {"cx_t": torch.randn(1, H)}, "cx_t must have shape"),
    ],
    "backward": [
        ("gru", {"d_output": torch.randn(T, H)}, "d_output must have shape"),
        ("gru", {"d_output_t": torch.randn(T, H)}, "d_output_t must have shape"),
        ("gru", {"output_t": torch.randn(T * B, H).double()}, "output_t must have input's dtype"),
        ("gru", {"gates_t": torch.randn(T * B, H)}, "gates_t must have shape"),
        ("gru", {"before_t": torch.randn(T, H)}, "before_t must have shape"),
        ("gru", {"d_h_n": torch.randn(B + 1, H)}, "d_h_n must have shape"),
        ("lstm", {"d_c_n": torch.randn(B, 1)}, "d_c_n must have shape"),
        ("lstm", {"c_t": torch.randn(T, H)}, "c_t must have shape"),
    ],
}
BAD = [(name, *each) for name in PASSES for each in (*BOTH, *ONE[name])]


@pytest.mark.parametrize("name, cell, change, message", BAD)
def test_bad_steps(name, cell, change, message):
    operator, arguments = PASSES[name]
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        operator(**arguments(cell) | change)


def on_meta(arguments):
    """All but the batch sizes, which are read."""
    return {
        k: v.to("meta") if isinstance(v, torch.Tensor) and k != "batch_sizes" else v
        for k, v in arguments.items()
    }


@pytest.mark.parametrize("name, cell, change, message", BAD)
def test_bad_steps_without_data(name, cell, change, message):
    operator, arguments = PASSES[name]
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        operator(**on_meta(arguments(cell) | change))


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("name", PASSES)
def test_steps_on_two_devices(name, cell):
    operator, arguments = PASSES[name]
    given = arguments(cell)
    operator(**on_meta(given))
    with pytest.raises(RuntimeError, match="w_hh must be on input's device cpu, got meta"):
        operator(**given | {"w_hh": given["w_hh"].to("meta")})


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("name", PASSES)
def test_good_steps(name, cell):
    operator, arguments = PASSES[name]
    for result in operator(**arguments(cell)):
        assert result.isfinite().all()


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("name", PASSES)
def test_no_sequences(name, cell):
    operator, arguments = PASSES[name]
    of_rows = ("output", "c", "gates", "before", "pre")
    given = {k: v[:0] if k in of_rows else v for k, v in arguments(cell).items()}
    assert all(result.numel() == 0 for result in operator(**given))


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("which", PASSES)
def test_opcheck(which, cell):
    operator, arguments = PASSES[which]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (), arguments(cell), test_utils=tests)
    if which == "backward":
        without = arguments(cell) | {"needs_states": False}
        torch.library.opcheck(operator, (), without, test_utils=tests)
