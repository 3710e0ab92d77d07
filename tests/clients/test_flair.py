"""flair: a tagger of words by its letters, two packed and bidirectional LSTMs and a CRF."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("flair")

from flair.data import Dictionary, Sentence
from flair.embeddings import CharacterEmbeddings
from flair.models import SequenceTagger

import fastbptt
from clients.swap import assert_ours, assert_same, assert_trains_alike, converted, recurrent


def make_tagger(**settings: object) -> SequenceTagger:
    """With one layer: between two of them flair has a dropout of 0.5 that nothing turns off."""
    letters, tags = Dictionary(), Dictionary(add_unk=False)
    for letter in "abcdefghijklmnopqrstuvwxyz":
        letters.add_item(letter)
    for tag in ("noun", "verb", "other"):
        tags.add_item(tag)
    embeddings = CharacterEmbeddings(letters, char_embedding_dim=4, hidden_size_char=3)
    return SequenceTagger(
        embeddings, tags, tag_type="pos", hidden_size=5, word_dropout=0.0,
        locked_dropout=0.0, **settings,
    )  # fmt: skip


def sentences() -> list[Sentence]:
    made = [Sentence("the cat sleeps"), Sentence("go"), Sentence("a dog and a cat see birds")]
    for sentence in made:
        for token, tag in zip(sentence, ["other", "noun", "verb"] * 3, strict=False):
            token.add_label("pos", tag)
    return made


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "RNN"])
def test_training(rnn_type):
    theirs = make_tagger(rnn_type=rnn_type, train_initial_hidden_state=rnn_type == "LSTM")
    ours = converted(theirs)

    def loss(tagger: SequenceTagger) -> torch.Tensor:
        return tagger.forward_loss(sentences())[0]

    assert_trains_alike(ours, theirs, loss, lr=0.01)


def test_prediction():
    theirs = make_tagger()
    tagged = []
    for tagger in (converted(theirs), theirs):
        told = sentences()
        tagger.predict(
            told, force_token_predictions=True, return_probabilities_for_all_classes=True
        )
        tagged.append([[token.get_label("pos") for token in each] for each in told])
    for ours, expected in zip(*tagged, strict=True):
        assert [label.value for label in ours] == [label.value for label in expected]
        scores = ([label.score for label in each] for each in (ours, expected))
        assert next(scores) == pytest.approx(next(scores), rel=1e-5)


def test_loaded_is_torchs_again(tmp_path):
    """It builds the tagger anew, so convert after every load."""
    ours = converted(make_tagger())
    ours.save(tmp_path / "tagger.pt")
    loaded = SequenceTagger.load(tmp_path / "tagger.pt")
    assert type(loaded.rnn) is torch.nn.LSTM
    for module in recurrent(fastbptt.convert(loaded)).values():
        assert_ours(module, torch.nn.LSTM)
    assert_same(loaded.state_dict(), ours.state_dict(), rtol=0)
