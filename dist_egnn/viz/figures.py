"""The pictures of a run's report, each one panel, so that it can be read on a telephone: arrays in, PNG out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import plots

SIZE, DPI = (5.6, 4.0), 160
SHOWN = 6000  # points of a cloud
PHASES = {
    "data_s": "waiting for samples",
    "forward_s": "forward",
    "communication_s": "communication",
    "backward_s": "backward",
}


def _figure(three: bool = False) -> tuple[Any, Any]:
    plt = plots.pyplot()
    figure = plt.figure(figsize=SIZE, dpi=DPI, layout=None if three else "constrained")
    axes = figure.add_subplot(projection="3d" if three else None)
    if three:
        axes.set_position((0.03, 0.09, 0.9, 0.83))
        axes.computed_zorder = False
    else:
        axes.grid(alpha=0.3, which="both")
    return figure, axes


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    plots.pyplot().close(figure)
    return out.getvalue()


def _aside(figure: Any, axes: Any) -> None:
    """A legend above the axes, where no data are."""
    marks, names = axes.get_legend_handles_labels()
    if not names:
        return
    # in 3-D there is no layout that makes room: the axes leave it
    place = "upper center" if axes.name == "3d" else "outside upper center"
    figure.legend(marks, names, loc=place, ncols=min(len(names), 3), fontsize=9, frameon=False, columnspacing=1.2)


def _cloud(axes: Any, x: np.ndarray, colour: Any, label: str = "", count: int = SHOWN, **style: Any) -> None:
    """Up to ``count`` of the points x (N, 3), y up; colour: one, or (N, 3)."""
    rows = np.random.default_rng(0).permutation(len(x))[:count]
    c = colour if isinstance(colour, str) else colour[rows]
    size = float(np.clip(2e4 / len(rows), 4, 30))
    axes.scatter(*x[rows][:, [0, 2, 1]].T, c=c, s=size, linewidths=0, depthshade=False, **style)
    if label:
        axes.plot([], [], "o", color=c, label=label)


def curves(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], levels: Mapping[str, float], xlabel: str, ylabel: str
) -> bytes:
    """Lines over x on a logarithmic axis, and level ones; what is NaN or not positive is left out."""
    figure, axes = _figure()
    for k, (name, values) in enumerate(lines.items()):
        y = np.asarray(values, float)
        if (y > 0).any():
            axes.plot(x, np.where(y > 0, y, np.nan), marker="o", ms=3.5, color=f"C{k}", label=name)
    for k, (name, value) in enumerate(levels.items()):
        axes.axhline(value, color="0.35", ls=(":", "--")[k % 2], label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _aside(figure, axes)
    return _png(figure)


def displacement(x: np.ndarray, y: np.ndarray, predicted: np.ndarray) -> bytes:
    """How far each node moved against how far it was said to move; x, y, predicted: (N, 3)."""
    figure, axes = _figure()
    true, said = np.linalg.norm(y - x, axis=1), np.linalg.norm(predicted - x, axis=1)
    rows = np.random.default_rng(0).permutation(len(x))[:SHOWN]
    top = 1.05 * float(max(true.max(), np.percentile(said, 99.5))) or 1.0
    axes.plot(true[rows], said[rows], ".", ms=3.5, alpha=0.4, mew=0, color="C0")
    axes.plot([0, top], [0, top], "k--", lw=1, label="exact")
    axes.set(xlabel="true displacement ‖y − x‖", ylabel="predicted displacement", xlim=(0, top), ylim=(0, top))
    _aside(figure, axes)
    return _png(figure)


def _scene(axes: Any, x: np.ndarray) -> None:
    """A view of x (N, 3), with some room about it, and not too flat."""
    slack = 0.03 * np.ptp(x, 0) + max(0.04 * np.ptp(x, 0).max(), 1e-6)
    low, high = x.min(0) - slack, x.max(0) + slack
    tall = (high - low)[1] / np.linalg.norm(high - low)
    plots.view(axes, low, high, zoom=min(1.15, 0.68 / float(tall)))
    axes.locator_params(nbins=5)
    axes.xaxis.labelpad = axes.yaxis.labelpad = -4


def parts(x: np.ndarray, part: np.ndarray) -> bytes:
    """The nodes x (N, 3), coloured by part (N,)."""
    figure, axes = _figure(three=True)
    _scene(axes, x)
    _cloud(axes, x, np.array(plots.pyplot().get_cmap("tab10").colors)[part % 10])
    return _png(figure)


def cloud(y: np.ndarray, predicted: np.ndarray, virtual: np.ndarray) -> bytes:
    """True (N, 3) and predicted positions, and the virtual nodes (C, 3)."""
    figure, axes = _figure(three=True)
    _scene(axes, np.concatenate([y, predicted, virtual]))
    _cloud(axes, y, "0.65", "true", SHOWN // 2)
    _cloud(axes, predicted, "C0", "predicted", SHOWN // 2)
    if len(virtual):
        style: dict[str, Any] = {"s": 170, "edgecolors": "black", "linewidths": 1, "depthshade": False, "zorder": 9}
        axes.scatter(*virtual[:, [0, 2, 1]].T, marker="*", c="white", label="virtual nodes", **style)
    _aside(figure, axes)
    return _png(figure)


def paths(x: np.ndarray, virtual: np.ndarray) -> bytes:
    """The way of each virtual node over a rollout, (steps, C, 3), over the nodes' first positions x (N, 3)."""
    figure, axes = _figure(three=True)
    _scene(axes, np.concatenate([x, virtual.reshape(-1, 3)]))
    _cloud(axes, x, "0.8", "nodes at the start", alpha=0.4)
    for c in range(virtual.shape[1]):
        way, colour = virtual[:, c, [0, 2, 1]], f"C{c % 10}"
        axes.plot(*way.T, "-o", ms=3, lw=1.5, color=colour, zorder=5)
        axes.plot(*way[-1:].T, "*", ms=13, color=colour, mec="black", zorder=9)
    axes.plot([], [], "-o", ms=3, color="0.2", label="virtual node, a dot a step")
    axes.plot([], [], "*", ms=12, color="0.9", mec="black", label="its end")
    _aside(figure, axes)
    return _png(figure)


def timing(epochs: Sequence[float], seconds: Mapping[str, Sequence[float]], step: Sequence[float]) -> bytes:
    """Stacked bars: seconds of a step by phase, the rest of the step on top."""
    figure, axes = _figure()
    below = np.zeros(len(epochs))
    left = np.asarray(step, float) - sum(np.asarray(s, float) for s in seconds.values())
    rest = {"the rest (optimiser)": np.maximum(left, 0)}
    for k, (name, values) in enumerate({**{PHASES[n]: v for n, v in seconds.items()}, **rest}.items()):
        axes.bar(epochs, values, bottom=below, width=0.8, color=f"C{k}", label=name)
        below = below + np.asarray(values, float)
    axes.set(xlabel="epoch", ylabel="seconds a step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis="x")
    axes.set_axisbelow(True)
    _aside(figure, axes)
    return _png(figure)
