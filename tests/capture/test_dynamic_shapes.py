"""T and B stay symbols in a compiled program: one graph for all lengths and batch sizes."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastbptt
from common import assert_matches, parts

# (T, B): every pair, and from each to the next both change.
SHAPES = [((5, 9, 19, 7, 12)[i % 5], (2, 3, 5, 4)[i % 4]) for i in range(20)]
RTOL = 1e-12  # the compiler may order the sums of the loss in its own way
OPTIONS = [
    {},
    {"truncation": 4},
    {"truncation": fastbptt.TBPTT(2, 6), "num_layers": 2},  # longer than some sequences
    {"truncation": fastbptt.TBPTT(6, 7, "last"), "batch_first": True, "num_layers": 2},
    {"truncation": fastbptt.Sliding(8), "num_layers": 2, "dropout": 0.5},
    {"truncation": fastbptt.Randomized(0.5), "per_sequence": True},
    {"truncation": 3, "num_layers": 2, "bidirectional": True, "batch_first": True},
]
CLASSES = [fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM]
every_class = pytest.mark.parametrize("cls", CLASSES)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch, tmp_path):
    # torch's caches on disk know a graph by its operators' names, whatever these compute by now.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def made(cls: type, options: dict) -> torch.nn.RNNBase:
    torch.manual_seed(0)
    options = dict(options)
    if options.pop("per_sequence", False):
        options["truncation"] = fastbptt.Randomized(0.5, per_sequence=True)
    return cls(3, 4, dtype=torch.float64, **options)


def drawn(module: torch.nn.RNNBase, T: int, B: int) -> torch.Tensor:
    shape = (B, T, 3) if module.batch_first else (T, B, 3)
    return torch.randn(shape, dtype=torch.float64)


def gradients(module: torch.nn.RNNBase, call, x) -> dict[str, torch.Tensor]:
    """Of a call whose draws (dropout, gates) are the seed's."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    output, states = call(x)
    loss = output.square().sum() + sum(state.sum() for state in parts(states))
    leaves = {"dx": x, **dict(module.named_parameters())}
    return dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))


# Every option with a class, and every class with some.
by_turns = pytest.mark.parametrize(
    "options, cls", [(options, CLASSES[i % 3]) for i, options in enumerate(OPTIONS)], ids=str
)


def check_training(cls: type, options: dict, dynamic: bool | None, most: int) -> None:
    module = made(cls, options)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T, B in SHAPES:
        x = drawn(module, T, B)
        assert_matches(gradients(module, compiled, x), gradients(module, module, x), RTOL)
    assert graphs() <= most


@pytest.mark.slow(1)
@every_class
@every_option
def test_training(cls, options):
    check_training(cls, options, dynamic=True, most=1)


@pytest.mark.slow(2)
@by_turns
def test_training_that_learns_the_sizes(cls, options):
    """One after the other: T and B each cost a graph beside the first."""
    check_training(cls, options, dynamic=None, most=2)


@pytest.mark.slow(3)
@by_turns
def test_inference(cls, options):
    module = made(cls, options).eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for T, B in SHAPES:
            x = drawn(module, T, B)
            assert torch.equal(compiled(x)[0], module(x)[0])
    assert graphs() == 1


@pytest.mark.parametrize("lengths", [range(5, 20), (5,)], ids=["T", "T fixed"])
def test_one_size_that_changes(lengths):
    """With dynamic=None a second graph has the symbol."""
    module = made(fastbptt.GRU, {"truncation": fastbptt.TBPTT(2, 6)})
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    sizes = [(T, 3) for T in lengths] if len(lengths) > 1 else [(5, B) for B in range(2, 15)]
    for T, B in sizes:
        x = drawn(module, T, B)
        assert_matches(gradients(module, compiled, x), gradients(module, module, x), RTOL)
    assert graphs() == 2


@every_class
def test_marked_dynamic(cls):
    module = made(cls, {"truncation": fastbptt.TBPTT(2, 6), "num_layers": 2})
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for T, B in SHAPES[:6]:
        x = drawn(module, T, B)
        torch._dynamo.mark_dynamic(x, (0, 1))
        with torch.no_grad():
            assert torch.equal(compiled(x)[0], module(x)[0])
    assert graphs() == 1


PACKED = {
    "plain": {},
    "chunked": {"truncation": 2},
    "overlapping": {"truncation": fastbptt.TBPTT(1, 3), "num_layers": 2},
    "two layers and directions": {"num_layers": 2, "bidirectional": True},
}


GIVEN = ["input", "states, gates and resets"]


@pytest.mark.slow(1)
@every_class
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("given", GIVEN)
def test_packed(cls, name, given):
    """Which B the batch_sizes hold is a symbol too. Who has sorted them goes by turns."""
    turn = CLASSES.index(cls) + list(PACKED).index(name) + GIVEN.index(given)
    sorted_by = ["pack", "caller"][turn % 2]
    module = made(cls, PACKED[name])
    layers = module.num_layers * (2 if module.bidirectional else 1)

    def call(data, batch_sizes, order, inverse, *more):
        packed = PackedSequence(data, batch_sizes, order, inverse)
        if not more:
            output, states = module(packed)
        else:
            h, kappa, resets = more
            hx = (h, h) if module.mode == "LSTM" else h
            cut = module.truncation or fastbptt.Gated(kappa)
            output, states = module(packed, hx, truncation=cut, resets=resets)
        return output.data, states

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    # The first sizes all differ, as the compiler takes equal ones for the same.
    for lengths in [(7, 5, 3, 2, 2), (9, 4), (7, 7, 6, 3), (12, 2, 2)]:
        T, B = max(lengths), len(lengths)
        data = torch.randn(T, B, 3, dtype=torch.float64)
        lengths = lengths[::-1] if sorted_by == "pack" else lengths
        packed = pack_padded_sequence(data, lengths, enforce_sorted=sorted_by == "caller")
        more = ()
        if given != "input":
            h = torch.randn(layers, B, module.hidden_size, dtype=torch.float64)
            more = h, torch.rand(T, B, dtype=torch.float64), torch.rand(T, B) < 0.2
        found, expected = (
            gradients(module, lambda x, f=f, rest=(*packed[1:], *more): f(x, *rest), packed.data)
            for f in (compiled, call)
        )
        assert_matches(found, expected, RTOL)
    assert graphs() == 1


@pytest.mark.slow
def test_inductor():
    module = made(fastbptt.LSTM, {"truncation": fastbptt.TBPTT(2, 6), "num_layers": 2})
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for T, B in SHAPES[::5]:
        x = drawn(module, T, B)
        assert_matches(gradients(module, compiled, x), gradients(module, module, x), RTOL)
    assert graphs() == 1
