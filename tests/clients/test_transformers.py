"""transformers: the LSTMs in the encoder and decoder of Encodec."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import EncodecConfig, EncodecModel

import fastbptt
from clients.swap import assert_same, assert_trains_alike, converted, recurrent


def make_model() -> EncodecModel:
    return EncodecModel(
        EncodecConfig(
            target_bandwidths=[48.0], num_filters=2, upsampling_ratios=[2, 2], codebook_size=16,
            codebook_dim=8, hidden_size=8, num_lstm_layers=2,
        )
    )  # fmt: skip


def test_codes_and_sound():
    theirs = make_model().eval()
    for layer in theirs.quantizer.layers:
        layer.codebook.embed.normal_(std=0.2)  # zeros, in a model that was not trained
    ours, sound = converted(theirs), torch.randn(2, 1, 300)
    with torch.no_grad():
        coded, expected = (model.encode(sound) for model in (ours, theirs))
        assert torch.equal(coded.audio_codes, expected.audio_codes)
        assert expected.audio_codes.unique().numel() > 1
        heard, wanted = (
            model.decode(expected.audio_codes, expected.audio_scales) for model in (ours, theirs)
        )
        assert_same(heard.audio_values, wanted.audio_values)


def test_training():
    theirs = make_model()
    sound = torch.randn(2, 1, 300)

    def loss(model: EncodecModel) -> torch.Tensor:
        return (model.decoder(model.encoder(sound)) - sound).square().mean()

    assert_trains_alike(converted(theirs), theirs, loss, lr=0.01)


def test_initialiser():
    """It asks for torch.nn.LSTM, and has one for it: ours are initialised by it too."""
    theirs = make_model()
    ours = converted(theirs)
    for model in (ours, theirs):
        torch.manual_seed(1)
        for name, module in model.named_modules():
            if name in recurrent(model):
                torch.nn.init.zeros_(module.weight_hh_l0)
                model._init_weights(module)
                assert module.weight_hh_l0.any()
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=0)


def test_loaded_is_torchs_again(tmp_path):
    """It builds the model anew, so convert after every load."""
    ours = converted(make_model())
    ours.save_pretrained(tmp_path)
    loaded = EncodecModel.from_pretrained(tmp_path)
    assert {type(module) for module in recurrent(loaded).values()} == {torch.nn.LSTM}
    fastbptt.convert(loaded)
    assert_same(loaded.state_dict(), ours.state_dict(), rtol=0)
