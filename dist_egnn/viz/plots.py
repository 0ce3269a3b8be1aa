"""Pictures of runs and data. matplotlib is an extra (viz); whoever asks for a picture without it is told so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Failure


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise Failure("pictures need matplotlib: pip install -e '.[viz]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def scene(axes: Any, box: np.ndarray | None, x: np.ndarray) -> None:
    """A 3-D view of the box, up to the highest of x, or of x (N, 3) itself."""
    low, high = (box[0], box[1]) if box is not None else (x.min(0), x.max(0))
    view(axes, low, np.array([high[0], min(high[1], low[1] + 1.15 * (x[:, 1].max() - low[1])), high[2]]))


def view(axes: Any, low: np.ndarray, high: np.ndarray, zoom: float = 1.0) -> None:
    """A 3-D view from corner low (3,) to high (3,) with y up: data (x, y, z) is drawn at (x, z, y), with equal scales."""
    axes.set(xlim=(low[0], high[0]), ylim=(low[2], high[2]), zlim=(low[1], high[1]))
    axes.set_box_aspect((high - low)[[0, 2, 1]], zoom=zoom)
    axes.set(xlabel="x", ylabel="z", zlabel="y")
    axes.tick_params(labelsize=6, pad=-2)
    axes.view_init(elev=18, azim=-60)


def report(
    path: Path,
    *,
    x: np.ndarray,
    y: np.ndarray,
    part: np.ndarray,
    box: np.ndarray | None,
    predicted: Mapping[str, np.ndarray],
    virtual: np.ndarray,
    curves: Mapping[str, Sequence[float]],
    baselines: Mapping[str, float],
    title: str,
) -> None:
    """A run on one page: the fluid by partition with the virtual nodes, displacements, errors over the epochs.

    x, y: (N, 3) input and target; part: (N,); predicted: model → (N, 3); virtual: (C, 3) final virtual nodes of the last
    model; curves: model → validation MSE by epoch; baselines: name → MSE on the same split.
    """
    plt = pyplot()
    figure = plt.figure(figsize=(13, 9.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2)
    colours = plt.get_cmap("tab10")(np.arange(part.max() + 1) % 10)
    rank = np.random.default_rng(0).permutation(len(x))[:6000]  # more would only paint over one another

    axes = figure.add_subplot(grid[0, 0], projection="3d")
    axes.scatter(*x[rank][:, [0, 2, 1]].T, c=colours[part[rank]], s=4, linewidths=0, alpha=0.7)
    scene(axes, box, x)
    axes.set_title(f"input, coloured by partition ({part.max() + 1} parts)")

    axes = figure.add_subplot(grid[0, 1], projection="3d")
    axes.scatter(*y[rank][:, [0, 2, 1]].T, c=colours[part[rank]], s=5, linewidths=0, alpha=0.5)
    axes.scatter(
        *virtual[:, [0, 2, 1]].T, marker="*", s=260, c="black", edgecolors="white", label="virtual nodes z", zorder=9
    )
    axes.legend(loc="upper right")
    scene(axes, box, np.concatenate([x, y, virtual]))
    axes.set_title("true target, with the virtual nodes where the last layer left them")

    axes = figure.add_subplot(grid[1, 0])
    true = np.linalg.norm(y - x, axis=1)
    top = 1.05 * true.max()
    for k, (name, guess) in enumerate(predicted.items()):
        moved = np.linalg.norm(guess - x, axis=1)
        axes.plot(true[rank], moved[rank], ".", ms=2.5, alpha=0.35, color=f"C{k}", rasterized=True)
        axes.plot([], [], "o", color=f"C{k}", label=name)
    axes.plot([0, top], [0, top], "k--", lw=1, label="exact")
    axes.set(xlabel="true displacement ‖y − x‖ [m]", ylabel="predicted displacement [m]", xlim=(0, top), ylim=(0, top))
    axes.set_title("displacement over the horizon, each particle of one test snapshot")
    axes.legend()

    axes = figure.add_subplot(grid[1, 1])
    for k, (name, values) in enumerate(curves.items()):
        axes.semilogy(np.arange(1, len(values) + 1), values, color=f"C{k}", label=name)
    for k, (name, value) in enumerate(baselines.items()):
        axes.axhline(value, color="0.4", ls=(":", "--")[k % 2], label=name)
    axes.set(xlabel="epoch", ylabel="validation MSE [m²]", title="validation error")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    fresh = path.with_name(path.stem + ".partial.png")
    figure.savefig(fresh, dpi=110)
    plt.close(figure)
    fresh.replace(path)


def sweep(path: Path, key: str, ticks: Sequence[str], curves: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Test errors over a config key, its values evenly spaced, with error bars over seeds.

    curves: name → value of the key → (mean, standard deviation); the value "" does not depend on the key: a level line.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for n, (name, points) in enumerate(curves.items()):
        aside = 0.2 * ((n + 0.5) / len(curves) - 0.5)  # side by side, so that all bars are seen
        known = [(k + aside, *points[tick]) for k, tick in enumerate(ticks) if tick in points]
        if known:
            x, mean, spread = zip(*known, strict=True)
            axes.errorbar(x, mean, spread, marker="o", ms=4, lw=1, capsize=3, color=f"C{n % 10}", label=name)
        if "" in points:
            axes.axhline(points[""][0], ls="--", lw=1, color=f"C{n % 10}", label=None if known else name)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(xlabel=key, ylabel="test MSE of the best epoch", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)  # anywhere inside it may cover bars
    fresh = path.with_name(path.stem + ".partial.png")
    figure.savefig(fresh, dpi=110)
    plt.close(figure)
    fresh.replace(path)
