"""The partition of a rollout, which follows the moving nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ..data import graphs, halo
from ..data.edges import edges_among, edges_of
from ..data.graphs import Edges
from ..data.halo import Halo
from ..distributed.comm import Comm
from ..partition import assign
from .boundary_conditions import RolloutJob

# the nodes that a process owns, ascending; source and destination of their edges, as rows of these; its halo
LocalGraph = tuple[np.ndarray, np.ndarray, np.ndarray, Halo | None]


class Repartitioner:
    """The owner of each node, made anew every job.repartition steps.

    side: (3,) of a periodic box; given: the edges of the trajectory, with data.edges=given.
    """

    def __init__(
        self, comm: Comm, job: RolloutJob, nodes: int, side: np.ndarray | None = None, given: Edges | None = None
    ) -> None:
        self.comm, self.job, self.part, self.side, self.given = comm, job, np.zeros(nodes, np.int64), side, given

    def local_graph(self, x: np.ndarray, step: int) -> LocalGraph:
        """This process's part of the graph of a step: the edges of the whole graph between nodes of one owner.

        x: (N, 3), all positions. A collective call. Rank 0 partitions; with edge dropping it also finds the longest
        edge of the whole graph that remains, in each step. In halo mode every process computes all edges.
        """
        comm, rule, section = self.comm, self.job.spec.rule, self.job.config.partition
        if comm.size == 1:
            return np.arange(len(x)), *edges_of(x, rule, self.side, self.given), None
        due, longest = step % self.job.repartition == 0, np.zeros(3)
        exchange = section.halo == "exchange"
        part = np.zeros_like(self.part)
        if exchange or (comm.rank == 0 and (due or rule.edge_drop)):
            src, dst = edges_of(x, rule, self.side, self.given)
            if due and comm.rank == 0:
                wrapped = x if self.side is None else graphs.wrap(x, self.side)  # as partition/snapshot.py
                part = assign.assign(section.method, wrapped, src, dst, comm.size, section.seed, section.weights)
                part = part if step == 0 else relabel(part, self.part, comm.size, section.weights)
            longest = longest if exchange else self._longest(x, src, dst)
        if due:
            self.part = comm.sum(torch.from_numpy(part)).numpy()
        if exchange:
            about: dict[str, Any] = {
                "number": step,
                "where": f"step {step + 1}",
                "longest": rule.longest,
                "side": self.side,
            }
            return halo.extract_part(src, dst, self.part, comm.rank, comm.size, **about)
        own = np.flatnonzero(self.part == comm.rank)
        src, dst = edges_among(x, own, rule, self.side, self.given)
        if rule.edge_drop:
            length, to, by = comm.sum(torch.from_numpy(longest)).numpy()
            squared = graphs.squared_lengths(x, own[src], own[dst], self.side)
            before = (own[dst] < to) | ((own[dst] == to) & (own[src] <= by))
            remaining = (squared < length) | ((squared == length) & before)
            src, dst = src[remaining], dst[remaining]
        return own, src, dst, None

    def _longest(self, x: np.ndarray, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """The last edge in the order of edge dropping: its squared length, destination and source."""
        if not len(src):
            return np.array([-1.0, 0, 0])
        squared = graphs.squared_lengths(x, src, dst, self.side)
        last = np.lexsort((src, dst, squared))[-1]
        return np.array([squared[last], dst[last], src[last]], np.float64)


def relabel(part: np.ndarray, before: np.ndarray, parts: int, weights: Sequence[float] | None = None) -> np.ndarray:
    """Number the parts so that most nodes stay with their owner. Only parts of equal weight are exchanged."""
    shared = np.zeros((parts, parts), np.int64)
    np.add.at(shared, (part, before), 1)
    if weights is not None:
        shared[np.not_equal.outer(weights, weights)] = -len(part) - 1  # lower than any valid assignment
    return linear_sum_assignment(shared, maximize=True)[1][part]
