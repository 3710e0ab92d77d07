"""RLlib: the recurrent encoders of its models, and PPO's module around one, without a cluster."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ray.rllib")

import numpy as np
from gymnasium.spaces import Box, Discrete
from ray.rllib.algorithms.ppo.ppo_catalog import PPOCatalog
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.models.base import ENCODER_OUT
from ray.rllib.core.models.configs import RecurrentEncoderConfig

from clients.swap import assert_same, assert_trains_alike, converted

B, T, I, H, LAYERS = 3, 7, 4, 5, 2


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_encoder(cell):
    theirs = RecurrentEncoderConfig(
        input_dims=[I], recurrent_layer_type=cell, hidden_dim=H, num_layers=LAYERS
    ).build(framework="torch")
    ours = converted(theirs)
    states = {
        name: torch.randn(B, *each.shape) for name, each in theirs.get_initial_state().items()
    }
    batch = {Columns.OBS: torch.randn(B, T, I), Columns.STATE_IN: states}
    assert_same(ours(batch), theirs(batch))
    assert_trains_alike(ours, theirs, lambda model: model(batch)[ENCODER_OUT].square().mean())


def test_ppo():
    theirs = DefaultPPOTorchRLModule(
        observation_space=Box(-1, 1, (I,), np.float32), action_space=Discrete(2),
        catalog_class=PPOCatalog,
        model_config=dict(use_lstm=True, lstm_cell_size=H, fcnet_hiddens=[8], max_seq_len=T),
    )  # fmt: skip
    ours = converted(theirs)
    states = {
        name: torch.as_tensor(each).expand(B, *each.shape)
        for name, each in theirs.get_initial_state().items()
    }
    batch = {Columns.OBS: torch.randn(B, T, I), Columns.STATE_IN: states}
    assert_same(ours.forward_inference(batch), theirs.forward_inference(batch))

    def loss(model: torch.nn.Module) -> torch.Tensor:
        output = model.forward_train(batch)
        return (
            output[Columns.ACTION_DIST_INPUTS].square().mean()
            + model.compute_values(batch).sub(1).square().mean()
        )

    assert_trains_alike(ours, theirs, loss)
