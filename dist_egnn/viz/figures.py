"""The panels of a run's report and of the demo's picture. Each panel draws arrays on an empty figure or subfigure.

Shapes: N nodes, C virtual nodes, S steps of a rollout. Positions have y up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import plots

SIZE, DPI = (5.6, 4.0), 160  # of one panel: inches, pixels per inch
MAX_POINTS = 6000  # of a point cloud
Lines = Mapping[str, Sequence[float]]  # by name


def png(panel: Callable[..., None], *arguments: Any) -> bytes:
    """One panel as PNG; arguments: those of the panel after ``figure``."""
    figure = plots.pyplot().figure(figsize=SIZE, dpi=DPI, layout="constrained")
    panel(figure, *arguments)
    return plots.png(figure)


def png_of_panels(title: str, panels: Mapping[str, Callable[[Any], None]]) -> bytes:
    """Several panels as one PNG, two per row. panels: title → function that draws on a subfigure."""
    rows = -(-len(panels) // 2)
    figure = plots.pyplot().figure(figsize=(2 * SIZE[0], rows * SIZE[1]), dpi=DPI, layout="constrained")
    figure.suptitle(title)
    for subfigure, (name, draw) in zip(figure.subfigures(rows, 2, squeeze=False).flat, panels.items(), strict=False):
        draw(subfigure)
        axes = subfigure.axes[0]
        axes.set_title(name, fontsize=10, y=0.98 if axes.name == "3d" else None)  # below the legend
    return plots.png(figure)


def _axes(figure: Any) -> Any:
    axes = figure.add_subplot()
    axes.grid(alpha=0.3, which="both")
    return axes


def _axes_3d(figure: Any, x: np.ndarray) -> Any:
    """Axes that show all of x (N, 3) with a margin, not too flat."""
    axes = figure.add_subplot(projection="3d")
    axes.set_position((0.03, 0.09, 0.9, 0.83))  # the layout engine does not know how large 3-D axes are
    axes.computed_zorder = False
    margin = 0.03 * np.ptp(x, 0) + max(0.04 * np.ptp(x, 0).max(), 1e-6)
    low, high = x.min(0) - margin, x.max(0) + margin
    height = float((high - low)[1] / np.linalg.norm(high - low))
    plots.view(axes, low, high, zoom=min(1.15, 0.68 / height))
    axes.locator_params(nbins=5)
    axes.xaxis.labelpad = axes.yaxis.labelpad = -4
    return axes


def _legend(figure: Any, axes: Any) -> None:
    """A legend above the axes, where it covers no data."""
    handles, names = axes.get_legend_handles_labels()
    loc = "upper center" if axes.name == "3d" else "outside upper center"
    if names:
        figure.legend(handles, names, loc=loc, ncols=min(len(names), 3), fontsize=9, frameon=False, columnspacing=1.2)


def _cloud(axes: Any, x: np.ndarray, colour: Any, label: str = "", count: int = MAX_POINTS, **style: Any) -> None:
    """Draw at most ``count`` of the points x (N, 3). colour: one, or (N, 3)."""
    rows = np.random.default_rng(0).permutation(len(x))[:count]
    c = colour if isinstance(colour, str) else colour[rows]
    size = float(np.clip(2e4 / len(rows), 4, 30))
    axes.scatter(*x[rows][:, [0, 2, 1]].T, c=c, s=size, linewidths=0, depthshade=False, **style)
    if label:
        axes.plot([], [], "o", color=c, label=label)


def curves(
    figure: Any, x: Sequence[float], lines: Lines, levels: Mapping[str, float], xlabel: str, ylabel: str
) -> None:
    """Lines over x and horizontal lines at ``levels``, on a logarithmic axis; values that are NaN or ≤ 0 are left out."""
    axes = _axes(figure)
    for k, (name, values) in enumerate(lines.items()):
        y = np.asarray(values, float)
        if (y > 0).any():
            axes.plot(x, np.where(y > 0, y, np.nan), marker="o", ms=3.5, color=f"C{k}", label=name)
    for k, (name, value) in enumerate(levels.items()):
        axes.axhline(value, color="0.35", ls=(":", "--")[k % 2], label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)


def displacement(figure: Any, x: np.ndarray, y: np.ndarray, predicted: Mapping[str, np.ndarray]) -> None:
    """Predicted over true displacement of each node. x, y: (N, 3); predicted: model → (N, 3)."""
    axes = _axes(figure)
    rows = np.random.default_rng(0).permutation(len(x))[:MAX_POINTS]
    true = np.linalg.norm(y - x, axis=1)
    moved = {name: np.linalg.norm(guess - x, axis=1) for name, guess in predicted.items()}
    top = 1.05 * float(max(true.max(), *(np.percentile(d, 99.5) for d in moved.values()))) or 1.0
    for k, (name, distance) in enumerate(moved.items()):
        axes.plot(true[rows], distance[rows], ".", ms=3.5, alpha=0.4, mew=0, color=f"C{k}")
        axes.plot([], [], "o", color=f"C{k}", label=name)
    axes.plot([0, top], [0, top], "k--", lw=1, label="exact")
    axes.set(xlabel="true displacement ‖y − x‖", ylabel="predicted displacement", xlim=(0, top), ylim=(0, top))
    _legend(figure, axes)


def parts(figure: Any, x: np.ndarray, part: np.ndarray) -> None:
    """The nodes x (N, 3), coloured by part (N,)."""
    _cloud(_axes_3d(figure, x), x, np.array(plots.pyplot().get_cmap("tab10").colors)[part % 10])


def positions(figure: Any, y: np.ndarray, predicted: np.ndarray, virtual: np.ndarray) -> None:
    """True (N, 3) and predicted positions (N, 3), and virtual nodes (C, 3)."""
    axes = _axes_3d(figure, np.concatenate([y, predicted, virtual]))
    _cloud(axes, y, "0.65", "true", MAX_POINTS // 2)
    _cloud(axes, predicted, "C0", "predicted", MAX_POINTS // 2)
    if len(virtual):
        style: dict[str, Any] = {"marker": "*", "s": 170, "c": "white", "edgecolors": "black", "zorder": 9}
        axes.scatter(*virtual[:, [0, 2, 1]].T, linewidths=1, depthshade=False, label="virtual nodes", **style)
    _legend(figure, axes)


def virtual_node_paths(figure: Any, x: np.ndarray, virtual: np.ndarray) -> None:
    """The path of each virtual node over a rollout (S, C, 3), on the nodes' first positions x (N, 3)."""
    axes = _axes_3d(figure, np.concatenate([x, virtual.reshape(-1, 3)]))
    _cloud(axes, x, "0.8", "nodes at the start", alpha=0.4)
    for c in range(virtual.shape[1]):
        path, colour = virtual[:, c, [0, 2, 1]], f"C{c % 10}"
        axes.plot(*path.T, "-o", ms=3, lw=1.5, color=colour, zorder=5)
        axes.plot(*path[-1:].T, "*", ms=13, color=colour, mec="black", zorder=9)
    axes.plot([], [], "-o", ms=3, color="0.2", label="virtual node, one dot per step")
    axes.plot([], [], "*", ms=12, color="0.9", mec="black", label="last step")
    _legend(figure, axes)


def timing(figure: Any, epochs: Sequence[float], seconds: Lines, step: Sequence[float]) -> None:
    """Stacked bars: seconds per step of each phase, and the rest of the step on top."""
    axes = _axes(figure)
    bars = {name: np.asarray(values, float) for name, values in seconds.items()}
    bars["other (optimiser)"] = np.maximum(np.asarray(step, float) - sum(bars.values()), 0)
    bottom = np.zeros(len(epochs))
    for k, (name, height) in enumerate(bars.items()):
        axes.bar(epochs, height, bottom=bottom, width=0.8, color=f"C{k}", label=name)
        bottom = bottom + height
    axes.set(xlabel="epoch", ylabel="seconds per step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis="x")
    axes.set_axisbelow(True)
    _legend(figure, axes)
