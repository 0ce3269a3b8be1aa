"""Write a store: DistDGL partitions of every snapshot, snapshots.csv, parts.csv and manifest.yaml. See docs/formats.md.

A store is a row of *shards*, each one graph in DistDGL's own on-disk format that holds several snapshots side by side, so
that DGL's loaders and servers accept it. Memory stays within one snapshot's nodes plus one part's edges (pieces.py): the pieces of
each snapshot are spooled to disk, then put together part by part. Everything is written under OUT.partial and renamed at
the end; a run that was killed goes on from the last complete snapshot.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dgl
import numpy as np
import pandas as pd
import torch
import yaml
from dist_egnn.partition import assign, snapshot
from dist_egnn.partition.snapshot import Inputs

from dist_egnn import __version__
from dist_egnn.data.samples import Snapshot, select_snapshots
from dist_egnn.data.store import FORMAT, GRAPH, VERSION
from dist_egnn.data.store_inputs import DEFAULT_INPUTS
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure
from dist_egnn.utils import disk, part_weights

SHARD_NODES = 262_144  # small enough that loading a part costs little beside a step, large enough to keep files few
NODE_FIELDS = (
    "x",
    "v",
    "f",
    "a",
    "y",
    "gid",
    "snapshot",
    "trainer_id",
)  # the last one with several trainers a part only


def sha256(path: Path) -> str:
    """The hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inputs_of(
    data: Trajectories,
    *,
    parts: int,
    trainers: int = 1,
    weights: Sequence[float] | None = None,
    method: str,
    method_seed: int,
    settings: Any,
    shard_nodes: int,
) -> Inputs:
    """The inputs of a store from a config's data section. ``features: null`` means every node attribute, then speed.

    weights: what each process, parts × trainers, is to own of each graph, in any unit.
    """
    assign.check(method, parts)
    if trainers < 1:
        raise Failure(f"trainers={trainers}: must be at least 1")
    weights = part_weights.of(weights, parts * trainers)
    assign.check(method, parts, weights)
    features = settings.features
    if features is None:
        features = [*data[0].attributes, "speed"]
    return Inputs(
        source=data.path.name,
        source_sha256=sha256(data.path),
        parts=parts,
        trainers=trainers,
        weights=weights,
        method=method,
        method_seed=method_seed,
        radius=float(settings.radius),
        horizon=settings.horizon,
        features=tuple(features),
        node_attributes=tuple(settings.node_attributes),
        edge_drop=float(settings.edge_drop),
        periodic=settings.periodic,
        frames=settings.frames,
        first_frame=settings.first_frame,
        last_frame=settings.last_frame,
        frame_seed=settings.frame_seed,
        shard_nodes=shard_nodes,
    )


def listing(data: Trajectories, inputs: Inputs) -> list[Snapshot]:
    """The snapshots of a store. Raises Failure where one has fewer nodes than parts, or than its weights need, or not the
    periodic box it needs."""
    for k, trajectory in enumerate(data):
        if trajectory.nodes < inputs.processes:
            many = (
                f"{inputs.parts} parts of {inputs.trainers} trainers"
                if inputs.trainers > 1
                else f"{inputs.parts} parts"
            )
            raise Failure(f"{data.path}: trajectory {k} has {trajectory.nodes} nodes, fewer than {many}; take fewer")
        if inputs.weights is not None:
            part_weights.sizes(trajectory.nodes, inputs.weights)
        if inputs.periodic:
            data.sides(k, inputs.radius)
    return list(
        select_snapshots(data, inputs.horizon, inputs.frames, inputs.first_frame, inputs.last_frame, inputs.frame_seed)
    )


def check(data: Trajectories, inputs: Inputs) -> list[Snapshot]:
    """The snapshots of a store. Raises Failure where `listing` does, and where memory would not do for the largest: before there
    is anything to remove."""
    listed = listing(data, inputs)
    if listed and snapshot.in_memory(inputs):
        k, frame = max(((s.trajectory, s.frame) for s in listed), key=lambda one: data[one[0]].nodes)
        side = data.sides(k, inputs.radius) if inputs.periodic else None
        snapshot.check_memory(data.position(k, frame), inputs, side, f"{data.path}: trajectory {k}")
    return listed


def _shards(data: Trajectories, listed: list[Snapshot], limit: int) -> Iterator[range]:
    """Consecutive snapshots that share a graph: up to ``limit`` nodes, at least one snapshot; 0: all in one."""
    first, nodes = 0, 0
    for index, listed_snapshot in enumerate(listed):
        size = data[listed_snapshot.trajectory].nodes
        if limit and index > first and nodes + size > limit:
            yield range(first, index)
            first, nodes = index, 0
        nodes += size
    yield range(first, len(listed))


def _assemble(folder: Path, spool: Path, indices: range, counts: np.ndarray) -> None:
    """Put a shard's pieces together: one DistDGL partition after the other. counts: (snapshots, parts, 2) nodes, edges."""
    parts = counts.shape[1]
    # global ids: part after part, within a part snapshot after snapshot
    node_lo = np.concatenate([[0], np.cumsum(counts[:, :, 0].sum(0))])
    edge_lo = np.concatenate([[0], np.cumsum(counts[:, :, 1].sum(0))])
    within = np.cumsum(counts[:, :, 0], 0) - counts[:, :, 0]
    starts = np.concatenate([np.zeros((len(indices), 1), np.int64), np.cumsum(counts[:, :, 0], 1)], 1)
    meta: dict[str, Any] = {
        "graph_name": GRAPH,
        "num_nodes": int(node_lo[-1]),
        "num_edges": int(edge_lo[-1]),
        "part_method": "dist_egnn",
        "num_parts": parts,
        "halo_hops": 1,
        "node_map": {"_N": [[int(a), int(b)] for a, b in itertools.pairwise(node_lo)]},
        "edge_map": {"_N:_E:_N": [[int(a), int(b)] for a, b in itertools.pairwise(edge_lo)]},
        "ntypes": {"_N": 0},
        "etypes": {"_N:_E:_N": 0},
    }
    for p in range(parts):
        inner = int(node_lo[p + 1] - node_lo[p])
        edges, seen = int(edge_lo[p + 1] - edge_lo[p]), 0
        src, dst = np.empty(edges, np.int64), np.empty(edges, np.int64)
        halo_ids, halo_seen = [], 0
        rows: dict[str, list[np.ndarray]] = defaultdict(list)
        for s, index in enumerate(indices):
            with np.load(spool / f"{index:06d}-{p}.npz") as piece:
                n, halo, from_ = counts[s, p, 0], piece["halo"], piece["src"]
                here = slice(seen, seen := seen + len(from_))
                src[here], dst[here] = from_, piece["dst"]
                dst[here] += within[s, p]
                src[here] += np.where(from_ < n, within[s, p], inner + halo_seen - n)
                owner = np.searchsorted(starts[s], halo, side="right") - 1
                halo_ids.append(node_lo[owner] + within[s, owner] + halo - starts[s, owner])
                halo_seen += len(halo)
                for name in (name for name in NODE_FIELDS if name in piece):
                    rows[name].append(piece[name])
        graph = dgl.graph((torch.from_numpy(src), torch.from_numpy(dst)), num_nodes=inner + halo_seen)
        ids = np.concatenate([np.arange(node_lo[p], node_lo[p + 1]), *halo_ids])
        graph.ndata[dgl.NID] = torch.from_numpy(ids)
        graph.ndata["inner_node"] = (torch.arange(inner + halo_seen) < inner).to(torch.uint8)
        graph.edata[dgl.EID] = torch.arange(edge_lo[p], edge_lo[p + 1])
        graph.edata["inner_edge"] = torch.ones(graph.num_edges(), dtype=torch.uint8)
        target = folder / f"part{p}"
        target.mkdir(parents=True, exist_ok=True)
        features = {f"_N/{name}": torch.from_numpy(np.concatenate(value)) for name, value in rows.items()}
        # int64: both ends and the number of an edge, the number of a node; bytes: inner or not
        size = 25 * graph.num_edges() + 9 * graph.num_nodes()
        disk.save(target / "graph.dgl", size, functools.partial(dgl.save_graphs, g_list=[graph], formats=["coo"]))
        for name, tensors in (("node_feat", features), ("edge_feat", {})):
            size = sum(tensor.nbytes for tensor in tensors.values())
            disk.save(target / f"{name}.dgl", size, functools.partial(dgl.data.utils.save_tensors, tensor_dict=tensors))
        meta[f"part-{p}"] = {
            "node_feats": f"part{p}/node_feat.dgl",
            "edge_feats": f"part{p}/edge_feat.dgl",
            "part_graph": f"part{p}/graph.dgl",
        }
    (folder / f"{GRAPH}.json").write_text(json.dumps(meta, indent=1))


def _write_atomically(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    os.replace(fresh, path)


def _made_with(inputs: Inputs, file: Path) -> bool:
    """Whether a manifest or an unfinished run's stamp is there and names these inputs."""
    try:
        found = yaml.safe_load(file.read_text()) if file.suffix == ".yaml" else {"inputs": json.loads(file.read_text())}
        return DEFAULT_INPUTS | found["inputs"] == inputs.plain()
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False


def _begin(out: Path, inputs: Inputs) -> Path | None:
    """The folder to work in, with what an earlier run of the same inputs left there; None if the store is complete."""
    if out.exists():
        if _made_with(inputs, out / "manifest.yaml"):
            return None
        raise Failure(f"{out}: exists and is not a store of these settings; remove it or choose another --out")
    work = out.with_name(out.name + ".partial")
    stamp = work / "inputs.json"
    if not stamp.exists() and _made_with(inputs, work / "manifest.yaml"):  # only the last rename was missing
        os.replace(work, out)
        return None
    if work.exists() and not _made_with(inputs, stamp):
        raise Failure(f"{work}: left by an unfinished run with other settings; remove it or choose another --out")
    fresh = not work.exists()
    work.mkdir(parents=True, exist_ok=True)
    try:
        _write_atomically(stamp, json.dumps(inputs.plain()))
    except OSError:
        if fresh:  # without the stamp it would look like somebody else's
            shutil.rmtree(work)
        raise
    return work


def write(data: Trajectories, out: Path, inputs: Inputs, progress: Callable[[int, int], None]) -> bool:
    """Write the store of a trajectories file to ``out``; False if it stands there complete already.

    progress(done, all) is called after each snapshot. Raises Failure for inputs that cannot be partitioned, for an
    ``out`` that holds something else, and where something cannot be written; what is complete stays.
    """
    listed = check(data, inputs)
    try:
        return _write(data, out, inputs, listed, progress)
    except OSError as error:
        raise Failure(f"{disk.reason(error, out)}; once that is mended the same command goes on") from error


def _write(
    data: Trajectories, out: Path, inputs: Inputs, listed: list[Snapshot], progress: Callable[[int, int], None]
) -> bool:
    work = _begin(out, inputs)
    if work is None:
        return False
    spool = work / "spool"
    spool.mkdir(exist_ok=True)
    done: list[dict[str, Any]] = []
    for k, indices in enumerate(_shards(data, listed, inputs.shard_nodes)):
        shard = f"shard-{k:05d}"
        complete = work / f"{shard}.json"  # written last: its shard is whole
        if not complete.is_file():
            rows = []
            for index in indices:
                mark = spool / f"{index:06d}.json"
                if not mark.is_file():
                    _write_atomically(mark, json.dumps(snapshot.write(data, listed[index], index, inputs, spool)))
                rows.append(json.loads(mark.read_text()))
                progress(index + 1, len(listed))
            shutil.rmtree(work / shard, ignore_errors=True)
            counts = np.array([r["parts"] for r in rows])[:, :, :2]
            counts = counts.reshape(len(rows), inputs.parts, inputs.trainers, 2).sum(2)
            _assemble(work / shard, spool, indices, counts)
            files = {str(f.relative_to(work)): sha256(f) for f in sorted((work / shard).rglob("*")) if f.is_file()}
            _write_atomically(complete, json.dumps({"rows": rows, "files": files, "shard": shard}))
            for index in indices:
                for piece in spool.glob(f"{index:06d}*"):
                    piece.unlink()
        progress(indices.stop, len(listed))
        done.append(json.loads(complete.read_text()))
    _finish(work, out, inputs, done)
    return True


def _finish(work: Path, out: Path, inputs: Inputs, done: list[dict[str, Any]]) -> None:
    """The tables and the manifest, then the rename that makes it a store."""
    rows = [{**r["row"], "shard": shard["shard"]} for shard in done for r in shard["rows"]]
    parts = [
        {
            "snapshot": r["row"]["snapshot"],
            "part": p,
            **dict(zip(("nodes", "edges", "cut_edges", "halo"), one, strict=True)),
        }
        for shard in done
        for r in shard["rows"]
        for p, one in enumerate(r["parts"])
    ]
    pd.DataFrame(rows).to_csv(work / "snapshots.csv", index=False)
    pd.DataFrame(parts).to_csv(work / "parts.csv", index=False)
    files = {name: digest for shard in done for name, digest in shard["files"].items()}
    files.update({name: sha256(work / name) for name in ("snapshots.csv", "parts.csv")})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": inputs.plain(),
        "versions": {
            "dist_egnn": __version__,
            "dgl": dgl.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "files": files,
    }
    (work / "manifest.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
    shutil.rmtree(work / "spool")
    for leftover in [*work.glob("shard-*.json"), work / "inputs.json"]:  # the stamp last, see _begin
        leftover.unlink()
    os.replace(work, out)


def compare(data: Trajectories, inputs: Inputs) -> list[tuple[str, assign.Quality, float]]:
    """Every method that can (follow the weights) on the first snapshot: its name, what its cut costs, the seconds it took."""
    first = listing(data, inputs)[0]
    fields, place, side = snapshot.nodes_of(data, first, inputs)
    src, dst = snapshot.edges_of(fields["x"], replace(inputs, method="metis"), side, str(data.path))
    rows = []
    for name in assign.METHODS:
        try:
            assign.check(name, inputs.parts, inputs.weights)
        except Failure:
            continue
        started = time.perf_counter()
        owner = snapshot.owners(name, place, src, dst, inputs)
        seconds = time.perf_counter() - started
        rows.append((name, assign.quality(owner, src, dst, inputs.processes, inputs.weights), seconds))
    return rows
