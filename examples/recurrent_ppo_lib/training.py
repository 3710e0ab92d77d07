"""Proximal policy optimisation of a recurrent policy."""

import argparse
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from shared_lib.command_line import BadInput
from shared_lib.timing import LayerTimer

from .policy import Policy
from .rollout import Actor, Rollout, advantages
from .tasks import make_envs

WINDOW = 100  # the last episodes, whose mean return is looked at
THRESHOLD = 0.9  # the mean return from which on the task counts as solved; 1 is the best
VALUE_WEIGHT = 0.5  # of the critic's loss beside the actor's
MAX_GRAD_NORM = 0.5


class TrainingTimer(LayerTimer):
    """Leaves out the forward passes of acting, which are without gradients."""

    def _end_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            super()._end_forward()


def ppo_loss(
    policy: nn.Module, rollout: Rollout, advantages: Tensor, clip: float, entropy_weight: float
) -> Tensor:
    """The loss of a training pass over a whole rollout.

    The clipped objective of Schulman et al., "Proximal policy optimization algorithms", 2017, with
    the critic's squared error and a bonus for entropy.
    """
    logits, values, _ = policy(rollout.observations, rollout.state, rollout.resets)
    all_log_probs = logits.log_softmax(-1)
    log_probs = all_log_probs.gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
    ratio = (log_probs - rollout.log_probs).exp()
    normalized = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    objective = torch.min(ratio * normalized, clipped * normalized).mean()
    error = (values - (advantages + rollout.values)).square().mean()
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1).mean()
    return -objective + VALUE_WEIGHT * error - entropy_weight * entropy


@dataclass
class Progress:
    """What a run has measured; one entry an update."""

    returns: list[list[float]] = field(default_factory=list)  # of the episodes that ended in it
    mean_return: list[float] = field(default_factory=list)  # of the last WINDOW episodes
    losses: list[float] = field(default_factory=list)  # mean over the epochs
    seconds: list[float] = field(default_factory=list)  # in all, since the start
    solved: int | None = None  # the first update after which the mean return was THRESHOLD


class Trainer:
    """One policy of one backend, and all that training it needs and changes."""

    def __init__(self, args: argparse.Namespace, backend: str) -> None:
        self.args = args
        self.backend = backend
        envs = make_envs(args.envs, args.task, args.keep)
        # The one seed decides on the weights, the environments and the actions.
        torch.manual_seed(args.seed)
        self.policy = Policy(
            observations=envs.single_observation_space.shape[0],
            actions=int(envs.single_action_space.n),
            backend=backend,
            cell=args.cell,
            hidden=args.hidden,
            chunk=args.chunk,
        )
        self.timer = TrainingTimer(self.policy.core)
        self.actor = Actor(envs, self.policy, args.gamma, args.seed)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=args.lr, eps=1e-5)
        # Down to 0 at the end: large steps on a solved task may lose it again.
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, args.updates)
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.progress = Progress()

    @property
    def mean_return(self) -> float:
        """Of the last WINDOW episodes; NaN before the first has ended."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    @property
    def core_seconds(self) -> float:
        """In the recurrent core's forward and backward passes of training."""
        return self.timer.forward + self.timer.backward

    def update(self) -> None:
        """Collect one rollout and train on it."""
        progress, begun = self.progress, time.perf_counter()
        try:
            rollout = self.actor.collect(self.args.steps)
            loss = self._train(rollout)
        except FloatingPointError as error:
            raise BadInput(
                f"argument --lr: must be small enough for training to stay finite, but was "
                f"{self.args.lr}, and in update {len(progress.losses) + 1} {error}"
            ) from error
        self.schedule.step()
        progress.losses.append(loss)
        self.recent += rollout.returns
        progress.returns.append(rollout.returns)
        progress.mean_return.append(self.mean_return)
        if progress.solved is None and len(self.recent) == WINDOW:
            if self.mean_return >= THRESHOLD:
                progress.solved = len(progress.losses)
        before = progress.seconds[-1] if progress.seconds else 0.0
        progress.seconds.append(before + time.perf_counter() - begun)

    def _train(self, rollout: Rollout) -> float:
        """All the training passes over a rollout; returns their mean loss."""
        args, losses = self.args, []
        gains = advantages(rollout, args.gamma, args.lam)
        for _ in range(args.epochs):
            loss = ppo_loss(self.policy, rollout, gains, args.clip, args.entropy)
            self.optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            losses.append(loss.item())
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError("the loss is not finite")
        return sum(losses) / len(losses)
