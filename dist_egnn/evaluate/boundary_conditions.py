"""What a rollout starts from, and what its nodes are held to: walls, fixed nodes, the unit of the velocity, how far is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import Config
from ..data.samples import SampleSpec
from ..data.trajectories import Trajectories
from ..errors import Failure
from ..utils.part_weights import Weights

BOUNDS = ("none", "reflect", "clamp")
FAR = 10.0  # a node this many box sizes from the box's centre is lost: the rollout stops


@dataclass(frozen=True)
class Job:
    """All that decides a rollout."""

    config: Config
    weights: str  # a checkpoint
    data: str  # trajectories.h5
    spec: SampleSpec
    trajectory: int
    start: int  # frame
    steps: int
    repartition: int  # steps from one partition to the next
    method: str
    method_seed: int
    owned: Weights | None  # what each process is to own of the nodes; None: equal shares
    bounds: str
    fixed: tuple[str, float] | None  # attribute and value of the nodes that stay where they are
    out: str
    double: bool = False  # compute in float64, to compare numbers of processes


class Scene:
    """What stays as it is over a rollout: attributes, walls, fixed nodes, the unit of the velocity."""

    def __init__(self, data: Trajectories, job: Job) -> None:
        k, self.trajectory = job.trajectory, data[job.trajectory]
        self.bounds, self.box = job.bounds, data.box(k)
        self.side = data.sides(k, job.spec.radius) if job.spec.periodic else None
        self.dtype = np.dtype(np.float64 if job.double else np.float32)
        self.attributes = {name: data.attribute(k, name).astype(self.dtype) for name in self.trajectory.attributes}
        # v is length per time where velocities are stored, else length per frame
        self.per_step = job.spec.horizon * (self.trajectory.dt if self.trajectory.velocity else 1.0)
        self.held = np.zeros(self.trajectory.nodes, bool)
        if job.fixed is not None:
            self.held = data.attribute(k, job.fixed[0]) == job.fixed[1]
            if not self.held.any():
                raise Failure(f"--fixed {job.fixed[0]}={job.fixed[1]:g}: {job.data} has no such node in trajectory {k}")
        if self.bounds != "none" and (self.box is None or self.trajectory.periodic):
            why = "has no box" if self.box is None else "is in a periodic box, which has no walls"
            raise Failure(f"--bounds {self.bounds}: trajectory {k} of {job.data} {why}; use --bounds none")
        ends = [data.position(k, t) for t in (job.start, self.trajectory.frames - 1)]
        corners = self.box if self.box is not None else np.stack([np.min(ends, (0, 1)), np.max(ends, (0, 1))])
        self.centre, self.reach = corners.mean(0), FAR * float(np.ptp(corners, 0).max())

    def lost(self, x: np.ndarray, before: np.ndarray) -> str:
        """What is wrong with positions (N, 3), given those a step before; empty if nothing is."""
        wrong = ~np.isfinite(x).all(1)
        if wrong.any():
            return f"{wrong.sum()} positions are NaN or infinite, the first of node {wrong.argmax()}"
        if self.side is not None:  # nodes may travel through many boxes, but not in a step
            step = np.abs(x - before).max(1)
            if step.max() > self.reach:
                return f"node {step.argmax()} moves by {step.max():.3g}, over {FAR:g} times the box's size"
            return ""
        far = np.abs(x - self.centre).max(1)
        if far.max() > self.reach:
            of = "the box's" if self.box is not None else "the data's"
            return f"node {far.argmax()} is {far.max():.3g} from the centre, over {FAR:g} times {of} size"
        return ""

    def settle(self, x: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next positions and velocities (N, 3), of positions now and as predicted: walls, fixed nodes, differences."""
        after, sign = predicted, np.ones_like(predicted)
        if self.bounds == "clamp":
            after = predicted = np.clip(predicted, *self._walls(x))
        elif self.bounds == "reflect":
            low, high = self._walls(x)
            along = np.mod(predicted - low, 2 * (high - low))
            back = along > high - low
            after = np.clip(low + np.where(back, 2 * (high - low) - along, along), low, high)
            sign[back] = -1
        v = sign * (predicted - x) / np.asarray(self.per_step, x.dtype)
        after, v = np.where(self.held[:, None], x, after), np.where(self.held[:, None], 0, v)
        return after.astype(x.dtype), v.astype(x.dtype)

    def _walls(self, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self.box is not None
        low, high = self.box.astype(like.dtype)
        return low, high


def parse_fixed(text: str) -> tuple[str, float]:
    """ATTRIBUTE=VALUE in two."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise Failure(f"--fixed {text}: write ATTRIBUTE=VALUE, for example --fixed type=3") from None
