"""return_states, reset_to and clip_grad of all modules, against loops by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import brute
import by_hand
import fastbptt
from by_hand import assert_equal
from common import cotangent, parts
from fastbptt import _cell_network, _loops, cells
from option_nets import (
    CLIP,
    FORMS,
    MODES,
    MODULES,
    OVERLAPPING,
    RECURRENT,
    B,
    H,
    I,
    Net,
    T,
    whole_of,
)

NORMALIZED_LSTM = partial(fastbptt.Recurrent, cells.layer_norm_lstm)


@pytest.mark.slow(6)
@pytest.mark.parametrize("name", [*MODULES, *RECURRENT])
@pytest.mark.parametrize("mode", MODES)
def test_against_windows_by_hand(name, mode, steps):
    truncation = MODES[mode]
    for layers, bidirectional, form in [
        (1, False, "steps"),
        (2, False, "layers"),
        (1, True, "learned"),
        (2, True, "steps"),
    ]:
        if bidirectional and mode in OVERLAPPING:
            continue
        net = Net(name, layers, bidirectional, form)
        for reset_to, clip in [(True, None), (False, CLIP), (True, CLIP), (False, None)]:
            options = {"clip_grad": clip, "truncation": truncation, "resets": net.resets}
            if reset_to:
                options["reset_to"] = tuple(net.reset_to) if len(net.hx) > 1 else net.reset_to[0]
            got = net.call(return_states=True, **options)
            want = net.by_hand(truncation, True, reset_to, clip)
            assert_equal(net.gradients(*got), net.gradients(*want))


@pytest.mark.slow(6)
@pytest.mark.parametrize("name", [*MODULES, *RECURRENT])
def test_clipping_changes_gradients_alone(name, steps):
    """Also without resets; and the bound of the call takes the place of the module's."""
    net = Net(name, 2, clip_grad=CLIP)
    got, clipped = net.gradients(*net.call())
    assert_equal((got, clipped), net.gradients(*net.by_hand(None, False, False, CLIP)[:2], []))
    want, full = net.gradients(*net.call(clip_grad=None))
    assert_equal((got, {}), (want, {}))
    assert not torch.allclose(clipped["x"], full["x"])
    for bound in (1e6, 0.5):
        again = net.gradients(*net.call(clip_grad=bound))
        assert_equal(again, net.gradients(*net.by_hand(None, False, False, bound)[:2], []))


def packed_rows(output, states):
    """[L*D, N, H] of the packed rows as [L*D, T, B, H]."""
    return torch.stack([pad_packed_sequence(output._replace(data=s))[0] for s in states])


@pytest.mark.slow(25)
@pytest.mark.parametrize("name", [*MODULES, *RECURRENT])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "mode, bidirectional",
    [(m, both) for m in MODES for both in (False, True) if not (both and m in OVERLAPPING)],
)
def test_packed_is_each_sequence_by_hand(name, form, mode, bidirectional, steps):
    net, truncation, lengths = Net(name, 2, bidirectional, form), MODES[mode], (3, 6, 5)
    packed = pack_padded_sequence(net.x, lengths, enforce_sorted=False)
    options = {"truncation": truncation, "resets": net.resets, "return_states": True}
    options["reset_to"] = tuple(net.reset_to) if len(net.hx) > 1 else net.reset_to[0]
    output, last, every = net.call(packed, clip_grad=CLIP, **options)
    got = net.gradients(
        pad_packed_sequence(output)[0], last, [packed_rows(output, each) for each in every]
    )
    runs = []
    for b, n in enumerate(lengths):
        its = brute.run(
            net.view,
            net.step,
            net.x[:n, b : b + 1],
            [state[:, b : b + 1] for state in net.hx],
            by_hand.of_sequence(truncation, n, b),
            net.resets[:n, b : b + 1],
            {},
            [each[:, :n, b : b + 1] for each in net.wide()],
            CLIP,
        )
        runs.append(its[:3])
    assert_equal(got, net.gradients(*by_hand.joined(runs, T)))


@pytest.mark.parametrize("name", [*MODULES, *RECURRENT])
@pytest.mark.parametrize("form", FORMS)
def test_other_layouts(name, form, steps):
    """Unbatched and batch_first calls give what the padded one gives."""
    net = Net(name, 2, True, form)
    given = {"resets": net.resets, "return_states": True}
    output, last, every = net.call(reset_to=whole_of(net.reset_to), **given)

    turned = Net(name, 2, True, form, batch_first=True)
    reset_to = [r.transpose(1, 2) if form == "steps" else r for r in net.reset_to]
    given["resets"] = net.resets.t()
    got = turned.call(net.x.transpose(0, 1), reset_to=whole_of(reset_to), **given)
    torch.testing.assert_close(got[0].transpose(0, 1), output)
    for a, b in zip([*got[1], *got[2]], [*last, *(s.transpose(1, 2) for s in every)], strict=True):
        torch.testing.assert_close(a, b)

    b = 1
    reset_to = [r[..., 0 if form == "learned" else b, :] for r in net.reset_to]
    hx = whole_of([s[:, b] for s in net.hx])
    given["resets"] = net.resets[:, b]
    output_b, last_b, *every_b = net.module(net.x[:, b], hx, reset_to=whole_of(reset_to), **given)
    torch.testing.assert_close(output_b, output[:, b])
    for own, whole_batch in zip(parts(last_b), last, strict=True):
        torch.testing.assert_close(own, whole_batch[:, b])
    for own, whole_batch in zip(parts(every_b[0]), every, strict=True):
        torch.testing.assert_close(own, whole_batch[:, :, b])


@pytest.mark.parametrize("name", ["tanh", "gru"])
@pytest.mark.parametrize("packed", [False, True])
def test_states_of_one_layer_are_the_output(name, packed):
    """They come from the built-in kernels, with the same bits."""
    net = Net(name, 1, True)
    x = pack_padded_sequence(net.x, [2, 6, 5], enforce_sorted=False) if packed else net.x
    output, last, (every,) = net.call(x, return_states=True, truncation=2)
    plain, _ = net.module(x, net.hx[0], truncation=2)
    if packed:
        output, plain = output.data, plain.data
    assert torch.equal(output, plain)
    assert torch.equal(every, torch.stack(plain.split(H, -1)))
    grad = cotangent(every, 3)
    got = torch.autograd.grad(every, net.module.weight_hh_l0, grad)[0]
    want = torch.autograd.grad(plain, net.module.weight_hh_l0, torch.cat([*grad], -1))[0]
    assert torch.equal(got, want)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_projections(bidirectional):
    torch.manual_seed(0)
    options = {"proj_size": 3, "bidirectional": bidirectional, "dtype": torch.float64}
    net, D = fastbptt.LSTM(I, H, 2, **options), 2 if bidirectional else 1
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.4
    hx = [torch.randn(2 * D, B, width, dtype=torch.float64) for width in (3, H)]
    plain, final = net(x, tuple(hx), resets=resets)
    zeros = tuple(torch.zeros_like(state) for state in hx)
    output, last, (h, c) = net(x, tuple(hx), resets=resets, reset_to=zeros, return_states=True)
    torch.testing.assert_close((output, last), (plain, final))
    assert h.shape == (2 * D, T, B, 3) and c.shape == (2 * D, T, B, H)
    torch.testing.assert_close(torch.cat([*h[-D:]], -1), output)
    torch.testing.assert_close(c[0, -1], final[1][0])


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", ["tanh", "gru", "lstm", *RECURRENT])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(name, form, plain):
    net = Net(name, 2, name == "gru", form)
    names = list(net.leaves)

    def call(*leaves):
        given = dict(zip(names, leaves, strict=True))
        hx = whole_of([given.pop(f"hx{i}") for i in range(len(net.hx))])
        reset_to = whole_of([given.pop(f"reset_to{i}") for i in range(len(net.hx))])
        options = {"resets": net.resets, "reset_to": reset_to, "return_states": True}
        results = torch.func.functional_call(net.module, given, (given.pop("x"), hx), options)
        return (results[0], *parts(results[1]), *parts(results[2]))

    leaves = [leaf.detach().clone().requires_grad_() for leaf in net.leaves.values()]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["tanh", "lstm", "leaky"])
def test_a_clipped_gradient_has_none(name, steps):
    net = Net(name, 2)
    _, first = net.gradients(*net.call(clip_grad=CLIP), create_graph=True)
    assert_equal(({}, first), ({}, net.gradients(*net.call(clip_grad=CLIP))[1]))
    with pytest.raises(NotImplementedError, match="clip_grad has no gradient of gradients"):
        first["x"].square().sum().backward()


@pytest.mark.parametrize("name", ["tanh", "lstm", "leaky"])
def test_second_derivatives(name, steps):
    net = Net(name, 2, name == "lstm")
    results = []
    options = {"resets": net.resets, "reset_to": whole_of(net.reset_to), "return_states": True}
    for each in (net.call(**options), net.by_hand(None, True, True, None)):
        _, first = net.gradients(*each, create_graph=True)
        total = sum((cotangent(g, 9) * g).sum() for g in first.values())
        second = torch.autograd.grad(total, net.leaves.values(), allow_unused=True)
        results.append(({}, dict(zip(net.leaves, second, strict=True))))
    assert_equal(*results)


def test_the_gradient_to_what_came_before_a_reset_is_cut(steps):
    net = Net("gru", 1)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    output, *_ = net.call(resets=resets, reset_to=net.reset_to[0])
    x, hx, to = torch.autograd.grad(output[3:].sum(), [net.x, net.hx[0], net.reset_to[0]])
    assert not x[:3].any() and not hx.any() and to.all() and x[3:].all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("make", [fastbptt.LSTM, NORMALIZED_LSTM], ids=["lstm", "normalized"])
def test_many_units(make, packed, threads):
    """Compiled, more of them than a tile has, by several threads: as the loop."""
    torch.manual_seed(0)
    count, width = 23, 70
    net = make(I, width, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(count, 9, I, dtype=torch.float64)
    resets = torch.rand(count, 9) < 0.2
    start = [torch.randn(4, count, 9, width, dtype=torch.float64) for _ in range(2)]
    start = [start[0].requires_grad_(), start[1][:, 0].clone().requires_grad_()]
    if packed:
        lengths = torch.randint(1, count + 1, (9,)).tolist()
        lengths[3] = count
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
    leaves, results = [*start, *net.parameters()], []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for way in ("unroll_of", "unroll"):
            with pytest.MonkeyPatch.context() as patch:
                if way == "unroll":
                    patch.setattr(_cell_network, "unroll_of", lambda *_: _loops.unroll)
                options = {"truncation": 7, "resets": resets, "reset_to": tuple(start)}
                output, last, every = net(x, return_states=True, clip_grad=0.1, **options)
            found = [output.data if packed else output, *last, *every]
            grads = torch.autograd.grad(found, leaves, [cotangent(t, 2) for t in found])
            results.append([*found, *grads])
    finally:
        torch.set_num_threads(before)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
