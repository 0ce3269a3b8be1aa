"""Whether a rollout still resembles its start: neighbours of a node, kinetic energy and spacing."""

from __future__ import annotations

import sys

import numpy as np
from scipy.spatial import KDTree

from ..data import graphs
from ..data.samples import past_velocities
from ..data.trajectories import Trajectories
from .boundary_conditions import RolloutJob

WARN, SAMPLED = 3.0, 1000  # factor of a warning; nodes whose neighbours are counted
FRAMES = 10  # of the data, whose largest energy counts as the start's: a fluid may start at rest


class Stability:
    """Compares a rollout with its start, equally on all processes. side: (3,) of a periodic box."""

    def __init__(self, data: Trajectories, job: RolloutJob, x: np.ndarray, v: np.ndarray, side: np.ndarray | None):
        self.job, self.side, self.warned = job, side, set[str]()
        self.start = self._measure(x, v)
        k, stored = job.trajectory, job.spec.past or data[job.trajectory].velocity
        latest = data[k].frames - 1 - (not stored)
        frames = np.unique(np.linspace(job.start, latest, FRAMES).round().astype(int)).tolist()
        energies = [_energy(past_velocities(data, k, frame, job.spec)["v"]) for frame in frames]
        self.start["kinetic energy"] = max(self.start["kinetic energy"], *energies)

    def _measure(self, x: np.ndarray, v: np.ndarray) -> dict[str, float]:
        """Mean neighbours within the radius (all nodes if edges have none), mean distance to the nearest; of a sample. Energy."""
        x = np.asarray(x, np.float64) if self.side is None else graphs.wrap(x, self.side)
        sample = x[np.random.default_rng(0).permutation(len(x))[:SAMPLED]]
        rule, near = self.job.spec.rule, float(len(x))
        tree = KDTree(x, boxsize=graphs.boxsize(self.side), balanced_tree=False, compact_nodes=False)
        if rule.edges == "radius" and not rule.complete:
            near = tree.query_ball_point(sample, rule.radius, return_length=True).mean()
        spacing = tree.query(sample, k=2)[0][:, 1].mean() if len(x) > 1 else 1.0
        return {"neighbours of a node": float(near) - 1, "spacing": float(spacing), "kinetic energy": _energy(v)}

    def problem(self, step: int, x: np.ndarray, v: np.ndarray, warn: bool) -> str:
        """Why the rollout must stop at positions and velocities x, v (N, 3); empty if it need not. warn: print warnings."""
        for name, value in self._measure(x, v).items():
            start = self.start[name]
            if name == "neighbours of a node":
                factor = value / max(start, 1.0)
            elif start == 0:  # data at rest, or all nodes at one point
                continue
            else:
                factor = value / start
            if name == "spacing" and factor < 1:
                factor = 1 / max(factor, 1e-12)
            text = f"{name} {value:.3g}, {start:.3g} at the start"
            if 0 < self.job.limit < factor:
                return f"{text} (over --limit {self.job.limit:g})"
            if factor > WARN and name not in self.warned:
                self.warned.add(name)
                if warn:
                    print(f"warning: step {step}: {text}", file=sys.stderr)
        return ""


def _energy(v: np.ndarray) -> float:
    return float(np.square(v, dtype=np.float64).sum(1).mean() / 2)
