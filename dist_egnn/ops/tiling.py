"""Cut a graph into tiles of nodes and blocks of edges, small enough for a layer's arrays to stay in cache.

Nodes are ordered along a space-filling curve. A tile is a range of some thousand nodes in that order with all their
in-edges; a block is a range of some thousand in-edges, those of consecutive nodes of one tile.

Legend: N nodes, E edges, B graphs of a batch; n, e, b the same within a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from dgl import DGLGraph
from torch import Tensor

from ..data import halo
from ..data.graphs import in_edges, morton_order
from ..errors import Failure
from .message_passing import Engine

BLOCK_EDGES = 8192  # default edges of a block: each of its float32 arrays takes 2 MB at the usual width
USUAL_WIDTH = 64
# A graph of up to this many blocks becomes one block under plain autograd: arrays of up to 24 MB are cheaper to keep
# than to recompute. Larger arrays are fresh memory from the system each time; tiles are faster (docs/performance.md).
MAX_UNTILED_BLOCKS = 12
EDGES_PER_NODE = 4  # edges of a block for each node of a tile: with C = 3, arrays over nodes are then as large
ACCELERATOR_FACTOR = 32  # how much larger blocks are on devices other than the CPU


@dataclass
class Block:
    """Consecutive destinations of a tile with their in-edges."""

    nodes: slice  # of the tile's nodes
    edges: slice  # of the tile's edges
    graph: Any  # the edges, in the engine's own type


@dataclass
class Tile:
    """Consecutive nodes in the order of ``Tiles``, with their in-edges."""

    nodes: slice  # of the ordered nodes
    edges: slice  # of the ordered edges
    graphs: slice  # of the batch
    graph: Tensor | None  # (n,) the graph of each node, counted from graphs.start; None if it is one for all
    src: Tensor  # (n_src,) the sources of its edges, each once, as ordered nodes
    halo_src: Tensor  # (n_halo,) the sources that are halo nodes, which follow those in src
    blocks: list[Block]


@dataclass
class Tiles:
    """A graph in tiles. Index tensors are int32."""

    order: Tensor  # (N,) the graph's node at each position
    inverse: Tensor  # (N,) the position of each node of the graph
    edge_order: Tensor  # (E,) the graph's edge at each position; cross edges of a halo count after the graph's own
    batch: int  # B
    tiles: list[Tile]

    @property
    def interior(self) -> list[Tile]:
        """The tiles without halo nodes."""
        return [tile for tile in self.tiles if not len(tile.halo_src)]

    @property
    def boundary(self) -> list[Tile]:
        """The tiles that need halo nodes."""
        return [tile for tile in self.tiles if len(tile.halo_src)]

    @property
    def is_single_block(self) -> bool:
        return len(self.tiles) == 1 and len(self.tiles[0].blocks) == 1


def tiles_of(
    graph: DGLGraph,
    engine: Engine,
    block_edges: int = BLOCK_EDGES,
    device: torch.device | None = None,
    width: int = USUAL_WIDTH,
) -> Tiles:
    """Cut a (batched) DGLGraph into tiles with blocks of about ``block_edges`` edges; cached until its edges change.

    device: of the layers (default: the graph's); width: of the layers. Raises Failure for block_edges below 1, and for a
    graph without nodes.
    """
    if block_edges < 1:
        raise Failure(f"model.tile={block_edges}: must be at least 1 (default {BLOCK_EDGES})")
    device = device or graph.device
    key = (engine.name, block_edges, device, width, MAX_UNTILED_BLOCKS)
    cached = graph.__dict__.get("_dist_egnn_tiles")
    if cached is None or cached[0] is not graph._graph or cached[1] != key:
        cached = (graph._graph, key, _build_tiles(graph, engine, block_edges, device, width))
        graph.__dict__["_dist_egnn_tiles"] = cached
    return cached[2]


class _InEdges:
    """The in-edges of the graph's nodes; cross edges and nodes of a halo count after the graph's own.

    No array of E numbers here or in ``_build_tiles`` is int64: with ten million nodes that would take gigabytes.
    """

    def __init__(self, graph: DGLGraph, position: np.ndarray) -> None:
        # not DGL's compressed columns, which the graph would keep: 8 bytes an edge
        self.src, dst = (t.cpu().numpy() for t in graph.edges(order="eid"))
        self.position, n = position, len(position)
        if (halos := halo.get(graph)) is not None:
            self.src = np.concatenate([self.src, (halos.src + n).int().numpy()])
            dst = np.concatenate([dst, halos.dst.int().numpy()])
            self.position = np.concatenate([position, np.arange(n, n + halos.size, dtype=np.int32)])
        degree = torch.bincount(torch.from_numpy(dst), minlength=n).numpy()
        self.indptr = np.concatenate([[0], np.cumsum(degree)])
        self.by_destination = None  # where the edges are not sorted by destination
        if (dst[1:] < dst[:-1]).any():
            self.by_destination = np.argsort(dst, kind="stable").astype(np.int32)

    def of_nodes(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """indptr (n + 1,), the positions of the sources (e,) and the edges (e,) of some nodes (n,), node by node."""
        indptr, edges = in_edges(self.indptr, nodes)
        if self.by_destination is not None:
            edges = self.by_destination[edges]
        return indptr, self.position[self.src[edges]], edges


def _build_tiles(graph: DGLGraph, engine: Engine, block_edges: int, device: torch.device, width: int) -> Tiles:
    per_graph = graph.batch_num_nodes().cpu().numpy()
    if not len(graph.ndata["x"]) or not per_graph.all():
        raise Failure("graph: no node of a snapshot is on this process; use fewer parts")
    graph_of = np.repeat(np.arange(len(per_graph), dtype=np.int32), per_graph)
    x = graph.ndata["x"].detach().cpu().numpy()
    order = morton_order(x, graph_of if len(per_graph) > 1 else None).astype(np.int32)
    graph_of = graph_of[order]
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order), dtype=np.int32)

    incoming = _InEdges(graph, inverse)
    edge_order = np.empty(len(incoming.src), np.int32)
    native = engine.name == "native"  # it keeps no array over edges
    rows = EDGES_PER_NODE * len(order) + (0 if native else len(edge_order))
    if rows * width <= MAX_UNTILED_BLOCKS * block_edges * USUAL_WIDTH:
        block_edges = EDGES_PER_NODE * len(order) + len(edge_order) + 1
    elif device.type != "cpu":
        block_edges *= ACCELERATOR_FACTOR
    tiles: list[Tile] = []
    first_edge = 0
    tile_nodes = block_edges if native else -(-block_edges // EDGES_PER_NODE)
    for lo, hi in pairwise([*range(0, len(order), tile_nodes), len(order)]):
        indptr, src, edges = incoming.of_nodes(order[lo:hi])
        tile_edges = slice(first_edge, first_edge + len(edges))
        edge_order[tile_edges] = edges
        graphs = slice(int(graph_of[lo]), int(graph_of[hi - 1]) + 1)
        graph_here = None
        if graphs.stop - graphs.start > 1:
            graph_here = torch.from_numpy(graph_of[lo:hi] - graphs.start).long().to(device)
        sources, local_src = np.unique(src, return_inverse=True)
        limit = len(edges) + 1 if native else block_edges
        blocks = _blocks(indptr, local_src, len(sources), limit, engine, device)
        own = [int(np.searchsorted(sources, len(order)))]
        own_src, halo_src = torch.from_numpy(sources).to(device).tensor_split(own)
        tiles.append(Tile(slice(lo, hi), tile_edges, graphs, graph_here, own_src, halo_src - len(order), blocks))
        first_edge = tile_edges.stop
    indices = [torch.from_numpy(a).to(device) for a in (order, inverse, edge_order)]
    return Tiles(indices[0], indices[1], indices[2], len(per_graph), tiles)


def _blocks(
    indptr: np.ndarray, src: np.ndarray, n_src: int, block_edges: int, engine: Engine, device: torch.device
) -> list[Block]:
    """The blocks of a tile, each of at most ``block_edges`` edges and those of one node; src: (e,) local sources."""
    dst = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    ends = torch.from_numpy(np.stack([src, dst]).astype(np.int32)).to(device)
    marks = np.arange(block_edges, indptr[-1], block_edges)
    cuts = np.unique([0, *(np.searchsorted(indptr[1:], marks) + 1), len(indptr) - 1]).tolist()
    blocks = []
    for lo, hi in pairwise(cuts):
        edges = slice(int(indptr[lo]), int(indptr[hi]))
        block = engine.block(ends[0, edges], ends[1, edges] - lo, n_src, hi - lo)
        blocks.append(Block(slice(lo, hi), edges, block))
    return blocks
