"""One snapshot → its parts → a file for each: nodes in order, in-edges, halo.

Memory: the snapshot's node fields, and one part's edges at a time. METIS cuts the edges themselves, edge dropping ranks them and
a complete graph has too many for boxes: these hold all edges of the snapshot (``in_memory``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dist_egnn.partition import assign, neighbors

from dist_egnn.data import graphs
from dist_egnn.data.samples import SampleSpec, Snapshot, node_fields
from dist_egnn.data.store import SIDES
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure
from dist_egnn.utils import part_weights, resources

NONE = np.zeros(0, np.int64)
METIS_EDGE, HELD_EDGE = 90, 75  # bytes of an edge at the peak


@dataclass(frozen=True)
class Inputs:
    """All that decides what a store holds; two runs with equal inputs write equal stores."""

    source: str
    source_sha256: str
    parts: int
    trainers: int
    weights: part_weights.Weights | None  # one a process; None: all equal
    method: str
    method_seed: int
    radius: float
    horizon: int
    features: tuple[str, ...]
    node_attributes: tuple[str, ...]
    edge_drop: float
    periodic: bool
    frames: int
    first_frame: int
    last_frame: int
    frame_seed: int
    shard_nodes: int

    @property
    def processes(self) -> int:
        return self.parts * self.trainers

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(self.radius, self.horizon, self.features, self.node_attributes, self.edge_drop, self.periodic)

    def plain(self) -> dict[str, Any]:
        """As YAML and JSON give it back."""
        return json.loads(json.dumps(asdict(self)))


def nodes_of(
    data: Trajectories, snapshot: Snapshot, inputs: Inputs
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    """Node fields of a snapshot, the places (N, 3) by which it is partitioned, and the sides of its periodic box.

    In a periodic box places are positions wrapped into it: far-travelled neighbours then share a part, as they share an edge.
    """
    fields = node_fields(data, snapshot, inputs.sample)
    side = data.sides(snapshot.trajectory, inputs.radius) if inputs.periodic else None
    return fields, fields["x"] if side is None else graphs.wrap(fields["x"], side), side


def in_memory(inputs: Inputs) -> bool:
    """Whether all edges of a snapshot must be held at once."""
    return assign.METHODS[inputs.method].edges or inputs.edge_drop > 0 or np.isinf(inputs.radius)


def bytes_in_memory(method: str, nodes: float, edges: float) -> float:
    """About how many bytes a snapshot takes whose edges are all held, from what a million nodes took (docs/scaling.md)."""
    return 0.4e9 + 200 * nodes + (METIS_EDGE if assign.METHODS[method].edges else HELD_EDGE) * edges


def check_memory(x: np.ndarray, inputs: Inputs, side: np.ndarray | None, where: str) -> None:
    """Raise Failure, naming ``where``, if memory would not do for all edges of a snapshot at x (N, 3)."""
    edges = len(x) * neighbors.degree(x, inputs.radius, side)
    what = (
        f"{where}: method {inputs.method} with edge_drop={inputs.edge_drop:g} on {len(x):,} nodes, {edges:,.0f} edges,"
    )
    resources.enough_memory(
        bytes_in_memory(inputs.method, len(x), edges),
        "cpu",
        what,
        "use bisection or morton without edge_drop, or a smaller radius",
    )


def edges_of(x: np.ndarray, inputs: Inputs, side: np.ndarray | None, where: str) -> tuple[np.ndarray, np.ndarray]:
    """All edges of a snapshot at x (N, 3). Raises Failure, naming ``where``, before any work for which memory would not do."""
    check_memory(x, inputs, side, where)
    return graphs.sample_edges(x, inputs.radius, inputs.edge_drop, side)


def owners(method: str, place: np.ndarray, src: np.ndarray, dst: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The rank (N,) that owns each node: first the parts, then each part's own graph among its trainers.

    A part's weight is the sum of its trainers'. Raises Failure where a part has fewer nodes than trainers.
    """
    own_weights = None if inputs.weights is None else np.reshape(inputs.weights, (inputs.parts, inputs.trainers))
    weights = None if own_weights is None else own_weights.sum(1).tolist()
    part = assign.assign(method, place, src, dst, inputs.parts, inputs.method_seed, weights)
    if inputs.trainers == 1:
        return part
    rank, local = np.empty_like(part), np.empty_like(part)
    for p in range(inputs.parts):
        nodes = np.flatnonzero(part == p)
        if len(nodes) < inputs.trainers:
            raise Failure(
                f"part {p} of {inputs.parts} has {len(nodes)} nodes, fewer than its trainers; lower --trainers"
            )
        local[nodes] = np.arange(len(nodes))
        own = (part[src] == p) & (part[dst] == p)
        weights = None if own_weights is None else own_weights[p].tolist()
        cut = assign.assign(
            method, place[nodes], local[src[own]], local[dst[own]], inputs.trainers, inputs.method_seed, weights
        )
        rank[nodes] = p * inputs.trainers + cut
    return rank


Sources = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # as near.sources, of some nodes


def _cut(
    x: np.ndarray, place: np.ndarray, inputs: Inputs, side: np.ndarray | None, where: str
) -> tuple[np.ndarray, Sources]:
    """The rank (N,) of each node, and what gives the in-edges of nodes."""
    if not in_memory(inputs):
        owner = owners(inputs.method, place, NONE, NONE, inputs)
        return owner, lambda nodes: neighbors.sources(place, inputs.radius, nodes, side)
    src, dst = edges_of(x, inputs, side, where)
    owner = owners(inputs.method, place, src, dst, inputs)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(dst, minlength=len(place)))])

    def sources(nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends, pick = graphs.in_edges(indptr, nodes)
        return ends, src[pick]

    return owner, sources


def write(data: Trajectories, snapshot: Snapshot, index: int, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Partition one snapshot and write its pieces to folder/INDEX-PART.npz. Returns its row and its ranks' rows.

    A piece holds the node fields of its inner nodes, its edges in local numbers (inner nodes first, then halo nodes) and
    the halo nodes' places in the snapshot, where nodes are ordered by rank, then along a Z-order curve.
    """
    fields, place, side = nodes_of(data, snapshot, inputs)
    n, trainers = len(place), inputs.trainers
    owner, sources = _cut(fields["x"], place, inputs, side, f"{data.path}: trajectory {snapshot.trajectory}")
    order = graphs.morton_order(place, owner).astype(neighbors.number(n))
    at = np.empty_like(order)
    at[order] = np.arange(n)
    start = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=inputs.processes))])
    ranks: list[list[int]] = []
    for p in range(inputs.parts):
        lo, hi = int(start[p * trainers]), int(start[(p + 1) * trainers])
        nodes = order[lo:hi]
        ends, from_ = sources(nodes)
        from_ = at[from_]
        for r in range(p * trainers, (p + 1) * trainers):
            first, after = int(start[r]), int(start[r + 1])
            seen = from_[ends[first - lo] : ends[after - lo]]
            remote = seen[(seen < first) | (seen >= after)]
            ranks.append([after - first, len(seen), len(remote), len(np.unique(remote))])
        away = (from_ < lo) | (from_ >= hi)
        halo, which = np.unique(from_[away], return_inverse=True)
        from_ -= lo
        from_[away] = hi - lo + which
        rows = {name: value[nodes] for name, value in fields.items()}
        rows["snapshot"] = np.full(hi - lo, index)
        if trainers > 1:
            rows["trainer_id"] = owner[nodes]
        to = np.repeat(np.arange(hi - lo, dtype=from_.dtype), np.diff(ends))
        _save(folder / f"{index:06d}-{p}.npz", src=from_, dst=to, halo=halo, **rows)
        del from_, to, away, which, rows  # before the next part takes as much
    centroid = fields["x"].astype(np.float64).mean(0)
    row = {
        "snapshot": index,
        "split": snapshot.split,
        "trajectory": snapshot.trajectory,
        "frame": snapshot.frame,
        "target_frame": snapshot.frame + inputs.horizon,
        "nodes": n,
        "edges": sum(edges for _, edges, _, _ in ranks),
        **dict(zip(("centroid_x", "centroid_y", "centroid_z"), centroid.tolist(), strict=True)),
        **({} if side is None else dict(zip(SIDES, side.tolist(), strict=True))),
    }
    return {"row": row, "parts": ranks}


def _save(path: Path, **arrays: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
