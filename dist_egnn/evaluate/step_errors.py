"""Errors of a rollout by step, beside predictions that need no model; the table of a rollout's file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from . import metrics
from .vtkhdf import Rollout

BASELINES = ("static", "linear", "ballistic")


class StepErrors:
    """Errors over the nodes that move, and those of the first frame unchanged (static), moved by its velocity (linear)
    and, with gravity, in free flight that ends at the walls (ballistic). Energies are those of all nodes.

    x, v: (N, 3) first positions, and velocities in length per time; moving: (N,) bool; step_time: time of a step;
    mass: (N,), default 1; gravity: (3,), displacement per step²; box: (2, 3), the walls.
    """

    def __init__(
        self,
        x: np.ndarray,
        v: np.ndarray,
        moving: np.ndarray,
        step_time: float,
        mass: np.ndarray | None = None,
        gravity: np.ndarray | None = None,
        box: np.ndarray | None = None,
    ) -> None:
        self.x, self.v = x.astype(np.float64), v.astype(np.float64)
        self.moving, self.step_time = moving, step_time
        self.mass = mass.ravel() if mass is not None and mass.size == len(x) else None
        self.true = self.x
        self.flight: Iterator[np.ndarray] = iter(())
        if gravity is not None:
            self.flight = metrics.ballistic(x, self.v * step_time, gravity, box)

    def row(self, step: int, x: np.ndarray, v: np.ndarray, y: np.ndarray | None) -> dict[str, float]:
        """Errors of a step, in order of steps. x, v: as above; y: true positions (N, 3), None after the end of the data.

        True velocities are differences over a step, as in the rollout.
        """
        ballistic, at = next(self.flight, None), self.moving
        row = {"kinetic_energy": metrics.kinetic_energy(v, self.mass)}
        if y is None:
            return row
        true_v = (y - self.true) / self.step_time if step else self.v
        self.true = y
        static, linear = metrics.baselines(self.x[at], self.v[at], step * self.step_time, y[at])
        row |= {"mse": metrics.position_mse(x[at], y[at]), "static_mse": static, "linear_mse": linear}
        if ballistic is not None:
            row["ballistic_mse"] = metrics.position_mse(ballistic[at], y[at])
        return row | {"true_kinetic_energy": metrics.kinetic_energy(true_v, self.mass)}


def error_table(path: Path) -> pd.DataFrame:
    """Errors of a rollout's file by frame. Energies and radii of gyration use the attribute `mass`, else mass 1.

    NaN where the data have ended.
    """
    rows, errors = [], None
    with Rollout(path) as rollout:
        meta, mass = rollout.meta, rollout.attributes.get("mass")
        per_time = 1 / meta["dt"] if meta["velocity"] == "per frame" else 1.0
        for frame in rollout:
            x, v = frame.position.astype(np.float64), frame.velocity.astype(np.float64) * per_time
            if errors is None:
                box = metrics.walls(rollout.box, meta.get("periodic", [False] * 3))
                about = meta["horizon"] * meta["dt"], mass, meta.get("gravity"), box
                errors = StepErrors(x, v, rollout.moving, *about)
            y, at, mass = None if frame.error is None else x - frame.error, errors.moving, errors.mass
            row = {"step": frame.step, "frame": frame.frame, "time": frame.time, **errors.row(frame.step, x, v, y)}
            row["radius_of_gyration"] = metrics.radius_of_gyration(x, mass)
            if y is not None:
                row |= {"mae": metrics.mean_absolute_error(x[at], y[at]), "rmsd": metrics.rmsd(x, y, mass)}
                row |= {"displacement": metrics.displacement_error(x[at], y[at])}
                row["true_radius_of_gyration"] = metrics.radius_of_gyration(y, mass)
            rows.append(row)
    names = ["step", "frame", "time", "mse", "mae", "displacement", *(f"{name}_mse" for name in BASELINES), "rmsd"]
    names += [f"{true}{name}" for name in ("kinetic_energy", "radius_of_gyration") for true in ("", "true_")]
    return pd.DataFrame(rows, columns=names)
