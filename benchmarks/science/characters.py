"""Random truncation against the regular one on characters, at equal cost.

Tallec and Ollivier's second experiment ("Unbiasing Truncated Backpropagation Through Time", 2017)
on a small scale: a GRU predicts the next character of the help texts that every CPython carries.
Every mode makes the same number of updates on the same segments from the same weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import fastbptt
from char_lm_lib.text import Corpus, read_text, streams
from fastbptt.truncation import Truncation

REACH, STEPS, BATCH, HIDDEN, EMBEDDING = 10, 100, 16, 64, 16
RATE = 1e-2  # of Adam at the start, 0 at the end
HELD_OUT = 1000  # steps of each stream
EVALUATE = 50  # updates from one evaluation to the next

FULL, REGULAR = "None", f"Chunked({REACH})"
MODES = (
    FULL,
    REGULAR,
    f"Randomized({REACH})",
    f"Randomized({REACH}), per sequence",
    f"Randomized({REACH}, alpha=4)",
    f"Randomized({REACH}, alpha=4), per sequence",
)


def truncation_of(mode: str, seed: int) -> Truncation | None:
    """The truncation that a mode's name stands for."""
    if mode == FULL:
        return None
    if mode == REGULAR:
        return fastbptt.Chunked(REACH)
    return fastbptt.Randomized(
        mean_length=REACH,
        alpha=4 if "alpha" in mode else None,
        per_sequence=mode.endswith("per sequence"),
        generator=torch.Generator().manual_seed(seed),
    )


class Model(nn.Module):
    """Embedding, GRU, linear readout."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.recurrent = fastbptt.GRU(EMBEDDING, HIDDEN)
        self.readout = nn.Linear(HIDDEN, vocabulary)

    def loss(self, inputs: Tensor, targets: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The cross entropy of a segment [T, B], in nats a character; and the state after it."""
        output, state = self.recurrent(self.embedding(inputs), state)
        return cross_entropy(self.readout(output).flatten(0, 1), targets.flatten()), state


@dataclass
class Run:
    """What a run has shown."""

    curve: list[list[float]] = field(default_factory=list)  # update, held-out bits a character

    @property
    def final(self) -> float:
        """Bits a character at the end."""
        return self.curve[-1][1]


def train(mode: str, seed: int, updates: int) -> Run:
    """One run: the state goes on from segment to segment, detached."""
    corpus = Corpus.of(read_text(None))
    torch.manual_seed(seed)
    model = Model(len(corpus.vocabulary))
    model.recurrent.truncation = truncation_of(mode, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    held_out = [part[:HELD_OUT] for part in streams(corpus.held_out, BATCH)]
    inputs, targets = streams(corpus.train, BATCH)
    run, state, place = Run(), None, 0
    for update in range(1, updates + 1):
        segment = slice(place, place + STEPS)
        loss, state = model.loss(inputs[segment], targets[segment], state)
        state, place = state.detach(), place + STEPS
        if place + STEPS > len(inputs):
            state, place = None, 0
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        decay.step()
        if update % EVALUATE == 0 or update == updates:
            with torch.no_grad():
                bits = model.loss(*held_out, None)[0].item() / math.log(2)
            run.curve.append([update, round(bits, 4)])
    return run
