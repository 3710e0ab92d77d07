"""Two tasks of remembering symbols, after RepeatFirst and RepeatPrevious of POPGym.

Morad et al., "POPGym: benchmarking partially observable reinforcement learning", 2023. Symbols and
actions have the same numbers. The observation of a step is the symbol that it shows, one-hot, and
whether the episode has just begun. Each of the steps that count is worth 1 / their number if the
action is the symbol that is wanted, and minus that if it is not: a perfect episode is worth 1.
"""

from typing import Any

import gymnasium
import numpy as np

SYMBOLS = 4
BEST_WITHOUT_MEMORY = 2 / SYMBOLS - 1  # a guess is right once in SYMBOLS times


class Repeat(gymnasium.Env):
    """Shows a random symbol in each of `steps` steps; the ones that are wanted lie back."""

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, steps: int, counted: int) -> None:
        self.steps = steps
        self.counted = counted  # the last ones, in which an action counts
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (SYMBOLS + 1,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(SYMBOLS)

    def wanted(self, step: int) -> int:
        """The step, from 0 on, whose symbol is to be said in this one."""
        raise NotImplementedError

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """New symbols."""
        super().reset(seed=seed)
        self._symbols = self.np_random.integers(SYMBOLS, size=self.steps)
        self._step = 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """An answer to the symbols so far; the last one ends the episode."""
        reward = 0.0
        if self._step >= self.steps - self.counted:
            is_right = action == self._symbols[self.wanted(self._step)]
            reward = (1 if is_right else -1) / self.counted
        self._step += 1
        ends = self._step == self.steps
        if ends:
            self._step -= 1  # what is seen then is of no use
        return self._observation(), reward, ends, False, {}

    def _observation(self) -> np.ndarray:
        observation = np.zeros(SYMBOLS + 1, np.float32)
        observation[self._symbols[self._step]] = 1
        observation[SYMBOLS] = self._step == 0
        return observation


class RepeatFirst(Repeat):
    """In each step the first symbol is to be said."""

    def __init__(self, steps: int = 24) -> None:
        super().__init__(steps, counted=steps)

    def wanted(self, step: int) -> int:
        """The first."""
        return 0


class RepeatPrevious(Repeat):
    """In each step the symbol of `delay` steps before is to be said."""

    def __init__(self, delay: int = 2, steps: int = 24) -> None:
        super().__init__(steps, counted=steps - delay)
        self.delay = delay

    def wanted(self, step: int) -> int:
        """That of `delay` steps before."""
        return step - self.delay
