"""Twenty recurrent cells of the literature as functions, each with its source.

Where a matrix stands inside a product of gates (W (r h)) it is taken before the gate, as torch's
GRU takes it: r (W h).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import sigmoid, tanh

from fastbptt import cell

FORMULAS = []


def formula(**options):
    def made(function):
        FORMULAS.append(cell(**options)(function))
        return FORMULAS[-1]

    return made


@formula(gates=1, states=1)
def elman_rectified(pre, rec, state):
    """Le, Jaitly and Hinton, "A simple way to initialize recurrent networks of ReLUs", 2015."""
    return (torch.relu(pre[0] + rec[0]),)


@formula(gates=2, states=1)
def update_gate(pre, rec, state):
    """Collins, Sohl-Dickstein and Sussillo, "Capacity and trainability in RNNs", 2017 (UGRNN)."""
    (h,) = state
    g = sigmoid(pre[0] + rec[0] + 1.0)
    return (g * h + (1 - g) * tanh(pre[1] + rec[1]),)


@formula(gates=1, states=1)
def fast_gated(pre, rec, state, shift, zeta, nu):
    """Kusupati et al., "FastGRNN", 2018: gate and candidate share W_ih and W_hh."""
    (h,) = state
    s = pre[0] + rec[0]
    z = sigmoid(s)
    return ((zeta * (1 - z) + nu) * tanh(s + shift) + z * h,)


@formula(gates=4, states=1)
def chaos_free(pre, rec, state):
    """Laurent and von Brecht, "A recurrent neural network without chaos", 2016 (CFN)."""
    (h,) = state
    forget, entering = sigmoid(pre[0] + rec[0]), sigmoid(pre[1] + rec[1])
    return (forget * tanh(h) + entering * tanh(pre[2]),)


@formula(gates=3, states=2)
def simple_unit(pre, rec, state):
    """Lei et al., "Simple recurrent units for highly parallelizable recurrence", 2018 (SRU)."""
    c = state[1]
    forget, reset = sigmoid(pre[1]), sigmoid(pre[2])
    c = forget * c + (1 - forget) * pre[0]
    return reset * tanh(c) + (1 - reset) * pre[0], c


@formula(gates=3, states=2)
def quasi(pre, rec, state):
    """Bradbury et al., "Quasi-recurrent neural networks", 2017 (fo-pooling)."""
    z, f, o = tanh(pre[0]), sigmoid(pre[1]), sigmoid(pre[2])
    c = torch.lerp(z, state[1], f)
    return o * c, c


@formula(gates=1, states=1)
def strongly_typed(pre, rec, state):
    """Balduzzi and Ghifary, "Strongly-typed recurrent neural networks", 2016 (T-RNN's pooling)."""
    (h,) = state
    f = sigmoid(pre[0])
    return (f * h + (1 - f) * pre[0],)


@formula(gates=3, states=1)
def mutated(pre, rec, state):
    """Jozefowicz et al., "An empirical exploration of recurrent architectures", 2015 (MUT1)."""
    (h,) = state
    z = sigmoid(pre[0])
    r = sigmoid(pre[1] + rec[1])
    new = tanh(r * rec[2] + tanh(pre[2]))
    return (new * z + h * (1 - z),)


@formula(gates=2, states=1)
def light_gated(pre, rec, state):
    """Ravanelli et al., "Light gated recurrent units for speech recognition", 2018 (Li-GRU)."""
    (h,) = state
    z = sigmoid(pre[0] + rec[0])
    return (z * h + (1 - z) * F.relu(pre[1] + rec[1]),)


@formula(gates=4, states=3)
def exponential_gates(pre, rec, state):
    """Beck et al., "xLSTM", 2024, the sLSTM with a sigmoid forget gate (not stabilized)."""
    _, c, n = state
    i, f, z, o = (p + r for p, r in zip(pre, rec, strict=True))
    i, f = torch.exp(i), sigmoid(f)
    c = f * c + i * tanh(z)
    n = f * n + i
    return sigmoid(o) * c / n, c, n


@formula(gates=4, states=4)
def stabilized_exponential_gates(pre, rec, state):
    """Beck et al., "xLSTM", 2024, the sLSTM with its stabilizer m."""
    _, c, n, m = state
    i, f, z, o = (p + r for p, r in zip(pre, rec, strict=True))
    log_f = F.logsigmoid(f)
    new_m = torch.maximum(log_f + m, i)
    i, f = torch.exp(i - new_m), torch.exp(log_f + m - new_m)
    c = f * c + i * tanh(z)
    n = f * n + i
    return sigmoid(o) * c / torch.clamp(n, min=1e-6), c, n, new_m


@formula(gates=3, states=2)
def ungated_output(pre, rec, state):
    """Greff et al., "LSTM: a search space odyssey", 2015 (NOG: without an output gate)."""
    i, f, g = (p + r for p, r in zip(pre, rec, strict=True))
    c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
    return tanh(c), c


@formula(gates=2, states=1)
def just_another(pre, rec, state, beta):
    """Van der Westhuizen and Lasenby, "Unreasonable effectiveness of the forget gate", 2018."""
    (c,) = state
    s = pre[0] + rec[0]
    return (sigmoid(s) * c + (1 - sigmoid(s - beta)) * tanh(pre[1] + rec[1]),)


@formula(gates=1, states=1)
def antisymmetric(pre, rec, state, step, friction):
    """Chang et al., "AntisymmetricRNN", 2019: Euler's step with friction (W_hh made so outside)."""
    (h,) = state
    return (h + step * tanh(pre[0] + rec[0] - friction * h),)


@formula(gates=1, states=2, recurrent=0, output=0)
def coupled_oscillators(pre, rec, state, dt, gamma, epsilon):
    """Rusch and Mishra, "Coupled oscillatory recurrent neural network", 2021 (coRNN)."""
    y, z = state
    z = z + dt * (tanh(pre[0] + rec[0]) - gamma * y - epsilon * z)
    return y + dt * z, z


@formula(gates=1, states=3, recurrent=1)
def leaky_integrate_and_fire(pre, rec, state, alpha, beta, threshold):
    """Neftci, Mostafa and Zenke, "Surrogate gradient learning", 2019, smooth.

    States: membrane, spikes, synaptic current.
    """
    u, spikes, current = state
    current = alpha * current + pre[0] + rec[0]
    u = beta * u * (1 - spikes) + (1 - beta) * current
    return u, F.softsign(10 * F.relu(u - threshold)), current


@formula(gates=1, states=2)
def adaptive_threshold(pre, rec, state, decay, strength):
    """Bellec et al., "Long short-term memory in networks of spiking neurons", 2018, with rates."""
    rate, a = state
    drive = pre[0] + rec[0] - strength * a
    new = F.softplus(drive, beta=2.0)
    return new, decay * a + (1 - decay) * rate


@formula(gates=1, states=3, recurrent=1)
def short_term_plasticity(pre, rec, state, tau, use):
    """Masse et al., "Circuit mechanisms for the maintenance of information", 2019: depression.

    States: rate, what W_hh sees, resource.
    """
    rate, _, resource = state
    new = 0.8 * rate + 0.2 * F.relu(pre[0] + rec[0])
    resource = torch.clamp(resource + (1 - resource) / tau - use * resource * rate, 0.0, 1.0)
    return new, new * resource, resource


@formula(gates=2, states=1)
def liquid(pre, rec, state, dt, tau, reversal):
    """Hasani et al., "Liquid time-constant networks", 2021: the fused step of the solver."""
    (h,) = state
    f = sigmoid(pre[0] + rec[0])
    return ((h + dt * f * reversal) / (1 + dt * (1 / tau + f)),)


@formula(gates=2, states=1)
def closed_form(pre, rec, state, t):
    """Hasani et al., "Closed-form continuous-time neural networks", 2022 (CfC)."""
    gate = sigmoid(-F.silu(pre[0] + rec[0]) * t)
    return (gate * tanh(pre[1] + rec[1]) + (1 - gate) * F.gelu(pre[1]),)


@formula(gates=1, states=1)
def modulus_rectified(pre, rec, state, shift):
    """Arjovsky, Shah and Bengio, "Unitary evolution recurrent neural networks", 2016: modReLU."""
    s = pre[0] + rec[0]
    return (torch.sign(s) * torch.relu(torch.abs(s) + shift),)


@formula(gates=1, states=2, output=1)
def piecewise_linear(pre, rec, state, slope):
    """Durstewitz, "A state space approach for piecewise-linear RNNs", 2017 (PLRNN).

    States: what W_hh sees, the latent state.
    """
    z = slope * state[1] + pre[0] + rec[0]
    return torch.where(z > 0, z, 0.0), z
