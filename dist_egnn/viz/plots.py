"""What all pictures share: matplotlib, which is the optional extra `viz`, 3-D views, PNG; and the plot of a sweep."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Failure
from ..utils.filesystem import write_atomically


def pyplot() -> Any:
    """matplotlib.pyplot with the backend Agg. Raises Failure if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise Failure("pictures need matplotlib: pip install -e '.[viz]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def png(figure: Any, **options: Any) -> bytes:
    """The figure as PNG; closes it. options: of ``savefig``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    pyplot().close(figure)
    return buffer.getvalue()


def view(axes: Any, low: np.ndarray, high: np.ndarray, zoom: float = 1.0) -> None:
    """Show the box from corner low (3,) to high (3,) in equal scales, y up: data (x, y, z) are drawn at (x, z, y)."""
    axes.set(xlim=(low[0], high[0]), ylim=(low[2], high[2]), zlim=(low[1], high[1]))
    axes.set_box_aspect((high - low)[[0, 2, 1]], zoom=zoom)
    axes.set(xlabel="x", ylabel="z", zlabel="y")
    axes.tick_params(labelsize=6, pad=-2)
    axes.view_init(elev=18, azim=-60)


def sweep(path: Path, key: str, ticks: Sequence[str], curves: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Plot test errors over the values of a config key, evenly spaced, with error bars over seeds.

    curves: name → value of the key → (mean, standard deviation); the value "" does not depend on the key: a level line.
    """
    figure, axes = pyplot().subplots(figsize=(7.5, 5), layout="constrained")
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
    write_atomically(path, png(figure, dpi=110))
