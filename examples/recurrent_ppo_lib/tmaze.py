"""The task: walk down a corridor, and turn at its end to the side that was shown at its start."""

from typing import Any

import gymnasium
import numpy as np

# What the observation's four parts say, each 0 or 1, and what the actions do.
CUE_LEFT, CUE_RIGHT, CORRIDOR, JUNCTION = range(4)
FORWARD, LEFT, RIGHT = range(3)

BUMP = -0.05  # the reward for walking into a wall
BEST_WITHOUT_MEMORY = 0.0  # at the junction, such a policy is right half of the time


class TMaze(gymnasium.Env):
    """A T-maze, after Bakker, "Reinforcement Learning with Long Short-Term Memory", 2001.

    The observation of the first step, and of no other, shows a cue: left or right. The agent then
    walks forward, from `length` // 2 + 1 to `length` times, to a junction. Turning to the cue's
    side there is worth 1, to the other side -1, and ends the episode; every other action that
    does not move the agent has it bump into a wall. Nothing that is seen after the first step
    depends on the cue, so no policy without memory has an expected return above 0.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, length: int = 10) -> None:
        self.length = length
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (4,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A new cue and a new corridor."""
        super().reset(seed=seed)
        self._cue = LEFT if self.np_random.random() < 0.5 else RIGHT
        self._ahead = int(self.np_random.integers(self.length // 2 + 1, self.length + 1))
        observation = self._observation()
        observation[CUE_LEFT if self._cue == LEFT else CUE_RIGHT] = 1
        return observation, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step; the time limit is that of ``gymnasium.make``."""
        turned = self._ahead == 0 and action != FORWARD
        if turned:
            reward = 1.0 if action == self._cue else -1.0
        elif self._ahead > 0 and action == FORWARD:
            self._ahead -= 1
            reward = 0.0
        else:
            reward = BUMP
        return self._observation(), reward, turned, False, {}

    def _observation(self) -> np.ndarray:
        observation = np.zeros(4, np.float32)
        observation[CORRIDOR if self._ahead else JUNCTION] = 1
        return observation
