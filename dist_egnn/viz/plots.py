"""Pictures by matplotlib, the optional extra `viz`: the panels of a run's report, the plot of a sweep.

A panel draws arrays on an empty figure or subfigure. Shapes: N nodes, C virtual nodes, S steps of a rollout.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Failure
from ..utils.filesystem import write_atomically

SIZE, DPI = (5.6, 4.0), 160  # of one panel: inches, pixels per inch
MAX_POINTS = 6000  # of a point cloud
MAX_BARS = 60
FLAT = 0.11  # depth of a view, of its longest side, up to which it is seen from the front
Values = Sequence[float]
Lines = Mapping[str, Values]  # by name


def pyplot() -> Any:
    """matplotlib.pyplot with the backend Agg. Raises Failure if matplotlib is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise Failure("pictures need matplotlib: pip install -e '.[viz]'") from error
    plt.matplotlib.use("Agg")
    return plt


def png(figure: Any) -> bytes:
    """The figure as PNG; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot().close(figure)
    return buffer.getvalue()


def is_flat(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether a view from corner low (3,) to high (3,) shows two-dimensional data."""
    return bool(high[2] - low[2] <= FLAT * (high - low).max())


def view(axes: Any, low: np.ndarray, high: np.ndarray, zoom: float = 1.0) -> None:
    """Show the box from corner low (3,) to high (3,) in equal scales, y up: (x, y, z) are drawn at (x, z, y).

    A box without depth, of two-dimensional data, is seen from the front.
    """
    axes.set(xlim=(low[0], high[0]), ylim=(low[2], high[2]), zlim=(low[1], high[1]), xlabel="x", ylabel="z", zlabel="y")
    axes.set_box_aspect((high - low)[[0, 2, 1]], zoom=zoom)
    axes.tick_params(labelsize=6, pad=-2)
    axes.view_init(elev=18, azim=-60)
    if is_flat(low, high):
        axes.view_init(elev=0, azim=-90)
        axes.set(yticks=[], ylabel="")


def panel_png(panel: Callable[..., None], *arguments: Any) -> bytes:
    """One panel as PNG; arguments: those of the panel after ``figure``."""
    figure = pyplot().figure(figsize=SIZE, dpi=DPI, layout="constrained")
    panel(figure, *arguments)
    return png(figure)


def empty_axes(figure: Any) -> Any:
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
    view(axes, low, high, zoom=min(1.15, 0.68 / height))
    axes.locator_params(nbins=5)
    axes.xaxis.labelpad = axes.yaxis.labelpad = -4
    return axes


def draw_legend(figure: Any, axes: Any) -> None:
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


def draw_virtual_nodes(axes: Any, z: np.ndarray, size: float) -> str:
    """White stars at z (C, 3), in front of everything; NaN: outside the view. Returns a label, and gives it to the stars.

    Nodes closer than 2% of the longest axis count as one point.
    """
    style: dict[str, Any] = {"marker": "*", "c": "white", "edgecolors": "black", "linewidths": 1, "zorder": 9}
    shown = z[np.isfinite(z).all(1)]
    near = 0.02 * max(float(np.ptp(limits)) for limits in (axes.get_xlim(), axes.get_ylim(), axes.get_zlim()))
    points = list[np.ndarray]()
    for x in shown:
        if not any(np.linalg.norm(x - point) < near for point in points):
            points.append(x)
    label = f"{len(z)} virtual node" + "s" * (len(z) != 1)
    if len(points) < len(shown):
        label += " at one point" if len(points) == 1 else f" at {len(points)} points"
    label += f", {len(z) - len(shown)} outside the view" * (len(shown) < len(z))
    axes.scatter(*np.reshape(points, (-1, 3))[:, [0, 2, 1]].T, s=size, depthshade=False, label=label, **style)
    return label


def curves(figure: Any, x: Values, lines: Lines, levels: Mapping[str, float], xlabel: str, ylabel: str) -> None:
    """Lines over x and horizontal lines at ``levels``, on a logarithmic axis; values that are NaN or ≤ 0 are left out."""
    axes = empty_axes(figure)
    for k, (name, values) in enumerate(lines.items()):
        y = np.asarray(values, float)
        if (y > 0).any():
            axes.plot(np.asarray(x)[y > 0], y[y > 0], marker="o", ms=3.5, color=f"C{k}", label=name)
    for k, (name, value) in enumerate(levels.items()):
        axes.axhline(value, color="0.35", ls=(":", "--")[k % 2], label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    draw_legend(figure, axes)


def displacement(figure: Any, x: np.ndarray, y: np.ndarray, predicted: Mapping[str, np.ndarray]) -> None:
    """Predicted over true displacement of each node. x, y: (N, 3); predicted: model → (N, 3)."""
    axes = empty_axes(figure)
    rows = np.random.default_rng(0).permutation(len(x))[:MAX_POINTS]
    true = np.linalg.norm(y - x, axis=1)
    moved = {name: np.linalg.norm(guess - x, axis=1) for name, guess in predicted.items()}
    top = 1.05 * float(max(true.max(), *(np.percentile(d, 99.5) for d in moved.values()))) or 1.0
    for k, (name, distance) in enumerate(moved.items()):
        axes.plot(true[rows], distance[rows], ".", ms=3.5, alpha=0.4, mew=0, color=f"C{k}")
        axes.plot([], [], "o", color=f"C{k}", label=name)
    axes.plot([0, top], [0, top], "k--", lw=1, label="exact")
    axes.set(xlabel="true displacement ‖y − x‖", ylabel="predicted displacement", xlim=(0, top), ylim=(0, top))
    draw_legend(figure, axes)


def parts(figure: Any, x: np.ndarray, part: np.ndarray) -> None:
    """The nodes x (N, 3), coloured by part (N,)."""
    _cloud(_axes_3d(figure, x), x, np.array(pyplot().get_cmap("tab10").colors)[part % 10])


def clouds(figure: Any, shown: Mapping[str, np.ndarray]) -> None:
    """Positions (N, 3) by name; seen from above if all have the same z."""
    x = np.concatenate(list(shown.values()))
    flat = np.ptp(x[:, 2]) == 0
    axes = empty_axes(figure) if flat else _axes_3d(figure, x)
    for (name, points), colour in zip(shown.items(), ("0.65", "C0"), strict=False):
        if flat:
            rows = np.random.default_rng(0).permutation(len(points))[: MAX_POINTS // 2]
            axes.plot(*points[rows, :2].T, ".", color=colour, label=name)
            axes.set(xlabel="x", ylabel="y", aspect="equal")
        else:
            _cloud(axes, points, colour, name, MAX_POINTS // 2)
    draw_legend(figure, axes)


def degrees(figure: Any, counts: Mapping[str, np.ndarray]) -> None:
    """Histograms of the neighbours of nodes, (N,) by name."""
    axes = empty_axes(figure)
    for k, (name, values) in enumerate(counts.items()):
        ends = np.arange(values.max() + 2) if values.max() < MAX_BARS else np.linspace(0, values.max() + 1, MAX_BARS)
        share = 100 * np.histogram(values, ends)[0] / len(values)
        axes.stairs(share, ends - 0.5, color=f"C{k}", lw=1.5, label=name)
        axes.axvline(values.mean(), color=f"C{k}", ls=":")
    axes.set(xlabel="neighbours of a node (dotted: mean)", ylabel="nodes [%]", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    draw_legend(figure, axes)


def positions(figure: Any, y: np.ndarray, predicted: np.ndarray, virtual: np.ndarray) -> None:
    """True (N, 3) and predicted positions (N, 3), and virtual nodes (C, 3)."""
    axes = _axes_3d(figure, np.concatenate([y, predicted, virtual]))
    _cloud(axes, y, "0.65", "true", MAX_POINTS // 2)
    _cloud(axes, predicted, "C0", "predicted", MAX_POINTS // 2)
    if len(virtual):
        draw_virtual_nodes(axes, virtual, 170)
    draw_legend(figure, axes)


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
    draw_legend(figure, axes)


def timing(figure: Any, epochs: Values, seconds: Lines, step: Values) -> None:
    """Stacked bars: seconds per step of each phase, and the rest of the step on top; means of epochs if they are many."""
    axes = empty_axes(figure)
    bars = {name: np.asarray(values, float) for name, values in seconds.items()}
    bars["other (optimiser)"] = np.maximum(np.asarray(step, float) - sum(bars.values()), 0)
    groups = np.array_split(np.asarray(epochs, float), min(len(epochs), MAX_BARS))
    ends = np.cumsum([0, *map(len, groups)])
    bottom = np.zeros(len(groups))
    for k, (name, values) in enumerate(bars.items()):
        height = np.add.reduceat(values, ends[:-1]) / np.diff(ends)
        centre, width = [group.mean() for group in groups], 0.8 * np.diff(ends)
        axes.bar(centre, height, bottom=bottom, width=width, color=f"C{k}", label=name, snap=True)
        bottom = bottom + height
    axes.set(xlabel="epoch", ylabel="seconds per step", axisbelow=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis="x")
    draw_legend(figure, axes)


def sweep(path: Path, key: str, ticks: Sequence[str], curves: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Plot test errors over the values of a config key, evenly spaced, with error bars over seeds.

    curves: name → value of the key → (mean, standard deviation); the value "" does not depend on the key: a level line.
    """
    figure, axes = pyplot().subplots(figsize=(7.5, 5), dpi=110, layout="constrained")
    for n, (name, points) in enumerate(curves.items()):
        colour = f"C{n % 10}"
        offset = 0.2 * ((n + 0.5) / len(curves) - 0.5)  # error bars side by side
        known = [(k + offset, *points[tick]) for k, tick in enumerate(ticks) if tick in points]
        if known:
            x, mean, spread = zip(*known, strict=True)
            axes.errorbar(x, mean, spread, marker="o", ms=4, lw=1, capsize=3, color=colour, label=name)
        if "" in points:
            axes.axhline(points[""][0], ls="--", lw=1, color=colour, label=None if known else name)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(xlabel=key, ylabel="test MSE of the best epoch", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)  # inside it could cover bars
    write_atomically(path, png(figure))
