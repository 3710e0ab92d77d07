"""PyTorch's own sample inputs for RNN, GRU and LSTM: our modules give what torch's give."""

from __future__ import annotations

import hypothesis
import pytest
import torch

import fastbptt
from common import assert_as_exact, assert_matches, referee, step

PROFILE = hypothesis.settings.get_current_profile_name()
# In a CI it loads settings of Hypothesis for torch's own tests, and all tests here would get them.
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db  # noqa: E402

hypothesis.settings.load_profile(PROFILE)

CLASSES = {
    torch.nn.RNN: fastbptt.RNN,
    torch.nn.GRU: fastbptt.GRU,
    torch.nn.LSTM: fastbptt.LSTM,
}
INFOS = {
    (info.module_cls, dtype): info
    for info in module_db
    if info.module_cls in CLASSES
    for dtype in info.dtypes
}
every_info = pytest.mark.parametrize(
    "cls, dtype", INFOS, ids=[f"{cls.__name__}-{dtype}" for cls, dtype in INFOS]
)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def inputs(function, info, dtype: torch.dtype, training: bool, **kwargs) -> list:
    torch.manual_seed(0)
    samples = function(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training, **kwargs
    )
    assert samples
    return samples


def test_all_three_are_there():
    assert {cls for cls, _ in INFOS} == set(CLASSES)
    dtypes = {dtype for _, dtype in INFOS}
    assert dtypes >= {torch.float32, torch.float64}


def make(cls: type, sample, dtype: torch.dtype, training: bool) -> torch.nn.Module:
    torch.manual_seed(1)
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    module = cls(*arguments, **{"dtype": dtype, **options})
    return module.train(training)


@every_info
@modes
@pytest.mark.usefixtures("poisoned")
def test_samples(cls, dtype, training):
    info = INFOS[cls, dtype]
    packed = {} if cls is torch.nn.LSTM else {"with_packed_sequence": True}
    for sample in inputs(info.module_inputs_func, info, dtype, training, **packed):
        theirs = make(cls, sample, dtype, training)
        ours = make(CLASSES[cls], sample, dtype, training)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert not sample.forward_input.kwargs
        input, hx = (*sample.forward_input.args, None)[:2]
        actual, expected = step(ours, input, hx), step(theirs, input, hx)
        if dtype == torch.float64:
            assert_matches(actual, expected)
        else:
            double, call = referee(theirs)
            assert_as_exact(actual, expected, step(double, input, hx, call=call))


@every_info
@modes
def test_error_inputs(cls, dtype, training):
    info = INFOS[cls, dtype]
    for error in inputs(info.module_error_inputs_func, info, dtype, training):
        sample, options = error.module_error_input, error.module_error_input.constructor_input
        for tried in (cls, CLASSES[cls]):
            if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(error.error_type, match=error.error_regex) as caught:
                    tried(*options.args, **options.kwargs)
            else:
                assert error.error_on == ModuleErrorEnum.FORWARD_ERROR
                module = tried(*options.args, **options.kwargs).train(training)
                forward = sample.forward_input
                with pytest.raises(error.error_type, match=error.error_regex) as caught:
                    module(*forward.args, **forward.kwargs)
            assert caught.type is error.error_type
