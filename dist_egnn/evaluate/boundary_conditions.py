"""What is constant in a rollout (its job, attributes, box, walls, fixed nodes, unit of velocity); when it stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..config import Config
from ..data.fixed_nodes import fixed_nodes, moving_nodes
from ..data.samples import SampleSpec, surroundings
from ..data.trajectories import Trajectories
from ..errors import Failure

LIMIT = 30.0
BOUNDS = ("none", "reflect", "clamp")
MAX_SIZES = 10.0  # a rollout stops where a node is so many box sizes from the centre of the box


@dataclass(frozen=True)
class RolloutJob:
    """Everything that determines a rollout."""

    config: Config  # with the partition section by which the rollout partitions
    weights: str  # a checkpoint
    data: str  # trajectories.h5
    spec: SampleSpec
    trajectory: int
    start: int  # frame
    steps: int
    repartition: int  # steps between partitions
    bounds: str
    out: str
    limit: float = LIMIT  # factor by which neighbours, energy or spacing may change from the start; 0: any
    double: bool = False  # compute in float64, to compare numbers of processes


class BoundaryConditions:
    """Raises Failure for walls or fixed nodes that the trajectory does not have."""

    def __init__(self, data: Trajectories, job: RolloutJob) -> None:
        self.job, k = job, job.trajectory
        self.trajectory, self.box = data[k], data.box(k)
        self.side = data.sides(k, job.spec.rule.longest) if job.spec.periodic else None
        self.dtype = np.dtype(np.float64 if job.double else np.float32)
        self._data, varying = data, self.trajectory.varying
        constant = [name for name in self.trajectory.attributes if name not in varying]
        self.attributes = {name: data.attribute(k, name).astype(self.dtype) for name in constant}
        names = (*job.spec.features, *job.spec.node_attributes)
        used, last = {name.partition("/")[0] for name in names} & set(varying), self.trajectory.frames - 1
        if used and (most := (last - job.start) // job.spec.horizon + 1) < job.steps:
            what = f"the model uses '{min(used)}', which varies over time, up to frame {last}"
            raise Failure(f"--steps {job.steps}: {what} of trajectory {k} of {job.data}; use at most {most}")
        self.around = surroundings(data, k, job.spec)
        # velocities are lengths per step in a simulator, lengths per frame as forward differences, else lengths per time
        stored, per_frame = self.trajectory.velocity, job.spec.velocity == "forward"
        self.velocity = "stored" if stored else "per frame" if per_frame else "backward differences"
        self.velocity = "per frame" if self.around else self.velocity
        frames = 1 if self.around else job.spec.horizon
        self.step_time = frames * (1.0 if self.velocity == "per frame" else self.trajectory.dt)
        fixed, n = job.spec.fixed, self.trajectory.nodes
        self.fixed = fixed_nodes(fixed, self.attributes.__getitem__) if fixed else np.zeros(n, bool)
        self.prescribed = bool(job.spec.past) and self._fixed_nodes_move()
        if job.bounds != "none" and (self.box is None or self.trajectory.periodic):
            why = "has no box" if self.box is None else "is in a periodic box, which has no walls"
            raise Failure(f"--bounds {job.bounds}: trajectory {k} of {job.data} {why}; use --bounds none")
        ends = [data.position(k, t) for t in (job.start, self.trajectory.frames - 1)]
        extent = np.stack([np.min(ends, (0, 1)), np.max(ends, (0, 1))])
        self.corners = extent if self.box is None else self.box
        self.limit = MAX_SIZES * float(np.ptp(self.corners, 0).max())

    def _fixed_nodes_move(self) -> bool:
        """Whether fixed nodes move in the input or in the rollout. Raises Failure if they do and the data end before it."""
        job, k, step = self.job, self.job.trajectory, self.job.spec.horizon
        last = self.trajectory.frames - 1
        frames = range(job.start - job.spec.past * step, min(last, job.start + job.steps * step) + 1, step)
        positions = (self._data.position(k, frame) for frame in frames if self.fixed.any())
        moves = (moving_nodes(self.fixed, *pair) for pair in pairwise(positions))
        node = next((move.argmax() for move in moves if move.any()), None)
        if node is not None and (most := (last - job.start) // step) < job.steps:
            what = f"node {node}, named by '{job.spec.fixed}', moves as in trajectory {k} of {job.data}, up to frame {last}"
            raise Failure(f"--steps {job.steps}: {what}; use at most {most}, or an earlier --start")
        return node is not None

    def attributes_at(self, step: int) -> Callable[[str], np.ndarray]:
        """Attributes (N,) or (N, k) by name, as the input of a step needs them."""

        def attribute(name: str) -> np.ndarray:
            if name in self.attributes:
                return self.attributes[name]
            frame = self.job.start + step * self.job.spec.horizon
            return self._data.attribute(self.job.trajectory, name, frame).astype(self.dtype)

        return attribute

    def problem(self, x: np.ndarray, before: np.ndarray) -> str:
        """Why the rollout must stop at positions x (N, 3), given those of the step before; empty if it need not."""
        x = np.where(self.fixed[:, None], before, x)  # what is predicted for fixed nodes is not used
        invalid = ~np.isfinite(x).all(1)
        if invalid.any():
            return f"{invalid.sum()} positions are NaN or infinite, the first of node {invalid.argmax()}"
        periodic = self.side is not None  # positions are unwrapped: only a single step can be too long
        distance = np.abs(x - (before if periodic else self.corners.mean(0))).max(1)
        most, size = distance.max(), "data" if self.box is None else "box"
        if most <= self.limit:
            return ""
        what = f"moves by {most:.3g}" if periodic else f"is {most:.3g} from the centre"
        return f"node {distance.argmax()} {what}, over {MAX_SIZES:g} times the {size}'s size"

    def apply(self, x: np.ndarray, predicted: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities (N, 3) after a step, from the positions before it and the predicted ones."""
        after, sign, fixed = predicted, np.ones_like(predicted), self.fixed[:, None]
        low, high = self.corners.astype(x.dtype)
        if self.job.bounds == "clamp":
            after = predicted = np.clip(predicted, low, high)
        elif self.job.bounds == "reflect":
            folded = np.mod(predicted - low, 2 * (high - low))
            reversed_ = folded > high - low
            after = np.clip(low + np.where(reversed_, 2 * (high - low) - folded, folded), low, high)
            sign[reversed_] = -1
        target, time = x, np.asarray(self.step_time, x.dtype)
        if self.prescribed:
            target = self._data.position(self.job.trajectory, self.job.start + step * self.job.spec.horizon)
        after, v = np.where(fixed, target, after), np.where(fixed, target - x, sign * (predicted - x)) / time
        return after.astype(x.dtype), v.astype(x.dtype)
