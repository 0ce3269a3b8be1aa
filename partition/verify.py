"""Check a store against its manifest, its tables and the edges of its own positions."""

from __future__ import annotations

import os
from collections.abc import Callable

import dgl
import numpy as np
from torch import Tensor

from dist_egnn.data.edges import edge_digest, edges_of
from dist_egnn.data.samples import edge_positions
from dist_egnn.data.store import EDGE_DIGEST, GRAPH, Store
from dist_egnn.errors import Failure

LoadedPart = tuple[dgl.DGLGraph, dict[str, Tensor]]  # a part's graph and node fields, as DGL's loader gives them


def verify_store(store: Store, progress: Callable[[int, int], None]) -> dict[str, int]:
    """Check every file and every snapshot; returns how many files, snapshots, nodes and edges were checked.

    Checks hashes, DGL's own assertions, that values are finite, and that every node, and every edge that follows from
    the positions or was given, is in exactly one part. progress(done, total) is called after each snapshot. Raises Failure.
    """
    files = {str(f.relative_to(store.path)) for f in store.path.rglob("*") if f.is_file()} - {"manifest.yaml"}
    if extra := sorted(files - set(store.manifest["files"])):
        raise Failure(f"{store.path / extra[0]}: not in the manifest; remove it or {store.remedy}")
    store.verify_files()
    nodes = edges = 0
    for shard, rows in store.snapshots.groupby("shard", sort=False).indices.items():
        config = str(store.path / shard / f"{GRAPH}.json")
        parts = [_load_part(store, config, p) for p in range(store.machines)]
        snapshot_of = np.concatenate([feats["_N/snapshot"].numpy() for _, feats in parts])
        if extra := sorted(set(snapshot_of.tolist()) - set(rows.tolist())):
            raise Failure(f"{config}: holds snapshot {extra[0]}, snapshots.csv does not list it there; {store.remedy}")
        for snapshot in map(int, rows):
            n, e = _check_snapshot(store, snapshot, parts, snapshot_of)
            nodes, edges = nodes + n, edges + e
            progress(snapshot + 1, len(store.snapshots))
    return {"files": len(store.manifest["files"]), "snapshots": len(store.snapshots), "nodes": nodes, "edges": edges}


def _check_snapshot(store: Store, snapshot: int, parts: list[LoadedPart], snapshot_of: np.ndarray) -> tuple[int, int]:
    """Check one snapshot of a shard; returns its numbers of nodes and edges. snapshot_of: (N,) of the shard's nodes."""
    where = f"{store.path}: snapshot {snapshot}"
    gid_of = np.concatenate([feats["_N/gid"].numpy() for _, feats in parts])  # by DGL's global id, for remote sources
    for rank in range(store.parts):
        lo, hi = store.ranges[snapshot, rank, :2].tolist()
        feats = parts[rank // store.trainers][1]
        own = feats["_N/snapshot"] == snapshot
        if store.trainers > 1:
            own &= feats["_N/trainer_id"] == rank
        if int(own.sum()) != hi - lo or not own[lo:hi].all():
            raise Failure(f"{where}: part {rank} does not hold the {hi - lo} nodes of parts.csv; {store.remedy}")
    n = int(store.snapshots.loc[snapshot, "nodes"])
    if not np.array_equal(np.sort(gid_of[snapshot_of == snapshot]), np.arange(n)):
        raise Failure(f"{where}: its {n} nodes are not each in exactly one part; {store.remedy}")
    stored = []
    for graph, feats in parts:
        src, dst = (t.numpy() for t in graph.edges(order="eid"))
        selected = feats["_N/snapshot"].numpy()[dst] == snapshot
        ids = graph.ndata[dgl.NID].numpy()
        src, dst = ids[src[selected]], ids[dst[selected]]
        if (snapshot_of[src] != snapshot).any():
            raise Failure(f"{where}: an edge joins two snapshots; {store.remedy}")
        stored.append(gid_of[src] * n + gid_of[dst])
    whole, around = store.whole(snapshot), store.domain(snapshot)  # also checks fields, shapes and NaN
    values = {name: whole.ndata[name].numpy() for name in ("x", "v")}
    x = edge_positions(values, None if around is None else around.gravity[0].numpy())
    edges, source = np.concatenate(stored), "positions"
    if store.rule.edges == "given":
        source, correct = "source", edge_digest(edges) == store.snapshots.loc[snapshot, EDGE_DIGEST]
    else:
        src, dst = edges_of(x, store.rule, store.sides(snapshot))
        correct = np.array_equal(np.sort(edges), np.sort(src * n + dst))
    if not correct:
        raise Failure(f"{where}: its edges are not those of its {source}, each once; {store.remedy}")
    return n, len(edges)


def _load_part(store: Store, config: str, part: int) -> LoadedPart:
    """Load a part with DGL's loader and its debug assertions."""
    added = "DGL_DIST_DEBUG" not in os.environ
    os.environ.setdefault("DGL_DIST_DEBUG", "1")
    try:
        graph, feats, *_ = dgl.distributed.load_partition(config, part)
    except AssertionError as error:
        raise Failure(f"{config}: part {part} fails DGL's own checks ({error}); {store.remedy}") from error
    finally:
        if added:
            del os.environ["DGL_DIST_DEBUG"]
    for name in ("gid", "snapshot", *(["trainer_id"] if store.trainers > 1 else [])):
        if f"_N/{name}" not in feats:
            raise Failure(f"{config}: part {part}: node field '{name}' is missing; {store.remedy}")
    return graph, feats
