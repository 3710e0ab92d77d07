"""Tokens a second of the model that "Dive into Deep Learning" trains on The Time Machine.

    python -m benchmarks.book

Its size and its training, epoch after epoch: 32 streams of 35 characters a step, one-hot of 28, 256
hidden units, a linear layer, SGD with a learning rate of 1, gradients clipped to a norm of 1, the
state carried from segment to segment and detached. The characters are drawn here: how fast it goes
does not depend on them. The same epoch from the same weights is trained with ``torch.nn``'s layer
and with ours, checked first and then timed in turn.

Beside them stands what the notebooks of the book's authors print, of MXNet's layers on a GPU: see
SOURCE.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from .common import arguments, machine
from .common.files import Record, save
from .common.timing import Quartiles, interleave, paired_ratios
from .common.workload import CELLS, OURS
from .cpu import tables

STEPS, BATCH, HIDDEN, VOCABULARY = 35, 32, 256, 28
TEXT = 10_000  # characters that the book takes
SEGMENTS = TEXT // (STEPS * BATCH)  # of an epoch
SOURCE = "https://github.com/d2l-ai/1day-notebooks/tree/21bedc9/notebooks-4"
PRINTED = {"rnn": 158_013, "gru": 99_504, "lstm": 217_383}  # "tokens/sec on gpu(0)"


class Epoch:
    """One epoch of training, as a step to be timed; each begins from the same weights."""

    def __init__(self, layer: nn.Module, text: Tensor) -> None:
        self.layer, self.readout = layer, nn.Linear(HIDDEN, VOCABULARY)
        self.segments = text.unfold(0, STEPS + 1, STEPS).movedim(-1, 1)  # [segments, steps + 1, B]
        self.parameters = [*self.layer.parameters(), *self.readout.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0)
        self.begin = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def clear(self) -> None:
        """Back to the first weights."""
        for parameter, value in zip(self.parameters, self.begin, strict=True):
            parameter.copy_(value)

    def run(self) -> list[float]:
        """Trains; returns the loss of each segment."""
        losses, state = [], None
        for segment in self.segments:
            inputs = one_hot(segment[:-1], VOCABULARY).float()
            output, state = self.layer(inputs, state)
            state = tuple(s.detach() for s in state) if type(state) is tuple else state.detach()
            loss = cross_entropy(self.readout(output.flatten(0, 1)), segment[1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def build(cell: str) -> dict[str, Epoch]:
    """Ours and torch's epoch, from equal weights."""
    torch.manual_seed(0)
    text = torch.randint(VOCABULARY, (SEGMENTS * STEPS + 1, BATCH))
    theirs = Epoch(CELLS[cell].torch(VOCABULARY, HIDDEN), text)
    ours = Epoch(CELLS[cell].ours(VOCABULARY, HIDDEN), text)
    ours.layer.load_state_dict(theirs.layer.state_dict())
    ours.readout.load_state_dict(theirs.readout.state_dict())
    ours.begin = copy.deepcopy(theirs.begin)
    return {OURS: ours, f"torch.nn.{cell.upper()}": theirs}


def measure(cell: str, *, min_rounds: int, budget_s: float) -> Record:
    """Checks and then times one cell; returns its record.

    ``tokens_per_s``: quartiles for each. ``speedup``: of torch's time over ours, paired.
    """
    epochs = build(cell)
    losses = {name: torch.tensor(epoch.run()) for name, epoch in epochs.items()}
    record: Record = {"cell": cell, "printed": PRINTED[cell]}
    ours, theirs = losses.values()
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=0):
        return record | {"error": f"the losses differ: {ours.tolist()}, {theirs.tolist()}"}
    seconds = interleave(epochs, min_rounds=min_rounds, budget_s=budget_s)
    tokens = SEGMENTS * STEPS * BATCH
    mine, others = seconds.values()
    return record | {
        "error": None,
        "rounds": len(mine),
        "tokens_per_s": {
            name: Quartiles.of([tokens / s for s in times]).rounded()
            for name, times in seconds.items()
        },
        "speedup": paired_ratios(others, mine).rounded(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and writes what it measures; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.book",
        description="Tokens a second of the book's character model, against torch.nn.",
    )
    add = parser.add_argument
    add("--threads", type=arguments.count, metavar="N", help="default: torch's choice")
    add("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="default: all")
    add("--rounds", type=arguments.count, metavar="N", default=9, help="at least (default: 9)")
    add("--budget", type=arguments.seconds, metavar="SECONDS", default=5.0, help="default: 5")
    arguments.add_common(parser, "book.json")
    args = parser.parse_args(argv)
    arguments.begin(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {
        "command": arguments.command(parser, args),
        "min_rounds": args.rounds,
        "budget_s": args.budget,
        "source": SOURCE,
    }
    results: Record = {"machine": machine.facts(), "settings": settings, "records": []}
    print(tables.machine_line(results))
    for cell in args.cells:
        record = measure(cell, min_rounds=args.rounds, budget_s=args.budget)
        results["records"].append(record)
        if record["error"] is not None:
            print(f"{cell:<5} FAILED, not timed: {record['error']}")
            continue
        speeds = (f"{n} {q['median']:,.0f}" for n, q in record["tokens_per_s"].items())
        print(f"{cell:<5} tokens/s: {', '.join(speeds)}; printed {record['printed']:,}", flush=True)
        save(results, args.out / "book.json")
    return 1 if any(record["error"] is not None for record in results["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
