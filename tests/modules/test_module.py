"""The module around the recurrence: its state, its options, what autograd may ask of it."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastbptt
from benchmarks import memory
from benchmarks.common.rows import Row
from common import (
    Case,
    assert_matches,
    cotangent,
    parts,
    python,
    referee,
    step,
    surrounded,
    tensors_of,
    through_file,
    through_pickle,
    twin,
    whole,
)
from fastbptt import Chunked

pytestmark = pytest.mark.usefixtures("poisoned")

STACKS = {
    "rnn": Case(6, 3, 4, 5, layers=2, bidirectional=True),
    "gru": Case(6, 3, 4, 5, layers=2, bidirectional=True, cell="gru"),
    "lstm": Case(6, 3, 4, 5, layers=2, bidirectional=True, cell="lstm", proj=3),
}
STACK = STACKS["rnn"]
every_stack = pytest.mark.parametrize("case", STACKS.values(), ids=STACKS)
every_cell = pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
CLASSES = {cls.__name__: cls for cls in (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM)}
every_class = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)


@every_class
@pytest.mark.parametrize("bias", [False, True], ids="bias={}".format)
def test_state_dict_goes_both_ways(bias, cls):
    options = {"num_layers": 2, "bidirectional": True, "bias": bias}
    if cls is fastbptt.LSTM:
        options["proj_size"] = 3
    theirs_cls = getattr(torch.nn, cls.__name__)
    ours, theirs = cls(4, 5, **options), theirs_cls(4, 5, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_matches(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0)
    fresh = theirs_cls(4, 5, **options)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    assert_matches(dict(fresh.state_dict()), dict(ours.state_dict()), rtol=0)
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(ours(x)[0], fresh(x)[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(cls(4, 6, **options).state_dict())


@every_stack
def test_same_seed_same_initialisation(case):
    ours = case.module()
    options = {"bidirectional": True, "dtype": case.dtype}
    if case.proj:
        options["proj_size"] = case.proj
    torch.manual_seed(case.seed)
    theirs = getattr(torch.nn, type(ours).__name__)(case.I, case.H, case.layers, **options)
    assert_matches(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0)


@every_class
def test_is_an_instance_of_torchs_class(cls):
    theirs = {name: getattr(torch.nn, name) for name in ("RNN", "GRU", "LSTM")}
    module = cls(3, 4)
    for name, other in theirs.items():
        assert isinstance(module, other) == (name == cls.__name__)
    converted = fastbptt.convert(theirs[cls.__name__](3, 4))
    assert type(converted) is cls and isinstance(converted, theirs[cls.__name__])
    names = [name for name in dir(theirs[cls.__name__]) if not name.startswith("__")]
    assert all(hasattr(module, name) for name in names)


COMPILES_OURS = """
import sys, torch
if sys.argv[1] == "before":
    import torch._dynamo
import fastbptt
assert sys.argv[1] == "before" or "torch._dynamo" not in sys.modules, "it would take a second"
class Net(torch.nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.rnn = cls(3, 4)
    def forward(self, x):
        return 2 * self.rnn(x)[0] if isinstance(self.rnn, torch.nn.LSTM) else x
x = torch.randn(5, 2, 3)
ours, theirs = Net(fastbptt.LSTM), Net(torch.nn.LSTM)
compile = lambda net: torch.compile(net, fullgraph=True, backend="aot_eager")
assert torch.equal(compile(ours)(x), ours(x))
converted = fastbptt.convert(Net(torch.nn.LSTM))
assert torch.equal(compile(converted)(x), converted(x))
assert not torch._dynamo.config.allow_rnn
try:
    compile(theirs)(x)
except torch._dynamo.exc.Unsupported:
    print("refused")
"""


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", ["before", "after"])
def test_compile_takes_ours_and_treats_torchs_own_as_before(dynamo):
    assert python(COMPILES_OURS, dynamo).stdout.strip() == "refused"


@every_class
def test_a_state_of_torchs_class_unpickled_into_ours(cls):
    theirs = getattr(torch.nn, cls.__name__)(3, 4, 2)
    ours = cls.__new__(cls)
    ours.__setstate__(theirs.__getstate__())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert ours.truncation is None


@every_class
def test_weights_are_set_by_name(cls):
    module = cls(3, 4)
    weights = list(module.parameters())
    assert all(a is b for a, b in zip(module._flat_weights, weights, strict=True))
    other = torch.nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    message = f"fastbptt.{cls.__name__} takes its weights by name"
    with pytest.raises(TypeError, match=message):
        module._flat_weights[1] = other
    with pytest.raises(TypeError, match=message):
        module._flat_weights = [weights[0], other, *weights[2:]]
    assert module.weight_hh_l0 is weights[1]
    module.weight_hh_l0 = other
    assert module._flat_weights[1] is other


def test_helpers_of_torchs_lstm():
    ours, theirs = fastbptt.LSTM(3, 4, 2, proj_size=2), torch.nn.LSTM(3, 4, 2, proj_size=2)
    x, h, c = torch.randn(5, 6, 3), torch.randn(2, 6, 2), torch.randn(2, 6, 4)
    assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)
    ours.check_forward_args(x, (h, c), None)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        ours.check_forward_args(x, (c, c), None)
    order = torch.tensor([5, 3, 4, 1, 2, 0])
    for a, b in zip(ours.permute_hidden((h, c), order), (h, c), strict=True):
        assert torch.equal(a, b[:, order])


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, through_pickle, through_file])
def test_copies(clone):
    module = STACK.module(truncation=3)
    expected = step(module, *STACK.data())  # after a call: whatever it keeps must be copied too
    other = clone(module)
    assert other.truncation == Chunked(3) and repr(other) == repr(module)
    assert_matches(step(other, *STACK.data()), expected, rtol=0)
    assert_matches(step(module, *STACK.data()), expected, rtol=0)


def test_repr():
    assert repr(fastbptt.RNN(4, 5)) == "RNN(4, 5)"
    text = repr(fastbptt.RNN(4, 5, 2, truncation=7, batch_first=True))
    assert "4, 5, num_layers=2, batch_first=True" in text and "truncation=Chunked(k=7)" in text
    assert repr(fastbptt.GRU(4, 5, recompute=True)) == "GRU(4, 5, recompute=True)"
    text = repr(fastbptt.LSTM(4, 5, proj_size=3, truncation=7))
    assert text == "LSTM(4, 5, proj_size=3, truncation=Chunked(k=7))"


@pytest.mark.parametrize(
    "cls, arguments",
    [
        (fastbptt.RNN, (4, 5, 2, "relu", False, True, 0.25, True)),
        (fastbptt.GRU, (4, 5, 2, False, True, 0.25, True)),
        (fastbptt.LSTM, (4, 5, 2, False, True, 0.25, True, 3, "cpu", torch.float64)),
    ],
)
def test_positional_arguments_are_torchs(cls, arguments):
    ours, theirs = cls(*arguments), getattr(torch.nn, cls.__name__)(*arguments)
    for name in (*torch.nn.RNNBase.__constants__, *["nonlinearity"] * (cls is fastbptt.RNN)):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("truncation", [None, 2])
@every_class
def test_dropout(cls, p, truncation):
    options = {"dtype": torch.float64, "truncation": truncation}
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    torch.manual_seed(0)
    module = cls(6, 32, 3, dropout=p, **options)
    no_dropout = cls(6, 32, 3, **options)
    no_dropout.load_state_dict(module.state_dict())
    assert_matches(step(module.eval(), x), step(no_dropout, x), rtol=0)

    # In training a mask lies between layers, and none after the last: by hand, layer by layer.
    # The masks are torch's, drawn in order from its generator, so the seed gives them.
    module.train()
    layers = [cls(n, 32, **options) for n in (6, 32, 32)]
    for i, layer in enumerate(layers):
        values = {n: getattr(module, n.replace("_l0", f"_l{i}")) for n in layer.state_dict()}
        layer.load_state_dict(values)

    def by_hand(x, hx=None):
        finals = []
        for i, layer in enumerate(layers):
            if i > 0:
                x = torch.nn.functional.dropout(x, p, training=True)
            x, last = layer(x)
            finals.append(parts(last))
        return x, whole([torch.cat(of_all) for of_all in zip(*finals, strict=True)])

    def outputs_and_dinput(call):
        torch.manual_seed(7)
        got = step(module, x, call=call)
        return {name: got[name] for name in got if name == "dinput" or not name.startswith("d")}

    assert_matches(outputs_and_dinput(module), outputs_and_dinput(by_hand))
    if truncation is None:
        assert_matches(outputs_and_dinput(module), outputs_and_dinput(twin(module)))


@every_stack
def test_replaced_parameters_are_used(case):
    module, other = case.module(), case.module()
    torch.manual_seed(9)
    new = {n: torch.nn.Parameter(torch.randn_like(p)) for n, p in module.named_parameters()}
    for name, value in new.items():
        setattr(module, name, value)
    expected = step(twin(module), *case.data())
    assert_matches(step(module, *case.data()), expected)

    def call(x, hx):
        return torch.func.functional_call(other, dict(module.named_parameters()), (x, hx))

    assert_matches(step(module, *case.data(), call=call), expected)


def test_parameters_of_another_dtype_for_one_call():
    single = Case(dtype=torch.float32).module()
    double = {n: p.detach().double() for n, p in single.named_parameters()}
    arguments = Case().data()
    output, h_n = torch.func.functional_call(single, double, arguments)
    expected = twin(Case(dtype=torch.float32).module()).double()(*arguments)
    assert_matches({"output": output, "h_n": h_n}, {"output": expected[0], "h_n": expected[1]})


@pytest.mark.parametrize("truncation", [None, 2])
def test_weight_norm(truncation):
    case = Case(6, 3, 4, 5)
    ours, theirs = case.module(truncation=truncation), twin(case.module())
    for module in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x, h = case.data()
    for _ in range(3):
        grads = []
        for module in (ours, theirs):
            module.zero_grad()
            if truncation is None or module is ours:
                output, h_n = module(x, h)
            else:
                output, h_n = fastbptt.reference.run(module, x, h, truncation=truncation)
            (output.sin().sum() + h_n.sum()).backward()
            grads.append({n: p.grad.clone() for n, p in module.named_parameters()})
            torch.optim.SGD(module.parameters(), lr=0.1).step()
        assert_matches(*grads)


def test_cast_and_move():
    module = Case(dtype=torch.float32).module()
    x = torch.randn(5, 3, 3)
    before = module(x)[0]
    assert module.double()(x.double())[0].dtype == torch.float64
    assert torch.equal(module.float()(x)[0], before)
    shapes = [t.shape for t in module.to("meta")(x.to("meta"))]
    assert shapes == [t.shape for t in twin(module)(x.to("meta"))]


# What is asked of autograd.


@pytest.mark.parametrize("truncation", [None, 4], ids="truncation={}".format)
@pytest.mark.parametrize(
    "cell, through",
    [
        *itertools.product(("tanh", "gru", "lstm"), [("output",), ("h_n",)]),
        *itertools.product(("lstm",), [("c_n",), ("output", "c_n"), ("h_n", "c_n")]),
    ],
)
def test_through_some_outputs(cell, through, truncation):
    for lengths in (None, (6, 2, 4)):
        case = Case(6, 3, 4, 5, 2, True, cell=cell, proj=3 * (cell == "lstm"), lengths=lengths)
        double, call = referee(case.module(), truncation)
        expected = step(double, *case.data(), through=through, call=call)
        module = case.module(truncation=truncation)
        assert_matches(step(module, *case.data(), through=through), expected)


@every_stack
def test_gradients_only_where_asked_for(case):
    module = case.module(truncation=4)
    x, hx = case.data()
    full = step(module, x, hx)
    names = [n for n, _ in module.named_parameters()]
    states = dict(zip(("dhx", "dcx"), parts(hx), strict=False))
    wanted = [{"dinput"}, *({name} for name in states), {"d" + n for n in names}]
    wanted += [{"dweight_hh_l1"}, {"dinput", "dbias_ih_l0_reverse"}, {*states, "dweight_ih_l0"}]
    wanted += [{"d" + n} for n in names if "weight_hr" in n]
    for some in wanted:
        module.zero_grad()
        leaves = {"dinput": x.clone(), **{name: t.clone() for name, t in states.items()}}
        initial = whole([leaves[name] for name in states])
        leaves |= {"d" + n: p for n, p in module.named_parameters()}
        for name, t in leaves.items():
            t.requires_grad_(name in some)
        outputs = tensors_of(module(leaves["dinput"], initial))
        torch.autograd.backward(outputs, [cotangent(t, i) for i, t in enumerate(outputs)])
        got = {n: t.grad for n, t in leaves.items() if t.grad is not None}
        assert_matches(got, {n: full[n] for n in some})


def test_no_gradient():
    module = STACK.module().requires_grad_(False)
    x, h = STACK.data()
    output, h_n = module(x, h)
    assert not output.requires_grad and not h_n.requires_grad
    module.requires_grad_(True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            silent, silent_h = module(x, h)
        assert not silent.requires_grad
        assert torch.equal(silent, output) and torch.equal(silent_h, h_n)


@every_stack
def test_retained_graph_gives_the_same_again(case):
    module = case.module(truncation=3)
    x, hx = case.data()
    leaves = [*(t.requires_grad_() for t in (x, *parts(hx))), *module.parameters()]
    loss = module(x, hx)[0].sin().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@every_stack
def test_gradients_accumulate(case):
    module = case.module()
    once = step(module, *case.data())
    outputs = tensors_of(module(*case.data()))
    torch.autograd.backward(outputs, [cotangent(t, i) for i, t in enumerate(outputs)])
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, 2 * once["d" + name]), name


@every_stack
@pytest.mark.parametrize("truncation", [None, 3], ids="truncation={}".format)
def test_gradient_penalty(truncation, case):
    """A second derivative in the parameters: as by torch's module, or a loop of it."""

    def penalty_gradients(module, call):
        x, hx = case.data()
        loss = call(x.requires_grad_(), hx)[0].square().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        weights = list(module.parameters())
        return dict(enumerate(torch.autograd.grad(dx.square().sum(), weights)))

    module = case.module(truncation=truncation)
    peer, call = referee(module, truncation)
    found, expected = penalty_gradients(module, module), penalty_gradients(peer, call)
    assert_matches(found, expected, rtol=1e-10)


@every_stack
@pytest.mark.parametrize("trains", [True, False], ids="trains={}".format)
def test_forward_mode(trains, case):
    module = case.module().requires_grad_(trains)
    x, hx = case.data()
    tangents = []
    for each in (module, twin(module)):
        with forward_ad.dual_level():
            output, _ = each(forward_ad.make_dual(x, torch.ones_like(x)), hx)
            tangents.append(forward_ad.unpack_dual(output).tangent.detach())
    assert_matches({"": tangents[0]}, {"": tangents[1]}, rtol=1e-10)


@every_stack
def test_watched_by_a_mode(case):
    # Where functions are watched the operator is called by its name, else directly.
    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    module, names = case.module(), []
    expected = step(module, *case.data())
    with Watch():
        results = step(module, *case.data())
    assert "fastbptt.network.default" in names
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@every_stack
@pytest.mark.parametrize("victim", ["input", "hx", "cx", "output", "weight_hh_l0", "weight_hr_l1"])
def test_a_saved_tensor_changed_in_place_is_noticed(victim, case):
    module = case.module()
    x, hx = case.data()
    results = tensors_of(module(x, hx))
    tensors = {"input": x, "output": results[0], **dict(module.named_parameters())}
    tensors |= dict(zip(("hx", "cx"), parts(hx), strict=False))
    if victim not in tensors:
        assert case.cell != "lstm"
        return
    with torch.no_grad():
        tensors[victim].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(t.sum() for t in results).backward()


@pytest.mark.parametrize("victim", ["output", "h_n", "c_n"])
@pytest.mark.parametrize("T", [1, 3])
@every_cell
def test_results_share_no_memory(cell, T, victim):
    case = Case(T, 2, 3, 4, cell=cell)
    module = case.module().requires_grad_(False)
    x, hx = case.data()
    tensors = {"x": x, **{f"state {i}": t for i, t in enumerate(parts(hx))}}
    tensors |= dict(zip(("output", "h_n", "c_n"), tensors_of(module(x, hx)), strict=False))
    if victim in tensors:
        before = {name: t.clone() for name, t in tensors.items() if name != victim}
        tensors[victim].zero_()
        assert_matches({name: tensors[name] for name in before}, before, rtol=0)


@every_stack
def test_checkpoint_and_saved_tensor_hooks(case):
    module = case.module(truncation=3)
    expected = step(module, *case.data())

    def checkpointed(x, h):
        return checkpoint(module, x, h, use_reentrant=False)

    assert_matches(step(module, *case.data(), call=checkpointed), expected, rtol=0)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    def hooked(x, h):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return module(x, h)

    assert_matches(step(module, *case.data(), call=hooked), expected, rtol=0)
    assert packed


@pytest.mark.parametrize("case", [STACKS["gru"], STACKS["lstm"]], ids=["gru", "lstm"])
@pytest.mark.parametrize("truncation", [None, 4], ids="truncation={}".format)
def test_recompute_gives_the_same(truncation, case, isa, threads):
    for shape in [(6, 3, 4, 5), (5, 13, 9, 70), (40, 1, 64, 33)]:
        for dtype in (torch.float32, torch.float64):
            T, B, I, H = shape
            lengths = (T, *(1 + b % T for b in range(B - 1)))
            kind = dataclasses.replace(case, T=T, B=B, I=I, H=H, dtype=dtype)
            for this in (kind, dataclasses.replace(kind, lengths=lengths, hx=False)):
                expected = step(this.module(truncation=truncation), *this.data())
                again = this.module(truncation=truncation, recompute=True)
                rtol = 1e-12 if dtype == torch.float64 else 64 * torch.finfo(dtype).eps
                assert_matches(step(again, *this.data()), expected, rtol)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recompute_takes_at_most_half_the_memory(cell):
    row = Row(cell, 256, 16, 64, None)
    kept, recomputed = (
        memory.allocated(row, label)["allocated"] for label in (memory.OURS, memory.RECOMPUTE)
    )
    gates = 256 * 16 * 4 * 64 * 4  # bytes
    assert kept >= gates
    assert recomputed <= kept / 2, f"{recomputed} bytes of {kept}"


# What lies in memory.


@every_cell
@pytest.mark.parametrize("contiguous", [True, False], ids="contiguous={}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_surrounding_memory_is_not_read(dtype, contiguous, cell, isa):
    check_that_surrounding_memory_is_not_read(dtype, contiguous, cell)


@every_cell
@pytest.mark.parametrize("contiguous", [True, False], ids="contiguous={}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_surrounding_16_bits_are_not_read(dtype, contiguous, cell, isa_of_16_bits):
    check_that_surrounding_memory_is_not_read(dtype, contiguous, cell)


def check_that_surrounding_memory_is_not_read(dtype, contiguous, cell):
    for B, H, k in [(3, 5, None), (13, 33, 4), (1, 70, None), (1, 64, 3), (6, 130, None)]:
        proj = 3 if cell == "lstm" and B > 1 else 0
        case = Case(7, B, 6, H, 2, bidirectional=True, cell=cell, proj=proj, dtype=dtype)
        module = case.module(truncation=k)
        expected = step(module, *case.data())
        for name, parameter in module.named_parameters():
            setattr(module, name, torch.nn.Parameter(surrounded(parameter, contiguous)))
        x, hx = case.data()
        x, *states = (surrounded(t, contiguous).requires_grad_() for t in (x, *parts(hx)))
        tensors = tensors_of(module(x, whole(states)))
        torch.autograd.backward(
            tensors, [surrounded(cotangent(t, i), contiguous) for i, t in enumerate(tensors)]
        )
        actual = dict(zip(("output", "h_n", "c_n"), tensors, strict=False))
        actual |= {name: t.grad for name, t in zip(("dhx", "dcx"), states, strict=False)}
        actual |= {"dinput": x.grad, **{"d" + n: p.grad for n, p in module.named_parameters()}}
        # Another stride may mean another order of summation in a GEMM, so: to rounding.
        assert_matches(actual, expected, rtol=16 * torch.finfo(dtype).eps)


@every_cell
def test_expanded_and_transposed_arguments(cell):
    case = Case(6, 4, 3, 5, 1, cell=cell)
    module = case.module(truncation=4)
    other, call = referee(module, 4)
    x, hx = case.data()
    expanded = whole([state[:, :1].expand(1, 4, 5) for state in parts(hx)])
    transposed = whole([state.mT.contiguous().mT for state in parts(hx)])
    for x_view, hx_view in [
        (x[:, :1].expand(6, 4, 3), expanded),
        (x.transpose(0, 1).contiguous().transpose(0, 1), transposed),
        (x.flip(0)[::2], hx),
        (x[..., :1].expand(6, 4, 3), hx),
    ]:
        grads = []
        for m, f in ((module, module), (other, call)):
            m.zero_grad()
            output, *_ = tensors_of(f(x_view, hx_view))
            output.sum().backward()  # an expanded gradient: stride 0 everywhere
            grads.append({n: p.grad.clone() for n, p in m.named_parameters()} | {"output": output})
        assert_matches(*grads)


@pytest.mark.parametrize("cell", ["tanh", "relu", "gru", "lstm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_spread_as_in_torch(value, cell, isa):
    for B, H in [(3, 5), (1, 64), (13, 33)]:
        case = Case(6, B, 4, H, cell=cell)
        module = case.module()
        x, hx = case.data()
        x[2, 0, 1] = value
        parts(hx)[0][0, B - 1, 0] = value
        actual, expected = step(module, x, hx), step(twin(module), x, hx)
        for name in expected:
            torch.testing.assert_close(
                actual[name], expected[name], rtol=1e-11, atol=1e-11, equal_nan=True, msg=name
            )


@every_stack
def test_empty_batch(case):
    for batch_first in (False, True):
        case = dataclasses.replace(case, B=0, batch_first=batch_first)
        module = case.module(truncation=2)
        actual = step(module, *case.data())
        assert_matches(actual, step(twin(module), *case.data()))
        for name, parameter in module.named_parameters():
            assert torch.equal(actual["d" + name], torch.zeros_like(parameter)), name
