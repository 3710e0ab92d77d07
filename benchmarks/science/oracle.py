"""The exact gradient by forward mode, as real-time recurrent learning has it, as the judge.

Along the training of a small net the gradient of each truncation is held against the tangents of
the loss in every parameter. No backward pass takes part in them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

import fastbptt
from fastbptt.truncation import Truncation

LAG, SYMBOLS, STEPS, BATCH, HIDDEN, REACH = 6, 2, 40, 8, 8, 4
RATE = 2e-2  # of Adam
DRAWS = 400  # of a random gradient

MODES: dict[str, Truncation | None] = {
    "None": None,
    f"Chunked({REACH})": fastbptt.Chunked(REACH),
    f"TBPTT(2, {REACH + 1})": fastbptt.TBPTT(2, REACH + 1),
    f"Sliding({REACH})": fastbptt.Sliding(REACH),
    f"Sliding({2 * REACH})": fastbptt.Sliding(2 * REACH),
    f"Randomized({REACH})": fastbptt.Randomized(mean_length=REACH, per_sequence=True),
    f"Randomized({REACH}, alpha=4)": fastbptt.Randomized(
        mean_length=REACH, alpha=4, per_sequence=True
    ),
}


class Net(nn.Module):
    """A GRU that says what it was shown some steps before."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = fastbptt.GRU(SYMBOLS, HIDDEN, dtype=torch.float64)
        self.readout = nn.Linear(HIDDEN, SYMBOLS, dtype=torch.float64)

    def forward(self, symbols: Tensor, truncation: Truncation | None = None) -> Tensor:
        """The loss of symbols [T, B]."""
        inputs = nn.functional.one_hot(symbols, SYMBOLS).double()
        output, _ = self.recurrent(inputs, truncation=truncation)
        logits = self.readout(output[LAG:]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, symbols[:-LAG].flatten())


def by_tangents(net: Net, symbols: Tensor) -> Tensor:
    """The gradient of the recurrent weights [P]: a tangent of the loss for each of them."""
    weights = {f"recurrent.{name}": p.detach() for name, p in net.recurrent.named_parameters()}
    sizes = [weight.numel() for weight in weights.values()]

    def along(direction: Tensor) -> Tensor:
        parts = direction.split(sizes)
        tangents = {
            name: part.view_as(weight)
            for (name, weight), part in zip(weights.items(), parts, strict=True)
        }
        return jvp(lambda w: functional_call(net, w, (symbols,)), (weights,), (tangents,))[1]

    return vmap(along)(torch.eye(sum(sizes), dtype=torch.float64))


def by_backward(net: Net, symbols: Tensor, truncation: Truncation | None) -> Tensor:
    """The gradient of the recurrent weights [P], truncated."""
    parts = torch.autograd.grad(net(symbols, truncation), list(net.recurrent.parameters()))
    return torch.cat([part.flatten() for part in parts])


def check(net: Net, symbols: Tensor, mode: str) -> dict[str, float]:
    """A mode's distance from the exact gradient, and for a random one its error, both relative."""
    exact, truncation = by_tangents(net, symbols).detach(), MODES[mode]
    unit = exact.norm()
    if not isinstance(truncation, fastbptt.Randomized):
        return {"bias": float((by_backward(net, symbols, truncation) - exact).norm() / unit)}
    draws = torch.stack([by_backward(net, symbols, truncation) for _ in range(DRAWS)])
    error = (draws.var(0).sum() / DRAWS).sqrt()
    return {"bias": float((draws.mean(0) - exact).norm() / unit), "error": float(error / unit)}


def train(mode: str, seed: int, updates: int, every: int) -> list[dict[str, float]]:
    """Trains by full backpropagation, and checks a mode's gradient now and then."""
    torch.manual_seed(seed)
    net, sequences = Net(), torch.Generator().manual_seed(seed)
    fixed = torch.randint(SYMBOLS, (STEPS, BATCH), generator=sequences)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    checks = []
    for update in range(updates + 1):
        loss = net(torch.randint(SYMBOLS, (STEPS, BATCH), generator=sequences))
        if update % every == 0:
            checks.append({"update": update, "loss": loss.item(), **check(net, fixed, mode)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return checks
