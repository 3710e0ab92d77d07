"""Training by second derivatives: with torch.nn and with these modules the same losses."""

from __future__ import annotations

import copy

import torch
from torch.func import functional_call

import fastbptt

TOLERANCE = {"rtol": 1e-8, "atol": 0.0}


class Last(torch.nn.Module):
    """A number for each sequence [B, T, I]: of the last state of a recurrent layer, [B]."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.head = torch.nn.Linear(rnn.hidden_size, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1]).squeeze(1)


class Generator(torch.nn.Module):
    """Sequences [B, T, I] of noise [B, T, Z]."""

    def __init__(self, rnn, features):
        super().__init__()
        self.rnn = rnn
        self.head = torch.nn.Linear(rnn.hidden_size, features)

    def forward(self, z):
        return self.head(self.rnn(z)[0])


def assert_same_curve(train, *models):
    """Of the models as they are, torch.nn's, and converted."""
    ours = [fastbptt.convert(copy.deepcopy(model)) for model in models]
    assert all(isinstance(m.rnn, (fastbptt.LSTM, fastbptt.GRU)) for m in ours)
    curves = []
    for each in (models, ours):
        torch.manual_seed(1)
        curves.append(torch.tensor(train(*each), dtype=torch.float64))
    theirs, ours = curves
    assert theirs.isfinite().all() and theirs.std() > 1e-3, "nothing was trained"
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def gradient_penalty(critic, real, made):
    """Gulrajani et al., "Improved training of Wasserstein GANs", 2017."""
    between = torch.lerp(real, made, torch.rand(len(real), 1, 1, dtype=real.dtype))
    between.requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def train_wgan(critic, generator, steps=15, B=8, T=12):
    losses = []
    of_critic = torch.optim.Adam(critic.parameters(), lr=1e-2, betas=(0.0, 0.9))
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-2, betas=(0.0, 0.9))
    for step in range(steps):
        phase = 6 * torch.rand(B, 1, 1, dtype=torch.float64)
        real = torch.sin(torch.arange(T)[:, None] + phase).expand(B, T, 2)
        made = generator(torch.randn(B, T, 3, dtype=torch.float64))
        loss = (critic(made.detach()) - critic(real)).mean()
        loss = loss + 10 * gradient_penalty(critic, real, made.detach())
        of_critic.zero_grad()
        loss.backward()
        of_critic.step()
        losses.append(loss.item())
        if step % 3 == 2:
            of_generator.zero_grad()
            loss = -critic(made).mean()
            loss.backward()
            of_generator.step()
            losses.append(loss.item())
    return losses


def test_wgan_with_gradient_penalty():
    torch.manual_seed(0)
    critic = Last(torch.nn.LSTM(2, 16, num_layers=2, batch_first=True)).double()
    generator = Generator(torch.nn.LSTM(3, 16, batch_first=True), 2).double()
    assert_same_curve(train_wgan, critic, generator)


def task(shots, T=10):
    """Sequences [shots, T, 3] and their labels [shots], by a rule of the task's own."""
    weights = torch.randn(3, dtype=torch.float64)
    x = torch.randn(shots, T, 3, dtype=torch.float64)
    return x, torch.tanh(x.mean(1) @ weights)


def train_maml(model, steps=12, tasks=3, lr=0.1, second_order=True):
    """Finn et al., "Model-agnostic meta-learning", 2017."""
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    mse = torch.nn.functional.mse_loss
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(tasks):
            (x, y), weights = task(10), dict(model.named_parameters())
            for _ in range(2):
                loss = mse(functional_call(model, weights, (x[:5],)), y[:5])
                slopes = torch.autograd.grad(
                    loss, list(weights.values()), create_graph=second_order
                )
                weights = {n: w - lr * d for (n, w), d in zip(weights.items(), slopes, strict=True)}
            total = total + mse(functional_call(model, weights, (x[5:],)), y[5:])
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


def test_second_order_maml():
    torch.manual_seed(0)
    assert_same_curve(train_maml, Last(torch.nn.GRU(3, 16, batch_first=True)).double())


def test_second_order_counts():
    """The curve is another without it, as the test above would tell."""
    torch.manual_seed(0)
    model = fastbptt.convert(Last(torch.nn.GRU(3, 16, batch_first=True)).double())
    curves = []
    for second_order in (False, True):
        torch.manual_seed(1)
        losses = train_maml(copy.deepcopy(model), steps=5, second_order=second_order)
        curves.append(torch.tensor(losses, dtype=torch.float64))
    assert not torch.allclose(*curves, rtol=1e-3)
