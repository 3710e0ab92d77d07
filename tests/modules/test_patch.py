"""fastbptt.patch: torch.nn's three names mean ours while it holds."""

from __future__ import annotations

import pickle

import pytest
import torch

import fastbptt
from fastbptt import Chunked, Sliding

THEIRS = {name: getattr(torch.nn, name) for name in ("RNN", "GRU", "LSTM")}


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert all(getattr(torch.nn, name) is cls for name, cls in THEIRS.items())
    assert all(getattr(torch.nn.modules, name) is cls for name, cls in THEIRS.items())
    assert fastbptt.RNN(3, 4).truncation is None


@pytest.mark.parametrize("name", THEIRS)
def test_names_mean_ours_while_it_holds(name):
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(3, 4, 2, batch_first=True)
    with fastbptt.patch(truncation=3):
        torch.manual_seed(0)
        ours = getattr(torch.nn, name)(3, 4, 2, batch_first=True)
        assert isinstance(ours, getattr(torch.nn, name))
        assert type(pickle.loads(pickle.dumps(theirs))) is THEIRS[name]
        assert type(pickle.loads(pickle.dumps(ours))) is getattr(fastbptt, name)
    assert type(ours) is getattr(fastbptt, name) and ours.truncation == Chunked(3)
    assert isinstance(ours, THEIRS[name])
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert type(getattr(torch.nn, name)(3, 4)) is THEIRS[name]


def test_a_class_derived_while_it_holds():
    with fastbptt.patch():

        class Net(torch.nn.GRU):
            pass

    assert issubclass(Net, fastbptt.GRU) and Net(3, 4)(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


def test_as_a_function_and_undone_twice():
    patched = fastbptt.patch()
    try:
        assert torch.nn.LSTM is fastbptt.LSTM
    finally:
        patched.undo()
    patched.undo()
    assert torch.nn.LSTM is THEIRS["LSTM"]


def test_nested_with_other_truncations():
    with fastbptt.patch(truncation=2):
        with fastbptt.patch(truncation=Sliding(5)):
            assert torch.nn.RNN(3, 4).truncation == Sliding(5)
            assert torch.nn.RNN(3, 4, truncation=None).truncation is None
        assert torch.nn.RNN(3, 4).truncation == Chunked(2)
        with pytest.raises(RuntimeError, match="on purpose"), fastbptt.patch():
            raise RuntimeError("on purpose")
        assert torch.nn.RNN is fastbptt.RNN


@pytest.mark.parametrize("bad, error", [(0, ValueError), (2.5, TypeError)])
def test_truncation_is_checked_first(bad, error):
    with pytest.raises(error, match="truncation"):
        fastbptt.patch(truncation=bad)
