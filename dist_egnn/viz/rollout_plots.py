"""Pictures of evaluated rollouts: each measure of `rollout_metrics.COLUMNS` by step, beside the truth and the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..evaluate.step_errors import BASELINES
from .plots import draw_legend, empty_axes

MOST = 3.0
STYLES: dict[str, dict[str, Any]] = {"truth": {"color": "black", "ls": "--", "lw": 1.2}}
STYLES |= {name: {"color": f"C{k}", "ls": ":", "lw": 1.8} for k, name in enumerate(BASELINES, 1)}


def by_step(figure: Any, lines: Mapping[str, pd.DataFrame], ylabel: str, log: bool = False) -> None:
    """Means over trajectories, those of model and truth with a band from the smallest to the largest.

    lines: label → values by step (rows) and trajectory; steps that not all trajectories have are left out. A linear axis
    ends at MOST times the truth, so that an explosion does not hide the steps before it.
    """
    axes = empty_axes(figure)
    for name, values in lines.items():
        values = values.where(values > 0) if log else values
        values = values.dropna()
        style = STYLES.get(name, {"color": "C0", "marker": "o", "ms": 3})
        axes.plot(values.index, values.mean(axis=1), label=name, **style)
        if name not in BASELINES:
            low, high = values.min(axis=1), values.max(axis=1)
            axes.fill_between(values.index, low, high, color=style["color"], alpha=0.15, lw=0)
    axes.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    if "truth" in lines and 0 < (most := MOST * np.nanmax(lines["truth"])) < axes.get_ylim()[1]:
        axes.set_ylim(top=most)
    axes.xaxis.get_major_locator().set_params(integer=True)
    draw_legend(figure, axes)


def panels(table: pd.DataFrame, model: str) -> dict[str, tuple[dict[str, pd.DataFrame], str, bool]]:
    """Caption → arguments of `by_step`, of the measures that the table has. model: its name."""
    values = table.pivot(index="step", columns="trajectory")
    known = {name for name in table if table[name].notna().any()}
    distance = {model: "mse", **{name: f"{name}_mse" for name in BASELINES}}
    lines = {name: np.sqrt(3 * values[column]) for name, column in distance.items() if column in known}
    caption = (
        "Root mean square distance of predicted and true positions by step. Static: the first frame; linear: moved "
    )
    caption += "by its velocity; ballistic: free flight that ends at the walls."
    result = {caption: (lines, "rms distance", True)}
    caption = "Sinkhorn distance of predicted and true positions, whichever node is where."
    result[caption] = {model: values["sinkhorn"]}, "Sinkhorn distance [length²]", True
    for name, ylabel, caption in (
        ("kinetic_energy", "kinetic energy", "Kinetic energy by step, each a mean over the step."),
        ("neighbours", "neighbours", "Density: mean number of neighbours within the radius, by step."),
        ("max_neighbours", "most neighbours", "Largest density: most neighbours of a node within the radius, by step."),
        ("front", "front", "Front by step: 95% quantile of the coordinate along the direction of the flow."),
        ("outside", "share outside", "Share of the nodes outside the box, by step."),
    ):
        if name in known and not (name == "outside" and (values[[name, f"true_{name}"]] == 0).all(axis=None)):
            result[caption] = {model: values[name], "truth": values[f"true_{name}"]}, ylabel, False
    return result
