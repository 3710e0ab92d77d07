"""The reference against definitions that share nothing with it: it decides what is right."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from common import (
    CELLS,
    Case,
    Results,
    assert_matches,
    cotangent,
    parts,
    step,
    tensors_of,
    twin,
    whole,
)
from fastbptt import TBPTT, Chunked, Gated, Randomized, Sliding, _layouts, reference

T = 7
KAPPA = torch.tensor([0.5, 1.0, -0.25, 2.0, 0.0, 0.75, 1.5], dtype=torch.float64)
RESETS = torch.tensor([[0, 0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1, 0]]).bool().T  # [T, 2]
MODES = {
    "full": None,
    "chunked": Chunked(3),
    "windows": TBPTT(2, 4),
    "last": TBPTT(3, 5, "last"),
    "chunks' last": TBPTT(2, 2, "last"),
    "sliding": Sliding(3),
    "gated": Gated(KAPPA),
}
every_cell = pytest.mark.parametrize("cell", CELLS)
every_mode = pytest.mark.parametrize("truncation", MODES.values(), ids=MODES)


def run(case: Case, truncation=None, resets: Tensor | None = None, **options) -> Results:
    module = case.module()
    call = partial(reference.run, module, truncation=truncation, resets=resets, **options)
    return step(module, *case.data(), call=call)


def weight(truncation, s: int, t: int) -> float:
    """What the gradient from the loss of step t to what step s reads is multiplied by.

    The state before step 0 counts as step -1's.
    """
    if isinstance(truncation, Gated):
        return math.prod(truncation.kappa[s + 1 : t + 1].tolist())
    if truncation is None:
        return 1.0
    first = t // truncation.k1 * truncation.k1  # of the losses in t's window
    begin = max(0, first - (truncation.k2 - truncation.k1))
    return float(max(s, 0) >= begin)


def counts(truncation, t: int) -> bool:
    if not getattr(truncation, "last_only", False):
        return True
    return (t + 1) % truncation.k1 == 0 or t == T - 1


def by_pairs(case: Case, truncation, resets: Tensor | None = None) -> Results:
    """The truncated gradient as a sum over pairs of steps.

    Every step gets its own copy of the parameters. The derivative of step t's loss in step s's
    copy runs along paths of states that cross each boundary s + 1, ..., t exactly once, in one
    layer or another, as h or as c. So gates multiply it by kappa_{s+1} ... kappa_t, and a window
    lets all of it through or nothing.
    """
    (x, hx), named = case.data(), dict(case.module().named_parameters())
    copies = [{n: p.detach().clone().requires_grad_() for n, p in named.items()} for _ in x]
    inputs = [x_t.clone().requires_grad_() for x_t in x]
    initial = [state.clone().requires_grad_() for state in parts(hx)]
    cell = getattr(reference, f"{case.cell}_cell", None)
    cell = cell or partial(reference.rnn_cell, nonlinearity=case.cell)

    outputs = []
    states = [tuple(state[layer] for state in initial) for layer in range(case.layers)]
    for s in range(T):
        below = inputs[s]
        for layer in range(case.layers):
            if resets is not None:
                states[layer] = tuple(h * ~resets[s, :, None] for h in states[layer])
            weights = [p for name, p in copies[s].items() if f"_l{layer}" in name]
            states[layer] = cell(below, states[layer], *weights)
            below = states[layer][0]
        outputs.append(below)
    last = [torch.stack(of_all) for of_all in zip(*states, strict=True)]
    results = {"output": torch.stack(outputs), **dict(zip(("h_n", "c_n"), last, strict=False))}
    given = [cotangent(value, i) for i, value in enumerate(results.values())]
    final = sum((state * grad).sum() for state, grad in zip(last, given[1:], strict=True))
    losses = [(T - 1, final)]  # the last states' belongs to the last step
    losses += [(t, (outputs[t] * given[0][t]).sum()) for t in range(T) if counts(truncation, t)]

    leaves = {("dhx", "dcx")[i]: [(-1, state)] for i, state in enumerate(initial)}
    leaves |= {"dinput": list(enumerate(inputs))}
    leaves |= {"d" + name: [(s, copies[s][name]) for s in range(T)] for name in named}
    for name, of_steps in leaves.items():
        grads = [torch.zeros_like(leaf) for _, leaf in of_steps]
        for t, loss in losses:
            parts_of_it = torch.autograd.grad(
                loss, [leaf for _, leaf in of_steps], retain_graph=True, materialize_grads=True
            )
            for grad, (s, _), part in zip(grads, of_steps, parts_of_it, strict=True):
                grad += weight(truncation, s, t) * part if s <= t else 0
        results[name] = torch.stack(grads) if name == "dinput" else sum(grads)
    return {name: value.detach() for name, value in results.items()}


@pytest.mark.slow(10)
@every_mode
@every_cell
def test_sum_over_pairs_of_steps(cell, truncation):
    for layers, proj in [(1, 0), (2, 3 * (cell == "lstm"))]:
        case = Case(T, 2, 3, 4, layers, cell=cell, proj=proj)
        for resets in (None, RESETS):
            assert_matches(run(case, truncation, resets), by_pairs(case, truncation, resets))


@every_mode
@every_cell
def test_packed_is_each_sequence_alone(cell, truncation):
    lengths = (3, 7, 6)
    case = Case(T, 3, 2, 4, 2, cell=cell, lengths=lengths)
    module, (x, hx) = case.module(), case.data()
    generator = torch.Generator().manual_seed(0)
    resets = torch.rand(T, 3, generator=generator) < 0.3
    if isinstance(truncation, Gated):
        truncation = Gated(torch.rand(T, 3, generator=generator))
    padded = pad_packed_sequence(x)[0].requires_grad_()
    leaves = [padded, *(state.requires_grad_() for state in parts(hx)), *module.parameters()]

    packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    output, last = reference.run(module, packed, hx, truncation=truncation, resets=resets)
    together = [
        pad_packed_sequence(output)[0].sin().sum(),
        *(t.square().sum() for t in parts(last)),
    ]
    alone = []
    for b, n in enumerate(lengths):
        its = whole([state[:, b] for state in parts(hx)])
        own = Gated(truncation.kappa[:n, b]) if isinstance(truncation, Gated) else truncation
        results = reference.run(module, padded[:n, b], its, truncation=own, resets=resets[:n, b])
        output, *last = tensors_of(results)
        alone += [output.sin().sum(), *(state.square().sum() for state in last)]
    expected = torch.autograd.grad(sum(alone), leaves)
    for got, want in zip(torch.autograd.grad(sum(together), leaves), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("truncation", [None, Chunked(3), Gated(KAPPA)], ids=str)
@every_cell
def test_the_reverse_direction_is_the_forward_one_from_the_end(cell, truncation):
    case = Case(T, 2, 3, 4, bidirectional=True, cell=cell)
    module = case.module()

    def both(x, hx, *, resets=None):
        functional = getattr(reference, cell, partial(reference.rnn, nonlinearity=cell))
        finals, outputs = [], []
        for i, suffix in enumerate(("", "_reverse")):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weights = [getattr(module, f"{name}_l0{suffix}") for name in names]
            # Between t - 1 and t, so between the steps T - t and T - t - 1 from the end; nothing
            # stands before the first of these.
            gate, reset = KAPPA, resets
            if isinstance(truncation, Chunked):
                gate = torch.tensor([float(t % truncation.k > 0 or t == 0) for t in range(T)])
            if i == 1:
                gate = torch.cat([torch.ones(1), gate[1:].flip(0)])
                reset = torch.cat([torch.zeros(1, 2), resets[1:].flip(0)]).bool()
            turned = x.flip(0) if i else x
            own = None if truncation is None else Gated(gate)
            states = whole([state[i] for state in parts(hx)])
            output, last = functional(turned, states, *weights, truncation=own, resets=reset)
            outputs.append(output.flip(0) if i else output)
            finals.append(parts(last))
        last = whole([torch.stack(of_all) for of_all in zip(*finals, strict=True)])
        return torch.cat(outputs, -1), last

    expected = step(module, *case.data(), call=partial(both, resets=RESETS))
    assert_matches(run(case, truncation, RESETS), expected)


@every_cell
@pytest.mark.parametrize("lengths", [None, (7, 2, 5)], ids=["padded", "packed"])
def test_modes_that_are_one_another(cell, lengths, monkeypatch):
    case = Case(T, 3, 3, 4, 2, cell=cell, lengths=lengths)
    full = run(case)
    same_as_full = [T, T + 1, Chunked(T), TBPTT(3, 2**62), TBPTT(1, T), Sliding(T), Sliding(2**62)]
    for truncation in [*same_as_full, Gated(torch.ones(T)), Gated(torch.ones(T, 3))]:
        assert_matches(run(case, truncation), full)
    for k in (1, 2, 3):
        chunks = run(case, k)
        assert_matches(run(case, TBPTT(k, k)), chunks, rtol=0)
        gates = torch.tensor([[float(t % k > 0 or t == 0)] for t in range(T)])
        assert_matches(run(case, Gated(gates[:, 0])), chunks)
        assert_matches(run(case, Gated(gates.expand(T, 3))), chunks)
        assert_matches(run(case, Sliding(k)), run(case, TBPTT(1, k)), rtol=0)
        last = run(case, TBPTT(k, k, "last"))
        with monkeypatch.context() as patch:  # chunks too as windows that are run again
            patch.setattr(_layouts, "run_side_by_side", _layouts.run_windows)
            assert_matches(run(case, TBPTT(k, k)), chunks)
            assert_matches(run(case, TBPTT(k, k, "last")), last)
    assert_matches(run(case, Sliding(1)), run(case, Chunked(1)))


@pytest.mark.parametrize("per_sequence", [False, True])
def test_one_draw_for_the_whole_call(per_sequence):
    for lengths in (None, (2, 7, 5)):
        for bidirectional in (False, True):
            case = Case(T, 3, 3, 4, 2, bidirectional, cell="lstm", lengths=lengths)
            generator = torch.Generator().manual_seed(5)
            truncation = Randomized(pi=0.6, generator=generator, per_sequence=per_sequence)
            results = run(case, truncation)
            after = generator.get_state()
            assert truncation.last.kappa.shape == ((T, 3) if per_sequence else (T,))
            assert_matches(run(case, truncation.last), results, rtol=0)
            assert torch.equal(generator.get_state(), after)
            generator.manual_seed(5)
            truncation.draw(T, 3)
            assert torch.equal(generator.get_state(), after), "it drew once"


def test_a_gate_of_zero_cuts_even_nan_and_infinity():
    case = Case(6, 1, 2, 3, 2, cell="gru")
    module, (x, hx) = case.module(), case.data()
    kappa = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    for value in (math.nan, math.inf):
        grads = []
        for given in (value, 0.0):
            x.requires_grad_().grad = None
            output, _ = reference.run(module, x, hx, truncation=Gated(kappa))
            on_output = torch.ones_like(output)
            on_output[3:] = given
            output.backward(on_output)
            grads.append(x.grad[:3].clone())
        assert torch.equal(*grads) and grads[0].isfinite().all()
    assert not x.grad[:3].eq(0).all()


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"B": None}, {"lengths": (2, 7, 5)}], ids=str
)
def test_dropout_masks(options):
    """With torch's own masks it is torch's module in training."""
    sizes = {"T": T, "B": 3, "layers": 3, "bidirectional": True, "cell": "lstm"}
    case = Case(**(sizes | options))
    theirs = twin(case.module(dropout=0.4))
    # torch draws each of [T, B, D*H], time first whatever the input, or of the packed rows.
    rows = case.data()[0].data.shape[:-1]
    rows = rows[::-1] if case.batch_first else rows

    def call(x, hx):
        torch.manual_seed(3)
        return theirs(x, hx)

    expected = step(theirs, *case.data(), call=call)
    torch.manual_seed(3)
    gaps = [torch.empty(*rows, 8, dtype=torch.float64) for _ in range(2)]
    masks = [gap.bernoulli_(0.6).div_(0.6) for gap in gaps]
    masks = [mask.transpose(0, 1) for mask in masks] if case.batch_first else masks
    assert_matches(run(case, dropout_masks=masks), expected)
    assert_matches(run(case, T, dropout_masks=masks), expected)
    if not case.batch_first:
        with pytest.raises(ValueError, match="dropout_masks must hold 2, got 1"):
            run(case, dropout_masks=masks[:1])


def test_dropout_masks_in_a_window_are_those_of_its_steps():
    case = Case(T, 3, layers=3)
    masks = [torch.empty(T, 3, 4, dtype=torch.float64).bernoulli_(0.6) for _ in range(2)]
    full = run(case, dropout_masks=masks)
    assert_matches(run(case, TBPTT(2, T + 1), dropout_masks=masks), full)
    windows = run(case, TBPTT(2, 3), dropout_masks=masks)
    assert_matches({"output": windows["output"]}, {"output": full["output"]})


def test_it_refuses():
    case = Case(T, 2, layers=2, bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional"):
        run(case, TBPTT(1, 2))
    for kappa in (torch.ones(T - 1), torch.ones(T, 3), torch.ones(2, T)):
        with pytest.raises(ValueError, match="kappa"):
            run(case, Gated(kappa))
        with pytest.raises(ValueError, match="resets"):
            run(case, None, kappa.bool())
    with pytest.raises(TypeError, match="resets"):
        run(case, None, torch.ones(T, 2))
