"""Check a store against itself and against its own positions."""

from __future__ import annotations

import os
from collections.abc import Callable

import dgl
import numpy as np
from torch import Tensor

from dist_egnn.data import graphs
from dist_egnn.data.store import GRAPH, Store
from dist_egnn.errors import Failure


def verify(store: Store, progress: Callable[[int, int], None]) -> dict[str, int]:
    """Re-check every file and every snapshot; returns what was counted. Raises Failure at the first thing that is wrong.

    Hashes; the same snapshots in every part; every node in exactly one part; every edge that the positions and the radius
    ask for in exactly one part, and no other; no value that is not finite; DGL's own loader with its own checks on.
    """
    listed = {str(f.relative_to(store.path)) for f in store.path.rglob("*") if f.is_file()} - {"manifest.yaml"}
    if extra := sorted(listed - set(store.manifest["files"])):
        raise Failure(f"{store.path / extra[0]}: not in the manifest; remove it or partition again")
    for name in store.manifest["files"]:
        store.disk.verify(name)
    nodes = edges = 0
    for shard, rows in store.snapshots.groupby("shard", sort=False).indices.items():
        config = str(store.path / shard / f"{GRAPH}.json")
        held = [_load(config, p, store.trainers) for p in range(store.machines)]
        # global id → (node of the snapshot), for the sources that live elsewhere
        gid_of = np.concatenate([feats["_N/gid"].numpy() for _, feats in held])
        snapshot_of = np.concatenate([feats["_N/snapshot"].numpy() for _, feats in held])
        if extra := sorted(set(snapshot_of.tolist()) - set(rows.tolist())):
            raise Failure(f"{config}: holds snapshot {extra[0]}, snapshots.csv does not list it there; partition again")
        for snapshot in rows:
            row = store.snapshots.loc[snapshot]
            where = f"{store.path}: snapshot {snapshot}"
            for r in range(store.parts):
                _check_owned(store, int(snapshot), r, held[r // store.trainers][1])
            own = snapshot_of == snapshot
            gid = gid_of[own]
            n = int(row["nodes"])
            if len(gid) != n or len(np.unique(gid)) != n or gid.min() != 0 or gid.max() != n - 1:
                raise Failure(f"{where}: its {n} nodes are not each in exactly one part; partition again")
            found = []
            for graph, feats in held:
                src, dst = (t.numpy() for t in graph.edges(order="eid"))
                inner = feats["_N/snapshot"].numpy()[dst] == snapshot
                ids = graph.ndata[dgl.NID].numpy()
                if (snapshot_of[ids[src[inner]]] != snapshot).any():
                    raise Failure(f"{where}: an edge joins two snapshots; partition again")
                found.append(gid_of[ids[src[inner]]] * n + gid_of[ids[dst[inner]]])
            x = store.whole(int(snapshot)).ndata["x"].numpy()  # also checks fields, shapes and NaN
            side = store.sides(int(snapshot))
            src, dst = graphs.sample_edges(x, store.inputs["radius"], store.inputs["edge_drop"], side)
            if not np.array_equal(np.sort(np.concatenate(found)), np.sort(src * n + dst)):
                raise Failure(f"{where}: its edges are not those of its positions, each once; partition again")
            nodes, edges = nodes + n, edges + len(src)
            progress(int(snapshot) + 1, len(store.snapshots))
    return {"files": len(store.manifest["files"]), "snapshots": len(store.snapshots), "nodes": nodes, "edges": edges}


def _check_owned(store: Store, snapshot: int, rank: int, feats: dict[str, Tensor]) -> None:
    """Raise Failure unless the rank's nodes of a snapshot are as many as parts.csv says, and where it says."""
    lo, hi = store.ranges[snapshot, rank, :2].tolist()
    own = feats["_N/snapshot"] == snapshot
    if store.trainers > 1:
        own &= feats["_N/trainer_id"] == rank
    if int(own.sum()) != hi - lo or not own[lo:hi].all():
        raise Failure(
            f"{store.path}: snapshot {snapshot}: part {rank} holds {int(own.sum())} nodes of it, parts.csv says {hi - lo}"
            f"{', others' * (int(own.sum()) == hi - lo)}; partition again"
        )


def _load(config: str, part: int, trainers: int):
    """A part by DGL's loader, its own assertions switched on."""
    before = os.environ.get("DGL_DIST_DEBUG")
    os.environ["DGL_DIST_DEBUG"] = "1"
    try:
        graph, feats, *_ = dgl.distributed.load_partition(config, part)
    except AssertionError as error:
        raise Failure(f"{config}: part {part} does not pass DGL's own checks ({error}); partition again") from error
    finally:
        if before is None:
            del os.environ["DGL_DIST_DEBUG"]
        else:
            os.environ["DGL_DIST_DEBUG"] = before
    for name in ("gid", "snapshot", *(["trainer_id"] if trainers > 1 else [])):
        if f"_N/{name}" not in feats:
            raise Failure(f"{config}: part {part}: node field '{name}' is missing; partition again")
    return graph, feats
