"""The partition of a rollout, which follows the moving nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from dgl import DGLGraph
from scipy.optimize import linear_sum_assignment

from ..data import graphs, halo
from ..data.edges import EdgeRule, edges_among, edges_of
from ..data.graphs import Edges
from ..data.halo import Halo
from ..distributed.comm import Comm
from ..partition import assign
from ..partition.neighbors import in_neighbors
from ..utils.laps import Laps
from .boundary_conditions import RolloutJob

# the nodes that a process owns, ascending; source and destination of their edges, as rows of these; its halo
LocalGraph = tuple[np.ndarray, np.ndarray, np.ndarray, Halo | None]


def part_graph(local: LocalGraph, fields: Mapping[str, np.ndarray], side: np.ndarray | None) -> DGLGraph:
    """The graph of a process's nodes; fields: those of all nodes, x (N, 3) among them."""
    own, src, dst, own_halo = local
    rows = {name: torch.from_numpy(value[own]) for name, value in fields.items()}
    rows["total"] = torch.full((len(own),), len(fields["x"]))
    rows["centroid"] = torch.from_numpy(fields["x"].astype(np.float64).mean(0)).expand(len(own), 3).contiguous()
    graph = graphs.build_graph(src, dst, rows, side)
    return graph if own_halo is None else halo.attach(graph, halo.Halos([own_halo], [len(own)]))


class Repartitioner:
    """The owner of each node, made anew every job.repartition steps.

    side: (3,) of a periodic box; given: the edges of the trajectory, with data.edges=given; laps: the seconds of the
    search for edges ("search"), of the partition ("partition") and of the halo ("exchange").
    """

    def __init__(
        self,
        comm: Comm,
        job: RolloutJob,
        nodes: int,
        side: np.ndarray | None = None,
        given: Edges | None = None,
        laps: Laps | None = None,
    ) -> None:
        self.comm, self.job, self.part, self.side, self.given = comm, job, np.zeros(nodes, np.int64), side, given
        self.laps = laps or Laps()

    def local_graph(self, x: np.ndarray, step: int) -> LocalGraph:
        """This process's part of the graph of a step: the edges of the whole graph between nodes of one owner.

        x: (N, 3), all positions. A collective call. Rank 0 partitions; with edge dropping it also finds the longest
        edge of the whole graph that remains, in each step. In halo mode also the edges from nodes of other owners.
        """
        comm, rule, exchange = self.comm, self.job.spec.rule, self.job.config.partition.halo == "exchange"
        if comm.size == 1:
            edges = edges_of(x, rule, self.side, self.given)
            self.laps("search")
            return np.arange(len(x)), *edges, None
        due, whole = step % self.job.repartition == 0, None
        if (exchange and rule.edge_drop) or (comm.rank == 0 and (due or rule.edge_drop)):
            whole = edges_of(x, rule, self.side, self.given)
            self.laps("search")
        if due:
            self._partition(x, whole, step)
        own = np.flatnonzero(self.part == comm.rank)
        if exchange:
            src, dst = whole or in_edges(x, own, rule, self.side, self.given)
            self.laps("search")
            about: dict[str, Any] = {"number": step, "where": f"step {step + 1}"}
            about |= {"longest": rule.longest, "side": self.side}
            graph = halo.extract_part(src, dst, self.part, comm.rank, comm.size, **about)
            self.laps("exchange")
            return graph
        longest = np.zeros(3) if whole is None or not rule.edge_drop else self._longest(x, *whole)
        if rule.edge_drop:
            longest = comm.sum(torch.from_numpy(longest)).numpy()
        src, dst = self._among(whole, own) if whole else self._remaining(x, own, longest)
        self.laps("search")
        return own, src, dst, None

    def _partition(self, x: np.ndarray, edges: Edges | None, step: int) -> None:
        """Set the owners, from the edges of the whole graph on rank 0."""
        section, part = self.job.config.partition, np.zeros_like(self.part)
        if edges is not None and self.comm.rank == 0:
            wrapped = x if self.side is None else graphs.wrap(x, self.side)  # as partition/snapshot.py
            part = assign.assign(section.method, wrapped, *edges, self.comm.size, section.seed, section.weights)
            part = part if step == 0 else relabel(part, self.part, self.comm.size, section.weights)
        self.part = self.comm.sum(torch.from_numpy(part)).numpy()
        self.laps("partition")

    def _among(self, edges: Edges, own: np.ndarray) -> Edges:
        """Those of all edges that join own nodes, as rows of these."""
        row = np.full(len(self.part), -1)
        row[own] = np.arange(len(own))
        src, dst = row[edges[0]], row[edges[1]]
        inner = (src >= 0) & (dst >= 0)
        return src[inner], dst[inner]

    def _remaining(self, x: np.ndarray, own: np.ndarray, longest: np.ndarray) -> Edges:
        """The edges among own nodes, as rows of these, up to the longest one that remains after edge dropping."""
        rule = self.job.spec.rule
        src, dst = edges_among(x, own, rule, self.side, self.given)
        if not rule.edge_drop:
            return src, dst
        length, to, by = longest
        squared = graphs.squared_lengths(x, own[src], own[dst], self.side)
        before = (own[dst] < to) | ((own[dst] == to) & (own[src] <= by))
        remaining = (squared < length) | ((squared == length) & before)
        return src[remaining], dst[remaining]

    def _longest(self, x: np.ndarray, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """The last edge in the order of edge dropping: its squared length, destination and source."""
        if not len(src):
            return np.array([-1.0, 0, 0])
        squared = graphs.squared_lengths(x, src, dst, self.side)
        last = np.lexsort((src, dst, squared))[-1]
        return np.array([squared[last], dst[last], src[last]], np.float64)


def in_edges(x: np.ndarray, own: np.ndarray, rule: EdgeRule, side: np.ndarray | None, given: Edges | None) -> Edges:
    """The edges into own nodes (all edges for some rules), without edge dropping. x: (N, 3), all positions."""
    if rule.complete or rule.edges == "given":
        return edges_of(x, rule, side, given)
    wrapped = np.asarray(x, np.float64) if side is None else graphs.wrap(x, side)
    ends, src = in_neighbors(wrapped, rule, own, side)
    return src.astype(np.int64), np.repeat(own, np.diff(ends))


def relabel(part: np.ndarray, before: np.ndarray, parts: int, weights: Sequence[float] | None = None) -> np.ndarray:
    """Number the parts so that most nodes stay with their owner. Only parts of equal weight are exchanged."""
    shared = np.zeros((parts, parts), np.int64)
    np.add.at(shared, (part, before), 1)
    if weights is not None:
        shared[np.not_equal.outer(weights, weights)] = -len(part) - 1  # lower than any valid assignment
    return linear_sum_assignment(shared, maximize=True)[1][part]
