"""Partition one snapshot and write one file for each part: its nodes in order, its in-edges and its halo nodes.

Memory: the node fields of the snapshot, and the edges of one part or, where `needs_all_edges`, of the snapshot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dist_egnn.partition import assign, neighbors
from numpy import ndarray as Array

from dist_egnn.data import domain, graphs
from dist_egnn.data.edges import EdgeRule, edge_digest, edges_of
from dist_egnn.data.graphs import Edges
from dist_egnn.data.samples import (
    SampleSpec,
    Snapshot,
    edge_positions,
    given_edges,
    node_fields,
    squares,
    surroundings,
)
from dist_egnn.data.store import EDGE_DIGEST, SIDES, SQUARES
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure
from dist_egnn.utils import memory, part_weights

NO_EDGES = np.zeros(0, np.int64)
CENTROID = ("centroid_x", "centroid_y", "centroid_z")


@dataclass(frozen=True)
class Inputs:
    """Everything that determines the content of a store: equal inputs give equal stores."""

    source: str
    source_sha256: str
    parts: int
    trainers: int  # processes of a part
    weights: part_weights.Weights | None  # one for each process; None: all equal
    method: str
    method_seed: int
    edges: str
    radius: float
    neighbours: int
    horizon: int
    features: tuple[str, ...]
    node_attributes: tuple[str, ...]
    widths: tuple[int, int] | None  # columns of features and of node attributes; None: one for each name
    edge_drop: float
    periodic: bool
    velocity: str
    velocity_scale: float
    fixed: str
    history: int
    walls: str
    gravity: tuple[float, ...] | None
    pushforward: int
    frames: int
    first_frame: int
    last_frame: int
    frame_seed: int
    shard_nodes: int

    @property
    def processes(self) -> int:
        return self.parts * self.trainers

    @property
    def rule(self) -> EdgeRule:
        return EdgeRule.of(self)

    @property
    def sample(self) -> SampleSpec:
        names = self.features, self.node_attributes
        plain = ["velocity", "velocity_scale", "fixed", "history", "walls", "gravity", "pushforward"]
        plain += ["edges", "neighbours"]
        given = {name: getattr(self, name) for name in plain}
        return SampleSpec(*(self.radius, self.horizon, *names, self.edge_drop, self.periodic), **given)

    def plain(self) -> dict[str, Any]:
        """The inputs as YAML and JSON read them back."""
        return json.loads(json.dumps(asdict(self)))


@dataclass
class NodeArrays:
    """A snapshot to partition."""

    fields: dict[str, Array]
    x: Array  # (N, 3), where edges join nodes
    wrapped: Array  # (N, 3), x wrapped into a periodic box: what parts are made by
    side: Array | None  # (3,) of the box
    given: Edges | None  # of the trajectory, with data.edges=given
    around: tuple[Array, Array | None] | None  # a simulator's gravity and box


def node_arrays(data: Trajectories, snapshot: Snapshot, inputs: Inputs) -> NodeArrays:
    """Read a snapshot."""
    fields = node_fields(data, snapshot, inputs.sample)
    k = snapshot.trajectory
    side = data.sides(k, inputs.rule.longest) if inputs.periodic else None
    around = surroundings(data, k, inputs.sample)
    x = edge_positions(fields, around and around[0])
    given = given_edges(data, k, inputs.rule)
    return NodeArrays(fields, x, x if side is None else graphs.wrap(x, side), side, given, around)


def needs_all_edges(inputs: Inputs) -> bool:
    """Whether all edges of a snapshot must be in memory at once."""
    whole = inputs.rule.complete or inputs.edges == "given"
    return assign.METHODS[inputs.method].needs_edges or inputs.edge_drop > 0 or whole


def memory_needed(method: str, nodes: float, edges: float) -> float:
    """Estimated bytes to partition a snapshot with all its edges in memory, measured at 10⁶ nodes (docs/scaling.md)."""
    return 0.4e9 + 200 * nodes + (90 if assign.METHODS[method].needs_edges else 75) * edges


def check_memory(x: Array, inputs: Inputs, side: Array | None, given: Edges | None, where: str) -> None:
    """Raise Failure, prefixed with ``where``, if all edges of a snapshot at x (N, 3) do not fit into memory."""
    edges = len(x) * neighbors.mean_degree(x, inputs.rule, side, given)
    what = f"{where}: method {inputs.method}, edge_drop={inputs.edge_drop:g}, {len(x):,} nodes, {edges:,.0f} edges,"
    remedy = "use bisection or morton without edge_drop, or a smaller radius"
    memory.require_memory(memory_needed(inputs.method, len(x), edges), "cpu", what, remedy)


def assign_ranks(method: str, x: Array, src: Array, dst: Array, inputs: Inputs) -> Array:
    """The rank (N,) that owns each node: nodes are assigned to parts, then each part's subgraph to its trainers.

    The weight of a part is the sum of its trainers'. Raises Failure where a part has fewer nodes than trainers.
    """
    parts, trainers, seed = inputs.parts, inputs.trainers, inputs.method_seed
    table = None if inputs.weights is None else np.reshape(inputs.weights, (parts, trainers))
    part = assign.assign(method, x, src, dst, parts, seed, None if table is None else table.sum(1).tolist())
    if trainers == 1:
        return part
    rank, local = np.empty_like(part), np.empty_like(part)
    for p in range(parts):
        nodes = np.flatnonzero(part == p)
        if len(nodes) < trainers:
            raise Failure(f"part {p} of {parts} has {len(nodes)} nodes, fewer than its trainers; lower --trainers")
        local[nodes] = np.arange(len(nodes))
        inner = (part[src] == p) & (part[dst] == p)
        weights = None if table is None else table[p].tolist()
        trainer = assign.assign(method, x[nodes], local[src[inner]], local[dst[inner]], trainers, seed, weights)
        rank[nodes] = p * trainers + trainer
    return rank


def _ranks_and_edges(
    read: NodeArrays, inputs: Inputs, where: str
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """The rank (N,) of each node, and a function of nodes (n,): their in-edges as indptr (n + 1,) and sources (E,)."""
    x, wrapped, side = read.x, read.wrapped, read.side
    if not needs_all_edges(inputs):
        rank = assign_ranks(inputs.method, wrapped, NO_EDGES, NO_EDGES, inputs)
        return rank, lambda nodes: neighbors.in_neighbors(wrapped, inputs.rule, nodes, side)
    check_memory(x, inputs, side, read.given, where)
    src, dst = edges_of(x, inputs.rule, side, read.given)
    rank = assign_ranks(inputs.method, wrapped, src, dst, inputs)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(dst, minlength=len(x)))])

    def in_neighbors(nodes: Array) -> tuple[Array, Array]:
        ends, edges = graphs.in_edges(indptr, nodes)
        return ends, src[edges]

    return rank, in_neighbors


def write_parts(data: Trajectories, snapshot: Snapshot, index: int, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Partition one snapshot, number its nodes by rank and along a Z-order curve, write parts to folder/INDEX-PART.npz.

    A file holds fields of a part's inner nodes, src and dst (E,) in local numbers (inner nodes, then halo nodes), the
    numbers (m,) of its halo. Returns "row" of snapshots.csv and "parts": nodes, edges, cut edges, halo of each rank.
    """
    read = node_arrays(data, snapshot, inputs)
    fields, wrapped, side = read.fields, read.wrapped, read.side
    n, trainers = len(wrapped), inputs.trainers
    where = f"{data.path}: trajectory {snapshot.trajectory}"
    owner, in_neighbors = _ranks_and_edges(read, inputs, where)
    order = graphs.morton_order(wrapped, owner).astype(neighbors.index_dtype(n))
    number = np.empty_like(order)
    number[order] = np.arange(n)
    start = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=inputs.processes))]).tolist()
    ranks: list[list[int]] = []
    for p in range(inputs.parts):
        lo, hi = start[p * trainers], start[(p + 1) * trainers]
        nodes = order[lo:hi]
        indptr, src = in_neighbors(nodes)
        src = number[src]
        for r in range(p * trainers, (p + 1) * trainers):
            first, end = start[r], start[r + 1]
            own = src[indptr[first - lo] : indptr[end - lo]]
            remote = own[(own < first) | (own >= end)]
            ranks.append([end - first, len(own), len(remote), len(np.unique(remote))])
        outside = (src < lo) | (src >= hi)
        halo, halo_index = np.unique(src[outside], return_inverse=True)
        src -= lo
        src[outside] = hi - lo + halo_index
        rows = {name: value[nodes] for name, value in fields.items()}
        rows["snapshot"] = np.full(hi - lo, index)
        if trainers > 1:
            rows["trainer_id"] = owner[nodes]
        dst = np.repeat(np.arange(hi - lo, dtype=src.dtype), np.diff(indptr))
        np.savez(folder / f"{index:06d}-{p}.npz", src=src, dst=dst, halo=halo, **rows)
        del src, dst, outside, halo_index, rows  # before the next part takes as much
    row: dict[str, Any] = {"snapshot": index, **asdict(snapshot), "target_frame": snapshot.frame + inputs.horizon}
    row |= {"nodes": n, "edges": sum(edges for _, edges, _, _ in ranks)}
    row |= zip(CENTROID, fields["x"].astype(np.float64).mean(0).tolist(), strict=True)
    if side is not None:
        row |= zip(SIDES, side.tolist(), strict=True)
    if read.given:
        src, dst = edges_of(read.x, inputs.rule, side, read.given)
        row[EDGE_DIGEST] = edge_digest(src * n + dst)
    if read.around:
        gravity, box = read.around
        corners = np.full((2, 3), np.nan) if box is None else np.asarray(box, np.float64)
        row |= zip(domain.COLUMNS, [*gravity.tolist(), *corners.flatten().tolist()], strict=True)
        row |= zip(SQUARES, squares(fields, gravity), strict=True)
    return {"row": row, "parts": ranks}
