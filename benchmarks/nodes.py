"""What a short call costs by each way to the kernels: direct, by the dispatcher, by a Python node.

    python -m benchmarks.nodes

A layer of ``torch.nn``'s weights, B = 1, I = 16, H = 32, on one thread, with T = 1 and T = 16:

- ``direct``: what the modules call, ``_C.network``, a C++ function that makes a C++ node;
- ``dispatcher``: the operator ``network``, which is the same beyond torch's dispatcher;
- ``Python node``: a ``torch.autograd.Function`` over the operators of both passes, as a library
  built with torch's stable ABI alone must have it.

They are timed interleaved, once they have computed the same gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import fastbptt  # noqa: F401  (its operators)
from fastbptt import _C

from .common.timing import Quartiles, interleave, paired_ratios

I, H = 16, 32
DIRECT = "direct"
network_fwd = torch.ops.fastbptt.network_fwd.default
network_bwd = torch.ops.fastbptt.network_bwd.default


class Node(torch.autograd.Function):
    """One layer in one direction."""

    @staticmethod
    def forward(ctx, input, hx, cx, cell, *weights):
        output, h_n, c_n, _, cs, gates, _ = network_fwd(
            input, hx, cx, weights, True, 1, False, None, False, cell, 0.0, None
        )
        ctx.save_for_backward(input, hx, cx, output, cs[0], gates[0], *weights)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        input, hx, cx, output, c, gates, *weights = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]]
        grads = network_bwd(
            *(grad_output, grad_h_n, grad_c_n, hx, cx, None, None, None, weights),
            *([input, output, c, gates], [], True, 1, False, False, ctx.cell, 0, 0, False, needs),
        )
        given = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return *given[:3], None, *given[3:]


def by_python_node(input, hx, cx, weights, *options):
    return Node.apply(input, hx, cx, options[5], *weights)


WAYS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    DIRECT: _C.network,
    "dispatcher": torch.ops.fastbptt.network.default,
    "Python node": by_python_node,
}


class Call:
    """One call of a way: a forward pass, or forward and backward."""

    def __init__(self, way: str, cell: str, T: int, mode: str) -> None:
        torch.manual_seed(0)
        module = {"tanh": torch.nn.RNN, "lstm": torch.nn.LSTM}[cell](I, H)
        self.weights = list(module.parameters())
        state = torch.randn(1, 1, H)
        self.arguments = (torch.randn(T, 1, I), state, state if cell == "lstm" else None)
        self.arguments += (self.weights, True, 1, False, None, False, cell, 0.0)
        self.arguments += (0, 0, False, False, None, None)
        self.grad_output = torch.randn(T, 1, H)
        self.way, self.grad, self.backward = WAYS[way], mode != "no_grad", "backward" in mode

    def clear(self) -> None:
        for weight in self.weights:
            weight.grad = None

    def run(self) -> None:
        with torch.set_grad_enabled(self.grad):
            output = self.way(*self.arguments)[0]
        if self.backward:
            output.backward(self.grad_output)


def check(calls: dict[str, Call]) -> None:
    """All have the same gradients."""
    for call in calls.values():
        call.clear()
        call.run()
        for weight, expected in zip(call.weights, calls[DIRECT].weights, strict=True):
            torch.testing.assert_close(weight.grad, expected.grad, rtol=0, atol=0)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nodes")
    parser.add_argument("--rounds", type=int, default=60, metavar="N", help="default: 60")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {_C.cpu_isa()}; microseconds a call, medians of {rounds}")
    for cell in ("tanh", "lstm"):
        for T in (1, 16):
            for mode in ("no_grad", "forward", "forward + backward"):
                ways = [way for way in WAYS if mode != "no_grad" or way != "Python node"]
                calls = {way: Call(way, cell, T, mode) for way in ways}
                if mode == "forward + backward":
                    check(calls)
                seconds = interleave(calls, min_rounds=rounds, budget_s=0.0)
                row = f"{cell} T = {T:2} {mode:18}"
                for way, times in seconds.items():
                    ratio = paired_ratios(times, seconds[DIRECT]).median
                    row += f"  {way} {Quartiles.of(times).median * 1e6:6.2f} ({ratio:.2f}x)"
                print(row, flush=True)


if __name__ == "__main__":
    main()
