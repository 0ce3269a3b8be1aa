"""A graph cut into destination tiles, and a layer run over them in bounded memory.

Run on a whole graph, a layer writes some ten E×H arrays to memory and keeps them for the backward pass. Here nodes are
ordered along a space-filling curve and cut into tiles of a few thousand nodes, their in-edges into blocks of a few thousand
edges; messages and their mean run block by block, the node update with the partial sums for the virtual nodes tile by tile,
all inside one autograd function that keeps only the layer's inputs and the means, and recomputes the rest in the backward
pass. Arrays then live in cache and memory is O(N·H) a layer + one tile. The runner knows nothing of what the UDFs compute.

Legend: N nodes, E edges, B graphs; n, b the same within a tile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from dgl import DGLGraph
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..data import halo
from ..data.graphs import in_edges, morton_order
from ..errors import Failure
from .message_passing import Engine, Fields, Nodes

SIZE = 8192  # edges of a block: 2 MB for each float32 array of the usual width
WIDTH = 64
# A graph of up to this many blocks runs as one under plain autograd: keeping arrays of up to 24 MB costs less than computing
# them twice; above that, every one is fresh memory from the system, and tiles win (docs/performance.md).
WHOLE = 12
NODES = 4  # a tile has up to one node for this many edges of a block: with C = 3, arrays of nodes are then as large
FAR = 32  # a device other than the CPU gets so many times larger blocks


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
class Block:
    """Destinations lo…hi of a tile, counted from its first, and their in-edges elo…ehi."""

    lo: int
    hi: int
    elo: int
    ehi: int
    ends: Any  # the engine's own


@dataclass
class Tile:
    """Destinations lo…hi of the ordered nodes, their in-edges in blocks, the graphs they lie in."""

    lo: int
    hi: int
    src: Tensor  # (n_src,) rows of the sources, each once
    far: Tensor  # (n_far,) halo nodes among the sources, which follow
    blocks: list[Block]
    glo: int
    ghi: int
    graph: Tensor | None  # (n,) graph of each node, counted from glo, unless they lie in one

    @property
    def edges(self) -> slice:
        """Its in-edges among those of all rows."""
        return slice(self.blocks[0].elo, self.blocks[-1].ehi)


@dataclass
class Tiles:
    """A graph, ordered and cut. ``order`` (N,): which node of the graph is row k here; ``edge_order`` (E,) likewise of the in-edges
    of these rows, cross edges of a halo counted after the graph's own. All are int32."""

    order: Tensor
    inverse: Tensor
    edge_order: Tensor
    batch: int  # B
    tiles: list[Tile]

    @property
    def groups(self) -> tuple[list[Tile], list[Tile]]:
        """The tiles whose sources are all own nodes, then those that wait for a halo."""
        return [t for t in self.tiles if not len(t.far)], [t for t in self.tiles if len(t.far)]

    @property
    def whole(self) -> bool:
        """Whether there is nothing to bound."""
        return len(self.tiles) == 1 and len(self.tiles[0].blocks) == 1


def _bounds(cost: np.ndarray, size: int) -> list[int]:
    """Where to cut a run of items, given their summed costs, into pieces of at most ``size`` and one item."""
    marks = np.arange(size, cost[-1] if len(cost) else 0, size)
    return np.unique(np.concatenate([[0], np.searchsorted(cost, marks, side="left") + 1, [len(cost)]])).tolist()


class _Incoming:
    """The in-edges of the graph's nodes, in rows; a halo's cross edges and its nodes are counted after the graph's own.

    Nothing here or in ``cut`` that has E numbers is int64: of ten million nodes that would be gigabytes.
    """

    def __init__(self, graph: DGLGraph, inverse: np.ndarray) -> None:
        # not DGL's compressed columns: the graph would keep them, 8 bytes an edge
        self.src, dst = (t.cpu().numpy() for t in graph.edges(order="eid"))
        self.rows = inverse
        if (halos := halo.get(graph)) is not None:
            self.src = np.concatenate([self.src, (halos.src + len(inverse)).int().numpy()])
            dst = np.concatenate([dst, halos.dst.int().numpy()])
            self.rows = np.concatenate([inverse, np.arange(len(inverse), len(inverse) + halos.size, dtype=np.int32)])
        degree = torch.bincount(torch.from_numpy(dst), minlength=len(inverse)).numpy()
        self.indptr = np.concatenate([[0], np.cumsum(degree)])
        self.sorted = None  # the edges by destination, where they do not stand so
        if (dst[1:] < dst[:-1]).any():
            self.sorted = np.argsort(dst, kind="stable").astype(np.int32)

    def of(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of some nodes (n,), one node's after the other's: where each node's begin and end (n + 1,), the rows of their
        sources, the edges."""
        ends, edges = in_edges(self.indptr, nodes)
        if self.sorted is not None:
            edges = self.sorted[edges]
        return ends, self.rows[self.src[edges]], edges


def cut(
    graph: DGLGraph, engine: Engine, size: int = SIZE, device: torch.device | None = None, width: int = WIDTH
) -> Tiles:
    """Cut a (batched) DGLGraph into tiles with blocks of about ``size`` edges, for a device (default: the graph's) and layers
    of some width.

    Raises Failure for a size below 1.
    """
    if size < 1:
        raise Failure(f"model.tile={size}: must be at least 1 (default {SIZE})")
    device = device or graph.device
    per_graph = graph.batch_num_nodes().cpu().numpy()
    group = np.repeat(np.arange(len(per_graph), dtype=np.int32), per_graph)
    order = morton_order(graph.ndata["x"].detach().cpu().numpy(), group if len(per_graph) > 1 else None)
    order = order.astype(np.int32)
    group = group[order]
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order), dtype=np.int32)

    incoming = _Incoming(graph, inverse)
    edge_order = np.empty(len(incoming.src), np.int32)
    rows = NODES * len(order) + len(edge_order)
    if rows * width <= WHOLE * size * WIDTH:
        size = rows + 1
    elif device.type != "cpu":
        size *= FAR
    tiles: list[Tile] = []
    first = 0
    for lo, hi in pairwise([*range(0, len(order), -(-size // NODES)), len(order)]):
        ends, src, edges = incoming.of(order[lo:hi])
        edge_order[first : first + len(edges)] = edges
        tiles.append(_tile(lo, first, ends, src, group[lo:hi], len(order), engine, size, device))
        first += len(edges)
    there, back, listed = (torch.from_numpy(a).to(device) for a in (order, inverse, edge_order))
    return Tiles(there, back, listed, len(per_graph), tiles)


def _tile(
    lo: int,
    first: int,
    ends: np.ndarray,
    src: np.ndarray,
    group: np.ndarray,
    own: int,
    engine: Engine,
    size: int,
    device: torch.device,
) -> Tile:
    """The tile of the rows from ``lo``, in blocks of about ``size`` edges, given their in-edges as ``_Incoming.of`` does, of which
    the first is edge ``first`` of all, and the graph of each row; own: rows that are no halo node's."""
    sources, local = np.unique(src, return_inverse=True)
    dst = np.repeat(np.arange(len(group)), np.diff(ends))
    pairs = torch.from_numpy(np.stack([local, dst]).astype(np.int32)).to(device)
    blocks = []
    for here, after in pairwise(_bounds(ends[1:], size)):
        of_block = slice(int(ends[here]), int(ends[after]))
        joined = engine.block(pairs[0, of_block], pairs[1, of_block] - here, len(sources), after - here)
        blocks.append(Block(here, after, first + of_block.start, first + of_block.stop, joined))
    glo, ghi = int(group[0]), int(group[-1]) + 1
    local_graph = torch.from_numpy(group - glo).long().to(device) if ghi - glo > 1 else None
    near, far = torch.from_numpy(sources).to(device).tensor_split([int(np.searchsorted(sources, own))])
    return Tile(lo, lo + len(group), near, far - own, blocks, glo, ghi, local_graph)


def of(
    graph: DGLGraph, engine: Engine, size: int = SIZE, device: torch.device | None = None, width: int = WIDTH
) -> Tiles:
    """The tiles of a graph for a device, cut once and kept with it until its edges change."""
    key = (graph._graph, engine.name, size, device or graph.device, width)
    kept = graph.__dict__.get("_dist_egnn_tiles")
    if kept is None or kept[0][0] is not key[0] or kept[0][1:] != key[1:]:
        kept = (key, cut(graph, engine, size, device, width))
        graph.__dict__["_dist_egnn_tiles"] = kept
    return kept[1]


@dataclass
class _Rows:
    """A tile's own rows of a layer's inputs."""

    src: Fields  # (n_src, …)
    dst: Fields  # (n, …)
    edge: list[Fields]  # (e, …) of each block
    shared: Fields  # (b, …) per graph


@dataclass
class _Call:
    """One call of a layer: how its flat tensors (autograd functions take nothing else) are named."""

    layer: TileLayer
    engine: Engine
    tiles: Tiles
    node: Sequence[str]
    edge: Sequence[str]
    shared: Sequence[str]
    wire: halo.HaloExchange | None
    keep: bool  # whether a backward pass may follow; within an autograd function nobody can tell

    def unpack(self, tensors: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Sequence[Any]]:
        a, b, c = len(self.node), len(self.edge), len(self.shared)
        return (
            dict(zip(self.node, tensors[:a], strict=True)),
            dict(zip(self.edge, tensors[a : a + b], strict=True)),
            dict(zip(self.shared, tensors[a + b : a + b + c], strict=True)),
            tensors[a + b + c :],
        )

    def rows(self, tile: Tile, node: Fields, edge: Fields, shared: Fields, far: Fields) -> _Rows:
        src = {k: node[k].index_select(0, tile.src) for k in self.layer.source_fields}
        if len(tile.far):
            src = {k: torch.cat([t, far[k].index_select(0, tile.far)]) for k, t in src.items()}
        first = tile.edges.start
        here = {k: t.index_select(0, self.tiles.edge_order[tile.edges]) for k, t in edge.items()}
        return _Rows(
            src,
            {k: t[tile.lo : tile.hi] for k, t in node.items()},
            [{k: t[block.elo - first : block.ehi - first] for k, t in here.items()} for block in tile.blocks],
            {k: t[tile.glo : tile.ghi] for k, t in shared.items()},
        )

    def mean(self, block: Block, sent: Fields, received: Fields, edge: Fields) -> Fields:
        """The mean over in-edges of every field of the message, for the destinations of a block."""
        here = {k: t[block.lo : block.hi] for k, t in received.items()}
        return self.engine.mean(block.ends, self.layer.message, sent, here, edge)

    def update(self, tile: Tile, rows: _Rows, means: Fields) -> Fields:
        """The node update: node fields (n, …) and sums (b, …)."""
        n, b = tile.hi - tile.lo, tile.ghi - tile.glo
        spread = {
            k: t.expand(n, *t.shape[1:]) if tile.graph is None else t.index_select(0, tile.graph)
            for k, t in rows.shared.items()
        }
        out = self.layer.update(Nodes({**rows.dst, **means, **spread}))
        for name in self.layer.sums:
            if tile.graph is None:
                out[name] = out[name].sum(0, keepdim=True)
            else:
                out[name] = out[name].new_zeros(b, *out[name].shape[1:]).index_add(0, tile.graph, out[name])
        return out

    def place(self, tile: Tile, name: str) -> slice:
        """Where a tile's part of an output or a sum belongs."""
        return slice(tile.lo, tile.hi) if name in self.layer.outputs else slice(tile.glo, tile.ghi)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that run a tile each, every one of them with one thread of torch's own."""
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(lambda _: time.sleep(0.01), range(threads)))
    torch.set_num_threads(threads)  # the initializer's number would be that of every later thread
    return pool


def _share(tiles: Sequence[Tile], work: Callable[[Sequence[Tile], int], None]) -> int:
    """work(tiles, k) for one share of the tiles each, at the same time if torch has threads; returns how many shares.

    A share is fixed by the number of threads, so that sums over tiles have one order.
    """
    on_cpu = bool(tiles) and tiles[0].src.device.type == "cpu"
    threads = min(torch.get_num_threads(), len(tiles)) if on_cpu else 1
    if threads == 1:
        work(tiles, 0)
        return 1
    inference = torch.is_inference_mode_enabled()

    def share(k: int) -> None:
        with torch.inference_mode(inference):
            work(tiles[k::threads], k)

    list(_pool(threads).map(share, range(threads)))
    return threads


Leaves = list[tuple[Tensor, Callable[[Tensor], Any]]]  # tensors that want a gradient, each with what takes it


def _as_leaf(value: Tensor, take: Callable[[Tensor], Any], leaves: Leaves) -> Tensor:
    """The value as a leaf of a graph of its own."""
    leaves.append((value.detach().requires_grad_(), take))
    return leaves[-1][0]


def _adder(into: Tensor, where: slice | Tensor) -> Callable[[Tensor], Any]:
    """What adds to these rows."""
    return into[where].add_ if isinstance(where, slice) else partial(into.index_add_, 0, where)


def _back(ends: Iterable[tuple[Tensor, Tensor | None]], leaves: Leaves) -> None:
    """Hand every leaf its gradient, given those of the ends of the graph."""
    pairs = [(end, grad) for end, grad in ends if grad is not None and end.requires_grad]
    if not pairs or not leaves:
        return
    outputs, seeds = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, [leaf for leaf, _ in leaves], seeds, allow_unused=True)
    for (_, take), grad in zip(leaves, found, strict=True):
        if grad is not None:
            take(grad)


def _to_sources(tile: Tile, own: Tensor, far: Tensor | None, grad: Tensor) -> None:
    """Add the gradients of a tile's sources to those of own rows and of halo nodes."""
    own.index_add_(0, tile.src, grad[: len(tile.src)])
    if far is not None and len(tile.far):
        far.index_add_(0, tile.far, grad[len(tile.src) :])


class _Tiled(torch.autograd.Function):
    """A layer over many tiles: keeps its inputs and the means, and recomputes the rest when its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        node, edge, shared, _ = call.unpack(tensors)
        layer, rows = call.layer, len(call.tiles.order)
        wait = call.wire.start({name: node[name] for name in layer.source_fields}) if call.wire else dict
        far: Fields = {}  # of halo nodes
        keep = call.keep and any(ctx.needs_input_grad)
        means: dict[str, Tensor] = {}
        results: dict[str, Tensor] = {}
        sums: dict[int, dict[str, Tensor]] = {}  # of each share

        def write(into: dict[str, Tensor], tile: Tile, name: str, value: Tensor) -> None:
            if name not in into:
                into.setdefault(name, value.new_empty(rows, *value.shape[1:]))  # one share alone succeeds
            into[name][tile.lo : tile.hi] = value

        @torch.no_grad()
        def work(tiles: Sequence[Tile], k: int) -> None:
            sums.setdefault(k, {})
            for tile in tiles:
                own = call.rows(tile, node, edge, shared, far)
                sent, received = layer.send(own.src), layer.receive(own.dst)
                parts = [call.mean(block, sent, received, e) for block, e in zip(tile.blocks, own.edge, strict=True)]
                mean = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                out = call.update(tile, own, mean)
                for name, value in mean.items() if keep else ():
                    write(means, tile, name, value)
                for name in layer.outputs:
                    write(results, tile, name, out[name])
                for name in layer.sums:
                    if name not in sums[k]:
                        sums[k][name] = out[name].new_zeros(call.tiles.batch, *out[name].shape[1:])
                    sums[k][name][tile.glo : tile.ghi] += out[name]

        interior, boundary = call.tiles.groups
        _share(interior, work)
        far = wait()
        _share(boundary, work)
        for name in layer.sums:
            results[name] = sum((sums[k][name] for k in range(1, len(sums))), sums[0][name])
        ctx.call, ctx.means, ctx.far = call, tuple(means), tuple(far)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *far.values(), *means.values())
        return tuple(results[name] for name in (*layer.outputs, *layer.sums))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        layer, wanted = call.layer, ctx.needs_input_grad[1:]
        saved = ctx.saved_tensors  # asked for once: they may come from disk (kept.py)
        tensors, more = saved[: len(wanted)], saved[len(wanted) :]
        far, kept = dict(zip(ctx.far, more, strict=False)), more[len(ctx.far) :]
        node, edge, shared, parameters = call.unpack(tensors)
        needed = dict(zip(call.node, wanted, strict=False))
        totals: dict[int, list[Tensor | None]] = {}
        far_totals: dict[int, Fields] = {}

        @torch.enable_grad()
        def work(tiles: Sequence[Tile], k: int) -> None:
            if k not in totals:
                totals[k] = [torch.zeros_like(t) if need else None for t, need in zip(tensors, wanted, strict=True)]
                far_totals[k] = {name: torch.zeros_like(t) for name, t in far.items() if needed[name]}
            node_total, edge_total, shared_total, of_parameters = call.unpack(totals[k])
            trained = [(p, t.add_) for p, t in zip(parameters, of_parameters, strict=True) if t is not None]

            def as_leaves(
                fields: Fields, total: dict[str, Tensor | None], where: slice | Tensor, leaves: Leaves
            ) -> Fields:
                return {
                    name: value if (into := total[name]) is None else _as_leaf(value, _adder(into, where), leaves)
                    for name, value in fields.items()
                }

            for tile in tiles:
                here, graphs_here = slice(tile.lo, tile.hi), slice(tile.glo, tile.ghi)
                own = call.rows(tile, node, edge, shared, far)
                # the update, given the means
                leaves: Leaves = [*trained]
                of_mean: dict[str, Tensor] = {}
                mean = {
                    name: _as_leaf(value[here], partial(of_mean.__setitem__, name), leaves)
                    for name, value in zip(ctx.means, kept, strict=True)
                }
                given = _Rows(
                    own.src,
                    as_leaves(own.dst, node_total, here, leaves),
                    own.edge,
                    as_leaves(own.shared, shared_total, graphs_here, leaves),
                )
                out = call.update(tile, given, mean)
                names = zip((*layer.outputs, *layer.sums), grads, strict=True)
                _back([(out[name], None if g is None else g[call.place(tile, name)]) for name, g in names], leaves)
                del out
                # what the ends of edges bring, then the messages of one block after the other
                at_ends: Leaves = [*trained]
                src = {
                    name: value
                    if (into := node_total[name]) is None
                    else _as_leaf(value, partial(_to_sources, tile, into, far_totals[k].get(name)), at_ends)
                    for name, value in own.src.items()
                }
                sent = layer.send(src)
                received = layer.receive(as_leaves(own.dst, node_total, here, at_ends))
                of_sent, of_received = (
                    {name: torch.zeros_like(t) if t.requires_grad else None for name, t in fields.items()}
                    for fields in (sent, received)
                )
                for block, fields in zip(tile.blocks, own.edge, strict=True):
                    leaves = [*trained]
                    rows = slice(block.lo, block.hi)
                    found = call.engine.mean(
                        block.ends,
                        layer.message,
                        as_leaves(sent, of_sent, slice(None), leaves),
                        as_leaves({name: t[rows] for name, t in received.items()}, of_received, rows, leaves),
                        as_leaves(fields, edge_total, call.tiles.edge_order[block.elo : block.ehi], leaves),
                    )
                    _back([(t, of_mean[name][rows]) for name, t in found.items() if name in of_mean], leaves)
                    del found
                ends = [(sent[name], g) for name, g in of_sent.items()]
                _back([*ends, *((received[name], g) for name, g in of_received.items())], at_ends)

        def add_up(shares: dict[int, Any]) -> None:
            for k in range(1, len(shares)):
                for into, part in zip(shares[0], shares[k], strict=True):
                    if into is not None:
                        into += part

        interior, boundary = call.tiles.groups
        _share(boundary, work)
        add_up({k: each.values() for k, each in far_totals.items()})
        add = call.wire.start_backward(far_totals[0]) if call.wire and far_totals[0] else None
        _share(interior, work)
        add_up(totals)
        if add:
            add({name: total for name, total in zip(call.node, totals[0], strict=False) if total is not None})
        return None, *totals[0]


def run(
    layer: TileLayer,
    engine: Engine,
    tiles: Tiles,
    node: Fields,
    edge: Fields,
    shared: Fields,
    wire: halo.HaloExchange | None = None,
) -> Fields:
    """Run a layer over the tiles.

    node: fields (N, …) in the tiles' order; edge: (E, …) in the graph's; shared: (B, …) per graph. Returns the layer's
    outputs (N, …) and sums (B, …). With one block there is nothing to bound: it runs under autograd as it is.

    wire: in halo mode, how rows of halo nodes come and their gradients go. Tiles without any are run meanwhile.
    """
    # autograd would leave out the way back of a halo that nothing depends on, and the other ranks would wait for it
    call = _Call(layer, engine, tiles, tuple(node), tuple(edge), tuple(shared), wire, torch.is_grad_enabled())
    if tiles.whole and (wire is None or len(tiles.tiles[0].far)):
        (tile,) = tiles.tiles
        far = wire.refresh({name: node[name] for name in layer.source_fields}) if wire else {}
        own = call.rows(tile, node, edge, shared, far)
        mean = call.mean(tile.blocks[0], layer.send(own.src), layer.receive(own.dst), own.edge[0])
        return call.update(tile, own, mean)
    results = _Tiled.apply(call, *node.values(), *edge.values(), *shared.values(), *layer.parameters())
    return dict(zip((*layer.outputs, *layer.sums), results, strict=True))
