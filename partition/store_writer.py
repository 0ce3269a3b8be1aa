"""Write a store: DistDGL partitions of every snapshot, snapshots.csv, parts.csv and manifest.yaml (docs/formats.md).

A store is a sequence of *shards*: graphs in DistDGL's on-disk format, each of several snapshots side by side. The parts
of each snapshot are first written to a spool folder (snapshot.py), then joined into shards part by part, all under
OUT.partial, which is renamed at the end. An interrupted run continues after its last complete snapshot.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dgl
import numpy as np
import pandas as pd
import torch
import yaml
from dist_egnn.partition import assign, snapshot
from dist_egnn.partition.snapshot import Inputs
from numpy import ndarray as Array

from dist_egnn import __version__
from dist_egnn.config import Data
from dist_egnn.data import checks, identity
from dist_egnn.data.edges import edges_of
from dist_egnn.data.fixed_nodes import check_fixed
from dist_egnn.data.samples import (
    Snapshot,
    count_columns,
    displacement_scale,
    given_edges,
    length_unit,
    select_snapshots,
    surroundings,
)
from dist_egnn.data.store import FORMAT, GRAPH, MOVING, NODE_FIELDS, VERSION, Store
from dist_egnn.data.store_inputs import DEFAULT_INPUTS
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure
from dist_egnn.utils import part_weights
from dist_egnn.utils.filesystem import describe_os_error, lock_output, replace_file, save_verified, sha256

SHARD_NODES = 262_144  # loading a part of a shard costs little beside a training step, and files are few
OWN_FIELDS = (*NODE_FIELDS, *MOVING, "past", "snapshot", "trainer_id")  # those that a part has: see docs/formats.md


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
    """The inputs of a store; `data.features` of null means every node attribute, then speed.

    weights: (parts × trainers,), in any unit. Raises Failure for an unknown method and for invalid counts and weights.
    """
    if trainers < 1:
        raise Failure(f"trainers={trainers}: must be at least 1")
    if shard_nodes < 0 or not 0 <= method_seed < 1 << 32:
        raise Failure(f"shard_nodes={shard_nodes}, seed={method_seed}: must be at least 0, and the seed below 2^32")
    weights = part_weights.validate(weights, parts * trainers)
    assign.check_method(method, parts, weights)
    values = {name: value for name, value in vars(settings).items() if name in Inputs.__dataclass_fields__}
    features = [*data[0].attributes, "speed"] if settings.features is None else settings.features
    values |= {"features": tuple(features), "node_attributes": tuple(settings.node_attributes)}
    values["gravity"] = None if settings.gravity is None else tuple(map(float, settings.gravity))
    widths = count_columns(data, features), count_columns(data, settings.node_attributes)
    values["widths"] = widths if widths != (len(features), len(settings.node_attributes)) else None
    values |= {"radius": float(settings.radius), "edge_drop": float(settings.edge_drop), "shard_nodes": shard_nodes}
    d = settings
    frames = d.frames, d.first_frame, d.last_frame, d.frame_seed, d.history + d.pushforward, d.velocity
    selected = select_snapshots(data, d.horizon, *frames)
    values["velocity_scale"] = displacement_scale(data, selected, d)
    inputs = Inputs(data.path.name, sha256(data.path), parts, trainers, weights, method, method_seed, **values)
    return replace(inputs, radius=length_unit(data, selected, inputs.sample))


def list_snapshots(data: Trajectories, inputs: Inputs) -> list[Snapshot]:
    """The snapshots of a store. Raises Failure for a trajectory with too few nodes or without a required box."""
    check_fixed(data, inputs.fixed)
    for k, trajectory in enumerate(data):
        if trajectory.nodes < inputs.processes:
            parts = f"{inputs.parts} parts" + (f" of {inputs.trainers} trainers" if inputs.trainers > 1 else "")
            raise Failure(f"{data.path}: trajectory {k} has {trajectory.nodes} nodes, fewer than {parts}; use fewer")
        if inputs.weights is not None:
            part_weights.sizes(trajectory.nodes, inputs.weights)
        if inputs.periodic:
            data.sides(k, inputs.rule.longest)
        given_edges(data, k, inputs.rule)
        surroundings(data, k, inputs.sample)
    frames = inputs.frames, inputs.first_frame, inputs.last_frame, inputs.frame_seed
    return select_snapshots(data, inputs.horizon, *frames, inputs.sample.past, inputs.velocity)


def check_inputs(data: Trajectories, inputs: Inputs) -> list[Snapshot]:
    """`list_snapshots`; also raises Failure if memory does not suffice for the largest snapshot."""
    selected = list_snapshots(data, inputs)
    if selected and snapshot.needs_all_edges(inputs):
        k, frame = max(((s.trajectory, s.frame) for s in selected), key=lambda pair: data[pair[0]].nodes)
        side = data.sides(k, inputs.rule.longest) if inputs.periodic else None
        given, where = given_edges(data, k, inputs.rule), f"{data.path}: trajectory {k}"
        snapshot.check_memory(data.position(k, frame), inputs, side, given, where)
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
    return np.cumsum(np.insert(counts, 0, 0, axis), axis)


def _write_shard(folder: Path, spool: Path, indices: range, counts: Array) -> None:
    """Join the spooled parts of snapshots into DistDGL partitions. counts: (snapshots, parts, …) of nodes and edges."""
    # global ids: part after part, within a part snapshot after snapshot
    node_lo, edge_lo = _starts(counts[..., 0].sum(0)), _starts(counts[..., 1].sum(0))
    within = _starts(counts[..., 0])  # (snapshots + 1, parts): first node of a snapshot in its part
    starts = _starts(counts[..., 0], 1)  # (snapshots, parts + 1): first node of a part in its snapshot
    parts = counts.shape[1]
    node_map, edge_map = (np.stack([lo[:-1], lo[1:]], 1).tolist() for lo in (node_lo, edge_lo))
    meta: dict[str, Any] = {"graph_name": GRAPH, "num_nodes": int(node_lo[-1]), "num_edges": int(edge_lo[-1])}
    meta |= {"part_method": "dist_egnn", "num_parts": parts, "halo_hops": 1}
    meta |= {"node_map": {"_N": node_map}, "edge_map": {"_N:_E:_N": edge_map}}
    meta |= {"ntypes": {"_N": 0}, "etypes": {"_N:_E:_N": 0}}
    for p in range(parts):
        inner, edges = int(node_lo[p + 1] - node_lo[p]), int(edge_lo[p + 1] - edge_lo[p])
        src, dst = np.empty(edges, np.int64), np.empty(edges, np.int64)
        edges_done, halo_done, halo_ids = 0, 0, []
        rows: dict[str, list[Array]] = {}
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
                for name in OWN_FIELDS:
                    if name in arrays:
                        rows.setdefault(name, []).append(arrays[name])
        graph = dgl.graph((torch.from_numpy(src), torch.from_numpy(dst)), num_nodes=inner + halo_done)
        ids = np.concatenate([np.arange(node_lo[p], node_lo[p + 1]), *halo_ids])
        graph.ndata[dgl.NID] = torch.from_numpy(ids)
        graph.ndata["inner_node"] = (torch.arange(inner + halo_done) < inner).to(torch.uint8)
        graph.edata[dgl.EID] = torch.arange(edge_lo[p], edge_lo[p + 1])
        graph.edata["inner_edge"] = torch.ones(graph.num_edges(), dtype=torch.uint8)
        features = {f"_N/{name}": torch.from_numpy(np.concatenate(value)) for name, value in rows.items()}
        part = folder / f"part{p}"
        part.mkdir(parents=True, exist_ok=True)
        # int64: both ends and the number of an edge, the number of a node; one byte: inner or not
        size = 25 * edges + 9 * len(ids)
        save_verified(part / "graph.dgl", size, partial(dgl.save_graphs, g_list=[graph], formats=["coo"]))
        size = sum(tensor.nbytes for tensor in features.values())
        save_verified(part / "node_feat.dgl", size, partial(dgl.data.utils.save_tensors, tensor_dict=features))
        save_verified(part / "edge_feat.dgl", 0, partial(dgl.data.utils.save_tensors, tensor_dict={}))
        files = {"node_feats": "node_feat", "edge_feats": "edge_feat", "part_graph": "graph"}
        meta[f"part-{p}"] = {key: f"part{p}/{name}.dgl" for key, name in files.items()}
    (folder / f"{GRAPH}.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _names_inputs(file: Path, inputs: Inputs) -> bool:
    """Whether a manifest.yaml or an unfinished run's inputs.json exists and names these inputs."""
    try:
        stored = (
            yaml.safe_load(file.read_text(encoding="utf-8"))["inputs"]
            if file.suffix == ".yaml"
            else json.loads(file.read_text(encoding="utf-8"))
        )
        return DEFAULT_INPUTS | stored == inputs.plain()
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False


def _open_folder(out: Path, inputs: Inputs) -> Path | None:
    """The working folder, with what an earlier run of the same inputs left there; None if the store is complete."""
    if out.exists():
        if _names_inputs(out / "manifest.yaml", inputs):
            try:
                Store(out).verify_files()
            except Failure as failure:
                remedy = f"remove the store (rm -r {out}), then run the same command again"
                raise Failure(f"{str(failure).rpartition(';')[0]}; {remedy}") from failure
            return None
        raise Failure(f"{out}: exists and is not a store of these settings; remove it or choose another --out")
    work = out.with_name(out.name + ".partial")
    stamp = work / "inputs.json"
    if not stamp.exists() and _names_inputs(work / "manifest.yaml", inputs):  # only the last rename was missing
        os.replace(work, out)
        return None
    if work.exists() and any(work.iterdir()) and not _names_inputs(stamp, inputs):
        raise Failure(f"{work}: left by an unfinished run with other settings; remove it or choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    replace_file(stamp, json.dumps(inputs.plain()).encode())
    return work


def write_store(data: Trajectories, out: Path, inputs: Inputs, progress: Callable[[int, int], None]) -> bool:
    """Write the store of a trajectories file to ``out``; False if it is complete already.

    progress(done, total) is called after each snapshot. Raises Failure for inputs that cannot be partitioned, for other
    content or a damaged store at ``out``, while another process writes it, and for write errors; complete snapshots stay,
    and the same call continues.
    """
    selected = check_inputs(data, inputs)
    doubts = checks.warn_of_content(data)
    try:
        with lock_output(out):
            if work := _open_folder(out, inputs):
                about = {"data": identity.of_file(data)} | ({"warnings": doubts} if doubts else {})
                _finish(work, out, inputs, about, _write_shards(data, work, inputs, selected, progress))
            return work is not None
    except OSError as error:
        raise Failure(f"{describe_os_error(error, out)}; correct this and run the same command to continue") from error


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
                rows.append(json.loads(mark.read_text(encoding="utf-8")))
                progress(index + 1, len(selected))
            shutil.rmtree(work / shard, ignore_errors=True)
            counts = np.reshape([row["parts"] for row in rows], (len(rows), inputs.parts, inputs.trainers, 4)).sum(2)
            _write_shard(work / shard, spool, indices, counts)
            files = {str(f.relative_to(work)): sha256(f) for f in sorted((work / shard).rglob("*")) if f.is_file()}
            replace_file(complete, json.dumps({"rows": rows, "files": files, "shard": shard}).encode())
            for file in spool.iterdir():
                file.unlink()
        progress(indices.stop, len(selected))
        shards.append(json.loads(complete.read_text(encoding="utf-8")))
    return shards


def _finish(work: Path, out: Path, inputs: Inputs, about: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Write the tables and the manifest, with ``about`` the data, then rename the folder, which makes it a store."""
    entries = [(shard["shard"], entry["row"], entry["parts"]) for shard in shards for entry in shard["rows"]]
    rows = [{**row, "shard": shard} for shard, row, _ in entries]
    parts = [(row["snapshot"], part, *counts) for _, row, ranks in entries for part, counts in enumerate(ranks)]
    pd.DataFrame(rows).to_csv(work / "snapshots.csv", index=False)
    columns = ["snapshot", "part", "nodes", "edges", "cut_edges", "halo"]
    pd.DataFrame(parts, columns=columns).to_csv(work / "parts.csv", index=False)
    files = {name: digest for shard in shards for name, digest in shard["files"].items()}
    files.update({name: sha256(work / name) for name in ("snapshots.csv", "parts.csv")})
    versions = {"dist_egnn": __version__} | {module.__name__: str(module.__version__) for module in (dgl, torch, np)}
    manifest = {"format": FORMAT, "version": VERSION, "inputs": inputs.plain(), "versions": versions, **about}
    manifest["files"] = files  # last: a truncated manifest lacks files, and the store is refused
    (work / "manifest.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")
    Store(work)  # what is renamed can be opened
    shutil.rmtree(work / "spool")
    for file in [*work.glob("shard-*.json"), work / "inputs.json"]:  # inputs.json last, see _open_folder
        file.unlink()
    os.replace(work, out)


def compare_methods(data: Trajectories, inputs: Inputs) -> list[tuple[str, assign.Quality, float]]:
    """Apply every method that can follow the weights to the first snapshot: name, quality, seconds."""
    read = snapshot.node_arrays(data, list_snapshots(data, inputs)[0], inputs)
    snapshot.check_memory(read.x, replace(inputs, method="metis"), read.side, read.given, str(data.path))
    src, dst = edges_of(read.x, inputs.rule, read.side, read.given)
    rows = []
    for name in assign.METHODS:
        try:
            assign.check_method(name, inputs.parts, inputs.weights)
        except Failure:
            continue
        started = time.perf_counter()
        owner = snapshot.assign_ranks(name, read.wrapped, src, dst, inputs)
        seconds = time.perf_counter() - started
        rows.append((name, assign.quality(owner, src, dst, inputs.processes, inputs.weights), seconds))
    return rows
