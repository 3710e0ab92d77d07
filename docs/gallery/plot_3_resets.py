"""Resets inside a rollout
=======================

A rollout of recurrent reinforcement learning: [T, B], with episodes that end in the middle. One
call with ``resets`` against the loop over steps that it stands for.
"""

import os
import time

import matplotlib.pyplot as plt
import torch

import fastbptt

torch.set_num_threads(1)  # whoever builds these pages does something else beside it
T, B, H = 128, 8, 128
torch.manual_seed(0)
lstm = fastbptt.LSTM(H, H)
theirs = torch.nn.LSTM(H, H)
theirs.load_state_dict(lstm.state_dict())
x = torch.randn(T, B, H)
dones = torch.rand(T, B) < 0.02
resets = fastbptt.resets_from_dones(dones)


# %%
# The loop, and the call.


def by_loop():
    state, outputs = (torch.zeros(1, B, H), torch.zeros(1, B, H)), []
    for t in range(T):
        keep = (~resets[t]).float().view(1, B, 1)
        output, state = theirs(x[t : t + 1], (state[0] * keep, state[1] * keep))
        outputs.append(output)
    return torch.cat(outputs)


def by_call():
    return lstm(x, resets=resets)[0]


torch.testing.assert_close(by_call(), by_loop())


def milliseconds(run):
    times = []
    for _ in range(int(os.environ.get("GALLERY_STEPS", 20))):
        begun = time.perf_counter()
        run().square().mean().backward()
        times.append(1e3 * (time.perf_counter() - begun))
    return sorted(times)[len(times) // 2]


loop, call = milliseconds(by_loop), milliseconds(by_call)
print(f"forward and backward on one thread: {loop:.1f} ms by a loop, {call:.1f} ms in one call")

# %%
# What a reset does: of a loss at the last step, the gradient in the inputs of each sequence comes
# back to the beginning of that sequence's last episode and no further. Resets are marked in red.

x.requires_grad_()
(gradient,) = torch.autograd.grad(by_call()[-1].sum(), x)

LAST = 60  # steps
size = gradient[-LAST:].norm(dim=-1).t().clamp(min=1e-6).log10()
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
image = axes.imshow(size.numpy(), aspect="auto", interpolation="nearest")
for t, b in resets[-LAST:].nonzero().tolist():
    axes.plot([t - 0.5, t - 0.5], [b - 0.5, b + 0.5], color="red", linewidth=2)
axes.set(xlabel=f"of the last {LAST} steps", ylabel="sequence", title="gradient, powers of ten")
figure.colorbar(image)
plt.show()
