"""return_states, reset_to and clip_grad of all modules, against loops by hand."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import brute
import fastbptt
import shipped
from common import cotangent, parts, through_file, through_pickle, whole
from fastbptt import TBPTT, Chunked, Gated, Randomized, Sliding, cells

T, B, I, H = 6, 3, 2, 4
MODULES = {
    "tanh": shipped.elman,
    "relu": lambda layer, x, s, _: (torch.rnn_relu_cell(x, s[0], *shipped.weights(layer)),),
    "identity": lambda layer, x, s, _: (layer.pre(x)[0] + layer.rec(s[0])[0],),
    "gru": shipped.gru,
    "lstm": shipped.lstm,
}
RECURRENT = ("leaky", "dropout_lstm")  # of one state, and of three
CELLS = {"tanh": cells.elman, "relu": cells.elman, "identity": cells.elman}
CELLS |= {"gru": cells.gru, "lstm": cells.lstm}
MODES = {
    "full": None,
    "chunked": Chunked(2),
    "windows": TBPTT(2, 4),
    "last": TBPTT(2, 3, "last"),
    "sliding": Sliding(3),
    "gated": Gated(torch.tensor([0.5, 1.0, 0.25, 2.0, 0.0, 0.75])),
    "randomized": Randomized(pi=0.6, per_sequence=True),
}
OVERLAPPING = ("windows", "last", "sliding")
FORMS = ("layers", "learned", "steps")  # of reset_to
CLIP = 0.04  # of gradients most of which are larger


class Net:
    """A module, its step by hand, and leaves."""

    def __init__(self, name, layers=1, bidirectional=False, form="layers", **options):
        torch.default_generator.manual_seed(1)
        options |= {"bidirectional": bidirectional, "dtype": torch.float64}
        inputs = {}
        if name in RECURRENT:
            self.step = shipped.SHIPPED[name].step
            extras = {"alpha": 0.3} if name == "leaky" else {"mask": 0.8}
            cell = getattr(cells, name)
            self.module = self.view = fastbptt.Recurrent(cell, I, H, layers, **options, **extras)
        else:
            self.step, cell = MODULES[name], CELLS[name]
            cls = {"gru": fastbptt.GRU, "lstm": fastbptt.LSTM}.get(name, fastbptt.RNN)
            if cls is fastbptt.RNN:
                options["nonlinearity"] = name
            self.module = cls(I, H, layers, **options)
            self.view = SimpleNamespace(
                num_layers=layers, bidirectional=bidirectional, cell=cell, extras={}
            )
            for parameter, value in self.module.named_parameters():
                setattr(self.view, parameter, value)
        count = layers * (2 if bidirectional else 1)
        shape = {"layers": (B,), "learned": (1,), "steps": (T, B)}[form]

        def draw(*sizes):
            return (torch.rand(*sizes, dtype=torch.float64) * 2 - 1).requires_grad_()

        self.x = draw(T, B, I)
        self.hx = [draw(count, B, H) for _ in range(cell.states)]
        self.reset_to = [draw(count, *shape, H) for _ in range(cell.states)]
        self.resets = torch.rand(T, B) < 0.4
        self.resets[0, 1] = self.resets[3] = True
        self.inputs, self.form = inputs, form

    @property
    def leaves(self):
        leaves = {"x": self.x, **dict(self.module.named_parameters())}
        for name in ("hx", "reset_to"):
            leaves |= {f"{name}{i}": state for i, state in enumerate(getattr(self, name))}
        return leaves

    def wide(self):
        """reset_to as [L*D, T, B, H]."""
        if self.form == "steps":
            return self.reset_to
        return [each.unsqueeze(1).expand(-1, T, B, -1) for each in self.reset_to]

    def call(self, input=None, hx=None, **options):
        input = self.x if input is None else input
        states = tuple(self.hx) if len(self.hx) == 3 else whole(self.hx) if hx is None else hx
        output, last, *every = self.module(input, states, **options)
        return output, parts(last), parts(every[0]) if every else ()

    def by_hand(self, truncation, resets, reset_to, clip):
        with_given = self.wide() if reset_to else ()
        rest = (truncation, self.resets if resets else None, {}, with_given, clip)
        return brute.run(self.view, self.step, self.x, self.hx, *rest)

    def gradients(self, output, last, every, **options):
        """Outputs and gradients by name; a loss in the states, too."""
        results = [output, *last, *every]
        grads = [cotangent(t, i) for i, t in enumerate(results)]
        found = torch.autograd.grad(
            results, self.leaves.values(), grads, allow_unused=True, **options
        )
        given = {f"result {i}": t for i, t in enumerate(results)}
        return given, dict(zip(self.leaves, found, strict=True))


def assert_equal(got, want):
    for (a, b), rtol in zip(zip(got, want, strict=True), (1e-11, 1e-9), strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if value is None or a[name] is None:
                zero = a[name] if value is None else value
                assert zero is None or not zero.any(), name
                continue
            torch.testing.assert_close(
                a[name], value, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", [*MODULES, *RECURRENT])
@pytest.mark.parametrize("mode", MODES)
def test_against_windows_by_hand(name, mode):
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
            by_hand = net.by_hand(truncation, True, reset_to, clip)
            assert_equal(net.gradients(*got), net.gradients(*by_hand))


@pytest.mark.parametrize("name", [*MODULES, *RECURRENT])
def test_clipping_changes_gradients_alone(name):
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


@pytest.mark.parametrize("name", [*MODULES, *RECURRENT])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "mode, bidirectional",
    [(m, both) for m in MODES for both in (False, True) if not (both and m in OVERLAPPING)],
)
def test_packed_is_each_sequence_by_hand(name, form, mode, bidirectional):
    net, truncation, lengths = Net(name, 2, bidirectional, form), MODES[mode], (3, 6, 5)
    packed = pack_padded_sequence(net.x, lengths, enforce_sorted=False)
    options = {"truncation": truncation, "resets": net.resets, "return_states": True}
    options["reset_to"] = tuple(net.reset_to) if len(net.hx) > 1 else net.reset_to[0]
    output, last, every = net.call(packed, clip_grad=CLIP, **options)
    got = net.gradients(
        pad_packed_sequence(output)[0], last, [packed_rows(output, each) for each in every]
    )
    outputs, finals, kept = [], [], []
    for b, n in enumerate(lengths):
        own = truncation.last if isinstance(truncation, Randomized) else truncation
        if isinstance(own, Gated):
            own = Gated(own.kappa[:n] if own.kappa.dim() == 1 else own.kappa[:n, b : b + 1])
        its = brute.run(
            net.view,
            net.step,
            net.x[:n, b : b + 1],
            [state[:, b : b + 1] for state in net.hx],
            own,
            net.resets[:n, b : b + 1],
            {},
            [each[:, :n, b : b + 1] for each in net.wide()],
            CLIP,
        )
        pad = torch.nn.functional.pad
        outputs.append(pad(its[0], (0, 0, 0, 0, 0, T - n)))
        finals.append(its[1])
        kept.append([pad(each, (0, 0, 0, 0, 0, T - n)) for each in its[2]])
    by_hand = (
        torch.cat(outputs, 1),
        [torch.cat(of_all, 1) for of_all in zip(*finals, strict=True)],
        [torch.cat(of_all, 2) for of_all in zip(*kept, strict=True)],
    )
    assert_equal(got, net.gradients(*by_hand))


@pytest.mark.parametrize("name", [*MODULES, *RECURRENT])
@pytest.mark.parametrize("form", FORMS)
def test_other_layouts(name, form):
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


def whole_of(states):
    return tuple(states) if len(states) > 1 else states[0]


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


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm", *RECURRENT])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(name, form):
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
def test_second_derivatives_are_those_of_the_clamp(name):
    net = Net(name, 2)
    results = []
    reset_to = whole_of(net.reset_to)
    options = {"resets": net.resets, "reset_to": reset_to, "return_states": True}
    for each in (net.call(clip_grad=0.3, **options), net.by_hand(None, True, True, 0.3)):
        _, first = net.gradients(*each, create_graph=True)
        total = sum((cotangent(g, 9) * g).sum() for g in first.values())
        second = torch.autograd.grad(total, net.leaves.values(), allow_unused=True)
        results.append(({}, dict(zip(net.leaves, second, strict=True))))
    assert_equal(*results)


def test_the_gradient_to_what_came_before_a_reset_is_cut():
    net = Net("gru", 1)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    output, *_ = net.call(resets=resets, reset_to=net.reset_to[0])
    x, hx, to = torch.autograd.grad(output[3:].sum(), [net.x, net.hx[0], net.reset_to[0]])
    assert not x[:3].any() and not hx.any() and to.all() and x[3:].all()


def test_autocast():
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.4
    for cls in (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM):
        net = cls(I, H, 2)
        zeros = whole_of([torch.zeros(2, B, H)] * (2 if cls is fastbptt.LSTM else 1))
        with torch.autocast("cpu", torch.bfloat16):
            output, last = net(x, resets=resets)
            got, final, every = net(x, resets=resets, reset_to=zeros, return_states=True)
        assert got.dtype == output.dtype
        assert [s.dtype for s in parts(final)] == [s.dtype for s in parts(last)]
        assert [s.dtype for s in parts(every)] == [s.dtype for s in parts(last)]
        torch.testing.assert_close(got, output, rtol=0.03, atol=0.01)
        got.sum().backward()
        assert net.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    net = Net("lstm", 2)
    options = {"resets": net.resets, "reset_to": tuple(net.reset_to), "clip_grad": CLIP}
    exact = net.call(return_states=True, **options)
    hx = tuple(state.to(dtype) for state in net.hx)
    module = net.module.to(dtype)
    output, last, every = module(net.x.to(dtype), hx, return_states=True, **options)
    assert {s.dtype for s in (output, *last, *every)} == {dtype}
    torch.testing.assert_close(output.double(), exact[0], rtol=0.03, atol=0.02)


def test_transforms():
    net = fastbptt.GRU(I, H, dtype=torch.float64)
    x = torch.randn(5, T, B, I, dtype=torch.float64)
    resets = torch.rand(T, B) < 0.4
    start = torch.randn(1, 1, H, dtype=torch.float64)

    def loss(start, x):
        output, _ = net(x, resets=resets, reset_to=start, clip_grad=CLIP)
        return output.square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(start, x)
    for i in range(5):
        own = start.clone().requires_grad_()
        torch.testing.assert_close(got[i], torch.autograd.grad(loss(own, x[i]), own)[0])


def test_compiled():
    net = fastbptt.LSTM(I, H, clip_grad=CLIP)
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.4
    start = (torch.zeros(1, 1, H), torch.randn(1, 1, H, requires_grad=True))

    def call(x):
        output, _, (_, c) = net(x, resets=resets, reset_to=start, return_states=True)
        return output.sum() + c.square().sum()

    results = []
    for each in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        loss = each(x)
        results.append((loss, torch.autograd.grad(loss, [start[1], net.weight_hh_l0])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_file])
def test_copies(through):
    net = fastbptt.LSTM(I, H, 2, clip_grad=0.5, truncation=2)
    other = through(net)
    assert other.clip_grad == 0.5 and repr(other) == repr(net)
    assert repr(net) == "LSTM(2, 4, num_layers=2, truncation=Chunked(k=2), clip_grad=0.5)"
    assert net.state_dict().keys() == torch.nn.LSTM(I, H, 2).state_dict().keys()
    net = fastbptt.Recurrent(cells.elman, I, H, clip_grad=2)
    assert repr(through(net)) == "Recurrent(elman, 2, 4, clip_grad=2.0)"


def test_converting():
    model = torch.nn.Sequential(fastbptt.GRU(I, H, clip_grad=0.5))
    with pytest.warns(UserWarning, match=r"'0' \(GRU\) loses its clip_grad=0.5"):
        fastbptt.revert(model)
    assert type(model[0]) is torch.nn.GRU and "clip_grad" not in vars(model[0])
    net = fastbptt.convert(model)[0]
    assert net.clip_grad is None
    net.clip_grad = 0.25
    assert "clip_grad=0.25" in repr(net)
    with fastbptt.patch():
        assert torch.nn.LSTM(I, H, clip_grad=1).clip_grad == 1.0
    x = torch.randn(T, B, I)
    a = net(x, return_states=True)[2]
    assert a.shape == (1, T, B, H)


class Model(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.rnn = fastbptt.GRU(I, H, **options)

    def forward(self, x):
        return self.rnn(x)[0]


def test_torchscript():
    with pytest.raises(NotImplementedError, match="GRU: clip_grad=0.5 cannot be scripted"):
        torch.jit.script(Model(clip_grad=0.5))
    model, x = Model(clip_grad=0.5), torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match="trace cannot have clip_grad=0.5"):
        torch.jit.trace(model, (x,))
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x), model(x))
    model.rnn.clip_grad = None
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_forward_mode_has_no_clipping():
    net, x = fastbptt.GRU(I, H, clip_grad=0.5), torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match="forward mode cannot have clip_grad=0.5"):
        torch.func.jvp(lambda x: net(x)[0], (x,), (x,))


def net(cls=fastbptt.GRU, **options):
    return cls(I, H, 2, dtype=torch.float64, **options)


X = torch.zeros(T, B, I, dtype=torch.float64)
RESETS = torch.zeros(T, B, dtype=torch.bool)
TO = torch.zeros(2, B, H, dtype=torch.float64)
PACKED = pack_padded_sequence(X, [6, 5, 2])


def to(reset_to, x=X, resets=RESETS, cls=fastbptt.GRU, **options):
    return lambda: net(cls, **options)(x, resets=resets, reset_to=reset_to)


def recurrent(reset_to):
    cell = fastbptt.Recurrent(cells.dropout_lstm, I, H, mask=1.0, dtype=torch.float64)
    return lambda: cell(X, resets=RESETS, reset_to=reset_to)


ERRORS = {
    "no bool": (
        lambda: net()(X, return_states=1),
        TypeError,
        "return_states must be a bool, got 1",
    ),
    "no resets": (
        to(TO, resets=None),
        ValueError,
        "reset_to must go with resets, which say where, got none",
    ),
    "list": (to([TO]), TypeError, "reset_to must be a Tensor, got list"),
    "number": (to(0.0), TypeError, "reset_to must be a Tensor, got float"),
    "one state of two": (
        to(TO, cls=fastbptt.LSTM),
        TypeError,
        "reset_to must be a tuple of 2 Tensors, one for each state of lstm, got Tensor",
    ),
    "three states": (
        to((TO,) * 3, cls=fastbptt.LSTM),
        TypeError,
        "a tuple of 2 Tensors, one for each state of lstm, got 3 of them",
    ),
    "none": (
        to((TO, None), cls=fastbptt.LSTM),
        TypeError,
        r"reset_to\[1\] must be a Tensor, got N",
    ),
    "of Recurrent": (
        recurrent((TO, TO)),
        TypeError,
        "a tuple of 3 Tensors, one for each state of dropout_lstm, got 2 of them",
    ),
    "integers": (to(TO.long()), ValueError, "reset_to must be floating point, got torch.int64"),
    "device": (to(TO.to("meta")), ValueError, "reset_to must be on input's device cpu, got meta"),
    "layers": (
        to(TO[:1]),
        ValueError,
        r"reset_to must have shape \(2, 3, 4\) or \(2, 1, 4\) or \(2, 6, 3, 4\), got \(1, 3, 4\)",
    ),
    "batch first": (
        to(torch.zeros(2, T, B, H), X.transpose(0, 1), RESETS.t(), batch_first=True),
        ValueError,
        r"or \(2, 3, 6, 4\), got \(2, 6, 3, 4\)",
    ),
    "packed": (to(torch.zeros(2, B, T, H), PACKED), ValueError, r"\(2, 6, 3, 4\), got \(2, 3, 6"),
    "unbatched": (
        to(TO, X[:, 0], RESETS[:, 0]),
        ValueError,
        r"reset_to must have shape \(2, 4\) or \(2, 6, 4\), got \(2, 3, 4\)",
    ),
    "projection": (
        to((TO, TO), cls=fastbptt.LSTM, proj_size=2),
        ValueError,
        r"reset_to\[0\] must have shape \(2, 3, 2\) or .*, got \(2, 3, 4\)",
    ),
    "text": (
        lambda: net(clip_grad="1"),
        TypeError,
        "clip_grad must be a number, got '1' of type st",
    ),
    "true": (lambda: net()(X, clip_grad=True), TypeError, "clip_grad must be a number, got True"),
    "zero": (lambda: net(clip_grad=0), ValueError, "clip_grad must be positive and finite, got 0"),
    "negative": (lambda: net()(X, clip_grad=-1.0), ValueError, "must be positive .* got -1.0"),
    "nan": (lambda: net(clip_grad=float("nan")), ValueError, "must be positive .* got nan"),
    "infinite": (lambda: net(clip_grad=float("inf")), ValueError, "must be .* finite, got inf"),
    "Recurrent's": (
        lambda: fastbptt.Recurrent(cells.elman, I, H, clip_grad=-1),
        ValueError,
        "clip_grad must be positive and finite, got -1",
    ),
    "name": (
        lambda: fastbptt.Recurrent(cells.leaky, I, H, alpha="reset_to"),
        ValueError,
        "alpha must be the name of an input per step that a call can have, got 'reset_to'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    what, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        what()
