"""The book's exercises
====================

The exercises of *Dive into Deep Learning*, `Backpropagation Through Time
<https://d2l.ai/chapter_recurrent-neural-networks/bptt.html>`_: powers of a symmetric matrix, what
they mean for gradients, and the same with a nonlinearity. :doc:`../book` has the words.
"""

import os

import matplotlib.pyplot as plt
import torch

import fastbptt

torch.manual_seed(5)
N = 8
STEPS = 40

# %%
# Powers of a symmetric matrix
# ----------------------------
#
# A random vector turns towards the first eigenvector, by the ratio of the two largest eigenvalues
# a step.

M = torch.randn(N, N, dtype=torch.float64)
M = M + M.T
values, vectors = torch.linalg.eigh(M)
order = values.abs().argsort(descending=True)
values, vectors = values[order], vectors[:, order]
print("eigenvalues by size:", ", ".join(f"{value:.2f}" for value in values))


def tangent(x):
    """Of the angle between the rows of x and the first eigenvector."""
    along = x @ vectors[:, 0]
    across = (x - along[:, None] * vectors[:, 0]).norm(dim=1)
    return across / along.abs()


x = torch.randn(50, N, dtype=torch.float64)  # 50 of them
angles = []
for _ in range(STEPS):
    angles.append(tangent(x))
    x = x @ M / values[0].abs()
angles = torch.stack(angles)
bound = angles[0].median() * (values[1] / values[0]).abs() ** torch.arange(STEPS)

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.semilogy(angles, color="#7fb3e6", linewidth=0.7)
axes.semilogy(bound, color="black", label="(second / first eigenvalue) to the power k")
axes.set(
    xlabel="k", ylabel="tangent of the angle", title="M to the power k, times 50 random vectors"
)
axes.legend()
plt.show()

# %%
# Gradients with and without the nonlinearity
# -------------------------------------------
#
# A recurrent network whose weights are that matrix, scaled to a largest eigenvalue of 0.9, 1 and
# 1.1. Without a nonlinearity the gradient k steps back is a power of it. With ``tanh`` each
# Jacobian is smaller by 1 - h².


def gradient_norms(nonlinearity, largest):
    """Of the last step's loss in the state of each step before, by size."""
    rnn = fastbptt.RNN(N, N, nonlinearity=nonlinearity, bias=False, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(torch.eye(N))
        rnn.weight_hh_l0.copy_(M / values[0].abs() * largest)
    # A small push at each step, as an input: its gradient is that of the state before tanh.
    push = 0.3 * torch.randn(STEPS, 1, N, dtype=torch.float64)
    push.requires_grad_()
    output, _ = rnn(push)
    (gradient,) = torch.autograd.grad(output[-1].sum(), push)
    return gradient.norm(dim=-1).flatten().flip(0)


figure, panels = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True, layout="constrained")
for axes, nonlinearity in zip(panels, ("identity", "tanh"), strict=True):
    for largest, color in ((0.9, "#2c7fc9"), (1.0, "black"), (1.1, "#c2402a")):
        axes.semilogy(
            gradient_norms(nonlinearity, largest), color=color, label=f"eigenvalue {largest}"
        )
    axes.set(xlabel="steps back", title=nonlinearity)
panels[0].set_ylabel("norm of the gradient")
panels[0].legend()
plt.show()

# %%
# The three ways to cut the sum
# -----------------------------
#
# Full, regular, and randomized truncation, as the chapter draws them: the gradient in each input,
# for a loss at every step, of one sequence.

rnn = fastbptt.RNN(1, N, dtype=torch.float64)
torch.nn.init.orthogonal_(rnn.weight_hh_l0, gain=0.95)  # which keeps what it has seen for long
sequence = 0.3 * torch.randn(30, 1, 1, dtype=torch.float64)


def gradient_in_inputs(truncation):
    x = sequence.clone().requires_grad_()
    rnn(x, truncation=truncation)[0].sum().backward()
    return x.grad.flatten()


draws = int(os.environ.get("GALLERY_STEPS", 2000))
random = fastbptt.Randomized(mean_length=5)
mean = torch.stack([gradient_in_inputs(random) for _ in range(draws)]).mean(0)

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot(gradient_in_inputs(None), "k-", label="full")
axes.plot(gradient_in_inputs(fastbptt.Chunked(5)), "o-", color="#7fb3e6", label="Chunked(5)")
axes.plot(gradient_in_inputs(fastbptt.Sliding(5)), "-", color="#2c7fc9", label="Sliding(5)")
axes.plot(mean, "--", color="#e8a33d", label=f"Randomized(mean_length=5), mean of {draws}")
axes.set(xlabel="step", ylabel="gradient in the input")
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
plt.show()
