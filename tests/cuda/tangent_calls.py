"""Calls of the operators that run a tangent pass's steps, and autograd through a loop."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from common import CELLS, Results, assert_matches

GATES = {"gru": 3, "lstm": 4}  # of a unit; an Elman cell's is 1
COLUMNS = {"gru": 4, "lstm": 4}  # of d
VALUES = torch.tensor([0.0, 1.0, 1.0, 0.25, 1.75, -0.5], dtype=torch.float64)


@dataclass(frozen=True)
class Steps:
    """One direction of a layer: its sizes, and what it is given."""

    cell: str
    reverse: bool = False
    layout: str = "time first"  # or "batch first", "packed"
    lengths: tuple[int, ...] = (5, 5, 5, 5)
    H: int = 3
    R: int = 0  # of a projection
    gated: bool = True
    states: bool = True  # initial ones have tangents
    weights: bool = True  # have tangents, in the backward pass

    def __str__(self) -> str:
        extras = [n for n in ("reverse", "gated", "states", "weights") if getattr(self, n)]
        proj = ["projected"] if self.R else []
        return " ".join([self.cell, self.layout, str(self.H), *proj, *extras])

    @property
    def width(self) -> int:  # of the recurrent state
        return self.R or self.H

    def rows(self) -> dict[tuple[int, int], int]:
        """Which row each step of each sequence has, by (t, b)."""
        T, B = max(self.lengths), len(self.lengths)
        if self.layout == "batch first":
            return {(t, b): b * T + t for t in range(T) for b in range(B)}
        there = [(t, b) for t in range(T) for b in range(B) if t < self.lengths[b]]
        return {place: row for row, place in enumerate(there)}

    def common(self) -> dict:
        """Arguments of both operators."""
        sizes = None
        if self.layout == "packed":
            T = max(self.lengths)
            sizes = torch.tensor([sum(n > t for n in self.lengths) for t in range(T)])
        return {
            "batch_sizes": sizes,
            "T": max(self.lengths),
            "batch_first": self.layout == "batch first",
            "reverse": self.reverse,
            "cell": self.cell,
        }


def cases() -> list[Steps]:
    made = []
    for cell, reverse, layout, gated in itertools.product(
        (*CELLS, "projection"),
        (False, True),
        ("time first", "batch first", "packed"),
        (False, True),
    ):
        i = len(made) + len(made) // 6  # each choice below is met with each of the above
        lengths = (6, 4, 4, 1) if layout == "packed" else (5, 5, 5, 5)
        made.append(
            Steps(
                "lstm" if cell == "projection" else cell,
                reverse,
                layout,
                lengths,
                R=2 if cell == "projection" else 0,
                gated=gated,
                states=i % 3 > 0,
                weights=i % 2 > 0,
            )
        )
    # A tile's units and rows, and more than those; one step; one sequence.
    made += [Steps(cell, H=33, lengths=(3,) * 5) for cell in ("tanh", "gru", "lstm")]
    made += [Steps("lstm", True, "packed", (4, 4, 2, 2, 1), 34, 33)]
    made += [Steps(cell, lengths=(1, 1)) for cell in CELLS]
    made += [Steps("gru", True, lengths=(7,)), Steps("lstm", lengths=(7,), H=1)]
    return made


def cell_step(cell: str, pre: Tensor, rec: Tensor, h: Tensor, c: Tensor):
    """h, c and the activations kept, of pre in d's columns and each gate's recurrent part."""
    if cell == "gru":
        n_in, r, z, n_rec = pre.chunk(4)
        rec_r, rec_z, rec_n = rec.chunk(3)
        r, z, rec_n = (r + rec_r).sigmoid(), (z + rec_z).sigmoid(), n_rec + rec_n
        n = (n_in + r * rec_n).tanh()
        return (1 - z) * n + z * h, c, torch.cat([r, z, n, rec_n])
    if cell == "lstm":
        i, f, g, o = (pre + rec).chunk(4)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c, torch.cat([i, f, g, o])
    phi = {"tanh": torch.tanh, "relu": torch.relu, "identity": torch.clone}[cell]
    return phi(pre + rec), c, pre[:0]


def hold(x: Tensor, gate: Tensor | None) -> Tensor:
    """x, and its derivatives times the gate."""
    return x if gate is None else x.detach() + gate * (x - x.detach())


def forward(steps: Steps, gate: Tensor | None, variables: Results) -> Results:
    """The recurrence by a loop. before: the state that entered each step, behind the gate."""
    by_row: dict[int, tuple[Tensor, ...]] = {}
    last: list[tuple[Tensor, Tensor]] = []
    rows = steps.rows()
    for b, length in enumerate(steps.lengths):
        h, c = variables["hx"][b], variables["cx"][b]
        order = range(length)[::-1] if steps.reverse else range(length)
        for i, t in enumerate(order):
            row = rows[t, b]
            boundary = (None if i == 0 else rows[t + 1, b]) if steps.reverse else row
            if gate is not None and boundary is not None:
                h, c = hold(h, gate[boundary]), hold(c, gate[boundary])
            before = c if steps.cell == "lstm" else h
            rec = variables["w_hh"] @ h
            h, c, kept = cell_step(steps.cell, variables["pre"][row], rec, h, c)
            if steps.R:
                h = variables["w_hr"] @ h + variables["projected"][row]
            by_row[row] = (h, c, kept, before)
        last.append((h, c))
    columns = zip(*(by_row[row] for row in range(len(rows))), strict=True)
    output, c, gates, before = map(torch.stack, columns)
    h_n, c_n = map(torch.stack, zip(*last, strict=True))
    return {"output": output, "c": c, "gates": gates, "before": before, "h_n": h_n, "c_n": c_n}


def backward(steps: Steps, gate: Tensor | None, variables: Results, wanted: list[str]) -> Results:
    """Gradients of what is wanted, of the loss that d_output, d_h_n and d_c_n are those of."""
    results = forward(steps, gate, variables)
    loss = sum((results[n] * variables[f"d_{n}"]).sum() for n in ("output", "h_n", "c_n"))
    leaves = [variables[name] for name in wanted]
    options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    return dict(zip(wanted, torch.autograd.grad(loss, leaves, **options), strict=True))


def jvp(function, primals: Results, tangents: Results) -> tuple[Results, Results]:
    """What a function of named tensors gives, and its tangent. By two backward passes."""
    names: list[str] = []

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        results = function(dict(zip(primals, values, strict=True)))
        names[:] = results
        return tuple(results.values())

    along = tuple(tangents.get(name, torch.zeros_like(p)) for name, p in primals.items())
    value, tangent = torch.autograd.functional.jvp(call, tuple(primals.values()), along)
    return dict(zip(names, value, strict=True)), dict(zip(names, tangent, strict=True))


class Problem:
    """Numbers for a case: of all variables, and the tangents of those that have any."""

    def __init__(self, steps: Steps):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        N, B, H, R = len(steps.rows()), len(steps.lengths), steps.H, steps.width
        shapes = {
            "pre": (N, COLUMNS.get(steps.cell, 1) * H),
            "projected": (N, R),
            "hx": (B, R),
            "cx": (B, H),
            "w_hh": (GATES.get(steps.cell, 1) * H, R),
            "w_hr": (R, H),
            "d_output": (N, R),
            "d_h_n": (B, R),
            "d_c_n": (B, H),
        }
        self.steps = steps
        self.primals = {name: draw(*shape) for name, shape in shapes.items()}
        self.tangents = {name: draw(*shape) for name, shape in shapes.items()}
        for name in ("w_hh", "w_hr"):  # the state does not grow
            self.primals[name] /= self.primals[name].size(1) ** 0.5
        for name in () if steps.states else ("hx", "cx"):
            del self.tangents[name]
        for name in () if steps.weights else ("w_hh", "w_hr"):
            del self.tangents[name]
        self.gate = None
        if steps.gated:
            self.gate = VALUES[torch.randint(len(VALUES), (N,), generator=generator)]

    def forward(self, tangents: Results) -> tuple[Results, Results]:
        names = ("pre", "projected", "hx", "cx", "w_hh", "w_hr")
        primals = {name: self.primals[name] for name in names}
        return jvp(lambda v: forward(self.steps, self.gate, v), primals, tangents)

    def states(self) -> tuple[Results, Results]:
        """What the forward pass gave, and its tangents by those of the weights too."""
        names = [name for name in self.tangents if not name.startswith("d_")]
        return self.forward({name: self.tangents[name] for name in names})

    def backward(self) -> tuple[Results, Results]:
        wanted = ["pre", "hx"]
        wanted += ["projected"] * (self.steps.R > 0) + ["cx"] * (self.steps.cell == "lstm")
        return jvp(
            lambda v: backward(self.steps, self.gate, v, wanted), self.primals, self.tangents
        )


def part(values: Tensor) -> Tensor:
    """The same values as the middle columns of wider rows, full of NaN."""
    wide = values.new_full((values.size(0), values.size(1) + 5), float("nan"))
    wide[:, 2:-3] = values
    return wide[:, 2:-3]


def of_cell(steps: Steps, values: Results) -> Results:
    """output, c, gates and before as an operator takes them: without rows that a cell lacks."""
    unused = values["output"].new_empty(0, steps.H)
    return {
        "output": part(values["output"]),
        "c": values["c"] if steps.cell == "lstm" else unused,
        "gates": values["gates"] if steps.cell in GATES else unused,
        "before": values["before"] if steps.cell in GATES else unused,
    }


def run(name: str, arguments: dict, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """An operator's results, on the CPU. device "emulated": the CUDA kernels on CPU tensors."""

    def moved(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        on_it = value.to("cpu" if device == "emulated" else device, dtype)
        return on_it if value.is_contiguous() else part(on_it)

    namespace = torch.ops.fastbptt_emulated if device == "emulated" else torch.ops.fastbptt
    arguments = {name: moved(value) for name, value in arguments.items()}
    return tuple(result.cpu() for result in getattr(namespace, name)(**arguments))


def run_forward(
    problem: Problem,
    values: Results,
    dtype: torch.dtype = torch.float64,
    device: str = "emulated",
) -> Results:
    """The operator's tangents."""
    steps, tangents = problem.steps, problem.tangents
    projected = steps.R > 0
    arguments = {
        "pre": tangents["pre"],
        "projected": tangents["projected"] if projected else None,
        "hx_t": tangents.get("hx"),
        "cx_t": tangents.get("cx") if steps.cell == "lstm" else None,
        **of_cell(steps, values),
        "gate": problem.gate,
        "w_hh": problem.primals["w_hh"],
        "w_hr": problem.primals["w_hr"] if projected else None,
        **steps.common(),
    }
    results = run("rnn_jvp_steps", arguments, dtype, device)
    return dict(zip(("output", "c", "gates", "h_n", "c_n"), results, strict=True))


def run_backward(
    problem: Problem,
    values: Results,
    tangents: Results | None,
    dtype: torch.dtype = torch.float64,
    device: str = "emulated",
    **changed,
) -> tuple[Results, Results]:
    """The operator's gradients and their tangents; without tangents of the values, none."""
    steps, has_tangents = problem.steps, tangents is not None
    is_lstm = steps.cell == "lstm"
    arguments = {name: problem.primals[name] for name in ("d_output", "d_h_n")}
    arguments |= {"d_c_n": problem.primals["d_c_n"] if is_lstm else None}
    for name, d in list(arguments.items()):
        there = has_tangents and d is not None
        arguments[f"{name}_t"] = problem.tangents[name] if there else None
    for name in ("d_output", "d_output_t"):
        arguments[name] = None if arguments[name] is None else part(arguments[name])
    arguments |= of_cell(steps, values)
    of_tangents = of_cell(steps, tangents) if has_tangents else {}
    for name in ("output", "c", "gates", "before"):
        arguments[f"{name}_t"] = of_tangents.get(name)
    for name in ("w_hh", "w_hr"):
        weight = problem.primals[name]
        if has_tangents and steps.weights:
            weight = torch.cat([weight, problem.tangents[name]])
        arguments[name] = weight if name == "w_hh" or steps.R else None
    arguments |= {"gate": problem.gate, "needs_states": True, **steps.common(), **changed}
    results = run("rnn_bwd_jvp_steps", arguments, dtype, device)
    names = ("pre", "projected", "hx", "cx")
    return tuple(dict(zip(names, results[i::2], strict=True)) for i in (0, 1))


def there(results: Results) -> Results:
    return {name: result for name, result in results.items() if result.numel() > 0}


def check_forward(steps: Steps, device: str = "emulated") -> None:
    problem = Problem(steps)
    # Tangents of the weights are in those of pre.
    given = {n: t for n, t in problem.tangents.items() if n in ("pre", "projected", "hx", "cx")}
    values, expected = problem.forward(given)
    actual = there(run_forward(problem, values, device=device))
    names = {"output", "h_n"} | ({"gates"} if steps.cell in GATES else set())
    names |= {"c", "c_n"} if steps.cell == "lstm" else set()
    assert_matches(actual, {name: expected[name] for name in names}, rtol=1e-10)


def check_backward(steps: Steps, device: str = "emulated") -> None:
    problem = Problem(steps)
    results = run_backward(problem, *problem.states(), device=device)
    for actual, expected in zip(results, problem.backward(), strict=True):
        assert_matches(there(actual), expected, rtol=1e-10)


def check_backward_of_values(steps: Steps, device: str = "emulated") -> None:
    problem = Problem(steps)
    values, _ = problem.forward({})
    expected, _ = problem.backward()
    actual, nothing = run_backward(problem, values, None, device=device)
    assert_matches(there(actual), expected, rtol=1e-10)
    assert not there(nothing)
