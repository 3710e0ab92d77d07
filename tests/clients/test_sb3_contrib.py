"""sb3-contrib: RecurrentPPO learns with converted modules what it learns with torch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sb3_contrib")
gymnasium = pytest.importorskip("gymnasium")

from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

import fastbptt
from clients.swap import assert_ours, assert_same


class Recall(gymnasium.Env):
    """Says once which of two actions is right; episodes of 5 steps end inside the rollouts."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.cue = 0, int(self.np_random.integers(2))
        return self._seen(), {}

    def step(self, action):
        self.time += 1
        return self._seen(), float(action == self.cue), self.time == 5, False, {}

    def _seen(self):
        seen = self.np_random.uniform(-0.1, 0.1, 3).astype("float32")
        seen[0] = (2 * self.cue - 1) * (self.time == 0)
        return seen


class OneCall(RecurrentActorCriticPolicy):
    """The recipe for its rollouts' beginnings of episodes: resets in place of a loop over steps."""

    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        n = lstm_states[0].shape[1]
        x = features.reshape(n, -1, lstm.input_size).swapaxes(0, 1)
        resets = episode_starts.reshape(n, -1).swapaxes(0, 1) > 0
        output, states = lstm(x, lstm_states, resets=resets)
        return output.swapaxes(0, 1).flatten(0, 1), states


def learn(convert: bool, kind: str | type = "MlpLstmPolicy", **policy: object) -> RecurrentPPO:
    model = RecurrentPPO(
        kind, Recall(), n_steps=32, batch_size=16, n_epochs=2, seed=0, device="cpu",
        policy_kwargs=dict(
            lstm_hidden_size=8, net_arch=[8], optimizer_class=torch.optim.SGD, **policy
        ),
        learning_rate=0.05,
    )  # fmt: skip
    if convert:
        fastbptt.convert(model.policy)
        assert_ours(model.policy.lstm_actor, torch.nn.LSTM)
    return model.learn(128)


@pytest.mark.parametrize(
    "policy", [{}, {"shared_lstm": True, "enable_critic_lstm": False}, {"n_lstm_layers": 2}]
)
def test_learns_the_same(policy):
    ours, theirs = learn(True, **policy), learn(False, **policy)
    assert_same(ours.policy.state_dict(), theirs.policy.state_dict(), rtol=1e-4)
    fresh = RecurrentPPO("MlpLstmPolicy", Recall(), seed=0, policy_kwargs=theirs.policy_kwargs)
    assert not torch.equal(
        fresh.policy.lstm_actor.weight_hh_l0, ours.policy.lstm_actor.weight_hh_l0
    )


def test_resets_learn_the_same():
    ours, theirs = learn(True, OneCall), learn(False)
    assert_same(ours.policy.state_dict(), theirs.policy.state_dict(), rtol=1e-4)


def test_loaded_is_torchs_again(tmp_path):
    """It builds the policy anew, so convert after every load."""
    ours = learn(True)
    ours.save(tmp_path / "model")
    loaded = RecurrentPPO.load(tmp_path / "model", device="cpu")
    assert type(loaded.policy.lstm_actor) is torch.nn.LSTM
    fastbptt.convert(loaded.policy)
    assert_ours(loaded.policy.lstm_actor, torch.nn.LSTM)
    assert_same(loaded.policy.state_dict(), ours.policy.state_dict(), rtol=0)
