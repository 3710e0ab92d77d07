"""Resets against what is written by hand: a step loop, segments run alone; NaN does not pass."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastbptt
from common import Case, States, assert_matches, once, parts, step, tensors_of, twin, whole

pytestmark = pytest.mark.usefixtures("poisoned")

every_cell = pytest.mark.parametrize(
    "cell, proj", [("tanh", 0), ("relu", 0), ("gru", 0), ("lstm", 0), ("lstm", 3)]
)
BOOLS = (False, True)
T = 8


def random_resets(*shape: int, seed: int = 0, density: float = 0.3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def step_loop(module: torch.nn.RNNBase, done: Tensor):
    """torch's module a step at a time, h = h * (1 - done) before each; done is [T, B], 0 or 1."""

    def call(x: Tensor, hx: States | None):
        time = 1 if module.batch_first and x.dim() == 3 else 0
        count, width = module.num_layers, module.proj_size or module.hidden_size
        batch = done.shape[1:] if x.dim() == 3 else ()
        sizes = (width, module.hidden_size)[: 2 if module.mode == "LSTM" else 1]
        states = parts(hx) or [x.new_zeros(count, *batch, size) for size in sizes]
        outputs = []
        for t in range(x.size(time)):
            keep = (1 - done[t])[..., None] if x.dim() == 3 else 1 - done[t]
            states = parts(whole([state * keep for state in states]))
            output, states = module(x.narrow(time, t, 1), whole(states))
            states = parts(states)
            outputs.append(output)
        return torch.cat(outputs, dim=time), whole(states)

    return call


@every_cell
@pytest.mark.parametrize("hx", BOOLS, ids="hx={}".format)
def test_step_loop(hx, cell, proj):
    for B, batch_first in [(3, False), (3, True), (1, False), (None, False)]:
        case = Case(T, B, 3, 5, 2, batch_first=batch_first, cell=cell, proj=proj, hx=hx)
        module, other = case.module(), twin(case.module())
        batch = () if B is None else (B,)
        for resets in (random_resets(T, *batch), random_resets(T), torch.ones(T, *batch).bool()):
            wide = resets if B is None or resets.dim() == 2 else resets[:, None].expand(T, B)
            expected = step(other, *case.data(), call=step_loop(other, wide.double()))
            given = resets.T if batch_first and resets.dim() == 2 else resets
            actual = step(module, *case.data(), call=partial(module, resets=given))
            assert_matches(actual, expected)


@once
def by_step_loop(case: Case):
    other = twin(case.module())
    call = step_loop(other, random_resets(case.T, case.B).double())
    return step(other, *case.data(), call=call)


@every_cell
def test_step_loop_of_many_rows(cell, proj, isa, threads):
    for shape in [(9, 29, 6, 37), (30, 1, 4, 70), (5, 3, 2, 130)]:
        case = Case(*shape, cell=cell, proj=proj)
        module, resets = case.module(), random_resets(*shape[:2])
        actual = step(module, *case.data(), call=partial(module, resets=resets))
        assert_matches(actual, by_step_loop(case))


@every_cell
def test_dones(cell, proj):
    """As in reinforcement learning: the state is dropped after the step that ends an episode."""
    case = Case(T, 3, 3, 5, 2, cell=cell, proj=proj)
    module, other = case.module(), twin(case.module())
    dones, initial = random_resets(T, 3, seed=1), torch.tensor([True, False, False])
    for before in (None, initial, True):
        resets = fastbptt.resets_from_dones(dones, before)
        assert resets.dtype == torch.bool and resets.shape == (T, 3)
        first = torch.zeros(3) if before is None else torch.as_tensor(before).expand(3)
        done_before = torch.cat([first[None].double(), dones[:-1].double()])
        expected = step(other, *case.data(), call=step_loop(other, done_before))
        assert_matches(step(module, *case.data(), call=partial(module, resets=resets)), expected)
    by_step = fastbptt.resets_from_dones(dones[:, 0].float(), initial=True)
    assert by_step.dtype == torch.bool
    assert by_step.tolist() == [True, *dones[:-1, 0].tolist()]


def segments_alone(module: torch.nn.RNNBase, resets: Tensor):
    """torch's module on each stretch between two resets by itself, sequence by sequence.

    The forward direction begins the first stretch with hx (if no reset stands at step 0), the
    reverse direction the last; every other begins with zeros.
    """
    directions = 2 if module.bidirectional else 1

    def sequence(x: Tensor, hx: States, resets: Tensor):
        starts = [0, *(t for t in range(1, len(x)) if resets[t])]
        outputs, finals = [], []
        for start, end in zip(starts, [*starts[1:], len(x)], strict=True):
            from_hx = torch.tensor([start == 0 and not resets[0], end == len(x)])[:directions]
            from_hx = from_hx.repeat(module.num_layers)[:, None]
            initial = whole([torch.where(from_hx, h, torch.zeros_like(h)) for h in parts(hx)])
            output, last = module(x[start:end], initial)
            outputs.append(output)
            finals.append(parts(last))
        # Forward, the last state is the last stretch's; in reverse, the first's.
        is_reverse = torch.arange(directions).repeat(module.num_layers)[:, None].bool()
        ends = zip(finals[0], finals[-1], strict=True)
        return torch.cat(outputs), [torch.where(is_reverse, first, last) for first, last in ends]

    def call(x: Tensor | PackedSequence, hx: States):
        lengths = [T] * resets.size(1)
        if isinstance(x, PackedSequence):
            x, lengths = pad_packed_sequence(x)
        each = [
            sequence(x[:n, b], whole([h[:, b] for h in parts(hx)]), resets[:n, b])
            for b, n in enumerate(lengths)
        ]
        outputs = [output for output, _ in each]
        last = whole([torch.stack(of_all, 1) for of_all in zip(*(s for _, s in each), strict=True)])
        output = torch.nn.utils.rnn.pad_sequence(outputs)
        if min(lengths) < T:
            return pack_padded_sequence(output, lengths, enforce_sorted=False), last
        return output, last

    return call


@every_cell
@pytest.mark.parametrize("bidirectional", BOOLS, ids="bidirectional={}".format)
@pytest.mark.parametrize("lengths", [None, (8, 8, 5, 1), (2, 8, 1, 6)], ids=str)
def test_segments_alone(lengths, bidirectional, cell, proj):
    case = Case(T, 4, 3, 5, 2, bidirectional, cell=cell, proj=proj, lengths=lengths)
    module, other = case.module(), twin(case.module())
    for seed in range(3):
        resets = random_resets(T, 4, seed=seed)
        expected = step(other, *case.data(), call=segments_alone(other, resets))
        actual = step(module, *case.data(), call=partial(module, resets=resets))
        assert_matches(actual, expected)
        by_step = resets[:, 0]
        expected = step(
            other, *case.data(), call=segments_alone(other, by_step[:, None].expand(T, 4))
        )
        actual = step(module, *case.data(), call=partial(module, resets=by_step))
        assert_matches(actual, expected)


@every_cell
def test_none_of_them(cell, proj):
    case = Case(T, 3, 3, 5, 2, True, cell=cell, proj=proj)
    module = case.module()
    expected = step(module, *case.data())
    for never in (torch.zeros(T, 3).bool(), torch.zeros(T).bool()):
        assert_matches(step(module, *case.data(), call=partial(module, resets=never)), expected)


@every_cell
@pytest.mark.parametrize("training", BOOLS, ids="training={}".format)
def test_outputs_with_and_without_gradients(training, cell, proj):
    case = Case(T, 3, 3, 5, 2, True, cell=cell, proj=proj, dtype=torch.float32)
    module, resets = case.module().train(training), random_resets(T, 3)
    expected = tensors_of(module(*case.data(), resets=resets))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            actual = tensors_of(module(*case.data(), resets=resets))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# In the first sequence a reset at step 5, in the second at step 3, in the third none.
CUT = torch.zeros(T, 3, dtype=torch.bool)
CUT[5, 0] = CUT[3, 1] = True


@every_cell
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_does_not_pass_forward(value, cell, proj, isa):
    for H, B in [(5, 3), (33, 3), (64, 3)]:
        case = Case(T, B, 4, H, 2, cell=cell, proj=proj)
        module, (x, hx) = case.module(), case.data()
        x_bad, hx_bad = x.clone(), whole([state.clone() for state in parts(hx)])
        x_bad[2, 0, 1] = value  # spreads through the first sequence until its reset
        parts(hx_bad)[-1][:, 1, 0] = value  # and through the second until its
        results = []
        for data, states in ((x, hx), (x_bad, hx_bad)):
            data = data.clone().requires_grad_()
            output, last = module(data, states, resets=CUT)
            # The loss comes from after the resets, and from the whole of the third sequence.
            kept = torch.cat([output[5:, 0], output[3:, 1], output[:, 2]])
            (kept.sin().sum() + sum(state.square().sum() for state in parts(last))).backward()
            grad = torch.cat([data.grad[5:, 0], data.grad[3:, 1], data.grad[:, 2]])
            results.append({"kept": kept.detach(), "dinput": grad})
            results[-1] |= {f"last {i}": state.detach() for i, state in enumerate(parts(last))}
        assert not output[4, 0].isfinite().all() or abs(value) == math.inf, "it spread until there"
        assert all(value.isfinite().all() for value in results[1].values())
        assert_matches(results[1], results[0])


@every_cell
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("cut", ["resets", "gates", "chunks"])
def test_nan_gradients_do_not_pass(cut, value, cell, proj, isa):
    """A gradient of NaN or infinity ends at a reset, a gate of zero, or where chunks meet."""
    for H in (5, 33, 64):
        case = Case(T, 3, 4, H, 2, cell=cell, proj=proj)
        module, (x, hx) = case.module(), case.data()
        options = {
            "resets": {"resets": CUT},
            "gates": {"truncation": fastbptt.Gated((~CUT).double())},
            "chunks": {"truncation": 4},
        }[cut]
        begins = (4, 4, 4) if cut == "chunks" else (5, 3, T)
        results = []
        for given in (0.0, value):
            leaves = [t.clone().requires_grad_() for t in (x, *parts(hx))]
            output, _ = module(leaves[0], whole(leaves[1:]), **options)
            on_output = torch.ones_like(output)
            for b, begin in enumerate(begins):
                on_output[begin:, b] = given
            output.backward(on_output)
            kept = torch.cat([leaves[0].grad[:begin, b] for b, begin in enumerate(begins)])
            results.append({"dinput": kept})
            # A reset or gate before step 0 there is not: hx has its gradient.
            results[-1] |= {f"dhx {i}": leaf.grad for i, leaf in enumerate(leaves[1:])}
        assert not leaves[0].grad.isfinite().all(), "it is there, after the cut"
        assert all(value.isfinite().all() for value in results[1].values())
        assert_matches(results[1], results[0])
