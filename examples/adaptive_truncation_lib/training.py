"""One run: with a fixed K, or with one that is chosen while it trains."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import fastbptt

from .task import BATCH, STEPS, TASKS, Copier

FIXED = (5, 10, 15, 20, 30)
TOLERANCES = (0.9, 0.5, 0.1)
K_MIN, K_MAX = 2, 30
STRIDE = 5  # steps from one window to the next
MEASURED = 4  # sequences of a batch on which lags are measured
CHECKED = 64  # sequences on which the bias is
RATE = 1e-2  # of Adam at the start, 0 at the end
LAST = 50  # updates over which the final loss is a mean
FALL = 0.95  # factor by which a measurement takes K down at most
AT_ONCE = "at once"  # or K is what was measured

ADAPTIVE = tuple(f"tolerance {t}" for t in TOLERANCES)
SETTINGS = (*(f"K = {k}" for k in FIXED), *ADAPTIVE, *(f"{each} {AT_ONCE}" for each in ADAPTIVE))


def tolerance_of(setting: str) -> float | None:
    """None: its K is fixed."""
    kind, value = setting.split()[:2]
    return float(value) if kind == "tolerance" else None


def truncation_of(k: int) -> fastbptt.TBPTT:
    """Every loss reaches at least k steps."""
    return fastbptt.TBPTT(STRIDE, k + STRIDE - 1)


def cost_of(k: int) -> int:
    """Steps of the recurrence that a sequence takes, forward and backward."""
    ends = range(STRIDE, STEPS + STRIDE, STRIDE)
    return STEPS + sum(min(end, STEPS) - max(0, end - STRIDE - (k - 1)) for end in ends)


@dataclass
class Run:
    """What a run has shown."""

    task: str
    setting: str
    seed: int
    losses: list[float] = field(default_factory=list)  # one an update
    chosen: list[tuple[int, int, float]] = field(default_factory=list)  # update, K, bound
    checks: list[tuple[int, float]] = field(default_factory=list)  # update, relative bias
    cost: float = 0.0  # steps of the recurrence of a sequence, with those of measurements

    @property
    def final(self) -> float:
        """The mean loss of the last updates."""
        last = self.losses[-LAST:]
        return sum(last) / len(last)

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def bias_of(model: Copier, k: int, inputs: Tensor, target: Tensor) -> float:
    """How far the truncated gradient of the recurrent weights is from the full one, relative."""

    def gradient(truncation: fastbptt.TBPTT | None) -> Tensor:
        loss = model.loss(inputs, target, truncation=truncation)
        parts = torch.autograd.grad(loss, list(model.recurrent.parameters()))
        return torch.cat([part.flatten() for part in parts])

    full = gradient(None)
    return float((gradient(truncation_of(k)) - full).norm() / full.norm())


def train(task: str, setting: str, seed: int, updates: int, every: int) -> Run:
    """Train from the same weights and on the same sequences for each setting.

    Args:
        task: the name of one of TASKS.
        setting: one of SETTINGS.
        seed: of weights and sequences.
        updates: of a run.
        every: updates from one measurement to the next; the bias is checked half as often.
    """
    torch.manual_seed(seed)
    model = Copier(TASKS[task])
    draw = model.task.draw
    sequences = torch.Generator().manual_seed(seed)
    to_check = draw(CHECKED, torch.Generator().manual_seed(seed + 1))
    schedule, k = None, K_MAX
    if (tolerance := tolerance_of(setting)) is not None:
        fall = 0 if setting.endswith(AT_ONCE) else FALL
        schedule = fastbptt.AdaptiveTruncation(
            tolerance, K_MIN, K_MAX, every, rule=truncation_of, fall=fall
        )
    else:
        k = int(setting.split()[-1])
        model.recurrent.truncation = truncation_of(k)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    run = Run(task, setting, seed)
    for update in range(updates):
        inputs, target = draw(BATCH, sequences)
        if schedule is not None:
            few = target[:, :MEASURED]
            k = schedule.step(
                model.recurrent,
                inputs[:, :MEASURED],
                lambda output, few=few: model.loss_of_output(output, few),
            )
            if update % every == 0:
                run.chosen.append((update, k, schedule.bound))
                run.cost += MEASURED / BATCH * STEPS * (1 + K_MAX)
        run.cost += cost_of(k)
        if update % (2 * every) == 0:
            run.checks.append((update, bias_of(model, k, *to_check)))
        loss = model.loss(inputs, target)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        decay.step()
        run.losses.append(loss.item())
    return run
