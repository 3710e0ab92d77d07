"""A user's program, for a type checker: it passes a strict one; it is not run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastbptt
from fastbptt import cells, diagnostics


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fastbptt.GRU(3, 4, 2, batch_first=True, truncation=fastbptt.Chunked(32))
        self.lstm = fastbptt.LSTM(4, 8, proj_size=2, truncation=fastbptt.TBPTT(4, 8), clip_grad=1.0)
        self.net = fastbptt.Recurrent(cells.leaky, 2, 4, alpha=0.1)

    def forward(self, x: Tensor, dones: Tensor) -> Tensor:
        resets = fastbptt.resets_from_dones(dones)
        output, h_n = self.rnn(x, resets=resets, truncation=None)
        output, (h, c) = self.lstm(output)
        output, last, states = self.rnn(output + h_n, return_states=True)
        total: Tensor = output.sum() + states.sum() + last.sum() + h.sum() + c.sum()
        return total

    def packed(self, x: PackedSequence) -> PackedSequence:
        output, (h_n, c_n), (h, c) = self.lstm(x, return_states=True, truncation=8)
        return output


@fastbptt.cell(gates=1, states=1)
def own(
    pre: tuple[Tensor, ...], rec: tuple[Tensor, ...], state: tuple[Tensor, ...], alpha: Tensor
) -> tuple[Tensor, ...]:
    (h,) = state
    return (h + alpha * (torch.tanh(pre[0] + rec[0]) - h),)


network = fastbptt.Recurrent(own, 3, 4, alpha=torch.nn.Parameter(torch.ones(4)))
model: Model = fastbptt.convert(Model(), truncation=fastbptt.Randomized(pi=0.9))
theirs: torch.nn.LSTM = fastbptt.revert(torch.nn.LSTM(1, 1))
rnn = fastbptt.RNN(3, 4, nonlinearity="identity", bias=False)
x = torch.randn(5, 2, 3)
norms: Tensor = diagnostics.lag_norms(rnn, x, lambda output: output.sum(), 3)
steps: int = diagnostics.suggest_truncation(norms, 0.1)
output, h_n = fastbptt.gru(x, torch.zeros(1, 2, 4), torch.randn(12, 3), torch.randn(12, 4))
with fastbptt.patch(truncation=3):
    pass
fastbptt.set_workspace_limit(fastbptt.get_workspace_limit())
isa: str = fastbptt._C.cpu_isa()
