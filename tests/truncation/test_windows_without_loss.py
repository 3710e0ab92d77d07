"""Losses in few of the steps: the same gradients, and no work for steps that none comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastbptt
from calls import Call
from common import CELLS, Case, Results, assert_matches, cotangent, parts, whole
from fastbptt import TBPTT, Chunked, Sliding
from test_modes import LARGER, MODES, expected_of, random_call
from test_operators import backward_arguments, named, rnn_bwd

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class SparseCall(Call):
    """A call with losses in some of the steps, and some of the final states, alone."""

    density: float = 0.2  # of rows with a loss; 0 of all: every gradient is zero
    of_states: float = 0.5

    def keep(self, tensor: Tensor, density: float, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(tensor.shape[:-1], generator=generator) < density
        return tensor * kept.unsqueeze(-1).to(tensor)  # zeros of both signs, backward

    def run(self, function: Callable, module, device: str = "cpu") -> Results:
        def call(input, hx=None):
            output, states = function(input, hx)
            packed = isinstance(output, PackedSequence)
            rows = self.keep(output.data if packed else output, self.density, self.case.seed)
            output = PackedSequence(rows, *output[1:]) if packed else rows
            kept = [self.keep(s, self.of_states, i) for i, s in enumerate(parts(states))]
            return output, whole(kept)

        return super().run(call, module, device)


def sparse(call: Call, **densities: float) -> SparseCall:
    return SparseCall(**call.__dict__, **densities)


@pytest.mark.slow(80)
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("mode", MODES)
def test_random_calls(mode, seed):
    rng = Random(seed)
    densities = {"density": rng.choice((0.0, 0.1, 0.3)), "of_states": rng.choice((0.0, 0.0, 0.5))}
    call = sparse(random_call(mode, 5000 + seed), **densities)
    assert_matches(call.ours(), expected_of(call), rtol=1e-10)


@pytest.mark.slow(25)
@pytest.mark.parametrize("through", [("output",), ("h_n",), ("c_n",), ("output", "h_n", "c_n")])
@pytest.mark.parametrize("call", LARGER, ids=str)
def test_larger_calls(call, through):
    if through == ("c_n",) and call.case.cell != "lstm":
        pytest.skip("no c_n")
    for density in (0.0, 0.03):
        of_some = sparse(replace(call, through=through), density=density, of_states=0.3)
        assert_matches(of_some.ours(), expected_of(of_some), rtol=1e-10)


@pytest.mark.parametrize("limit", [1, 5000, 100_000], ids="bytes={}".format)
@pytest.mark.parametrize("call", [c for c in LARGER if isinstance(c.truncation, TBPTT)], ids=str)
def test_groups_of_windows(call, limit, workspace_limit_restored):
    fastbptt.set_workspace_limit(limit)
    for density in (0.0, 0.03, 0.3):
        of_some = sparse(replace(call, through=("output",)), density=density)
        assert_matches(of_some.ours(), expected_of(of_some), rtol=1e-10)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("cell", [c for c in CELLS if c != "relu"])  # which stops both
@pytest.mark.parametrize("truncation", [None, Chunked(3), TBPTT(2, 4), Sliding(3)], ids=str)
def test_what_is_not_finite_is_a_loss(truncation, cell, value):
    case = Case(9, 2, 3, 5, 2, cell=cell)
    results = []
    for run in (case.module(), case.module().double()):
        x, hx = case.data()
        x.requires_grad_()
        reference = bool(results)
        call = fastbptt.reference.run if reference else lambda module, *a, **k: module(*a, **k)
        output, _ = call(run, x, hx, truncation=truncation)
        grad = torch.zeros_like(output)
        grad[6, 1, 3] = value
        output.backward(grad)
        results.append({"dinput": x.grad, **{"d" + n: p.grad for n, p in run.named_parameters()}})
    for name, expected in results[1].items():
        assert torch.equal(results[0][name].isfinite(), expected.isfinite()), name
    assert not results[0]["dinput"][6, 1].isfinite().any()
    assert not results[0]["dinput"][7:].any() and not results[0]["dinput"][:, 0].any()


# Losses at these steps (of 12) alone; the steps that their gradients come to.
CUTS = {
    "full": ({}, [7, 3], range(8)),
    "chunked": ({"k1": 4, "k2": 4}, [10, 5], [4, 5, 8, 9, 10]),
    "windows": ({"k1": 2, "k2": 5}, [9, 2], [0, 1, 2, 5, 6, 7, 8, 9]),
    "windows that share steps": ({"k1": 2, "k2": 5}, [9, 6], range(3, 10)),
    "sliding": ({"k1": 1, "k2": 3}, [11, 4], [2, 3, 4, 9, 10, 11]),
    "last": ({"k1": 4, "k2": 6, "last_only": True}, [7, 9], range(2, 8)),
    "chunks' last": ({"k1": 4, "k2": 4, "last_only": True}, [3, 9], range(4)),
    "resets": ({"resets": [3, 6, 9]}, [4, 10], [3, 4, 9, 10]),
    "gates": ({"kappa": [3, 6, 9]}, [4, 10], [3, 4, 9, 10]),
    "no loss": ({}, [], []),
    "no loss in windows": ({"k1": 2, "k2": 5}, [], []),
}


def sparse_arguments(case: Case, cut: dict, losses: list[int]) -> dict[str, object]:
    arguments = backward_arguments(case) | cut
    if "resets" in cut:
        arguments["resets"] = torch.zeros(case.T, case.B, dtype=torch.bool)
        arguments["resets"][cut["resets"]] = True
    if "kappa" in cut:
        arguments["kappa"] = torch.ones(case.T, case.B, dtype=case.dtype)
        arguments["kappa"][cut["kappa"]] = 0
    kept = torch.zeros(case.T, 1, 1, dtype=case.dtype)
    kept[losses] = 1
    arguments["grad_output"] = arguments["grad_output"] * kept
    return arguments | {"grad_h_n": None, "grad_c_n": None}


def poison(kept: Tensor, t: int) -> None:
    """Of [D, N, ...] that the forward pass kept for the backward pass, with N = 12 * 2 rows."""
    kept[:, 2 * t : 2 * t + 2] = float("nan")


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_steps_without_a_gradient_are_not_read(cell, name):
    """What a NaN there would show: it is no number times zero."""
    cut, losses, reached = CUTS[name]
    case = Case(12, 2, 3, 5, cell=cell)
    arguments = sparse_arguments(case, cut, losses)
    expected = named(rnn_bwd(**arguments), case)
    has_gradient = [bool(row.any()) for row in expected["dinput"]]
    assert [t for t, there in enumerate(has_gradient) if there] == list(reached)
    for t in set(range(12)) - set(reached):
        poison(arguments["gates"], t)
        if name != "windows that share steps":  # of those all input is multiplied by a sum
            arguments["input"][t] = float("nan")
        if t + 1 not in reached:  # nor is the state before
            poison(arguments["c"], t)
            arguments["output"][t] = float("nan")
    results = named(rnn_bwd(**arguments), case)
    assert_matches(results, expected, rtol=0)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_the_reverse_direction_ends_at_the_first_step(cell):
    case = Case(12, 2, 3, 5, bidirectional=True, cell=cell)
    arguments = sparse_arguments(case, {}, [4, 6])
    arguments["grad_output"][..., :5] = 0  # of the reverse direction alone
    expected = named(rnn_bwd(**arguments), case)
    assert not expected["dinput"][:4].any() and expected["dinput"][4:].all(-1).all()
    assert not any(expected["d" + n].any() for n in ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0"))
    for t in range(4):
        poison(arguments["gates"], t)
        poison(arguments["c"], t)
    arguments["output"][:4] = float("nan")
    arguments["output"][..., :5] = float("nan")
    assert_matches(named(rnn_bwd(**arguments), case), expected, rtol=0)


@pytest.mark.parametrize("T, k1, k2, losses, rows", [
    (1000, 1, 400, [999], 400),
    (1000, 1, 400, [999, 10], 411),
    (1000, 8, 400, [993], 394),
    (1000, 1, 400, [], 0),
])  # fmt: skip
def test_rows_that_windows_run(T, k1, k2, losses, rows):
    arguments = sparse_arguments(Case(T, 1), {"k1": k1, "k2": k2}, losses)
    d_input, *_ = rnn_bwd(**arguments, input_by_lane=True)
    assert len(d_input) == rows


EXPLICIT = torch._C.DispatchKey.CompositeExplicitAutograd


class Rows(TorchDispatchMode):
    """How many rows by lane each layer was given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.fastbptt.network_bwd.default:
            with self:  # to see the layers' passes inside
                return function._op_dk(EXPLICIT, *args, **kwargs or {})
        if function is torch.ops.fastbptt.rnn_bwd.default:
            self.given.append(args[0].shape)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_a_stack_runs_the_same_lanes(cell, workspace_limit_restored):
    case = Case(60, 2, 3, 4, 3, cell=cell)
    truncation = Sliding(20)
    module = case.module(truncation=truncation)

    def rows_given(losses: list[int]) -> list[torch.Size]:
        with Rows() as rows:
            output, _ = module(*case.data())
            grad = torch.zeros_like(output)
            grad[losses, 1] = 1
            output.backward(grad)
        return rows.given

    assert rows_given([59]) == [(60, 2, 4), (20, 4), (20, 4)]
    assert rows_given([59, 9]) == [(60, 2, 4), (30, 4), (30, 4)]
    assert rows_given([]) == [(60, 2, 4), (0, 4), (0, 4)]
    fastbptt.set_workspace_limit(1)  # one window at a time: the top layer finds out
    assert rows_given([59]) == 60 * [(60, 2, 4)] + 2 * [(20, 4)]
    assert rows_given([9]) == 10 * [(60, 2, 4)] + 2 * [(10, 4)] + 50 * [(60, 2, 4)] + 2 * [(0, 4)]


@pytest.mark.parametrize("limit", [1, 2**28], ids="bytes={}".format)
def test_a_compiled_step_takes_any_losses(limit, workspace_limit_restored):
    """Which windows have a loss is found out at each call, not when the graph is made."""
    fastbptt.set_workspace_limit(limit)
    case = Case(8, 2, 3, 4, 2, cell="lstm")
    module = case.module(truncation=Sliding(3))

    def loss_of(x: Tensor, hx: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
        return (module(x, hx)[0] * weights).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for losses in ([0, 1, 2, 3, 4, 5, 6, 7], [7], [2, 3], []):
        results = []
        for run in (compiled, loss_of):
            x, hx = case.data()
            weights = torch.zeros(8, 2, 4, dtype=torch.float64)
            weights[losses] = 1
            module.zero_grad()
            run(x.requires_grad_(), hx, weights).backward()
            grads = {"d" + n: p.grad.clone() for n, p in module.named_parameters()}
            results.append({"dinput": x.grad, **grads})
        assert_matches(*results)


def test_the_gradient_of_the_network_goes_with_one_by_lane():
    arguments = sparse_arguments(Case(), {"k1": 2, "k2": 3}, [4])
    with pytest.raises(RuntimeError, match="grad_network goes with grad_by_lane"):
        rnn_bwd(**arguments, grad_network=arguments["grad_output"])
    by_lane = arguments | {"grad_by_lane": True, "grad_output": torch.zeros(7, 4).double()}
    with pytest.raises(RuntimeError, match="grad_output must have shape \\[6, 4\\]"):
        rnn_bwd(**by_lane, grad_network=arguments["grad_output"])
    with pytest.raises(RuntimeError, match="grad_network must have shape"):
        rnn_bwd(**by_lane, grad_network=cotangent(torch.zeros(4, 3, 4).double(), 0))
