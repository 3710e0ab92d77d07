"""Second derivatives and tangents of every kind of network, truncated or not."""

from __future__ import annotations

import os

import pytest
import torch
from torch.autograd import forward_ad

import fastbptt
from calls import Call
from common import CELLS, Case, assert_matches, cotangent, one_thread, parts, tensors_of, whole
from fastbptt import TBPTT, Chunked, Sliding
from orders import expected, function_of, leaves_of, ours, second
from test_modes import MODES, random_call

pytestmark = pytest.mark.usefixtures("poisoned")

SEEDS = range(40 if os.environ.get("FASTBPTT_TEST_EXPLORE") == "1" else 6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
def test_random_calls(mode, seed):
    call = random_call(mode, 1000 + seed)
    with one_thread():
        assert_matches(ours(call), expected(call), rtol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "truncation",
    [None, Chunked(2), TBPTT(2, 3), TBPTT(2, 3, "last"), TBPTT(2, 2, "last"), Sliding(2)],
    ids=str,
)
@pytest.mark.parametrize("lengths", [None, (2, 5, 3)], ids=["padded", "packed"])
def test_every_cell_and_window(cell, truncation, lengths):
    proj = 2 if cell == "lstm" else 0
    case = Case(5, 3, 2, 3, 2, cell=cell, proj=proj, lengths=lengths)
    call = Call(case, truncation, "some", dropout=0.3)
    assert_matches(ours(call), expected(call), rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
def test_forward_mode(mode, seed):
    """<v, J t> is <G(v), t>: the tangents are cut where the gradients are."""
    call = random_call(mode, 2000 + seed)
    module = call.module()
    leaves, input = leaves_of(call, module)
    names = [name for name in ("hx", "cx") if name in leaves]
    function = function_of(call, module)
    outputs = tensors_of(function(input, whole([leaves[n] for n in names])))
    grads = [cotangent(t, i) for i, t in enumerate(outputs)]
    first = torch.autograd.grad(outputs, list(leaves.values()), grads)
    tangents = {name: cotangent(t, 20 + i).detach() for i, (name, t) in enumerate(leaves.items())}
    expected = sum((d * t).sum() for d, t in zip(first, tangents.values(), strict=True))

    def dual(name):
        return forward_ad.make_dual(leaves[name].detach(), tangents[name])

    with forward_ad.dual_level():
        x = dual("x")
        input = type(input)(x, *input[1:]) if isinstance(input, tuple) else x
        weights = {n: dual(n) for n, _ in module.named_parameters()}

        def run(*arguments):
            return torch.func.functional_call(module, weights, arguments, options)

        call.seed_dropout()
        options = {"truncation": call.make_truncation(), "resets": call.make_resets()}
        results = tensors_of(run(input, whole([dual(n) for n in names])))
        found = [forward_ad.unpack_dual(result) for result in results]
    for result, output in zip(found, outputs, strict=True):
        assert torch.equal(result.primal, output)
    product = sum((v * r.tangent).sum() for v, r in zip(grads, found, strict=True))
    assert_matches({"": product.detach()}, {"": expected.detach()}, rtol=1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_only_what_is_asked_for(cell):
    """Of some leaves alone, through one result: as when all are asked for."""
    case = Case(4, 2, 2, 3, 2, cell=cell)
    call = Call(case, Chunked(3), "some", through=("h_n",))
    module = call.module()
    leaves, input = leaves_of(call, module)
    states = [leaves[n] for n in ("hx", "cx") if n in leaves]
    _, last = function_of(call, module)(input, whole(states))
    some = [leaves["x"], leaves["weight_hh_l0"]]
    first = torch.autograd.grad(parts(last)[0].square().sum(), some, create_graph=True)
    loss = sum(d.square().sum() for d in first)
    everything = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    for leaf, whole_way in zip(leaves.values(), everything, strict=True):
        (alone,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert_matches({"": alone}, {"": whole_way})


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("truncation", [None, TBPTT(2, 3)], ids=str)
def test_16_bits(cell, dtype, truncation):
    """By way of float32: as near to float64's as rounding what is given and returned lets it be."""
    call = Call(Case(5, 3, 4, 6, 2, cell=cell, dtype=dtype), truncation)
    found, module = ours(call), call.module()
    wide = call.in_dtype(torch.float64)
    double = module.double()
    exact = second(wide, double, function_of(wide, double), rounded=dtype)
    for name, truth in exact.items():
        assert found[name].dtype == dtype, name
        error = (found[name].double() - truth).abs().max() / truth.abs().max()
        assert error < 8 * torch.finfo(dtype).eps, (name, float(error))


@pytest.mark.parametrize("cls", [fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM])
def test_gradients_share_no_memory(cls):
    """Each parameter's may be changed in place, as clipping does."""
    module = cls(3, 4)
    output, _ = module(torch.randn(5, 2, 3))
    parameters = list(module.parameters())
    slopes = torch.autograd.grad(output.sum(), parameters, create_graph=True)
    sum(slope.square().sum() for slope in slopes).backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in parameters}
    assert len(storages) == len(parameters)
