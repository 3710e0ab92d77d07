"""What the emulated CUDA kernels and those on a GPU are both held against."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastbptt
from calls import Call, Gates
from common import (
    CELLS,
    Case,
    Results,
    assert_matches,
    cotangent,
    once,
    parts,
    referee,
    step,
    tensors_of,
    twin,
    whole,
)
from fastbptt import TBPTT, Chunked, Sliding
from test_operators import forward_arguments, named, rnn_bwd, rnn_fwd

TRUNCATIONS = (
    None,
    Chunked(3),
    TBPTT(2, 5),
    TBPTT(3, 4, "last"),
    TBPTT(2, 2, "last"),
    Sliding(3),
    Gates(per_sequence=True),
)
LENGTHS = (7, 2, 7, 4, 5)  # in no order


def grid() -> list[Call]:
    """Every cell, cut in every way, with and without resets, padded and packed."""
    calls = []
    for cell, truncation, resets in itertools.product(CELLS, TRUNCATIONS, ("none", "some")):
        packed = (len(calls) + CELLS.index(cell)) % 2 == 0  # each way is packed for some cell
        lengths = LENGTHS if packed else None
        calls.append(Call(Case(7, 5, 3, 4, 2, cell=cell, lengths=lengths), truncation, resets))
    return calls


# A row, a step, a unit, an empty batch, sizes just beyond a tile's.
ODD = [
    Call(Case(1, 1, 1, 1), Chunked(1)),
    Call(Case(1, 3, 2, 33, cell="gru", bidirectional=True), None, "some"),
    Call(Case(6, 5, 9, 33, cell="lstm", proj=32), Sliding(4)),
    Call(Case(5, 33, 1, 65, 2, cell="lstm"), TBPTT(2, 3), dropout=0.4, recompute=True),
    Call(Case(4, 0, 3, 5, 2, True, cell="gru"), Chunked(2)),
    Call(Case(3, 0, 3, 5, cell="lstm"), TBPTT(1, 2), "some"),
    Call(Case(8, None, 3, 5, 3, cell="gru"), TBPTT(3, 8), dropout=0.5),
    Call(Case(9, 4, 3, 31, 2, True, True, cell="lstm", proj=7), Gates(), "some", dropout=0.3),
    Call(Case(6, 4, 5, 6, 2, True, cell="lstm", lengths=(6, 1, 3, 3)), Chunked(4), recompute=True),
    Call(Case(6, 4, 5, 6, 2, True, cell="gru", lengths=(2, 6, 3, 3)), TBPTT(2, 2, "last"), "some"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def long_calls(T: int, B: int, H: int) -> list[Call]:
    """A kernel's own loop over many steps, with more lanes than a tile has."""
    return [
        Call(Case(T, B, 12, H, cell=cell, dtype=dtype), truncation)
        for cell, truncation in (("tanh", None), ("gru", Chunked(16)), ("lstm", None))
        for dtype in DTYPES
    ]


def uneven_calls(truncation) -> list[Call]:
    """Sequences that end one after another, over more steps than a kernel looks ahead."""
    both = not isinstance(truncation, Sliding)
    options = {"cell": "gru", "bidirectional": both, "lengths": (50, 3, 33, 17, 16)}
    return [
        Call(Case(50, 5, 3, 12, dtype=dtype, **options), truncation, "some")
        for dtype in (torch.float32, torch.bfloat16)
    ]


# Not the rectifier: a rounding error at its kink is another derivative. Sums over many rows, which
# a library's product takes in parts, as torch does by a small product a step; for fewer than 11
# columns a CPU's library adds up row after row.
ROUNDED = [
    *(Case(64, 32, 12, 17, cell=cell) for cell in ("tanh", "gru", "lstm")),
    Case(64, 32, 12, 17, bidirectional=True, cell="gru", lengths=(64, *30 * (50,), 1), hx=False),
    Case(64, 32, 12, 17, cell="lstm", proj=13, batch_first=True, bias=False),
]


def operators_step(case: Case, device: str, recompute: bool = False) -> Results:
    """What a layer's operators give, whichever dtypes the modules take on the device."""

    def moved(value):
        if isinstance(value, list):
            return [each.to(device) for each in value]
        return value.to(device) if isinstance(value, Tensor) else value

    arguments = forward_arguments(case)
    forward = {name: moved(value) for name, value in arguments.items()}
    forward["batch_sizes"] = arguments["batch_sizes"]  # on the CPU
    forward["keep_gates"] = not recompute
    output, h_n, c_n, c, gates = rnn_fwd(**forward)
    del forward["keep_gates"]
    has_c = case.cell == "lstm"
    gradients = rnn_bwd(
        grad_output=cotangent(output, 0),
        grad_h_n=cotangent(h_n, 1),
        grad_c_n=cotangent(c_n, 2) if has_c else None,
        **forward,
        output=output,
        c=c,
        gates=gates,
        needs=[True, case.hx, case.hx and has_c, True],
    )
    results = {"output": output, "h_n": h_n, "c_n": c_n, **named(gradients, case)}
    return {name: result.cpu() for name, result in results.items() if result.numel()}


@once
def peer_and_truth(case: Case) -> tuple[Results, Results]:
    """torch's results on the CPU in the case's dtype, and the reference's."""
    module, data = case.module(), case.data()
    exact, call = referee(module)
    peer = step(twin(module), *data)
    return peer, step(exact, *data, call=call, rounded=case.dtype)


def rounded_results(case: Case, device: str) -> list[Results]:
    """Ours on the device, torch's on the CPU in the same dtype, and the truth, of some seeds."""
    of_seeds = []
    for seed in range(3):  # the largest error of a few numbers is less by luck than that of many
        seeded = dataclasses.replace(case, seed=seed)
        of_seeds.append((operators_step(seeded, device), *peer_and_truth(seeded)))
    return [
        {name: torch.stack([results[name] for results in of_all]) for name in of_all[0]}
        for of_all in zip(*of_seeds, strict=True)
    ]


def errors_of_activations(device: str) -> dict[str, float]:
    """The largest errors of tanh and sigmoid in float32, in units in the last place."""
    rows, H = 512, 64
    bits = torch.linspace(0x33000000, 0x42AE0000, rows * H // 2, dtype=torch.float64)  # to x = 87
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.cat([x, -x]).view(1, rows, H)
    zeros, one = torch.zeros(H, H), torch.eye(H)

    def state(module, *input_weights, initial):
        module.load_state_dict(
            {"weight_ih_l0": torch.cat(input_weights), "weight_hh_l0": 0 * module.weight_hh_l0}
        )
        hx = torch.full((1, rows, H), initial)
        return module.to(device)(x.to(device), hx.to(device))[0].detach().cpu().double()

    exact = x.double()
    values = {  # of z n + (1 - z) h with n = 0 and h = 1 only the gate is left
        "tanh": (state(fastbptt.RNN(H, H, bias=False), one, initial=0.0), exact.tanh()),
        "sigmoid": (
            state(fastbptt.GRU(H, H, bias=False), zeros, one, zeros, initial=1.0),
            exact.sigmoid(),
        ),
    }
    return {
        name: ((value - truth).abs() / 2.0 ** (truth.frexp().exponent - 24)).max().item()
        for name, (value, truth) in values.items()
    }


def second_derivatives(call: Call, device: str = "cpu", run: Callable | None = None) -> Results:
    """The gradients of a product with the gradients, in those given and all that a call takes.

    ``run`` runs the forward pass, the module itself unless given.
    """
    module, (x, hx) = call.module().to(device), call.case.data()
    packed, resets = isinstance(x, PackedSequence), call.make_resets()
    leaves = [(x.data if packed else x).to(device), *(state.to(device) for state in parts(hx))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    states = whole(leaves[1:])
    given = PackedSequence(leaves[0], x.batch_sizes) if packed else leaves[0]
    cut = {"truncation": call.make_truncation()}
    cut |= {"resets": None if resets is None else resets.to(device)}
    outputs = tensors_of((run or type(module).__call__)(module, given, states, **cut))
    weights = [cotangent(t, i).requires_grad_() for i, t in enumerate(outputs)]
    variables = dict(zip(("input", "h", "c"), leaves, strict=False)) | dict(
        module.named_parameters()
    )
    gradients = torch.autograd.grad(outputs, variables.values(), weights, create_graph=True)
    variables |= dict(zip(("d_output", "d_h_n", "d_c_n"), weights, strict=False))
    along = [cotangent(gradient, i + 5) for i, gradient in enumerate(gradients)]
    results = torch.autograd.grad(
        gradients, variables.values(), along, allow_unused=True, materialize_grads=True
    )
    return {name: result.cpu() for name, result in zip(variables, results, strict=True)}


@once
def second_derivatives_by_reference(call: Call) -> Results:
    return second_derivatives(call, run=fastbptt.reference.run)


# Differentiated twice.
TWICE = [
    Call(Case(6, 4, 3, 5, 2, cell=cell, **options), truncation, resets)
    for cell in CELLS
    for options, truncation, resets in (
        ({"bidirectional": True}, None, "none"),
        ({"lengths": (6, 1, 3, 3), "hx": False}, Chunked(4), "some"),
        ({"batch_first": True}, Gates(per_sequence=True), "some"),
    )
]
TWICE += [Call(Case(6, 4, 3, 33, cell="lstm", proj=7, bidirectional=True))]


def check_replay(call: Callable, x: Tensor, resets: Tensor, module: torch.nn.Module) -> None:
    """A call's results and gradients, captured once in a graph and replayed with other numbers."""
    leaves = [x, *module.parameters()]

    def run():
        outputs = tensors_of(call())
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        weights = [cotangent(t, i) for i, t in enumerate(tensors_of(call()))]
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        resets.copy_(~resets)
    graph.replay()
    actual = [result.clone() for result in results]
    assert_matches(dict(enumerate(actual)), dict(enumerate(run())), rtol=0)
