"""Write a store: DistDGL partitions of every snapshot, snapshots.csv, parts.csv and manifest.yaml (docs/formats.md).

A store is a sequence of *shards*. Each shard is one graph in DistDGL's on-disk format that holds several snapshots side by
side, so that DGL's loaders and servers accept it. Memory is bounded by one snapshot's nodes and one part's edges: the parts
of each snapshot are first written to a spool folder (snapshot.py), then joined into shards part by part. Everything is
written under OUT.partial and renamed at the end; an interrupted run continues after its last complete snapshot.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dgl
import numpy as np
import pandas as pd
import torch
import yaml
from dist_egnn.partition import assign, snapshot
from dist_egnn.partition.snapshot import Inputs
from numpy import ndarray as Array

from dist_egnn import __version__
from dist_egnn.data.samples import Snapshot, select_snapshots
from dist_egnn.data.store import FORMAT, GRAPH, VERSION
from dist_egnn.data.store_inputs import DEFAULT_INPUTS
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure
from dist_egnn.utils import part_weights
from dist_egnn.utils.filesystem import describe_os_error, replace_file, save_verified, sha256

if TYPE_CHECKING:
    from dist_egnn.config import Data

SHARD_NODES = 262_144  # loading a part of a shard costs little beside a training step, and files are few
# trainer_id only if a part has several trainers
NODE_FIELDS = ("x", "v", "f", "a", "y", "gid", "snapshot", "trainer_id")


def build_inputs(
    data: Trajectories,
    *,
    parts: int,
    trainers: int = 1,
    weights: Sequence[float] | None = None,
    method: str,
    method_seed: int = 0,
    settings: Data,
    shard_nodes: int = SHARD_NODES,
) -> Inputs:
    """The inputs of a store from a config's data section; `data.features` of null means every node attribute, then speed.

    weights: (parts × trainers,) share of each graph that a process is to own, in any unit.
    Raises Failure for an unknown method, invalid counts and weights that the method cannot follow.
    """
    assign.check_method(method, parts)
    if trainers < 1:
        raise Failure(f"trainers={trainers}: must be at least 1")
    weights = part_weights.validate(weights, parts * trainers)
    assign.check_method(method, parts, weights)
    values = {name: value for name, value in vars(settings).items() if name in Inputs.__dataclass_fields__}
    features = [*data[0].attributes, "speed"] if settings.features is None else settings.features
    values |= {"features": tuple(features), "node_attributes": tuple(settings.node_attributes)}
    values |= {"radius": float(settings.radius), "edge_drop": float(settings.edge_drop)}
    return Inputs(
        source=data.path.name,
        source_sha256=sha256(data.path),
        parts=parts,
        trainers=trainers,
        weights=weights,
        method=method,
        method_seed=method_seed,
        shard_nodes=shard_nodes,
        **values,
    )


def list_snapshots(data: Trajectories, inputs: Inputs) -> list[Snapshot]:
    """The snapshots of a store. Raises Failure for a trajectory with too few nodes or without a necessary periodic box."""
    for k, trajectory in enumerate(data):
        if trajectory.nodes < inputs.processes:
            parts = f"{inputs.parts} parts" + (f" of {inputs.trainers} trainers" if inputs.trainers > 1 else "")
            raise Failure(f"{data.path}: trajectory {k} has {trajectory.nodes} nodes, fewer than {parts}; use fewer")
        if inputs.weights is not None:
            part_weights.sizes(trajectory.nodes, inputs.weights)
        if inputs.periodic:
            data.sides(k, inputs.radius)
    frames = inputs.frames, inputs.first_frame, inputs.last_frame, inputs.frame_seed
    return list(select_snapshots(data, inputs.horizon, *frames))


def check_inputs(data: Trajectories, inputs: Inputs) -> list[Snapshot]:
    """`list_snapshots`; also raises Failure if memory does not suffice for the largest snapshot."""
    selected = list_snapshots(data, inputs)
    if selected and snapshot.needs_all_edges(inputs):
        k, frame = max(((s.trajectory, s.frame) for s in selected), key=lambda one: data[one[0]].nodes)
        side = data.sides(k, inputs.radius) if inputs.periodic else None
        snapshot.check_memory(data.position(k, frame), inputs, side, f"{data.path}: trajectory {k}")
    return selected


def _shards(data: Trajectories, selected: list[Snapshot], limit: int) -> Iterator[range]:
    """Ranges of consecutive snapshots that share a graph of up to ``limit`` nodes, at least one each; 0: all in one."""
    first, nodes = 0, 0
    for index, item in enumerate(selected):
        size = data[item.trajectory].nodes
        if limit and index > first and nodes + size > limit:
            yield range(first, index)
            first, nodes = index, 0
        nodes += size
    yield range(first, len(selected))


def _starts(counts: Array, axis: int = 0) -> Array:
    """Where each of consecutive runs of these lengths begins, and the end of the last."""
    zero = np.zeros_like(counts.take([0], axis))
    return np.concatenate([zero, np.cumsum(counts, axis)], axis)


def _write_shard(folder: Path, spool: Path, indices: range, counts: Array) -> None:
    """Join the spooled parts of a shard's snapshots into DistDGL partitions. counts: (snapshots, parts, 2) nodes, edges."""
    # global ids: part after part, within a part snapshot after snapshot
    node_lo, edge_lo = _starts(counts[..., 0].sum(0)), _starts(counts[..., 1].sum(0))
    within = _starts(counts[..., 0])  # (snapshots + 1, parts): first node of a snapshot in its part
    starts = _starts(counts[..., 0], 1)  # (snapshots, parts + 1): first node of a part in its snapshot
    parts = counts.shape[1]
    meta: dict[str, Any] = {
        "graph_name": GRAPH,
        "num_nodes": int(node_lo[-1]),
        "num_edges": int(edge_lo[-1]),
        "part_method": "dist_egnn",
        "num_parts": parts,
        "halo_hops": 1,
        "node_map": {"_N": [list(ends) for ends in itertools.pairwise(node_lo.tolist())]},
        "edge_map": {"_N:_E:_N": [list(ends) for ends in itertools.pairwise(edge_lo.tolist())]},
        "ntypes": {"_N": 0},
        "etypes": {"_N:_E:_N": 0},
    }
    for p in range(parts):
        inner, edges = int(node_lo[p + 1] - node_lo[p]), int(edge_lo[p + 1] - edge_lo[p])
        src, dst = np.empty(edges, np.int64), np.empty(edges, np.int64)
        edges_done, halo_done = 0, 0
        halo_ids = []
        rows: dict[str, list[Array]] = defaultdict(list)
        for s, index in enumerate(indices):
            with np.load(spool / f"{index:06d}-{p}.npz") as arrays:
                n, halo, own_src = counts[s, p, 0], arrays["halo"], arrays["src"]
                here = slice(edges_done, edges_done := edges_done + len(own_src))
                src[here], dst[here] = own_src, arrays["dst"]
                dst[here] += within[s, p]
                src[here] += np.where(own_src < n, within[s, p], inner + halo_done - n)
                owner = np.searchsorted(starts[s], halo, side="right") - 1
                halo_ids.append(node_lo[owner] + within[s, owner] + halo - starts[s, owner])
                halo_done += len(halo)
                for name in NODE_FIELDS:
                    if name in arrays:
                        rows[name].append(arrays[name])
        graph = dgl.graph((torch.from_numpy(src), torch.from_numpy(dst)), num_nodes=inner + halo_done)
        ids = np.concatenate([np.arange(node_lo[p], node_lo[p + 1]), *halo_ids])
        graph.ndata[dgl.NID] = torch.from_numpy(ids)
        graph.ndata["inner_node"] = (torch.arange(inner + halo_done) < inner).to(torch.uint8)
        graph.edata[dgl.EID] = torch.arange(edge_lo[p], edge_lo[p + 1])
        graph.edata["inner_edge"] = torch.ones(graph.num_edges(), dtype=torch.uint8)
        features = {f"_N/{name}": torch.from_numpy(np.concatenate(value)) for name, value in rows.items()}
        _save_part(folder / f"part{p}", graph, features)
        files = {"node_feats": "node_feat", "edge_feats": "edge_feat", "part_graph": "graph"}
        meta[f"part-{p}"] = {key: f"part{p}/{name}.dgl" for key, name in files.items()}
    (folder / f"{GRAPH}.json").write_text(json.dumps(meta, indent=1))


def _save_part(folder: Path, graph: dgl.DGLGraph, features: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # int64: both ends and the number of an edge, the number of a node; one byte: inner or not
    size = 25 * graph.num_edges() + 9 * graph.num_nodes()
    save_verified(folder / "graph.dgl", size, functools.partial(dgl.save_graphs, g_list=[graph], formats=["coo"]))
    tables: dict[str, dict[str, torch.Tensor]] = {"node_feat": features, "edge_feat": {}}
    for name, tensors in tables.items():
        size = sum(tensor.nbytes for tensor in tensors.values())
        save_verified(folder / f"{name}.dgl", size, functools.partial(dgl.data.utils.save_tensors, tensor_dict=tensors))


def _names_inputs(file: Path, inputs: Inputs) -> bool:
    """Whether a manifest.yaml or an unfinished run's inputs.json exists and names these inputs."""
    try:
        text = file.read_text()
        stored = yaml.safe_load(text)["inputs"] if file.suffix == ".yaml" else json.loads(text)
        return DEFAULT_INPUTS | stored == inputs.plain()
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False


def _open_folder(out: Path, inputs: Inputs) -> Path | None:
    """The working folder, with what an earlier run of the same inputs left there; None if the store is complete."""
    if out.exists():
        if _names_inputs(out / "manifest.yaml", inputs):
            return None
        raise Failure(f"{out}: exists and is not a store of these settings; remove it or choose another --out")
    work = out.with_name(out.name + ".partial")
    stamp = work / "inputs.json"
    if not stamp.exists() and _names_inputs(work / "manifest.yaml", inputs):  # only the last rename was missing
        os.replace(work, out)
        return None
    if work.exists() and not _names_inputs(stamp, inputs):
        raise Failure(f"{work}: left by an unfinished run with other settings; remove it or choose another --out")
    created = not work.exists()
    work.mkdir(parents=True, exist_ok=True)
    try:
        replace_file(stamp, json.dumps(inputs.plain()).encode())
    except OSError:
        if created:  # without its stamp the folder would be refused as another run's
            shutil.rmtree(work)
        raise
    return work


def write_store(data: Trajectories, out: Path, inputs: Inputs, progress: Callable[[int, int], None]) -> bool:
    """Write the store of a trajectories file to ``out``; False if it is complete already.

    progress(done, total) is called after each snapshot. Raises Failure for inputs that cannot be partitioned, for an
    ``out`` with other content, and for write errors; complete snapshots are kept, and the same call continues.
    """
    selected = check_inputs(data, inputs)
    try:
        work = _open_folder(out, inputs)
        if work is not None:
            shards = _write_shards(data, work, inputs, selected, progress)
            _finish(work, out, inputs, shards)
    except OSError as error:
        raise Failure(f"{describe_os_error(error, out)}; correct this and run the same command to continue") from error
    return work is not None


def _write_shards(
    data: Trajectories, work: Path, inputs: Inputs, selected: list[Snapshot], progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Write all shards that are missing; returns what _finish needs of each."""
    spool = work / "spool"
    spool.mkdir(exist_ok=True)
    shards: list[dict[str, Any]] = []
    for k, indices in enumerate(_shards(data, selected, inputs.shard_nodes)):
        shard = f"shard-{k:05d}"
        complete = work / f"{shard}.json"  # written last
        if not complete.is_file():
            rows = []
            for index in indices:
                mark = spool / f"{index:06d}.json"
                if not mark.is_file():
                    row = snapshot.write_parts(data, selected[index], index, inputs, spool)
                    replace_file(mark, json.dumps(row).encode())
                rows.append(json.loads(mark.read_text()))
                progress(index + 1, len(selected))
            shutil.rmtree(work / shard, ignore_errors=True)
            counts = np.array([r["parts"] for r in rows])[:, :, :2]
            counts = counts.reshape(len(rows), inputs.parts, inputs.trainers, 2).sum(2)
            _write_shard(work / shard, spool, indices, counts)
            files = {str(f.relative_to(work)): sha256(f) for f in sorted((work / shard).rglob("*")) if f.is_file()}
            replace_file(complete, json.dumps({"rows": rows, "files": files, "shard": shard}).encode())
            for index in indices:
                for file in spool.glob(f"{index:06d}*"):
                    file.unlink()
        progress(indices.stop, len(selected))
        shards.append(json.loads(complete.read_text()))
    return shards


def _finish(work: Path, out: Path, inputs: Inputs, shards: list[dict[str, Any]]) -> None:
    """Write the tables and the manifest, then rename the folder, which makes it a store."""
    rows = [{**r["row"], "shard": shard["shard"]} for shard in shards for r in shard["rows"]]
    parts = [
        (r["row"]["snapshot"], part, *counts)
        for shard in shards
        for r in shard["rows"]
        for part, counts in enumerate(r["parts"])
    ]
    pd.DataFrame(rows).to_csv(work / "snapshots.csv", index=False)
    columns = ["snapshot", "part", "nodes", "edges", "cut_edges", "halo"]
    pd.DataFrame(parts, columns=columns).to_csv(work / "parts.csv", index=False)
    files = {name: digest for shard in shards for name, digest in shard["files"].items()}
    files.update({name: sha256(work / name) for name in ("snapshots.csv", "parts.csv")})
    packages = {"dgl": dgl.__version__, "torch": str(torch.__version__), "numpy": np.__version__}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": inputs.plain(),
        "versions": {"dist_egnn": __version__, **packages},
        "files": files,
    }
    (work / "manifest.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
    shutil.rmtree(work / "spool")
    for file in [*work.glob("shard-*.json"), work / "inputs.json"]:  # inputs.json last, see _open_folder
        file.unlink()
    os.replace(work, out)


def compare_methods(data: Trajectories, inputs: Inputs) -> list[tuple[str, assign.Quality, float]]:
    """Apply every method that can follow the weights to the first snapshot: name, quality, seconds."""
    first = list_snapshots(data, inputs)[0]
    fields, wrapped, side = snapshot.node_arrays(data, first, inputs)
    src, dst = snapshot.all_edges(fields["x"], replace(inputs, method="metis"), side, str(data.path))
    rows = []
    for name in assign.METHODS:
        try:
            assign.check_method(name, inputs.parts, inputs.weights)
        except Failure:
            continue
        started = time.perf_counter()
        owner = snapshot.assign_ranks(name, wrapped, src, dst, inputs)
        seconds = time.perf_counter() - started
        rows.append((name, assign.quality(owner, src, dst, inputs.processes, inputs.weights), seconds))
    return rows
