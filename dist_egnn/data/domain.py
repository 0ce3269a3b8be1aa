"""What surrounds the particles of a simulation: gravity and walls. A sample of a simulator has it attached.

Legend: B graphs of a batch, W walls (planes that bound a convex container).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from dgl import DGLGraph
from torch import Tensor

from ..errors import Failure
from .trajectories import Trajectories, closed

COLUMNS = tuple(f"{name}_{axis}" for name in ("gravity", "low", "high") for axis in "xyz")  # of a store's snapshots.csv


@dataclass
class Domain:
    """float64. gravity: displacement that it adds in a step; a wall is a point and a unit normal that points inside."""

    gravity: Tensor  # (B, 3)
    points: Tensor  # (B, W, 3)
    normals: Tensor  # (B, W, 3)
    sides: Tensor | None  # (B, 3), of periodic boxes

    def of_graph(self, b: int) -> Domain:
        """The domain of one graph of the batch."""
        at = slice(b, b + 1)
        sides = None if self.sides is None else self.sides[at]
        return Domain(self.gravity[at], self.points[at], self.normals[at], sides)


def make_domain(gravity: np.ndarray, box: np.ndarray | None, side: np.ndarray | None) -> Domain:
    """The domain of one graph.

    gravity: (3,), displacement per step²; box: low and high corner (2, 3) of its walls; side: (3,) of a periodic box,
    which has walls on the axes that are not periodic.
    """
    axes = np.arange(3) if side is None else np.flatnonzero(~closed(side))
    axes = axes if box is not None else axes[:0]
    corners = np.repeat(np.zeros((2, 3)) if box is None else np.asarray(box, np.float64), len(axes), 0)
    normals = np.concatenate([np.eye(3)[axes], -np.eye(3)[axes]])
    arrays = (
        None if a is None else torch.from_numpy(np.array(a, np.float64))[None]
        for a in (gravity, corners, normals, side)
    )
    return Domain(*arrays)  # type: ignore[arg-type]


def read_domain(
    data: Trajectories, k: int, horizon: int, walls: str, gravity: Sequence[float] | None, periodic: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """The arguments of `make_domain` for a trajectory. walls: data.walls; gravity: data.gravity, length/time² or None;
    periodic: data.periodic.

    Raises Failure for walls without a box, and where data.gravity is not the file's gravity.
    """
    trajectory, where = data[k], f"{data.path}: trajectory {k}"
    stored = trajectory.gravity
    if stored is not None and gravity is not None and not np.allclose(stored, gravity, rtol=1e-5, atol=1e-12):
        raise Failure(f"data.gravity={list(gravity)}: {where} has gravity {list(stored)}; leave data.gravity out")
    box = data.box(k) if walls == "box" else None
    if walls == "box" and (box is None or all(trajectory.axes)):
        why = "has no box" if box is None else "is periodic"
        raise Failure(f"data.walls=box: {where} {why}; set data.walls=none")
    if walls == "box" and trajectory.periodic and not periodic:
        raise Failure(f"data.walls=box: {where} is periodic in some directions; set data.periodic=true")
    acceleration = gravity if stored is None else stored
    vector = np.zeros(3) if acceleration is None else np.asarray(acceleration, np.float64)
    return vector * (horizon * trajectory.dt) ** 2, box


def attach(graph: DGLGraph, domain: Domain) -> DGLGraph:
    """Attach the domain to a graph; returns the graph."""
    graph.__dict__["domain"] = domain
    return graph


def get(graph: DGLGraph) -> Domain | None:
    """The domain of a graph; None in a sample of a one-shot model."""
    return graph.__dict__.get("domain")


def batch(samples: Sequence[DGLGraph]) -> Domain | None:
    """The domains of samples together. Raises Failure if only some samples have walls."""
    domains = [domain for domain in map(get, samples) if domain is not None]
    if not domains:
        return None
    if len({(d.points.shape[1], d.sides is None) for d in domains}) > 1:
        raise Failure("data.walls: only some samples of a batch have walls; set train.batch_size=1")
    columns = ([getattr(d, f.name) for d in domains] for f in fields(Domain))
    return Domain(*(None if values[0] is None else torch.cat(values) for values in columns))  # type: ignore[arg-type]


def advance(x: Tensor, v: Tensor, gravity: Tensor) -> Tensor:
    """x + v + g (N, 3), where particles are after a step of free flight: a simulator's edges join them there.

    gravity: (3,) or (N, 3). The same operations in training, stores and rollouts, so that all find the same edges.
    """
    return x + v + gravity.to(x)
