"""What a compiled cell's layer is given: errors that name it, and that nothing of it is kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import fastbptt
from cells.programs import CASES, leaky
from fastbptt import _C, Recurrent, cells
from test_compiled import arguments, compiled

pytestmark = pytest.mark.usefixtures("compiler")

T, B, I, H = 5, 3, 6, 4


@pytest.fixture(params=["CPU", "kernels"], autouse=True)
def either(request):
    """Layers of the CPU, and of a GPU's kernels, emulated: they read arguments by the same code."""
    if request.param == "kernels":
        request.getfixturevalue("kernels")


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "x with a dimension less": ({"x": zeros(T, I)}, r"input must have 3 dimensions, got 2"),
    "x without steps": ({"x": zeros(0, B, I)}, r"at least one time step, got shape \[0, 3, 6\]"),
    "x with fewer inputs": (
        {"x": zeros(T, B, 2)},
        r"weight_ih must have shape \[4, 2\], got \[4, 6\]",
    ),
    "w_ih of one row": ({"w_ih": zeros(I)}, r"weight_ih must have shape \[gates \* H, I\].*\[6\]"),
    "w_hh": ({"w_hh": zeros(H, 3)}, r"weight_hh must have shape \[4, 4\], got \[4, 3\]"),
    "dtype of w_hh": (
        {"w_hh": zeros(H, H, dtype=torch.float32)},
        "weight_hh must have input's dtype Double, got Float",
    ),
    "b_ih": ({"b_ih": zeros(3)}, r"bias_ih must have shape \[4\], got \[3\]"),
    "b_hh": ({"b_hh": zeros(1)}, r"bias_hh must have shape \[4\], got \[1\]"),
    "initial": ({"initial": [zeros(2, H)]}, r"hx must have shape \[3, 4\], got \[2, 4\]"),
    "extras": (
        {"extras": [zeros(T, B, 2)]},
        r"alpha must be a number, \[4\], \[5, 3, 4\] or \[5, 3, 1\], got \[5, 3, 2\]",
    ),
    "too few extras": ({"extras": []}, "extras must be 1, got 0"),
    "dtype of resets": ({"resets": zeros(T, B)}, "resets must have dtype Bool, got Double"),
    "resets": (
        {"resets": zeros(T, 2, dtype=torch.bool)},
        r"resets must have shape \[5, 3\], got \[5, 2\]",
    ),
    "rows of a packed batch": (
        {"x": zeros(5, I), "batch_sizes": torch.tensor([3, 3])},
        r"must have sum\(batch_sizes\) = 6 rows, got 5",
    ),
    "batch_sizes that increase": (
        {"x": zeros(5, I), "batch_sizes": torch.tensor([2, 3])},
        "batch_sizes must be positive and never increase, got 3 at step 1",
    ),
    "direction": ({"direction": 2}, "direction must be 1 or -1, got 2"),
    "reset_to": (
        {"reset_to": [zeros(T, B, 3)]},
        r"reset_to must have shape \[5, 3, 4\], got \[5, 3, 3\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    changed, message = BAD[name]
    of = arguments("leaky", T, B, H)._replace(**changed)
    with pytest.raises((RuntimeError, ValueError), match=message):
        compiled(leaky()).forward(of)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"initial": []}, "hx must hold 1 of them, got 0"),
        ({"reset_to": [zeros(T, B, H)] * 2}, "reset_to must hold 1 of them, got 2"),
        ({"x": zeros(T, B, I, dtype=torch.float32)}, "of the cell's dtype, got cpu and Float"),
    ],
    ids=["no states", "states of a reset", "dtype"],
)
def test_what_is_no_cells_is_refused(changed, message, request):
    if "kernels" in request.node.callspec.id:
        pytest.skip("kernels have no such check")
    with pytest.raises(RuntimeError, match=message):
        compiled(leaky()).forward(arguments("leaky", T, B, H)._replace(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"d_states": [zeros(T, B, 3)]}, r"a state's gradient must have shape \[5, 3, 4\]"),
        ({"d_last": [zeros(2, H)]}, r"a last state's gradient must have shape \[3, 4\]"),
        ({"kappa": zeros(T)}, r"kappa must have shape \[5, 3\], got \[5\]"),
        ({"states": [zeros(T, B, 3)]}, r"states must have shape \[5, 3, 4\], got \[5, 3, 3\]"),
        ({"kept": (zeros(T * B, H), zeros(3))}, r"kept must have shape \[15, 4\], got \[3\]"),
        ({"kept": (None, None)}, "pre must be a tensor"),
    ],
    ids=["state", "last state", "kappa", "states", "kept", "nothing kept"],
)
def test_what_does_not_fit_the_backward_pass_is_refused(changed, message, request):
    if "kernels" in request.node.callspec.id:
        pytest.skip("autograd has checked it")
    layer, of = compiled(leaky()), arguments("leaky", T, B, H)
    states, _, kept = layer.forward(of)
    given = {"states": states, "kept": kept, "d_states": states, **changed}
    with pytest.raises(RuntimeError, match=message):
        layer.backward(of, **given)


def test_weights_of_other_shapes_are_refused():
    """As a functional call may bring them."""
    net = Recurrent(cells.leaky, I, H, alpha=0.2).double()
    for name, shape in (("weight_hh", (H, 3)), ("bias_ih", (2,)), ("weight_ih", (H, 2))):
        with pytest.raises(RuntimeError, match=f"{name} must have shape"):
            torch.func.functional_call(net, {f"{name}_l0": zeros(*shape)}, (zeros(T, B, I),))


def test_an_error_keeps_nothing():
    layer, of = compiled(leaky()), arguments("leaky", T, B, H)

    def message(changed):
        try:
            layer.forward(of._replace(**changed))
        except (RuntimeError, ValueError) as error:
            return str(error)

    gc.disable()
    try:
        for changed, _ in BAD.values():
            alone = {  # of which there is no other reference
                name: value.clone() if torch.is_tensor(value) else value
                for name, value in changed.items()
            }
            alone["w_ih"] = alone.get("w_ih", of.w_ih.detach().clone())
            found = [weakref.ref(value) for value in alone.values() if torch.is_tensor(value)]
            assert message(alone)
            alone.clear()
            assert not any(each() is not None for each in found)
    finally:
        gc.enable()


def test_without_gradients_nothing_is_kept():
    """Where autograd is off, and where nothing asks for a gradient."""
    net, x = Recurrent(cells.lstm, I, H, dtype=torch.float64), zeros(T, B, I)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.no_grad():
            assert net(x)[0].grad_fn is None
        assert not packed
        assert net(x)[0].grad_fn is not None
        assert packed
        packed.clear()
        assert net.requires_grad_(False)(x)[0].grad_fn is None
        assert not packed


def test_a_number_comes_to_the_inputs_device():
    """Where no tensor of the CPU's can be read."""
    meta = torch.empty(T, B, I, device="meta")
    weights = [torch.empty(H, width, device="meta") for width in (I, H)]
    of = fastbptt._compiled.Arguments(meta, *weights, None, None, [None], [torch.tensor(0.5)])
    sizes, _, _, (number,), strides, *_ = _C.read_user_arguments(1, ["alpha"], *of)
    assert sizes == [T, B, T * B, I, H]
    assert (number.device.type, number.shape, strides) == ("meta", (), [0, 0])


@pytest.mark.parametrize("name", ["x", "w_ih", "w_hh", "b_ih", "b_hh", "initial"])
def test_views_that_say_they_are_negated(name):
    """As the imaginary part of a conjugate is: its memory has the other sign."""
    layer, of = compiled(leaky()), arguments("leaky", T, B, H)
    given = getattr(of, name)
    plain = given[0] if name == "initial" else given
    view = torch._neg_view(-plain.detach())
    assert view.is_neg() and torch.equal(view, plain)
    changed = of._replace(**{name: [view] if name == "initial" else view})
    states, last, kept = layer.forward(of)
    found, found_last, found_kept = layer.forward(changed)
    assert all(map(torch.equal, [*states, *last], [*found, *found_last]))
    gradients = [torch._neg_view(-torch.ones_like(states[0]))]
    expected = layer.backward(of, states, kept, [torch.ones_like(states[0])])
    result = layer.backward(changed, found, found_kept, gradients)
    assert all(map(torch.equal, expected[:5], result[:5]))


@pytest.mark.parametrize("cell", ["leaky", "gru"])
def test_what_was_kept_may_be_negated_too(cell):
    program, recurrent, _ = CASES[cell]
    layer, of = compiled(program, recurrent), arguments(cell, T, B, H)
    states, _, kept = layer.forward(of)
    gradients = [torch.ones_like(state) for state in states]
    expected = layer.backward(of, states, kept, gradients)
    negated = [None if each is None else torch._neg_view(-each) for each in kept]
    found = layer.backward(
        of, [torch._neg_view(-s) for s in states], type(kept)(*negated), gradients
    )
    assert all(map(torch.equal, expected[:5], found[:5]))
