"""The partition of a rollout, which follows the moving nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ..data import graphs, halo
from ..data.halo import Halo
from ..distributed.comm import Comm
from ..partition import assign

if TYPE_CHECKING:
    from .rollout import RolloutJob


class LocalGraph(NamedTuple):
    """The nodes that a process owns, ascending; source and destination of their edges, as rows of these; its halo."""

    nodes: np.ndarray
    src: np.ndarray
    dst: np.ndarray
    halo: Halo | None


class Repartitioner:
    """The owner of each node, made anew every job.repartition steps. side: (3,) of a periodic box."""

    def __init__(self, comm: Comm, job: RolloutJob, nodes: int, side: np.ndarray | None = None) -> None:
        self.comm, self.job, self.part, self.side = comm, job, np.zeros(nodes, np.int64), side

    def local_graph(self, x: np.ndarray, step: int) -> LocalGraph:
        """This process's part of the graph of a step. A collective call; x (N, 3): all positions.

        The edges are those of the whole graph (radius, edge dropping) between nodes of one owner. Rank 0 alone
        partitions; with edge dropping it also finds the longest edge of the whole graph that remains, in each step. In
        halo mode every process computes all edges.
        """
        job, comm, spec = self.job, self.comm, self.job.spec
        if comm.size == 1:
            return LocalGraph(np.arange(len(x)), *graphs.sample_edges(x, spec.radius, spec.edge_drop, self.side), None)
        due, longest = step % job.repartition == 0, np.zeros(3)
        exchange = job.config.partition.halo == "exchange"
        part = np.zeros_like(self.part)
        if exchange or (comm.rank == 0 and (due or spec.edge_drop)):
            src, dst = graphs.sample_edges(x, spec.radius, spec.edge_drop, self.side)
            if due and comm.rank == 0:
                wrapped = x if self.side is None else graphs.wrap(x, self.side)  # as partition/snapshot.py
                part = assign.assign(job.method, wrapped, src, dst, comm.size, job.method_seed, job.part_weights)
                part = part if step == 0 else relabel(part, self.part, comm.size, job.part_weights)
            longest = longest if exchange else self._longest(x, src, dst)
        if due:
            self.part = comm.sum(torch.from_numpy(part)).numpy()
        if exchange:
            about = {"number": step, "where": f"step {step + 1}", "radius": spec.radius, "side": self.side}
            return LocalGraph(*halo.extract_part(src, dst, self.part, comm.rank, comm.size, **about))
        own = np.flatnonzero(self.part == comm.rank)
        src, dst = graphs.radius_edges(x[own], spec.radius, self.side)
        if spec.edge_drop:
            length, to, by = comm.sum(torch.from_numpy(longest)).numpy()
            squared, d, s = self._sort_keys(x, own[src], own[dst])
            remaining = (squared < length) | ((squared == length) & ((d < to) | ((d == to) & (s <= by))))
            src, dst = src[remaining], dst[remaining]
        return LocalGraph(own, src, dst, None)

    def _sort_keys(self, x: np.ndarray, src: np.ndarray, dst: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of edge dropping: by squared length, then by destination and source."""
        return graphs.squared_lengths(x, src, dst, self.side), dst, src

    def _longest(self, x: np.ndarray, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """The sort keys (3,) of the last edge."""
        if not len(src):
            return np.array([-1.0, 0, 0])
        keys = self._sort_keys(x, src, dst)
        last = np.lexsort(keys[::-1])[-1]
        return np.array([key[last] for key in keys], np.float64)


def relabel(part: np.ndarray, before: np.ndarray, parts: int, weights: Sequence[float] | None = None) -> np.ndarray:
    """Number the parts so that most nodes stay with their owner. Only parts of equal weight are exchanged."""
    shared = np.zeros((parts, parts), np.int64)
    np.add.at(shared, (part, before), 1)
    if weights is not None:
        shared[np.not_equal.outer(weights, weights)] = -len(part) - 1  # lower than any valid assignment
    return linear_sum_assignment(shared, maximize=True)[1][part]
