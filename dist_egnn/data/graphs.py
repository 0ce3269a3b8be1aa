"""Build graphs from positions: radius graph, complete graph, edge dropping, edge fields, orders of nodes and edges.

In every function ``side`` (3,) holds the sides of a periodic box, `trajectories.OPEN` on axes that are not periodic; edges
then lead to the nearest image of their source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import dgl
import numpy as np
import torch
from dgl import DGLGraph
from scipy.sparse import csr_array
from scipy.spatial import KDTree
from torch import Tensor

from ..errors import Failure
from .trajectories import closed

Edges = tuple[np.ndarray, np.ndarray]  # source and destination, (E,)
Side = np.ndarray | None
CHUNK_EDGES = 1 << 20  # edges whose positions are gathered at once


def radius_edges(x: np.ndarray, radius: float, side: Side = None) -> Edges:
    """All pairs j→i, i ≠ j, with ‖x_i − x_j‖ ≤ radius in float64; an infinite radius gives the complete graph.

    x: (N, 3), any image of each node. Returns source and destination, int64 (E,), sorted by destination, then source.
    Raises Failure for a radius that is not positive or too large for the box, and for non-finite positions.
    """
    if not radius > 0:
        raise Failure(f"radius={radius}: must be positive (inf for the complete graph)")
    n = len(x := finite(x))
    if side is not None:
        check_side(radius, side)
        x = wrap(x, side)
    if math.isinf(radius):
        return complete_edges(x)
    i, j = KDTree(x, boxsize=boxsize(side)).query_pairs(radius, output_type="ndarray").astype(np.int64).T
    pairs = csr_array((np.ones(2 * len(i), np.int8), (np.r_[j, i], np.r_[i, j])), shape=(n, n))
    pairs.sort_indices()
    return pairs.indices.astype(np.int64), np.repeat(np.arange(n), np.diff(pairs.indptr))


def complete_edges(x: np.ndarray) -> Edges:
    """All pairs j→i, i ≠ j, of the nodes at x (N, 3), sorted by destination, then source. Raises Failure if x is not finite."""
    n = len(finite(x))
    dst, src = np.divmod(np.arange(n * max(n - 1, 0)), max(n - 1, 1))
    return src + (src >= dst), dst


def finite(x: np.ndarray) -> np.ndarray:
    """Positions (N, 3) as float64. Raises Failure if they are not finite."""
    if not np.isfinite(x := np.asarray(x, dtype=np.float64)).all():
        raise Failure("positions are NaN or infinite: no graph can be built; correct the source data")
    return x


def check_side(radius: float, side: np.ndarray, where: str = "") -> None:
    """Raise Failure if a second image of a node could lie within the radius: from half the shortest side on."""
    if not 0 < radius < (limit := side.min() / 2):
        text = f"{where}radius={radius:g}: must be below half the box's shortest side, {limit:g}"
        raise Failure(f"{text}; lower it, or repeat the box (distegnn import --repeat)")


def wrap(x: np.ndarray, side: np.ndarray) -> np.ndarray:
    """The image of each position (N, 3) in [0, side), float64; positions on axes that are not periodic (OPEN) stay."""
    x = np.asarray(x, dtype=np.float64)
    inside = np.mod(x, side)
    inside = np.where(inside < side, inside, 0.0)  # mod(−1e−20, side) rounds up to the side itself
    return np.where(closed(side), inside, x)


def boxsize(side: Side) -> Side:
    """The sides as SciPy's trees take them: 0 on axes that are not periodic."""
    return None if side is None else np.where(closed(side), side, 0.0)


def drop_longest(x: np.ndarray, src: np.ndarray, dst: np.ndarray, p: float, side: Side = None) -> Edges:
    """Drop the share p of the edges that is longest (FastEGNN's edge dropping); the others keep their order."""
    if not 0 <= p <= 1:
        raise Failure(f"edge_drop={p}: must lie in [0, 1]")
    if p == 0:
        return src, dst
    shortest = np.argsort(squared_lengths(x, src, dst, side), kind="stable")[: round((1 - p) * len(src))]
    shortest.sort()
    return src[shortest], dst[shortest]


def squared_lengths(x: np.ndarray, src: np.ndarray, dst: np.ndarray, side: Side = None) -> np.ndarray:
    """‖x_i − x_j‖² (E,) of edges j→i in float64."""
    x = np.asarray(x, dtype=np.float64)
    r = x[dst] - x[src]
    if side is not None:
        r -= np.rint(r / side) * side
    return (r**2).sum(1)


def build_graph(src: np.ndarray, dst: np.ndarray, nodes: Mapping[str, Any], side: Side = None) -> DGLGraph:
    """A DGLGraph with these node fields (arrays or tensors) and the edge fields of ``edge_fields``."""
    ends = torch.from_numpy(src), torch.from_numpy(dst)
    graph = dgl.graph(ends, num_nodes=len(nodes["x"]), idtype=torch.int32)  # int32 halves the memory
    graph.ndata.update({name: torch.as_tensor(value) for name, value in nodes.items()})
    set_edge_lengths(graph, side)
    return graph


def set_edge_lengths(graph: DGLGraph, side: Side = None) -> None:
    """Set the edge fields of ``edge_fields`` from the node field x."""
    src, dst = graph.edges()
    x = graph.ndata["x"]
    fields: dict[str, Tensor] = {}
    for lo in range(0, max(len(src), 1), CHUNK_EDGES):
        chunk = slice(lo, lo + CHUNK_EDGES)
        for name, value in edge_fields(x[src[chunk]], x[dst[chunk]], side).items():
            fields.setdefault(name, value.new_empty(len(src), value.shape[1]))[chunk] = value
    graph.edata.update(fields)


def edge_fields(source: Tensor, destination: Tensor, side: Side = None) -> dict[str, Tensor]:
    """The edge fields for positions (E, 3): e (E, 2), the length twice as in the benchmarks; in a box also shift (E, 3)."""
    fields, r = {}, destination - source
    if side is not None:
        sides = torch.tensor(side, dtype=torch.float64)
        # float64 for any dtype of x, as in radius_edges: both must choose the same image
        fields["shift"] = (((destination.double() - source.double()) / sides).round() * sides).to(source)
        r -= fields["shift"]
    fields["e"] = torch.linalg.vector_norm(r, dim=1, keepdim=True).expand(-1, 2).contiguous()
    return fields


def morton_order(x: np.ndarray, group: np.ndarray | None = None) -> np.ndarray:
    """Node numbers (N,) int64 along a Z-order curve (Morton 1966), in which consecutive nodes are close in space.

    group: (N,) graph of each node; graphs then follow one another.
    """
    x = np.asarray(x, dtype=np.float64)
    if not len(x):
        return np.zeros(0, np.int64)
    side = float(np.ptp(x, 0).max())
    cell = ((x - x.min(0)) * ((2**21 - 1) / side if side > 0 else 0.0)).astype(np.uint64)
    # spread the 21 bits of each axis to every third bit
    masks = (0x1F00000000FFFF, 0x1F0000FF0000FF, 0x100F00F00F00F00F, 0x10C30C30C30C30C3, 0x1249249249249249)
    for shift, mask in zip((32, 16, 8, 4, 2), masks, strict=True):
        cell = (cell | (cell << np.uint64(shift))) & np.uint64(mask)
    key = cell[:, 0] | (cell[:, 1] << np.uint64(1)) | (cell[:, 2] << np.uint64(2))
    return np.argsort(key, kind="stable") if group is None else np.lexsort((key, group))


def in_edges(indptr: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row pointers (N + 1,) and edges (E,) by destination in another order (N,) of the nodes."""
    start = indptr[order]
    degree = indptr[order + 1] - start
    ends = np.concatenate([[0], np.cumsum(degree)])
    return ends, np.repeat(start - ends[:-1], degree) + np.arange(ends[-1])
