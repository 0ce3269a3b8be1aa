"""`distegnn render --out PICTURE.png`: one picture of a rollout, predicted nodes under the true ones, energy and error.

Shapes: N nodes, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import Failure
from ..evaluate.step_errors import BASELINES, error_table
from ..evaluate.vtkhdf import Frame, Rollout
from ..utils.filesystem import write_atomically
from . import plots

SIZE = (11.2, 9.0)  # inches
DRAWN = 4  # steps, if none are given
MARGIN = 0.04  # around the nodes, of their extent
MOST = 20_000  # nodes drawn


@dataclass(frozen=True)
class Units:
    """Names of the data's units in a picture's labels; empty: none."""

    length: str = ""
    time: str = ""
    energy: str = ""

    @property
    def speed(self) -> str:
        return f"{self.length}/{self.time}" if self.length and self.time else ""


def run_figure(path: Path, out: Path, steps: str = "", title: str = "", units: str = "") -> None:
    """Write the picture of a rollout. steps: those drawn, "5,15"; by default four up to the last.

    units: "m,s,J". Raises Failure for a rollout without true frames, for steps that have no true frame, and for
    units that are not three names.
    """
    names = units.split(",") if units else ["", "", ""]
    if len(names) != 3:
        raise Failure(f"--units {units}: name those of length, time and energy, for example m,s,J")
    table = error_table(path).set_index("step").dropna(subset="mse")
    with Rollout(path) as rollout:
        last = len(table) - 1
        if last < 1:
            raise Failure(
                f"{path}: the data have no true frame after the first; write a video instead, --out VIDEO.mp4"
            )
        words = steps.split(",") if steps else [str(max(1, round(last * k / DRAWN))) for k in range(1, DRAWN + 1)]
        chosen = sorted({int(word) for word in words if word.strip().isdecimal()})
        if len(chosen) != len(set(words)) or not 1 <= chosen[0] <= chosen[-1] <= last:
            raise Failure(f"--steps {steps}: must be numbers from 1 to {last}, the last step with a true frame")
        write_atomically(out, picture(rollout, table, chosen, title or path.stem, Units(*names)))
    print(f"{out}: steps {', '.join(map(str, chosen))}, energy and error of {last} steps")


def picture(rollout: Rollout, table: pd.DataFrame, steps: Sequence[int], title: str, units: Units) -> bytes:
    """PNG: nodes from the side at the steps, then energy and error over time. table: `error_table` of the rollout, by step."""
    figure = plots.pyplot().figure(figsize=SIZE, dpi=plots.DPI, layout="constrained")
    figure.suptitle(title, fontsize=14)
    above, below = figure.subfigures(2, 1, height_ratios=(1.9, 1), hspace=0.03)
    _draw_nodes(above, rollout, steps, units)
    energy, error = below.subplots(1, 2)
    energy.plot(table["true_kinetic_energy"], color="0.3", label="true")
    energy.plot(table["kinetic_energy"], color="C0", lw=2, label="predicted")
    energy.set(ylabel=_label("kinetic energy", units.energy), ylim=(0, None))
    error.plot(_distance(table["mse"]), color="C0", lw=2, label="predicted")
    for name, style in zip(BASELINES, (":", "--", "-."), strict=True):
        if table[f"{name}_mse"].notna().all():
            error.plot(_distance(table[f"{name}_mse"]), color="0.3", ls=style, label=name)
    error.set(ylabel=_label("error: rms distance", units.length), yscale="log")
    for axes in (energy, error):
        axes.set_xlabel(f"step of {_step_time(rollout):.3g} {units.time or 'units of time'}")
        axes.grid(alpha=0.3)
        axes.legend()
    return plots.png(figure)


def _label(name: str, unit: str) -> str:
    return f"{name} [{unit}]" if unit else name


def _distance(mse: pd.Series) -> pd.Series:
    """Root mean square distance, from the mean over nodes and components of all steps but the first frame."""
    return np.sqrt(3 * mse[1:])


def _step_time(rollout: Rollout) -> float:
    return float(rollout.meta["horizon"] * rollout.meta["dt"])


def _draw_nodes(figure: Any, rollout: Rollout, steps: Sequence[int], units: Units) -> None:
    """True nodes above, predicted ones below, y over x, coloured by speed; the box is drawn where it is in view."""
    rows = np.sort(np.random.default_rng(0).permutation(rollout.nodes)[:MOST])
    time = _step_time(rollout)
    columns = [[pair[rows] for pair in (*_positions(rollout[k]), *_positions(rollout[k - 1]))] for k in steps]
    speeds = [
        [np.linalg.norm(x - before, axis=1) / time for x, before in zip(c[:2], c[2:], strict=True)] for c in columns
    ]
    # quantiles, so that a few nodes that fly away do not make the others small; of each step, so that none is cut
    low, high = np.array([np.quantile(c[0][:, :2], [0.005, 0.995], axis=0) for c in columns]).swapaxes(0, 1)
    low, high = low.min(0), high.max(0)
    if (box := rollout.box) is not None:
        corners = np.asarray(box)[:, :2]
        near = 0.25 * (high - low).max()
        low = np.where(low - corners[0] < near, corners[0], low)
        high = np.where(corners[1] - high < near, corners[1], high)
    low, high = low - MARGIN * (high - low).max(), high + MARGIN * (high - low).max()
    fastest = float(np.quantile(np.concatenate([s[0] for s in speeds]), 0.98))
    grid = figure.subplots(2, len(steps), sharex=True, sharey=True, squeeze=False)
    for column, step, nodes, speed in zip(grid.T, steps, columns, speeds, strict=True):
        for axes, x, colour in zip(column, nodes, speed, strict=False):
            order = np.argsort(x[:, 2])  # the nearest nodes are drawn last
            style = {"s": float(np.clip(2e4 / len(rows), 2, 12)), "lw": 0, "vmin": 0, "vmax": fastest or 1.0}
            dots = axes.scatter(*x[order, :2].T, c=colour[order], **style)
            if box is not None:
                axes.add_patch(plots.pyplot().Rectangle(corners[0], *np.ptp(corners, 0), fill=False, ec="0.3", lw=1.5))
            axes.set(aspect="equal", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        column[0].set_title(f"step {step}: t = {step * time:.2f} {units.time}", fontsize=12)
        column[1].set_xlabel(_label("x", units.length))
    for axes, name in zip(grid[:, 0], ("true", "predicted"), strict=True):
        axes.set_ylabel(_label(f"{name}\n\ny", units.length), fontsize=12)
    figure.colorbar(dots, ax=grid, label=_label("speed", units.speed), extend="max", shrink=0.7, aspect=30)


def _positions(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted positions (N, 3) of a frame that the data contain."""
    assert frame.error is not None
    return frame.position - frame.error, frame.position
