"""The psychometric curve, the state space, the eigenvalues and the weights in one figure."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # a file is drawn: no display is needed
import torch  # noqa: E402  (the line above has to come first)
from matplotlib import colormaps  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from .fixed_points import FixedPoint  # noqa: E402
from .network import DecisionNet  # noqa: E402
from .task import COHERENCES, DECISION, STEPS  # noqa: E402
from .training import Curve  # noqa: E402

COLOURS = colormaps["coolwarm"]


def draw(model: DecisionNet, curve: Curve, points: Sequence[FixedPoint], title: str) -> Figure:
    """Four panels."""
    figure = Figure(figsize=(13, 3.5), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    panels = figure.subplots(1, 4)
    _psychometric(panels[0], curve)
    _space(panels[1], curve, points)
    _eigenvalues(panels[2], points)
    _weights(panels[3], model)
    return figure


def _psychometric(axes: Axes, curve: Curve) -> None:
    x = torch.linspace(COHERENCES[0], COHERENCES[-1], 200)
    axes.plot(x, torch.sigmoid(curve.slope * (x - curve.bias)), color="black", linewidth=1.2)
    axes.plot(COHERENCES, curve.right, "o", color="#2c7fc9", markersize=4.5)
    axes.axhline(0.5, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="coherence", ylabel="share of right choices", title="psychometric curve")


def _space(axes: Axes, curve: Curve, points: Sequence[FixedPoint]) -> None:
    """Mean rates until the decision in their first two principal components."""
    rates = curve.rates[:, : STEPS - DECISION].double()
    center = rates.flatten(0, 1).mean(0)
    _, _, components = torch.linalg.svd(rates.flatten(0, 1) - center, full_matrices=False)
    plane = components[:2].T
    for coherence, path in zip(COHERENCES, (rates - center) @ plane, strict=True):
        colour = COLOURS(0.5 + 0.5 * coherence / COHERENCES[-1])
        axes.plot(*path.T, color=colour, linewidth=1)
    for point in points:
        x, y = ((point.rate - center) @ plane).tolist()
        face = "black" if point.is_stable else "white"
        axes.plot(x, y, "o", markerfacecolor=face, markeredgecolor="black", markersize=6)
    axes.set(xlabel="first component", ylabel="second", title="mean rates, fixed points")


def _eigenvalues(axes: Axes, points: Sequence[FixedPoint]) -> None:
    """Of the step's Jacobian, with the unit circle."""
    angle = torch.linspace(0, 2 * torch.pi, 200)
    axes.plot(angle.cos(), angle.sin(), color="gray", linestyle=":", linewidth=1)
    for point in points:
        values, colour = point.eigenvalues, "#0b3c6f" if point.is_stable else "#c2402a"
        axes.plot(values.real, values.imag, ".", color=colour, markersize=4, alpha=0.7)
    axes.set_aspect("equal")
    axes.set(xlabel="real part", ylabel="imaginary", title="eigenvalues there")


def _weights(axes: Axes, model: DecisionNet) -> None:
    """From each unit (column) to each; excitation red, inhibition blue."""
    weight = model.recurrent.weight_hh_l0.detach()
    limit = float(weight.abs().quantile(0.98)) or 1.0
    axes.imshow(weight.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.axvline(model.excitatory - 0.5, color="black", linewidth=0.8)
    axes.set(xlabel="from unit", ylabel="to unit", title="W_hh, by Dale's law")
