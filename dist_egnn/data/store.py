"""A store that `distegnn partition` wrote: one partition of one snapshot as a DGLGraph.

A ``Source`` hands out a part of a shard; ``DiskSource`` is one, a DistDGL server another (serving.py). What is cut out of a part
is the same for both, and who asks does not know which it is.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
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
from . import fields, graphs, halo
from .store_inputs import DEFAULT_INPUTS

FORMAT, VERSION, GRAPH = "dist_egnn.store", 1, "dist_egnn"
SIDES = ("side_x", "side_y", "side_z")  # columns of snapshots.csv in a store with periodic boxes


@dataclass
class Part:
    """A part of a shard: all its snapshots side by side. Inner nodes come first, then halo nodes."""

    src: Tensor  # (E,) local numbers, sorted by snapshot, then destination
    dst: Tensor
    inner: int
    nodes: dict[str, Tensor]  # fields of the inner nodes
    halo: Tensor  # global id of each halo node


class Source(Protocol):
    """Where parts come from."""

    def part(self, shard: str, part: int) -> Part: ...


class DiskSource:
    """Parts by DGL's own loader, each file's hash checked before it is first read; the last few stay in memory."""

    def __init__(self, folder: Path, hashes: dict[str, str], keep: int = 2) -> None:
        self.folder, self.hashes, self.keep = folder, hashes, keep
        self._kept: OrderedDict[tuple[str, int], Part] = OrderedDict()
        self._checked: set[str] = set()

    def verify(self, name: str) -> None:
        """Raise Failure unless the file is the one that the manifest names."""
        if name in self._checked:
            return
        path = self.folder / name
        if not path.is_file():
            raise Failure(f"{path}: missing from the store; partition again")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.hashes.get(name):
                raise Failure(f"{path}: its sha256 is not the manifest's: damaged or changed; partition again")
        self._checked.add(name)

    def config(self, shard: str, part: int) -> Path:
        """DGL's partition config of a shard, after a check of it and of the part's files."""
        for name in (f"{GRAPH}.json", *(f"part{part}/{kind}.dgl" for kind in ("graph", "node_feat", "edge_feat"))):
            self.verify(f"{shard}/{name}")
        return self.folder / shard / f"{GRAPH}.json"

    def part(self, shard: str, part: int) -> Part:
        key = (shard, part)
        if key not in self._kept:
            graph, node_feats, *_ = dgl.distributed.load_partition(str(self.config(shard, part)), part)
            src, dst = graph.edges(order="eid")
            inner = int(graph.ndata["inner_node"].sum())
            nodes = {k.removeprefix("_N/"): t for k, t in node_feats.items()}
            self._kept[key] = Part(src, dst, inner, nodes, graph.ndata[dgl.NID][inner:])
            while len(self._kept) > self.keep:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


_served: dict[Path, Source] = {}


def set_source(path: Path, source: Source) -> None:
    """Have every Store of this path take its parts from ``source``, in this process."""
    _served[path.resolve()] = source


class Store:
    """A complete store. Raises Failure for a folder that is none, is unfinished, or is of another version."""

    def __init__(self, path: str | Path, source: Source | None = None) -> None:
        self.path = Path(path)
        manifest = self.path / "manifest.yaml"
        if not manifest.is_file():
            unfinished = self.path.with_name(self.path.name.removesuffix(".partial") + ".partial")
            if unfinished.exists():
                raise Failure(
                    f"{unfinished}: a partition that was not finished; run the same `distegnn partition` again"
                )
            raise Failure(f"{path}: not a store (no manifest.yaml); make one with `distegnn partition`")
        try:
            self.manifest: dict[str, Any] = yaml.safe_load(manifest.read_text())
            found = self.manifest["format"], self.manifest["version"]
            if found == (FORMAT, VERSION):
                self.inputs: dict[str, Any] = DEFAULT_INPUTS | self.manifest["inputs"]
                self.machines: int = self.inputs["parts"]
                self.trainers: int = self.inputs["trainers"]
                self.parts = self.machines * self.trainers  # one process each; rank r is on machine r // trainers
                self.disk = DiskSource(self.path, dict(self.manifest["files"]))
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise Failure(f"{manifest}: damaged ({type(error).__name__}); partition again") from error
        if found != (FORMAT, VERSION):
            raise Failure(
                f"{manifest}: {found[0]} version {found[1]}, this program reads {FORMAT} {VERSION}; partition again"
            )
        self.source: Source = source or _served.get(self.path.resolve(), self.disk)
        for name in ("snapshots.csv", "parts.csv"):
            self.disk.verify(name)
        self.snapshots = pd.read_csv(self.path / "snapshots.csv", float_precision="round_trip")
        self.parts_table = pd.read_csv(self.path / "parts.csv")

    @cached_property
    def ranges(self) -> np.ndarray:
        """(snapshots, parts, 4): first and last inner node, first and last edge, within the machine's part of the shard."""
        shape = len(self.snapshots), self.machines, self.trainers
        counts = self.parts_table[["nodes", "edges"]].to_numpy().reshape(*shape, 2)
        ranges = np.empty((*shape, 4), np.int64)
        for rows in self.snapshots.groupby("shard", sort=False).indices.values():
            one = counts[rows].swapaxes(1, 2)  # on a machine: snapshot after snapshot, in it trainer after trainer
            ends = np.cumsum(one.reshape(-1, self.machines, 2), 0).reshape(one.shape).swapaxes(1, 2)
            ranges[rows, ..., 0::2], ranges[rows, ..., 1::2] = ends - counts[rows], ends
        return ranges.reshape(len(self.snapshots), self.parts, 4)

    @cached_property
    def _first(self) -> np.ndarray:
        """(snapshots, parts): the global id, in DistDGL's count, of a part's first inner node; parts follow one another."""
        first = self.ranges[:, :, 0].copy()
        for rows in self.snapshots.groupby("shard", sort=False).indices.values():
            nodes = self.ranges[rows, self.trainers - 1 :: self.trainers, 1].max(0)  # of each machine
            first[rows] += np.repeat(np.cumsum(nodes) - nodes, self.trainers)
        return first

    def split(self, name: str) -> list[int]:
        """The snapshots of train, valid or test."""
        return self.snapshots.index[self.snapshots["split"] == name].tolist()

    def sides(self, snapshot: int) -> np.ndarray | None:
        """The sides (3,) of the snapshot's periodic box; None unless the store was made with data.periodic."""
        if not self.inputs["periodic"]:
            return None
        return self.snapshots.loc[snapshot, list(SIDES)].to_numpy(np.float64)

    def read(self, snapshot: int, part: int, exchange: bool = False) -> DGLGraph:
        """A part of a snapshot as the bridge mode sees it: its nodes, and the edges among them.

        Node fields x, v, f, a, y, gid and the whole graph's total and centroid; edge field e, and shift in a periodic box.
        exchange: with its halo attached, for halo mode. Raises Failure for a halo that cannot be one.
        """
        row, machine = self.snapshots.loc[snapshot], part // self.trainers
        held = self.source.part(row["shard"], machine)
        lo, hi, elo, ehi = self.ranges[snapshot, part].tolist()
        src, dst = held.src[elo:ehi], held.dst[elo:ehi] - lo
        own = (src >= lo) & (src < hi)
        graph = graphs.empty_graph(src[own] - lo, dst[own], hi - lo)
        for name in ("x", "v", "f", "a", "y", "gid"):
            if name not in held.nodes:
                raise Failure(
                    f"{self.path}/{row['shard']}/part{machine}: node field '{name}' is missing; partition again"
                )
            graph.ndata[name] = held.nodes[name][lo:hi]
        self._mark(graph, row)
        if exchange:
            halo.attach(graph, halo.Halos([self._halo(snapshot, part, held, src[~own], dst[~own])], [hi - lo]))
        return graph

    def _halo(self, snapshot: int, part: int, held: Part, src: Tensor, dst: Tensor) -> halo.Halo:
        """The halo of a part: of its edges from local numbers src outside its own to its nodes dst."""
        where = f"{self.path}: snapshot {snapshot}, part {part}"
        first = self._first[snapshot]
        nodes = self.ranges[snapshot, :, 1] - self.ranges[snapshot, :, 0]
        inner = np.arange(held.inner) + first[part] - self.ranges[snapshot, part, 0]
        ids = np.concatenate([inner, held.halo.numpy()])[src.numpy()]
        owner = np.searchsorted(first, ids, side="right") - 1
        lost = (owner < 0) | (ids >= (first + nodes)[owner]) | (owner == part)
        if lost.any():
            raise Failure(f"{where}: its halo node {ids[lost][0]} is no other part's node of it; partition again")
        made = halo.from_edges(
            owner,
            ids - first[owner],
            dst.numpy(),
            nodes.tolist(),
            number=snapshot,
            where=where,
            radius=self.inputs["radius"],
            side=self.sides(snapshot),
        )
        listed = self.parts_table.iloc[snapshot * self.parts + part]
        found = {"cut_edges": len(made.src), "halo": sum(map(len, made.recv_rows))}
        for name, count in found.items():
            if count != listed[name]:
                raise Failure(f"{where}: has {count} {name}, parts.csv says {listed[name]}; partition again")
        return made

    def whole(self, snapshot: int, exchange: bool = False) -> DGLGraph:
        """The same cut graph in one piece: all parts side by side, in the snapshot's own node order.

        exchange: the full graph, the edges between parts too.
        """
        pieces = [self.read(snapshot, p, exchange) for p in range(self.parts)]
        gid = torch.cat([g.ndata["gid"] for g in pieces])
        joined = dgl.batch(pieces)
        src, dst = joined.edges()
        if exchange:
            own = [g.ndata["gid"] for g in pieces]
            first = np.cumsum([0, *map(len, own)])
            for begin, halos in zip(first, map(halo.get, pieces), strict=False):
                assert halos is not None
                far = torch.cat([rows + f for rows, f in zip(halos.parts[0].recv_rows, first, strict=False)])
                src, dst = torch.cat([src, far[halos.src]]), torch.cat([dst, halos.dst + begin])
        graph = graphs.empty_graph(gid[src], gid[dst], len(gid))
        back = gid.argsort()
        for name in ("x", "v", "f", "a", "y", "gid"):
            graph.ndata[name] = joined.ndata[name][back]
        self._mark(graph, self.snapshots.loc[snapshot])
        return graph

    def _mark(self, graph: DGLGraph, row: Any) -> None:
        """Give a part what it must know of the whole graph, so that no step has to ask."""
        n = graph.num_nodes()
        graph.ndata["total"] = torch.full((n,), int(row["nodes"]))
        centroid = torch.tensor([row["centroid_x"], row["centroid_y"], row["centroid_z"]], dtype=torch.float64)
        graph.ndata["centroid"] = centroid.expand(n, 3).contiguous()
        graphs.set_edge_lengths(graph, self.sides(row["snapshot"]))
        fields.validate(graph, f"{self.path}: snapshot {row['snapshot']}", target=True)

    def summary(self) -> dict[str, float]:
        """Means over snapshots: share of edges cut, largest part / mean part (of parts with weights: the fullest / its
        share), halo nodes / nodes."""
        table = self.parts_table.groupby("snapshot")
        nodes = self.snapshots["nodes"].to_numpy()
        owned = self.parts_table["nodes"].to_numpy().reshape(len(nodes), self.parts)
        return {
            "edge_cut": float(
                (table["cut_edges"].sum().to_numpy() / np.maximum(self.snapshots["edges"].to_numpy(), 1)).mean()
            ),
            "balance": float(
                ((owned / part_weights.fractions(self.inputs["weights"], self.parts)).max(1) / nodes).mean()
            ),
            "halo": float((table["halo"].sum().to_numpy() / nodes).mean()),
        }
