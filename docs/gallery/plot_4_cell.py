"""A cell of one's own
===================

Ten lines make a cell: here a unit that adapts. It moves toward its input by a time constant of
its own, and a second, slow state takes away from it. The network has layers, truncations, resets
and packed input like every other; on a CPU the function and its derivative are compiled when it
first runs.
"""

import os

import matplotlib.pyplot as plt
import torch

import fastbptt
from fastbptt import cells


@fastbptt.cell(gates=1, states=2)
def adapting(pre, rec, state, alpha, slow, strength):
    h, a = state
    h = h + alpha * (torch.tanh(pre[0] + rec[0] - strength * a) - h)
    return h, a + slow * (h - a)


# %%
# The response to a step, before any training, for units that differ in how strongly they adapt.

T = 120
x = torch.zeros(T, 1, 1)
x[20:] = 1.0
net = fastbptt.Recurrent(adapting, 1, 4, alpha=0.2, slow=0.04, strength=torch.linspace(0, 4, 4))
with torch.no_grad():
    net.weight_ih_l0.fill_(1.0)
    net.weight_hh_l0.zero_()
    net.bias_ih_l0.zero_()
    net.bias_hh_l0.zero_()
_, _, (rates, adaptation) = net(x, return_states=True)

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for unit in range(4):
    axes.plot(rates[0, :, 0, unit].detach(), label=f"strength {net.strength_l0[unit]:.1f}")
axes.plot(x[:, 0, 0], color="black", linewidth=0.8, label="input")
axes.set(xlabel="step", ylabel="h")
axes.legend()
plt.show()

# %%
# Trained, with the time constants among what is learnt: tell whether an input that came 30 steps
# ago was high or low. Units start with the same ``alpha``; the task takes them apart.

STEPS = int(os.environ.get("GALLERY_STEPS", 300))
torch.manual_seed(0)
H, B, DELAY = 24, 64, 30
net = fastbptt.Recurrent(
    adapting,
    1,
    H,
    alpha=torch.nn.Parameter(torch.full((H,), 0.3)),
    slow=0.04,
    strength=torch.nn.Parameter(torch.full((H,), 0.5)),
)
readout = torch.nn.Linear(H, 1)
optimizer = torch.optim.Adam([*net.parameters(), *readout.parameters()], lr=3e-3)
losses = []
for _ in range(STEPS):
    high = torch.randint(2, (B,)).float()
    x = 0.3 * torch.randn(DELAY + 5, B, 1)
    x[:5, :, 0] += 2 * high - 1
    output, _ = net(x)
    logits = readout(output[-1]).squeeze(-1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, high)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
left.plot(losses, color="black", linewidth=1)
left.set(xlabel="training step", ylabel="loss")
right.hist(net.alpha_l0.detach().numpy(), bins=12, color="#2c7fc9")
right.axvline(0.3, color="#c2402a", label="at first")
right.set(xlabel="alpha of a unit", ylabel="units")
right.legend()
plt.show()

# %%
# What ships with the package is written in the same way:

print(", ".join(name for name in cells.__all__ if name[0].islower()))
