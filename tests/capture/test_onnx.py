"""torch.onnx.export, by both exporters: ONNX's own recurrent operators, with eager's values."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastbptt
from common import Case, parts, tensors_of, whole

onnx = pytest.importorskip("onnx")
onnx_reference = pytest.importorskip("onnx.reference")

pytestmark = [pytest.mark.filterwarnings("ignore")]  # the exporters' own, of many kinds

EXPORTERS = ["torchscript", "dynamo"]
OPERATORS = {"tanh": "RNN", "relu": "RNN", "identity": "RNN", "gru": "GRU", "lstm": "LSTM"}


@pytest.fixture(params=EXPORTERS)
def exporter(request):
    if request.param == "dynamo":
        pytest.importorskip("onnxscript")
    return request.param


def export(exporter: str, model: nn.Module, arguments, path, dynamic: bool = False):
    """The ONNX model; ``dynamic`` lets the first two axes of the first argument change."""
    options: dict = {"dynamo": exporter == "dynamo"}
    if dynamic and exporter == "dynamo":
        axes = {0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")}
        options["dynamic_shapes"] = (axes, *[None] * (len(arguments) - 1))
    elif dynamic:
        options |= {"input_names": ["x"], "dynamic_axes": {"x": {0: "steps", 1: "batch"}}}
    if exporter == "dynamo":
        options["verbose"] = False
    torch.onnx.export(model, tuple(arguments), path, **options)
    return onnx.load(path)


def count(model, operator: str) -> int:
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    return kinds[operator]


def run(model, arguments) -> list[Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString())
    names = [each.name for each in session.get_inputs()]
    values = [tensor.numpy() for tensor in arguments]
    results = session.run(None, dict(zip(names, values, strict=True)))
    return [torch.from_numpy(result) for result in results]


CASES = [
    Case(cell="tanh"),
    Case(cell="tanh", hx=False, layers=2, bidirectional=True, batch_first=True),
    Case(cell="relu", bias=False),
    Case(cell="tanh", B=None),
    Case(cell="gru", hx=False),
    Case(cell="gru", layers=2, bidirectional=True),
    Case(cell="gru", batch_first=True, bias=False),
    Case(cell="lstm"),
    Case(cell="lstm", hx=False, batch_first=True),
    Case(cell="lstm", layers=2, bidirectional=True, bias=False),
]
CASES = [Case(**{**vars(case), "dtype": torch.float32}) for case in CASES]


@pytest.mark.slow(1)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bare_module(case, exporter, tmp_path):
    module, (x, hx) = case.module(truncation=2).eval(), case.data()
    arguments = (x,) if hx is None else (x, hx)
    model = export(exporter, module, arguments, tmp_path / "model.onnx")
    assert count(model, OPERATORS[case.cell]) == case.layers
    results = run(model, (x, *parts(hx)))
    for a, b in zip(results, tensors_of(module(x, hx)), strict=True):
        torch.testing.assert_close(a, b)


class Net(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        output, states = self.rnn(x.tanh())
        return self.head(output), whole([state[-1] for state in parts(states)])


@pytest.mark.slow(1)
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_inside_a_net_at_another_shape(cell, exporter, tmp_path):
    net = Net(Case(cell=cell, layers=2, dtype=torch.float32).module(truncation=2)).eval()
    x = torch.randn(5, 2, 3)
    model = export(exporter, net, (x,), tmp_path / "model.onnx", dynamic=True)
    assert count(model, OPERATORS[cell]) == 2
    x = torch.randn(9, 4, 3)
    output, states = net(x)
    for a, b in zip(run(model, (x,)), (output, *parts(states)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow(2)
@pytest.mark.parametrize(
    "truncation",
    [fastbptt.TBPTT(2, 3), fastbptt.Randomized(0.5), fastbptt.Gated(torch.zeros(5))],
    ids=str,
)
def test_truncations_play_no_part(truncation, exporter, tmp_path):
    case = Case(cell="lstm", hx=False, dtype=torch.float32)
    module, (x, _) = case.module(truncation=truncation).eval(), case.data()
    model = export(exporter, module, (x,), tmp_path / "model.onnx")
    assert count(model, "LSTM") == 1
    for a, b in zip(run(model, (x,)), tensors_of(module(x)), strict=True):
        torch.testing.assert_close(a, b)


def test_identity(tmp_path):
    """ONNX has that nonlinearity, the older exporter has not."""
    case = Case(cell="identity", layers=2, bidirectional=True, dtype=torch.float32)
    module, (x, hx) = case.module().eval(), case.data()
    with pytest.raises(NotImplementedError, match="nonlinearity='identity' cannot be exported"):
        export("torchscript", module, (x, hx), tmp_path / "model.onnx")
    pytest.importorskip("onnxscript")
    model = export("dynamo", module, (x, hx), tmp_path / "model.onnx")
    assert count(model, "RNN") == 2
    for a, b in zip(run(model, (x, hx)), tensors_of(module(x, hx)), strict=True):
        torch.testing.assert_close(a, b)


class WithResets(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, resets):
        return self.rnn(x, resets=resets)


def test_resets_are_refused(tmp_path):
    net = WithResets(fastbptt.GRU(3, 4).eval())
    arguments = torch.randn(5, 2, 3), torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="resets cannot be exported"):
        export("torchscript", net, arguments, tmp_path / "model.onnx")


class WithStates(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x, return_states=True)[2]


def test_states_are_refused(tmp_path):
    """But for those that are the output."""
    x = torch.randn(5, 2, 3)
    net = WithStates(fastbptt.GRU(3, 4, 2).eval())
    with pytest.raises(NotImplementedError, match="return_states cannot be exported"):
        export("torchscript", net, (x,), tmp_path / "model.onnx")
    net = WithStates(fastbptt.GRU(3, 4).eval())
    model = export("torchscript", net, (x,), tmp_path / "model.onnx")
    torch.testing.assert_close(run(model, (x,))[0], net(x))


def test_resets_to_a_state_are_refused(tmp_path):
    class Model(WithResets):
        def forward(self, x, resets):
            return self.rnn(x, resets=resets, reset_to=torch.ones(1, 2, 4))

    net = Model(fastbptt.GRU(3, 4, clip_grad=0.5).eval())
    arguments = torch.randn(5, 2, 3), torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="^reset_to cannot be exported"):
        export("torchscript", net, arguments, tmp_path / "model.onnx")


def test_clipping_plays_no_part(exporter, tmp_path):
    net, x = fastbptt.GRU(3, 4, clip_grad=0.5).eval(), torch.randn(5, 2, 3)
    model = export(exporter, net, (x,), tmp_path / "model.onnx")
    assert count(model, "GRU") == 1
    torch.testing.assert_close(run(model, (x,))[0], net(x)[0])


def test_a_projection_is_refused(exporter, tmp_path):
    """torch's newer exporter writes a graph that leaves it out."""
    module = fastbptt.LSTM(3, 4, proj_size=2).eval()
    # The newer exporter tries on with torch.compile's front end, which shows it the operator.
    reason = {"torchscript": "proj_size cannot be exported", "dynamo": "fastbptt"}[exporter]
    with pytest.raises(Exception, match=reason):
        export(exporter, module, (torch.randn(5, 2, 3),), tmp_path / "model.onnx")


class Packs(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        output, states = self.rnn(pack_padded_sequence(x, lengths))
        return pad_packed_sequence(output)[0], *parts(states)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_packed_by_the_older_exporter(cell, tmp_path):
    """At other lengths; the newer exporter refuses to pack, before it comes to the module."""
    net = Packs(Case(cell=cell, dtype=torch.float32).module().eval())
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 3])
    model = export("torchscript", net, (x, lengths), tmp_path / "model.onnx")
    assert count(model, OPERATORS[cell]) == 1
    lengths = torch.tensor([5, 2])
    for a, b in zip(run(model, (x, lengths)), net(x, lengths), strict=True):
        torch.testing.assert_close(a, b)


def test_eager_again_afterwards(tmp_path):
    module, x = fastbptt.GRU(3, 4), torch.randn(5, 2, 3)
    before = module(x)[0]
    export("torchscript", module, (x,), tmp_path / "model.onnx")
    after = module(x)[0]
    assert torch.equal(before, after) and after.grad_fn.name() == before.grad_fn.name()
