"""Acting in the environments, and what there is to learn from it."""

from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

import fastbptt
from shared_lib.layers import State

from .policy import Policy


@dataclass
class Rollout:
    """T steps of B environments; episodes end anywhere in it, and the next ones begin."""

    state: State  # of the core, as the step before the first one left it
    resets: Tensor  # [T, B] bool: an episode begins here, so the state before it is zeros
    observations: Tensor  # [T, B, features]
    actions: Tensor  # [T, B]
    log_probs: Tensor  # [T, B], of the actions
    values: Tensor  # [T, B]
    rewards: Tensor  # [T, B]
    dones: Tensor  # [T, B] bool: the episode ended with this step
    last_values: Tensor  # [B], of the observations after the last step
    returns: list[float]  # of the episodes that ended, in order


class Actor:
    """Acts in vectorised environments, rollout after rollout."""

    def __init__(self, envs: VectorEnv, policy: Policy, gamma: float, seed: int) -> None:
        self.envs = envs
        self.policy = policy
        self.gamma = gamma
        self.generator = torch.Generator().manual_seed(seed)
        observations, _ = envs.reset(seed=seed)
        self.observations = torch.from_numpy(observations)  # [B, features]
        self.state = policy.initial_state(envs.num_envs)
        self.dones = torch.zeros(envs.num_envs, dtype=torch.bool)  # of the step before
        self.running = np.zeros(envs.num_envs)  # returns of the episodes so far

    @torch.no_grad()
    def collect(self, steps: int) -> Rollout:
        """Act for `steps` steps in each environment.

        Raises:
            FloatingPointError: the policy has diverged.
        """
        state, initial = self.state, self.dones
        records, returns = [], []
        for _ in range(steps):
            observations = self.observations
            logits, values, self.state = self._look(observations, self.dones)
            if not logits.isfinite().all():
                raise FloatingPointError("the policy's logits are not finite")
            log_probs = logits.log_softmax(-1)
            actions = torch.multinomial(log_probs.exp(), 1, generator=self.generator)
            rewards, ended = self._step(actions.squeeze(-1).numpy())
            returns += ended
            records.append(
                (
                    observations,
                    actions.squeeze(-1),
                    log_probs.gather(-1, actions).squeeze(-1),
                    values,
                    rewards,
                    self.dones,
                )
            )
        observations, actions, log_probs, values, rewards, dones = map(
            torch.stack, zip(*records, strict=True)
        )
        return Rollout(
            state=state,
            # dones[t] came after step t, resets[t + 1] comes before the next one.
            resets=fastbptt.resets_from_dones(dones, initial),
            observations=observations,
            actions=actions,
            log_probs=log_probs,
            values=values,
            rewards=rewards,
            dones=dones,
            last_values=self._look(self.observations, self.dones)[1],
            returns=returns,
        )

    def _look(self, observations: Tensor, resets: Tensor) -> tuple[Tensor, Tensor, State]:
        """Logits [B, actions], values [B] and the next state."""
        logits, values, state = self.policy(
            observations.unsqueeze(0), self.state, resets.unsqueeze(0)
        )
        return logits.squeeze(0), values.squeeze(0), state

    def _step(self, actions: np.ndarray) -> tuple[Tensor, list[float]]:
        """Take the actions; returns the rewards, and the returns of the episodes that ended."""
        observations, rewards, terminated, truncated, info = self.envs.step(actions)
        dones = terminated | truncated
        self.running += rewards
        returns = self.running[dones].tolist()
        self.running[dones] = 0
        rewards = torch.from_numpy(rewards).to(self.policy.actor.weight.dtype)
        cut = truncated & ~terminated
        if cut.any():
            # The time limit is no part of the task: what would have followed counts as well.
            final = observations.copy()
            final[cut] = np.stack(info["final_obs"][cut])
            _, values, _ = self._look(torch.from_numpy(final), torch.zeros_like(self.dones))
            rewards += self.gamma * values * torch.from_numpy(cut)
        self.observations = torch.from_numpy(observations)
        self.dones = torch.from_numpy(dones)
        return rewards, returns


def advantages(rollout: Rollout, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation, [T, B].

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1}

    where nothing of t + 1 counts if the episode ended with step t. Schulman et al.,
    "High-dimensional continuous control using generalized advantage estimation", 2015.
    """
    goes_on = (~rollout.dones).to(rollout.values.dtype)
    following = torch.cat([rollout.values[1:], rollout.last_values.unsqueeze(0)])
    deltas = rollout.rewards + gamma * following * goes_on - rollout.values
    result = torch.empty_like(deltas)
    advantage = torch.zeros_like(rollout.last_values)
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + gamma * lam * goes_on[t] * advantage
        result[t] = advantage
    return result
