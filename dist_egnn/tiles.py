"""A graph cut into destination tiles, and a layer run over them in bounded memory.

Run on a whole graph, a layer writes some ten E×H arrays to memory and keeps them for the backward pass. Here nodes are
ordered along a space-filling curve and cut into ranges of a few thousand in-edges; the whole layer (messages, mean, node
update, partial sums for the virtual nodes) runs range by range inside one autograd function that keeps only the layer's
inputs and recomputes a tile in the backward pass. Arrays then live in cache and memory is O(N·H) a layer + one tile.
The runner knows nothing of what the UDFs compute.

Legend: N nodes, E edges, B graphs; n, b the same within a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from dgl import DGLGraph
from torch import Tensor
from torch.autograd.function import once_differentiable

from .engine import Engine, Fields, Nodes
from .errors import Failure
from .graphs import in_edges, morton_order

SIZE = 8192  # rows of a tile: 2 MB for each float32 array of width 64
WHOLE = 4  # a graph of up to this many tiles runs as one: keeping so little costs less than computing it twice
NODE_COST = 4  # a node's update costs about as much as this many messages


class TileLayer(Protocol):
    """What the runner asks of a layer: pure functions of rows."""

    source_fields: tuple[str, ...]  # node fields that its messages need from the source
    outputs: tuple[str, ...]  # fields of ``update`` that are new node fields
    sums: tuple[str, ...]  # fields of ``update`` to be summed over the nodes of each graph

    def send(self, src: Fields) -> Fields: ...
    def receive(self, dst: Fields) -> Fields: ...
    def message(self, edges: Any) -> Fields: ...
    def update(self, nodes: Any) -> Fields: ...
    def parameters(self) -> Any: ...


@dataclass
class Tile:
    """Destinations lo…hi of the ordered nodes, their in-edges elo…ehi, the sources of those, the graphs they lie in."""

    lo: int
    hi: int
    elo: int
    ehi: int
    src: Tensor  # (n_src,) rows of the sources, each once
    block: Any
    glo: int
    ghi: int
    graph: Tensor  # (n,) graph of each node, counted from glo


@dataclass
class Tiles:
    """A graph, ordered and cut. ``order`` (N,): which node of the graph is row k here; ``edge_order`` (E,) likewise."""

    order: Tensor
    inverse: Tensor
    edge_order: Tensor
    batch: int  # B
    tiles: list[Tile]


def cut(graph: DGLGraph, engine: Engine, size: int = SIZE) -> Tiles:
    """Cut a (batched) DGLGraph into tiles of about ``size`` rows. Raises Failure for a size below 1."""
    if size < 1:
        raise Failure(f"model.tile={size}: must be at least 1 (default {SIZE})")
    device = graph.device
    per_graph = graph.batch_num_nodes().cpu().numpy()
    group = np.repeat(np.arange(len(per_graph)), per_graph)
    order = morton_order(graph.ndata["x"].detach().cpu().numpy(), group if len(per_graph) > 1 else None)
    group = group[order]
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))

    # in-edges of each row, rows in order: a permutation of DGL's compressed columns
    indptr, sources, edge_ids = (t.cpu().numpy() for t in graph.adj_tensors("csc"))
    ends, pick = in_edges(indptr, order)
    degree = np.diff(ends)
    src, edge_order = inverse[sources[pick]], edge_ids[pick] if len(edge_ids) else pick
    dst = np.repeat(np.arange(len(order)), degree)

    cost = np.cumsum(degree + NODE_COST)
    if len(cost) and cost[-1] <= WHOLE * size:
        size = int(cost[-1]) + 1
    bounds = np.searchsorted(cost, np.arange(size, cost[-1] if len(cost) else 0, size), side="left") + 1
    bounds = np.unique(np.concatenate([[0], bounds, [len(order)]]))
    tiles = []
    for lo, hi in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        elo, ehi = int(ends[lo]), int(ends[hi])
        sources_here, local = np.unique(src[elo:ehi], return_inverse=True)
        block = engine.block(
            torch.from_numpy(local.astype(np.int32)).to(device),
            torch.from_numpy((dst[elo:ehi] - lo).astype(np.int32)).to(device),
            len(sources_here),
            hi - lo,
        )
        glo, ghi = int(group[lo]), int(group[hi - 1]) + 1
        local_graph = torch.from_numpy(group[lo:hi] - glo).to(device)
        tiles.append(Tile(lo, hi, elo, ehi, torch.from_numpy(sources_here).to(device), block, glo, ghi, local_graph))
    rows, back, edges = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (order, inverse, edge_order))
    return Tiles(rows, back, edges, len(per_graph), tiles)


def of(graph: DGLGraph, engine: Engine, size: int = SIZE) -> Tiles:
    """The tiles of a graph, cut once and kept with it until its edges change."""
    key = (graph._graph, engine.name, size)
    kept = graph.__dict__.get("_dist_egnn_tiles")
    if kept is None or kept[0][0] is not key[0] or kept[0][1:] != key[1:]:
        kept = (key, cut(graph, engine, size))
        graph.__dict__["_dist_egnn_tiles"] = kept
    return kept[1]


def _tile(
    layer: TileLayer, engine: Engine, tile: Tile, src: Fields, dst: Fields, edge: Fields, shared: Fields
) -> Fields:
    """The whole layer on one tile. shared: (b, …) per graph. Returns node fields (n, …) and sums (b, …)."""
    n, b = tile.hi - tile.lo, tile.ghi - tile.glo
    means = engine.mean(tile.block, layer.message, layer.send(src), layer.receive(dst), edge)
    spread = {k: t.expand(n, *t.shape[1:]) if b == 1 else t.index_select(0, tile.graph) for k, t in shared.items()}
    out = layer.update(Nodes({**dst, **means, **spread}))
    for name in layer.sums:
        if b == 1:
            out[name] = out[name].sum(0, keepdim=True)
        else:
            out[name] = out[name].new_zeros(b, *out[name].shape[1:]).index_add(0, tile.graph, out[name])
    return out


class _Tiled(torch.autograd.Function):
    """A layer over many tiles: keeps its inputs only, and recomputes a tile when its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        node, edge, shared, _ = call.unpack(tensors)
        layer, total = call.layer, call.tiles
        results: dict[str, Tensor] = {}
        for tile in total.tiles:
            out = _tile(layer, call.engine, tile, *call.rows(tile, node, edge, shared))
            for name in (*layer.outputs, *layer.sums):
                value = out[name]
                if name not in results:
                    rows = len(total.order) if name in layer.outputs else total.batch
                    # outputs are written row by row, sums are added to
                    make = value.new_empty if name in layer.outputs else value.new_zeros
                    results[name] = make(rows, *value.shape[1:])
                if name in layer.outputs:
                    results[name][tile.lo : tile.hi] = value
                else:
                    results[name][tile.glo : tile.ghi] += value
        return tuple(results[name] for name in (*layer.outputs, *layer.sums))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        tensors = ctx.saved_tensors
        node, edge, shared, parameters = call.unpack(tensors)
        wanted = ctx.needs_input_grad[1:]
        total = [torch.zeros_like(t) if need else None for t, need in zip(tensors, wanted, strict=True)]
        node_total, edge_total, shared_total, parameter_total = call.unpack(total)
        trained = [p for p, t in zip(parameters, parameter_total, strict=True) if t is not None]
        trained_total = [t for t in parameter_total if t is not None]
        names = (*call.layer.outputs, *call.layer.sums)
        for tile in call.tiles.tiles:
            src, dst, edges, globe = call.rows(tile, node, edge, shared)
            # (tensor of this tile, where its gradient goes): rows given, a slice is added to; else by index
            leaves: list[tuple[Tensor, Tensor, slice | None]] = []
            for fields, into, where in (
                (src, node_total, None),
                (dst, node_total, slice(tile.lo, tile.hi)),
                (edges, edge_total, slice(tile.elo, tile.ehi)),
                (globe, shared_total, slice(tile.glo, tile.ghi)),
            ):
                for name in fields:
                    if into[name] is not None:
                        fields[name] = fields[name].detach().requires_grad_()
                        leaves.append((fields[name], into[name], where))
            with torch.enable_grad():
                out = _tile(call.layer, call.engine, tile, src, dst, edges, globe)
            ends, seeds = [], []
            for name, grad in zip(names, grads, strict=True):
                if grad is not None and out[name].requires_grad:
                    ends.append(out[name])
                    first, last = (tile.lo, tile.hi) if name in call.layer.outputs else (tile.glo, tile.ghi)
                    seeds.append(grad[first:last])
            inputs = [leaf for leaf, _, _ in leaves] + trained
            if not ends or not inputs:
                continue
            found = torch.autograd.grad(ends, inputs, seeds, allow_unused=True)
            for (_, gathered, where), grad in zip(leaves, found, strict=False):
                if grad is not None and where is None:
                    gathered.index_add_(0, tile.src, grad)
                elif grad is not None:
                    gathered[where] += grad
            for added, grad in zip(trained_total, found[len(leaves) :], strict=True):
                if grad is not None:
                    added += grad
        return None, *total


@dataclass
class _Call:
    """One call of a layer: how its flat tensors (autograd functions take nothing else) are named."""

    layer: TileLayer
    engine: Engine
    tiles: Tiles
    node: Sequence[str]
    edge: Sequence[str]
    shared: Sequence[str]

    def unpack(self, tensors: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Sequence[Any]]:
        a, b, c = len(self.node), len(self.edge), len(self.shared)
        return (
            dict(zip(self.node, tensors[:a], strict=True)),
            dict(zip(self.edge, tensors[a : a + b], strict=True)),
            dict(zip(self.shared, tensors[a + b : a + b + c], strict=True)),
            tensors[a + b + c :],
        )

    def rows(self, tile: Tile, node: Fields, edge: Fields, shared: Fields) -> tuple[Fields, Fields, Fields, Fields]:
        """A tile's own rows of the inputs: of its sources, destinations, edges and graphs."""
        return (
            {k: node[k].index_select(0, tile.src) for k in self.layer.source_fields},
            {k: t[tile.lo : tile.hi] for k, t in node.items()},
            {k: t[tile.elo : tile.ehi] for k, t in edge.items()},
            {k: t[tile.glo : tile.ghi] for k, t in shared.items()},
        )


def run(layer: TileLayer, engine: Engine, tiles: Tiles, node: Fields, edge: Fields, shared: Fields) -> Fields:
    """Run a layer over the tiles.

    node: fields (N, …) in the tiles' order; edge: (E, …) in its edge order; shared: (B, …) per graph. Returns the layer's
    outputs (N, …) and sums (B, …). With one tile there is nothing to bound: it runs under autograd as it is.
    """
    call = _Call(layer, engine, tiles, tuple(node), tuple(edge), tuple(shared))
    if len(tiles.tiles) == 1:
        return _tile(layer, engine, tiles.tiles[0], *call.rows(tiles.tiles[0], node, edge, shared))
    results = _Tiled.apply(call, *node.values(), *edge.values(), *shared.values(), *layer.parameters())
    return dict(zip((*layer.outputs, *layer.sums), results, strict=True))
