"""How far do gradients reach?
===========================

``lag_norms`` measures the gradient that comes back k steps, ``suggest_truncation`` says how many
steps keep the relative bias within a tolerance. A net that has not learnt to remember has short
gradients: so measure again during training.
"""

import os

import matplotlib.pyplot as plt
import torch

import fastbptt

# %%
# The task: say again what was seen 12 steps ago.

LAG, T, B, H = 12, 60, 64, 32
STEPS = int(os.environ.get("GALLERY_STEPS", 700))
torch.manual_seed(0)
gru, readout = fastbptt.GRU(2, H), torch.nn.Linear(H, 2)
optimizer = torch.optim.Adam([*gru.parameters(), *readout.parameters()], lr=5e-3)


def draw():
    symbols = torch.randint(2, (T, B))
    return torch.nn.functional.one_hot(symbols, 2).float(), symbols[:-LAG]


def loss_of(output, target):
    logits = readout(output[LAG:])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def norms():
    x, target = draw()
    return fastbptt.diagnostics.lag_norms(gru, x, lambda output: loss_of(output, target), 40)


# %%
# Train by full backpropagation, and measure before, on the way and after.

measured, losses = {0: norms()}, []
for step in range(1, STEPS + 1):
    x, target = draw()
    loss = loss_of(gru(x)[0], target)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(gru.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
    if step in (STEPS // 2, STEPS):
        measured[step] = norms()

for step, each in measured.items():
    try:
        K = fastbptt.diagnostics.suggest_truncation(each, tolerance=0.2)
        print(f"after {step} steps of training: {K} steps keep the bias within 0.2")
    except ValueError as error:
        print(f"after {step} steps of training: {error}")

# %%
# The gradient that comes back over lag 12 is what the net lives on, once it has learnt.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
left.plot(losses, color="black", linewidth=1)
left.set(xlabel="training step", ylabel="loss")
for step, each in measured.items():
    right.semilogy(each / each[0], label=f"after {step} steps")
right.axvline(LAG, color="#c2402a", linewidth=1)
right.set(xlabel="lag k", ylabel="gradient norm, of that at lag 0")
right.legend()
plt.show()

# %%
# ``plot_lag_norms`` draws one measurement with the decay that is fitted to it, and the bound of
# the bias.

fastbptt.diagnostics.plot_lag_norms(measured[0], tolerance=0.2)
plt.show()
