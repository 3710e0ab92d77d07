"""PyTorch's own test_grad and test_gradgrad, over its sample inputs for RNN, GRU and LSTM."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence

import fastbptt
from test_torch_samples import CLASSES, INFOS, inputs, make, modes

DOUBLE = [cls for cls, dtype in INFOS if dtype == torch.float64]


@pytest.mark.slow(1)
@pytest.mark.parametrize("cls", DOUBLE, ids=lambda cls: cls.__name__)
@modes
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=lambda f: f.__name__)
def test_samples(cls, training, check):
    info = INFOS[cls, torch.float64]
    packed = {} if cls is torch.nn.LSTM else {"with_packed_sequence": True}
    for sample in inputs(info.module_inputs_func, info, torch.float64, training, **packed):
        module = make(CLASSES[cls], sample, torch.float64, training)
        input, hx = (*sample.forward_input.args, None)[:2]
        leaves = [input.data if isinstance(input, PackedSequence) else input]
        leaves += [hx] if isinstance(hx, torch.Tensor) else list(hx or ())
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        count = len(leaves)

        def function(*tensors, input=input, hx=hx, count=count, module=module):
            x, *states = tensors[:count]
            if isinstance(input, PackedSequence):
                x = PackedSequence(x, *input[1:])
            if hx is not None:
                states = states[0] if isinstance(hx, torch.Tensor) else tuple(states)
            output, last = module(x, states if hx is not None else None)
            output = output.data if isinstance(output, PackedSequence) else output
            return output, *((last,) if isinstance(last, torch.Tensor) else last)

        # As torch's: random projections of the Jacobian, which are as strict and much faster.
        assert check(function, [*leaves, *module.parameters()], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_deep_lstm_as_torch_tests_its_own(dtype):
    """The slope of a sum of outputs, and the gradients of its sum, of many narrow layers."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(3, 3, 20, batch_first=True, dtype=dtype)
    ours = fastbptt.LSTM(3, 3, 20, batch_first=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    data = torch.rand(10, 12, 3, dtype=dtype)
    found = []
    for module in (ours, theirs):
        input = data.clone().requires_grad_()
        output, _ = module(input)
        (slope,) = torch.autograd.grad(output.sum(), input, create_graph=True)
        slope.sum().backward()
        found.append([slope.detach(), input.grad, *(p.grad for p in module.parameters())])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)
