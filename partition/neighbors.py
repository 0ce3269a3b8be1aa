"""In-edges of selected nodes of a snapshot, without those of the others: of a radius graph box by box, or of nearest nodes.

Memory: the graph of one box, or a tree of all nodes; and 4 or 8 bytes for each edge of the result.
"""

from __future__ import annotations

import numpy as np
from dist_egnn.partition.assign import split_longest_axis
from numpy import ndarray as Array
from scipy.spatial import KDTree

from dist_egnn.data import graphs
from dist_egnn.data.edges import EdgeRule, knn_edges
from dist_egnn.data.graphs import Edges

BOX = 65_536  # nodes of a box at most: its tree and its pairs take about 50 MB at 15 edges a node


def index_dtype(count: int) -> type[np.signedinteger]:
    """The smaller of int32 and int64 that can index ``count`` items."""
    return np.int32 if count < 2**31 else np.int64


def in_neighbors(x: Array, rule: EdgeRule, nodes: Array, side: Array | None = None) -> tuple[Array, Array]:
    """The in-edges of ``nodes`` (n,) in the graph of x (N, 3), radius or knn, as ``edges_of`` gives and orders them.

    side: (3,) sides of a periodic box, in which x must lie. Returns indptr (n + 1,) and the sources (E,): those of
    nodes[i] are sources[indptr[i] : indptr[i + 1]], in order. Raises Failure where edges_of does.
    """
    if rule.edges == "knn":
        src, _ = knn_edges(x, rule.neighbours, side, nodes)
        count = min(rule.neighbours, len(x) - 1)
        return np.arange(len(nodes) + 1) * count, src.astype(index_dtype(len(x)))
    radius = rule.radius
    degree = np.empty(len(nodes), np.int64)
    boxes = []
    for rows in _boxes(x[nodes], np.arange(len(nodes))):
        local = candidates(x, x[nodes[rows]], radius, side)
        src, dst = graphs.radius_edges(x[local], radius, side)
        local_indptr = np.concatenate([[0], np.cumsum(np.bincount(dst, minlength=len(local)))])
        ends, edges = graphs.in_edges(local_indptr, np.searchsorted(local, nodes[rows]))
        degree[rows] = np.diff(ends)
        boxes.append((rows, local[src[edges]].astype(index_dtype(len(x)))))
    indptr = np.concatenate([[0], np.cumsum(degree)])
    sources = np.empty(indptr[-1], index_dtype(len(x)))
    while boxes:  # each box's memory is released as its edges are copied
        rows, src = boxes.pop()
        count = degree[rows]
        sources[np.repeat(indptr[rows] - (np.cumsum(count) - count), count) + np.arange(len(src))] = src
    return indptr, sources


def _boxes(x: Array, rows: Array) -> list[Array]:
    """These rows of x, halved across the longest axis until no box has more than BOX."""
    if len(rows) <= BOX:
        return [rows]
    return [box for half in split_longest_axis(x, rows, len(rows) // 2) for box in _boxes(x, half)]


def candidates(x: Array, box: Array, radius: float, side: Array | None = None) -> Array:
    """The nodes (m,) of x (N, 3), in order, within the radius of the bounding box of ``box`` (n, 3), and a few more."""
    low, high = box.min(0).astype(np.float64), box.max(0).astype(np.float64)
    # bounds are compared in the precision of x
    reach = radius + 1e-6 * (radius + np.abs([low, high]).max())
    nodes: Array | None = None
    for axis, (a, b) in enumerate(zip((low - reach).tolist(), (high + reach).tolist(), strict=True)):
        along = x[:, axis] if nodes is None else x[nodes, axis]
        inside = (along >= a) & (along <= b)
        if side is not None:
            inside |= (along >= a + side[axis]) | (along <= b - side[axis])
        nodes = np.flatnonzero(inside) if nodes is None else nodes[inside]
    assert nodes is not None
    return nodes


def mean_degree(x: Array, rule: EdgeRule, side: Array | None = None, given: Edges | None = None) -> float:
    """An estimate of the in-edges of a node before edge dropping: in a radius graph the mean over a thousand nodes of x (N, 3)."""
    if given is not None:
        return len(given[0]) / len(x)
    if rule.complete or rule.edges == "knn":
        return len(x) - 1 if rule.complete else min(rule.neighbours, len(x) - 1)
    x = x if side is None else graphs.wrap(x, side)
    sample = x[np.random.default_rng(0).integers(len(x), size=1000)]
    tree = KDTree(x, boxsize=graphs.boxsize(side), balanced_tree=False, compact_nodes=False)
    return float(tree.query_ball_point(sample, rule.radius, return_length=True).mean()) - 1
