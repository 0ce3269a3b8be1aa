"""Which edges a graph has (data.edges): within a radius, from the k nearest nodes, given by the file, or all pairs.

`edges_of` makes all edges of a graph, `edges_among` those of a part. side: (3,) of a periodic box; lengths are then those
to the nearest image. given: the directed edges of the trajectory (`Trajectories.edges`), for data.edges=given.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from ..errors import Failure
from . import graphs
from .graphs import Edges, Side

BLOCK = 1 << 16  # nodes whose neighbours are sought at once


@dataclass(frozen=True)
class EdgeRule:
    """The keys of the data section that determine the edges of given positions."""

    edges: str = "radius"
    radius: float = math.inf
    neighbours: int = 0
    edge_drop: float = 0.0

    @classmethod
    def of(cls, settings: Any) -> EdgeRule:
        """The rule of a data section, or of anything else with these attributes."""
        return cls(settings.edges, settings.radius, settings.neighbours, settings.edge_drop)

    @property
    def complete(self) -> bool:
        """Whether every node is joined with every other one."""
        return self.edges == "complete" or (self.edges == "radius" and math.isinf(self.radius))

    @property
    def longest(self) -> float | None:
        """The largest length that an edge may have; None if there is no such length."""
        return self.radius if self.edges == "radius" else None

    def __str__(self) -> str:
        if self.edges == "radius" and not self.complete:
            return f"radius {self.radius:g}"
        return "complete" if self.complete else {"knn": f"{self.neighbours} nearest nodes"}.get(self.edges, self.edges)


def edges_of(x: np.ndarray, rule: EdgeRule, side: Side = None, given: Edges | None = None) -> Edges:
    """All edges of a graph at x (N, 3), sorted by destination, then source. Raises Failure as ``graphs.radius_edges``."""
    return graphs.drop_longest(x, *_undropped(x, rule, side, given), rule.edge_drop, side)


def _undropped(x: np.ndarray, rule: EdgeRule, side: Side, given: Edges | None) -> Edges:
    if rule.edges == "given":
        if given is None:
            raise Failure("data.edges=given: the edges of the graph are missing; pass edges=")
        return given
    if rule.edges == "knn":
        return knn_edges(x, rule.neighbours, side)
    return graphs.complete_edges(x) if rule.edges == "complete" else graphs.radius_edges(x, rule.radius, side)


def edges_among(
    x: np.ndarray, nodes: np.ndarray, rule: EdgeRule, side: Side = None, given: Edges | None = None
) -> Edges:
    """The edges of the graph at x (N, 3) between some nodes (n,), as rows of these; without edge dropping."""
    if rule.edges in ("radius", "complete"):  # determined by the two ends
        return _undropped(x[nodes], rule, side, None)
    src, dst = _undropped(x, rule, side, given) if rule.edges == "given" else knn_edges(x, rule.neighbours, side, nodes)
    row = np.full(len(x), -1)
    row[nodes] = np.arange(len(nodes))
    src, dst = row[src], row[dst]
    inner = (src >= 0) & (dst >= 0)
    return src[inner], dst[inner]


def edge_digest(edges: np.ndarray) -> str:
    """A digest of edges, each as the number destination + N · source, in any order."""
    return f"blake2b:{hashlib.blake2b(np.sort(edges).astype('<i8').tobytes(), digest_size=16).hexdigest()}"


def knn_edges(x: np.ndarray, k: int, side: Side = None, nodes: np.ndarray | None = None) -> Edges:
    """Edges to each of ``nodes`` (n,), by default all, from the k nodes that are nearest; from fewer if N ≤ k.

    Of equally near ones those of the lowest numbers are taken, so that the edges are the same for any selection of nodes.
    x: (N, 3), any image of each node. Returns source and destination, int64 (E,), in the order of nodes, then by source.
    """
    x = graphs.finite(x) if side is None else graphs.wrap(graphs.finite(x), side)
    nodes, count = np.arange(len(x)) if nodes is None else nodes, min(k, len(x) - 1)
    if count < 1 or not len(nodes):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    tree = KDTree(x, boxsize=graphs.boxsize(side))
    rounding = 1e-12 * max(np.abs(x).max(), 0 if side is None else graphs.boxsize(side).max())  # type: ignore[union-attr]
    blocks = []
    for lo in range(0, len(nodes), BLOCK):
        block = nodes[lo : lo + BLOCK]
        distance, near = tree.query(x[block], count + 2)  # the node itself among them
        nearest = np.empty((len(block), count), np.int64)
        reach = distance[:, count] * (1 + 1e-9) + rounding
        tied = distance[:, count + 1] <= reach
        near = near[~tied, : count + 1]
        nearest[~tied] = near[near != block[~tied, None]].reshape(-1, count)
        nearest[tied] = _of_lowest_number(x, tree, block[tied], reach[tied], count, side)
        blocks.append(np.sort(nearest, 1))
    return np.concatenate(blocks).ravel(), np.repeat(nodes, count)


def _of_lowest_number(
    x: np.ndarray, tree: KDTree, nodes: np.ndarray, reach: np.ndarray, count: int, side: Side
) -> np.ndarray:
    """The ``count`` nodes (n, count) nearest to each of some nodes (n,), those of lower number where distances are equal.

    reach: (n,) a distance within which so many other nodes lie.
    """
    found = tree.query_ball_point(x[nodes], reach, return_sorted=False)
    degree = np.fromiter(map(len, found), np.int64, len(nodes))
    src = np.fromiter(chain.from_iterable(found), np.int64, int(degree.sum()))
    row = np.repeat(np.arange(len(nodes)), degree)
    src, row = src[other := src != nodes[row]], row[other]
    order = np.lexsort((src, graphs.squared_lengths(x, src, nodes[row], side), row))
    return src[order[np.arange(len(row)) - np.searchsorted(row, row) < count]].reshape(-1, count)
