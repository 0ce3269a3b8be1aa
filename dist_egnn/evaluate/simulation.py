"""The steps of a rollout: feed a model with its own predictions, on one process or several.

Every process holds positions and velocities of all N nodes and computes the next positions of the nodes that it owns.
One sum over processes of (N, 3) numbers, in which each process fills its own rows, gives all of them the next frame.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import Module

from ..data import domain
from ..data.samples import edge_positions, feature_columns, given_edges, past_velocities
from ..data.trajectories import Trajectories
from ..distributed.comm import Comm
from ..models.simulator import FASTEST
from ..utils.laps import Laps
from .boundary_conditions import BoundaryConditions, RolloutJob
from .repartition import LocalGraph, Repartitioner, part_graph
from .stability import Stability


@dataclass(frozen=True)
class State:
    """All nodes after a step, the same on every process."""

    step: int
    frame: int  # of the trajectory
    x: np.ndarray  # (N, 3)
    v: np.ndarray  # (N, 3), in the unit of the data
    part: np.ndarray  # (N,) the process that computed the node; in the first frame: that computes it next
    z: np.ndarray  # (C, 3) virtual nodes after the last layer; NaN in the first frame


class Simulation:
    """Iterates over the states of a rollout, from the first frame on. A collective.

    model: in eval mode. After the iteration ``stopped`` says why it ended early, empty if it
    did not, and ``laps`` the seconds of its phases: those of `Repartitioner`, "model", "watch" (walls, fixed nodes and
    `Stability`), and "writing", which the caller takes between the steps; ``seconds`` is their sum without the last.
    watch: compare with the start (`Stability`), print warnings, and stop at job.limit.
    """

    def __init__(self, comm: Comm, job: RolloutJob, model: Module, watch: bool = True) -> None:
        self.comm, self.job, self.model, self.data = comm, job, model, Trajectories(job.data)
        self.conditions = BoundaryConditions(self.data, job)
        self.watch, self.stopped, self.laps, self.warned = watch, "", Laps(), False

    @property
    def seconds(self) -> float:
        return self.laps.without("writing")

    def true_position(self, frame: int) -> np.ndarray | None:
        """Positions (N, 3) of a frame of the data; None after their end."""
        k = self.job.trajectory
        return self.data.position(k, frame) if frame < self.data[k].frames else None

    def __iter__(self) -> Iterator[State]:
        comm, job, conditions, data = self.comm, self.job, self.conditions, self.data
        names = job.spec.features, job.spec.node_attributes
        x = data.position(job.trajectory, job.start).astype(conditions.dtype)
        velocities = past_velocities(data, job.trajectory, job.start, job.spec)
        v, past = (velocities.get(name, x[:, :0]).astype(conditions.dtype) for name in ("v", "past"))
        per_frame = job.spec.horizon if conditions.around else 1
        stability = Stability(data, job, x, v, conditions.side) if self.watch else None
        given = given_edges(data, job.trajectory, job.spec.rule)
        partition = Repartitioner(comm, job, len(x), conditions.side, given, laps := self.laps)
        for step in range(job.steps):
            laps("writing")
            attribute = conditions.attributes_at(step)
            scaled = v * np.asarray(job.spec.velocity_scale, v.dtype)
            columns = [feature_columns(listed, scaled, attribute) for listed in names]
            state = dict(zip(("x", "v", "past", "f", "a"), (x, scaled, past, *columns), strict=True))
            local = partition.local_graph(edge_positions(state, conditions.around and conditions.around[0]), step)
            predicted, z = self._predict(local, state)
            if step == 0:  # the number of virtual nodes is known now
                yield State(0, job.start, x, v / per_frame, partition.part, np.full_like(z, np.nan))
                laps("writing")
            if not (problem := conditions.problem(predicted, x)):
                past = np.concatenate([v, past], 1)[:, : past.shape[1]]
                if self.watch and comm.rank == 0 and not self.warned:
                    self._check_speed(step + 1, predicted - x)
                x, v = conditions.apply(x, predicted, step + 1)
                problem = stability.problem(step + 1, x, v, warn=comm.rank == 0) if stability else ""
            laps("watch")
            if problem:
                self.stopped = f"step {step + 1}: {problem}"
                return
            frame = job.start + (step + 1) * job.spec.horizon
            yield State(step + 1, frame, x, v / per_frame, partition.part, z)
        laps("writing")

    def _check_speed(self, step: int, moved: np.ndarray) -> None:
        """Warn once if the model shortened displacements (N, 3) of nodes that move."""
        limit = getattr(self.model, "limit", np.inf) * (1 - 1e-4)
        count = int((np.linalg.norm(moved[~self.conditions.fixed], axis=1) > limit).sum())
        if count:
            nodes = f"{count} node{'s' * (count > 1)}"
            reason = f"{FASTEST:g} times the largest of a usual training frame"
            print(
                f"warning: step {step}: {nodes} at the largest speed that the model allows, {reason}", file=sys.stderr
            )
            self.warned = True

    @torch.no_grad()
    def _predict(self, local: LocalGraph, state: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the next frame (N, 3) and of the virtual nodes (C, 3), from the fields of all nodes."""
        x, conditions = state["x"], self.conditions
        graph = part_graph(local, state, conditions.side)
        if conditions.around:
            domain.attach(graph, domain.make_domain(*conditions.around, conditions.side))
        predicted, z = self.model(graph)
        whole = torch.zeros(x.shape, dtype=torch.from_numpy(x).dtype)
        whole[torch.from_numpy(local[0])] = predicted.cpu()
        self.laps("model")
        whole = self.comm.sum(whole)
        self.laps("exchange")
        return whole.numpy(), z[0].cpu().numpy()
