"""Read a store written by `distegnn partition`: one part of one snapshot as a DGLGraph.

A store holds *shards*: graphs in DistDGL's format that hold several snapshots side by side. A ``Source`` returns one
machine's part of a shard, from disk (``DiskSource``) or from a DistDGL server (graph_server.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import dgl
import numpy as np
import pandas as pd
import torch
import yaml
from dgl import DGLGraph
from torch import Tensor

from ..errors import Failure
from ..utils import part_weights
from ..utils.filesystem import sha256
from . import domain, fields, graphs, halo
from .edges import EdgeRule
from .samples import motion_statistics
from .store_inputs import DEFAULT_INPUTS, partition_command, remake

FORMAT, VERSION, GRAPH = "dist_egnn.store", 1, "dist_egnn"
SIDES = ("side_x", "side_y", "side_z")  # columns of snapshots.csv in a store with periodic boxes
NODE_FIELDS = ("x", "v", "f", "a", "y", "gid")
MOVING = ("moving_id", "moving")  # with data.fixed
EDGE_DIGEST = "edge_digest"  # column of snapshots.csv with data.edges=given: ``edges.edge_digest``
SQUARES = (
    "v_squares",
    "a_squares",
    "terms",
    "farthest",
)  # columns of snapshots.csv of a simulator: ``samples.squares``


@dataclass
class Part:
    """A machine's part of a shard: all its snapshots side by side. Inner nodes come first, then halo nodes."""

    src: Tensor  # (E,) local numbers, sorted by snapshot, then destination
    dst: Tensor
    inner: int
    nodes: dict[str, Tensor]  # fields of the inner nodes
    halo: Tensor  # global id of each halo node


class Source(Protocol):
    part: Callable[[str, int], Part]  # a machine's part of a shard


class DiskSource:
    """Load parts with DGL's loader and verify each file's sha256 once; the last two parts stay in memory."""

    def __init__(self, folder: Path, hashes: dict[str, str], remedy: str) -> None:
        self.folder, self.hashes, self.remedy = folder, hashes, remedy
        self.verify = functools.cache(self._verify)
        self.part: Callable[[str, int], Part] = functools.lru_cache(2)(self._load)

    def _verify(self, name: str) -> None:
        """Raise Failure unless the file has the sha256 that the manifest lists."""
        path = self.folder / name
        if not path.is_file():
            raise Failure(f"{path}: missing from the store; {self.remedy}")
        if sha256(path) != self.hashes.get(name):
            raise Failure(f"{path}: its sha256 is not the manifest's: damaged or changed; {self.remedy}")

    def config(self, shard: str, part: int) -> Path:
        """DGL's partition config of a shard, after verifying it and the part's files."""
        for name in (f"{GRAPH}.json", *(f"part{part}/{kind}.dgl" for kind in ("graph", "node_feat", "edge_feat"))):
            self.verify(f"{shard}/{name}")
        return self.folder / shard / f"{GRAPH}.json"

    def _load(self, shard: str, part: int) -> Part:
        graph, node_feats, *_ = dgl.distributed.load_partition(str(self.config(shard, part)), part)
        inner = int(graph.ndata["inner_node"].sum())
        nodes = {k.removeprefix("_N/"): t for k, t in node_feats.items()}
        src, dst = graph.edges(order="eid")
        return Part(src, dst, inner, nodes, graph.ndata[dgl.NID][inner:])


def open_store(path: str | Path) -> Store:
    """The store at a path: opened, hashed and parsed once per process, again only if its manifest has changed."""
    manifest = Path(path, "manifest.yaml")
    return _open(manifest.resolve().parent, manifest.stat().st_mtime_ns) if manifest.is_file() else Store(path)


@functools.lru_cache(8)
def _open(path: Path, _modified_ns: int) -> Store:
    return Store(path)


class Store:
    """A complete store. Raises Failure for a folder that is not a store, is unfinished, or has another version."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = self.path / "manifest.yaml"
        if not manifest.is_file():
            unfinished = self.path.with_name(self.path.name.removesuffix(".partial") + ".partial")
            if unfinished.exists():
                again = "`distegnn partition` as before"
                with suppress(OSError, ValueError, KeyError, TypeError):
                    inputs = json.loads((unfinished / "inputs.json").read_text(encoding="utf-8"))
                    again = f"`{partition_command(unfinished.with_suffix(''), inputs)}`"
                raise Failure(f"{unfinished}: an unfinished partition; complete it: {again}")
            raise Failure(f"{path}: not a store (no manifest.yaml); make one with `distegnn partition`")
        try:
            self.manifest: dict[str, Any] = yaml.safe_load(manifest.read_text(encoding="utf-8"))
            version = self.manifest["format"], self.manifest["version"]
            if version == (FORMAT, VERSION):
                self.inputs: dict[str, Any] = DEFAULT_INPUTS | self.manifest["inputs"]
                self.machines: int = self.inputs["parts"]
                self.trainers: int = self.inputs["trainers"]
                self.parts = self.machines * self.trainers  # one process each; rank r is on machine r // trainers
                self.remedy = remake(self.path, self.inputs)
                self.disk = DiskSource(self.path, dict(self.manifest["files"]), self.remedy)
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise Failure(f"{manifest}: damaged ({type(error).__name__}); {remake(self.path)}") from error
        if version != (FORMAT, VERSION):
            actual = f"{version[0]} version {version[1]}"
            raise Failure(f"{manifest}: {actual}, this program reads {FORMAT} {VERSION}; {remake(self.path)}")
        self.source: Source = self.disk
        self.rule = EdgeRule(*map(self.inputs.__getitem__, ("edges", "radius", "neighbours", "edge_drop")))
        self.past = self.inputs["history"] + self.inputs["pushforward"]
        self.fields = (*NODE_FIELDS, *(MOVING if self.inputs["fixed"] else ()), *(["past"] if self.past > 1 else ()))
        for name in ("snapshots.csv", "parts.csv"):
            self.disk.verify(name)
        self.snapshots = pd.read_csv(self.path / "snapshots.csv", float_precision="round_trip")
        self.parts_table = pd.read_csv(self.path / "parts.csv")

    @functools.cached_property
    def ranges(self) -> np.ndarray:
        """(snapshots, parts, 4): begin and end of nodes, begin and end of edges in the machine's part of a shard."""
        shape = len(self.snapshots), self.machines, self.trainers
        counts = self.parts_table[["nodes", "edges"]].to_numpy().reshape(*shape, 2)
        ranges = np.empty((*shape, 4), np.int64)
        for rows in self.snapshots.groupby("shard", sort=False).indices.values():
            by_machine = counts[rows].swapaxes(1, 2)  # a machine's part: by snapshot, then by trainer
            ends = np.cumsum(by_machine.reshape(-1, self.machines, 2), 0).reshape(by_machine.shape).swapaxes(1, 2)
            ranges[rows, ..., 0::2], ranges[rows, ..., 1::2] = ends - counts[rows], ends
        return ranges.reshape(len(self.snapshots), self.parts, 4)

    @functools.cached_property
    def first_ids(self) -> np.ndarray:
        """(snapshots, parts): DistDGL's global id of each part's first inner node."""
        first = self.ranges[:, :, 0].copy()
        for rows in self.snapshots.groupby("shard", sort=False).indices.values():
            nodes = self.ranges[rows, self.trainers - 1 :: self.trainers, 1].max(0)  # of each machine
            first[rows] += np.repeat(np.cumsum(nodes) - nodes, self.trainers)
        return first

    def verify_files(self) -> None:
        """Raise Failure unless every file has the sha256 that the manifest lists."""
        for name in self.manifest["files"]:
            self.disk.verify(name)

    def split(self, name: str) -> list[int]:
        """The snapshots of train, valid or test."""
        return self.snapshots.index[self.snapshots["split"] == name].tolist()

    def sides(self, snapshot: int) -> np.ndarray | None:
        """The sides (3,) of the snapshot's periodic box; None unless the store was made with data.periodic."""
        return self.snapshots.loc[snapshot, list(SIDES)].to_numpy(np.float64) if self.inputs["periodic"] else None

    def domain(self, snapshot: int) -> domain.Domain | None:
        """Gravity and walls of a snapshot; None unless the store was made with data.history."""
        if not self.past:
            return None
        gravity, *box = self.snapshots.loc[snapshot, list(domain.COLUMNS)].to_numpy(np.float64).reshape(3, 3)
        walls = None if np.isnan(box).any() else np.stack(box)
        return domain.make_domain(gravity, walls, self.sides(snapshot))

    def statistics(self) -> tuple[float, float, float] | None:
        """`samples.motion_statistics` of the training split; None unless the store was made with data.history."""
        if not self.past:
            return None
        for name in set(SQUARES) - set(self.snapshots):
            raise Failure(f"{self.path}/snapshots.csv: column '{name}' is missing; {self.remedy}")
        return motion_statistics(self.snapshots.loc[self.snapshots["split"] == "train", list(SQUARES)].to_numpy())

    def read(self, snapshot: int, part: int, exchange: bool = False) -> DGLGraph:
        """A part of a snapshot: its nodes and the edges among them; with ``exchange`` its halo is attached (halo mode).

        Raises Failure for missing or invalid fields and for an inconsistent halo.
        """
        row, machine = self.snapshots.loc[snapshot], part // self.trainers
        shard = self.source.part(row["shard"], machine)
        lo, hi, edges_lo, edges_hi = self.ranges[snapshot, part].tolist()
        src, dst = shard.src[edges_lo:edges_hi], shard.dst[edges_lo:edges_hi] - lo
        own = (src >= lo) & (src < hi)
        graph = dgl.graph((src[own] - lo, dst[own]), num_nodes=hi - lo, idtype=torch.int32)
        for name in set(self.fields) - set(shard.nodes):
            raise Failure(f"{self.path}/{row['shard']}/part{machine}: node field '{name}' is missing; {self.remedy}")
        graph.ndata.update({name: shard.nodes[name][lo:hi] for name in self.fields})
        self._set_global_fields(graph, row)
        if exchange:
            halo.attach(graph, halo.Halos([self._halo(snapshot, part, shard, src[~own], dst[~own])], [hi - lo]))
        return graph

    def _halo(self, snapshot: int, part: int, shard: Part, src: Tensor, dst: Tensor) -> halo.Halo:
        """The halo of a part, from its cross edges: local numbers src in the shard's part, own nodes dst."""
        where = f"{self.path}: snapshot {snapshot}, part {part}"
        first, nodes = self.first_ids[snapshot], self.ranges[snapshot, :, 1] - self.ranges[snapshot, :, 0]
        inner = np.arange(shard.inner) + first[part] - self.ranges[snapshot, part, 0]
        ids = np.concatenate([inner, shard.halo.numpy()])[src.numpy()]
        owner = np.searchsorted(first, ids, side="right") - 1
        invalid = (owner < 0) | (ids >= (first + nodes)[owner]) | (owner == part)
        if invalid.any():
            raise Failure(f"{where}: halo node {ids[invalid][0]} belongs to no other part; {self.remedy}")
        about = {"number": snapshot, "where": where, "longest": self.rule.longest, "side": self.sides(snapshot)}
        about["remedy"] = self.remedy
        result = halo.from_edges(owner, ids - first[owner], dst.numpy(), nodes.tolist(), **about)
        listed = self.parts_table.iloc[snapshot * self.parts + part]
        for name, count in (("cut_edges", len(result.src)), ("halo", sum(map(len, result.recv_rows)))):
            if count != listed[name]:
                raise Failure(f"{where}: has {count} {name}, parts.csv says {listed[name]}; {self.remedy}")
        return result

    def whole(self, snapshot: int, exchange: bool = False) -> DGLGraph:
        """All parts of a snapshot as one graph, in its own node order; ``exchange``: with the edges between parts."""
        parts = [self.read(snapshot, p, exchange) for p in range(self.parts)]
        joined = dgl.batch(parts)
        gid, (src, dst) = joined.ndata["gid"], joined.edges()
        if exchange:
            begins = np.cumsum([0, *(g.num_nodes() for g in parts[:-1])])
            for begin, halos in zip(begins, map(halo.get, parts), strict=True):
                assert halos is not None
                remote = torch.cat([rows + b for rows, b in zip(halos.parts[0].recv_rows, begins, strict=True)])
                src, dst = torch.cat([src, remote[halos.src]]), torch.cat([dst, halos.dst + begin])
        graph = dgl.graph((gid[src], gid[dst]), num_nodes=len(gid), idtype=torch.int32)
        graph.ndata.update({name: joined.ndata[name][gid.argsort()] for name in self.fields})
        self._set_global_fields(graph, self.snapshots.loc[snapshot])
        return graph

    def _set_global_fields(self, graph: DGLGraph, row: pd.Series) -> None:
        """Set total and centroid of the whole graph and the edge fields, then validate all fields."""
        n, centroid = graph.num_nodes(), torch.tensor([row[f"centroid_{axis}"] for axis in "xyz"], dtype=torch.float64)
        graph.ndata.update(total=torch.full((n,), int(row["nodes"])), centroid=centroid.expand(n, 3).contiguous())
        graphs.set_edge_lengths(graph, self.sides(row["snapshot"]))
        if around := self.domain(row["snapshot"]):
            domain.attach(graph, around)
        fields.validate(graph, f"{self.path}: snapshot {row['snapshot']}", target=True)

    def summary(self) -> dict[str, float]:
        """Means over snapshots: share of cut edges, largest ratio of a part's nodes to its share, halo nodes / nodes."""
        table = self.parts_table.groupby("snapshot")
        nodes, edges = (self.snapshots[name].to_numpy() for name in ("nodes", "edges"))
        owned = self.parts_table["nodes"].to_numpy().reshape(len(nodes), self.parts)
        shares = part_weights.fractions(self.inputs["weights"], self.parts)
        cut, halo = (table[name].sum().to_numpy() for name in ("cut_edges", "halo"))
        by_snapshot = {"edge_cut": cut / np.maximum(edges, 1), "balance": (owned / shares).max(1) / nodes}
        return {name: float(values.mean()) for name, values in (by_snapshot | {"halo": halo / nodes}).items()}
