"""In-edges of some nodes of a snapshot, from positions, without the edges of the others: box by box.

Nodes are cut into boxes of a few ten thousand; a box and all that lies within the radius of it make a small radius graph, of
which the in-edges of its own nodes are kept. Memory is that of one box, and 8 bytes for an edge of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from dist_egnn.partition.assign import halves
from scipy.spatial import KDTree

from dist_egnn.data import graphs

BOX = 65_536  # nodes of a box at most: its tree and its pairs take some 50 MB at 15 edges a node


def number(count: int) -> type[np.signedinteger]:
    """The narrower integer that can count so far."""
    return np.int32 if count < 2**31 else np.int64


def sources(
    x: np.ndarray, radius: float, nodes: np.ndarray, side: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The in-edges of ``nodes`` (n,) in the radius graph of x (N, 3): where each node's begin and end, (n + 1,), and their
    sources (E,), sorted for each node. They are those of ``graphs.radius_edges``, in its order.

    side: (3,) sides of a periodic box, in which x must lie. Raises Failure where radius_edges does.
    """
    degree = np.empty(len(nodes), np.int64)
    found = []
    for rows in _boxes(x[nodes]):
        near = within(x, x[nodes[rows]], radius, side)
        src, dst = graphs.radius_edges(x[near], radius, side)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(dst, minlength=len(near)))])
        ends, pick = graphs.in_edges(indptr, np.searchsorted(near, nodes[rows]))
        degree[rows] = np.diff(ends)
        found.append((rows, near[src[pick]].astype(number(len(x)))))
    ends = np.concatenate([[0], np.cumsum(degree)])
    into = np.empty(ends[-1], number(len(x)))
    while found:
        rows, src = found.pop()
        count = degree[rows]
        into[np.repeat(ends[rows] - (np.cumsum(count) - count), count) + np.arange(len(src))] = src
    return ends, into


def _boxes(x: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of x (n, 3), cut in halves across the longest axis until none has more than BOX."""
    pending = [np.arange(len(x))]
    while pending:
        rows = pending.pop()
        if len(rows) <= BOX:
            yield rows
        else:
            pending += halves(x, rows, len(rows) // 2)


def within(x: np.ndarray, box: np.ndarray, radius: float, side: np.ndarray | None = None) -> np.ndarray:
    """The nodes (m,) of x (N, 3) that lie in the bounding box of the points ``box`` (n, 3) or within the radius of it, and
    perhaps a few more; in order."""
    low, high = box.min(0).astype(np.float64), box.max(0).astype(np.float64)
    # bounds are compared in the precision of x, and a small number of nodes too many does no harm
    reach = radius + 1e-6 * (radius + np.abs([low, high]).max())
    found: np.ndarray | slice = slice(None)
    for axis, (a, b) in enumerate(zip((low - reach).tolist(), (high + reach).tolist(), strict=True)):
        along = x[found, axis]
        inside = (along >= a) & (along <= b)
        if side is not None:
            inside |= (along >= a + side[axis]) | (along <= b - side[axis])
        kept = np.flatnonzero(inside)
        found = kept if isinstance(found, slice) else found[kept]
    assert not isinstance(found, slice)
    return found


def degree(x: np.ndarray, radius: float, side: np.ndarray | None = None) -> float:
    """In-edges of a node, about: the mean of a thousand nodes of x (N, 3)."""
    if np.isinf(radius):
        return len(x) - 1
    x = x if side is None else graphs.wrap(x, side)
    few = x[np.random.default_rng(0).integers(len(x), size=1000)]
    tree = KDTree(x, boxsize=side, balanced_tree=False, compact_nodes=False)
    return float(tree.query_ball_point(few, radius, return_length=True).mean()) - 1
