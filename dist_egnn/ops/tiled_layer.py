"""Run a layer over the tiles of a graph in bounded memory.

Run on a whole graph, a layer writes some ten (E, H) arrays and saves them for the backward pass. Here messages and
their mean run block by block, the node update and the sums for the virtual nodes tile by tile, all inside one autograd
function that saves only the layer's inputs and the means, and recomputes the rest in the backward pass. Arrays stay in
cache, and memory is O(N·H) per layer plus one tile. The code depends on no particular layer.

Legend: N nodes, E edges, B graphs; n, e, b the same within a tile; m halo nodes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..data import halo
from . import activation_offload
from .linear import products_by
from .message_passing import Engine, Fields, Nodes
from .native.library import Library
from .tiling import Block, Tile, Tiles


class TileLayer(Protocol):
    """The interface of a layer: pure functions of rows."""

    source_fields: tuple[str, ...]  # node fields that ``send`` reads
    outputs: tuple[str, ...]  # fields of ``update`` that are new node fields
    sums: tuple[str, ...]  # fields of ``update`` to be summed over the nodes of each graph

    def send(self, src: Fields) -> Fields: ...
    def receive(self, dst: Fields) -> Fields: ...
    def message(self, edges: Any) -> Fields: ...
    def update(self, nodes: Any) -> Fields: ...
    def parameters(self) -> Any: ...


def run_layer(
    layer: TileLayer,
    engine: Engine,
    tiles: Tiles,
    node: Fields,
    edge: Fields,
    shared: Fields,
    exchange: halo.HaloExchange | None = None,
) -> Fields:
    """The layer's outputs (N, …) and sums (B, …).

    node: fields (N, …) in the tiles' order; edge: (E, …) in the graph's order; shared: (B, …) per graph. exchange: in
    halo mode, exchanges rows of halo nodes and their gradients; tiles without halo nodes run meanwhile. A graph of one
    block runs under plain autograd.
    """
    call = _Call(layer, engine, tiles, tuple(node), tuple(edge), tuple(shared), exchange, torch.is_grad_enabled())
    # plain autograd would skip the backward exchange of an unused halo, and the other ranks would wait for it
    if tiles.is_single_block and (exchange is None or tiles.boundary):
        (tile,) = tiles.tiles
        halo_rows = exchange.refresh({name: node[name] for name in layer.source_fields}) if exchange else {}
        rows = call.rows(tile, _Inputs(node, edge, shared, ()), halo_rows)
        with products_by(call.library):
            mean = call.mean(tile.blocks[0], layer.send(rows.src), layer.receive(rows.dst), rows.edge[0])
            return call.update(tile, rows, mean)
    results = _TiledLayer.apply(call, *node.values(), *edge.values(), *shared.values(), *layer.parameters())
    return dict(zip((*layer.outputs, *layer.sums), results, strict=True))


@dataclass
class _Inputs:
    """The tensors of a call by name, or their gradients (None where no gradient is needed)."""

    node: dict[str, Any]
    edge: dict[str, Any]
    shared: dict[str, Any]
    parameters: Sequence[Any]


@dataclass
class _Rows:
    """The rows of a layer's inputs that one tile reads."""

    src: Fields  # (n_src, …)
    dst: Fields  # (n, …)
    edge: list[Fields]  # of each block
    shared: Fields  # (b, …)


@dataclass
class _Call:
    """One call of a layer, with the names of its tensors: autograd functions take a flat list."""

    layer: TileLayer
    engine: Engine
    tiles: Tiles
    node: Sequence[str]
    edge: Sequence[str]
    shared: Sequence[str]
    exchange: halo.HaloExchange | None
    grad_enabled: bool  # always false within an autograd function

    @property
    def library(self) -> Library | None:
        """The native kernels, if they run this call."""
        return getattr(self.engine, "library", None)

    def unpack(self, tensors: Iterable[Any]) -> _Inputs:
        rest = iter(tensors)
        node, edge, shared = ({k: next(rest) for k in names} for names in (self.node, self.edge, self.shared))
        return _Inputs(node, edge, shared, list(rest))

    def rows(self, tile: Tile, inputs: _Inputs, halo_rows: Fields) -> _Rows:
        src = {name: inputs.node[name].index_select(0, tile.src) for name in self.layer.source_fields}
        if len(tile.halo_src):
            src = {k: torch.cat([t, halo_rows[k].index_select(0, tile.halo_src)]) for k, t in src.items()}
        edge = {k: t.index_select(0, self.tiles.edge_order[tile.edges]) for k, t in inputs.edge.items()}
        return _Rows(
            src,
            {name: t[tile.nodes] for name, t in inputs.node.items()},
            [{name: t[block.edges] for name, t in edge.items()} for block in tile.blocks],
            {name: t[tile.graphs] for name, t in inputs.shared.items()},
        )

    def mean(self, block: Block, sent: Fields, received: Fields, edge: Fields) -> Fields:
        """The mean of every field of the message over the in-edges of a block's nodes."""
        dst = {name: t[block.nodes] for name, t in received.items()}
        return self.engine.mean(block.graph, self.layer, sent, dst, edge)

    def update(self, tile: Tile, rows: _Rows, mean: Fields, gradients_only: bool = False) -> Fields:
        """The node update of a tile: outputs (n, …) and sums (b, …)."""
        return self.layer.update(Nodes({**rows.dst, **mean}, rows.shared, tile.graph, self.library, gradients_only))


_tile_threads: int | None = None  # None: as many as torch has


@contextmanager
def tile_threads(count: int) -> Iterator[None]:
    """Run tiles on ``count`` threads, everything else on one: results then have the same bits for any count."""
    global _tile_threads
    before, torch_threads = _tile_threads, torch.get_num_threads()
    _tile_threads = count
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _tile_threads = before
        torch.set_num_threads(torch_threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that each run a tile with one intra-op thread of torch."""
    torch_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(lambda _: time.sleep(0.01), range(threads)))
    torch.set_num_threads(torch_threads)  # the initializer also set the number for threads that start later
    return pool


def _for_each_tile(tiles: Sequence[Tile], compute: Callable[[Tile], Callable[[], None]]) -> None:
    """Run compute(tile) on T threads, and what it returns in this thread, tile by tile.

    The returned functions add to sums over tiles, whose order then does not depend on T.
    """
    on_cpu = bool(tiles) and tiles[0].src.device.type == "cpu"
    threads = min(_tile_threads or torch.get_num_threads(), len(tiles)) if on_cpu else 1
    if threads == 1:
        for tile in tiles:
            compute(tile)()
        return
    pool, running = _pool(threads), deque[Future[Callable[[], None]]]()
    compute = torch.inference_mode(torch.is_inference_mode_enabled())(compute)  # each thread has its own mode
    try:
        for tile in tiles:
            running.append(pool.submit(compute, tile))
            if len(running) > threads:  # the others keep the threads busy; more would need memory for their results
                running.popleft().result()()
        for future in running:
            future.result()()
    finally:
        wait(running)


Additions = list[Callable[[], Any]]  # of a tile's gradients to totals, to be called in the order of the tiles


class _Leaves:
    """Leaves of the autograd graph of one tile or block: the trained parameters and what `leaf` adds to them."""

    def __init__(self, parameters: Iterable[Tensor], totals: Iterable[Tensor | None], additions: Additions) -> None:
        self.additions = additions
        pairs = zip(parameters, totals, strict=True)
        self.leaves = [(p, self._later(total.add_)) for p, total in pairs if total is not None]

    def _later(self, add: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        additions = self.additions  # a reference to self would be a cycle, which keeps the tile's arrays in memory
        return lambda grad: additions.append(partial(add, grad))

    def leaf(self, value: Tensor, add: Callable[[Tensor], Any], local: bool = False) -> Tensor:
        """The value as a leaf, whose gradient is passed to ``add``: at once if that is local to the tile."""
        self.leaves.append((value.detach().requires_grad_(), add if local else self._later(add)))
        return self.leaves[-1][0]

    def rows(
        self, fields: Fields, totals: Mapping[str, Tensor | None], index: slice | Tensor, local: bool = False
    ) -> Fields:
        """The fields as leaves whose gradients are added to the rows ``index`` of their totals, where they have one."""
        result = dict(fields)
        for name, value in fields.items():
            if (total := totals[name]) is not None:
                add = total[index].add_ if isinstance(index, slice) else partial(total.index_add_, 0, index)
                result[name] = self.leaf(value, add, local)
        return result

    def backward(self, outputs: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Compute the gradient of every leaf, given outputs with their gradients."""
        pairs = [(output, grad) for output, grad in outputs if grad is not None and output.requires_grad]
        if not pairs or not self.leaves:
            return
        roots, seeds = zip(*pairs, strict=True)
        grads = torch.autograd.grad(roots, [leaf for leaf, _ in self.leaves], seeds, allow_unused=True)
        for (_, add), grad in zip(self.leaves, grads, strict=True):
            if grad is not None:
                add(grad)


class _TileBackward:
    """The backward pass of a tile: recomputes it and lists the additions to ``totals``, the gradients of all tensors.

    Gradients of parameters, which are sums over all tiles, are added up in float64.
    """

    def __init__(self, call: _Call, tensors: Sequence[Tensor], needed: Sequence[bool], halo_rows: Fields) -> None:
        self.call, self.inputs, self.halo_rows = call, call.unpack(tensors), halo_rows
        first_parameter = len(tensors) - len(self.inputs.parameters)
        self.totals = [
            torch.zeros_like(t, dtype=torch.float64 if k >= first_parameter else None) if need else None
            for k, (t, need) in enumerate(zip(tensors, needed, strict=True))
        ]
        self.grad = call.unpack(self.totals)
        self.halo_grad = {k: torch.zeros_like(t) for k, t in halo_rows.items() if self.grad.node[k] is not None}

    @torch.enable_grad()
    def run(self, tile: Tile, means: Mapping[str, Any], grads: Mapping[str, Tensor | None]) -> Additions:
        """means: saved by the forward pass, in memory or in files; grads: of the layer's outputs and sums."""
        additions: Additions = []
        rows = self.call.rows(tile, self.inputs, self.halo_rows)
        means = {name: t[tile.nodes] for name, t in means.items()}
        leaves = partial(_Leaves, self.inputs.parameters, self.grad.parameters, additions)
        grad_mean = self._update(tile, rows, means, grads, leaves())
        self._messages(tile, rows, means, grad_mean, leaves)
        return additions

    def _update(
        self, tile: Tile, rows: _Rows, means: Fields, grads: Mapping[str, Tensor | None], leaves: _Leaves
    ) -> Fields:
        """The backward pass of the node update; returns the gradients of the means."""
        grad_mean = Fields()
        mean = {k: leaves.leaf(t, partial(grad_mean.__setitem__, k), local=True) for k, t in means.items()}
        dst = leaves.rows(rows.dst, self.grad.node, tile.nodes)
        shared = leaves.rows(rows.shared, self.grad.shared, tile.graphs)
        out = self.call.update(tile, replace(rows, dst=dst, shared=shared), mean, gradients_only=True)
        part = {
            **dict.fromkeys(self.call.layer.outputs, tile.nodes),
            **dict.fromkeys(self.call.layer.sums, tile.graphs),
        }
        leaves.backward((out[name], grad if grad is None else grad[part[name]]) for name, grad in grads.items())
        return grad_mean

    def _messages(
        self, tile: Tile, rows: _Rows, means: Fields, grad_mean: Fields, new_leaves: Callable[[], _Leaves]
    ) -> None:
        """The backward pass of the messages, block by block, then of ``send`` and ``receive``; one block: all in one pass."""
        layer, leaves = self.call.layer, new_leaves()
        src = {
            name: value if self.grad.node[name] is None else leaves.leaf(value, partial(self._add_to_src, tile, name))
            for name, value in rows.src.items()
        }
        sent, received = layer.send(src), layer.receive(leaves.rows(rows.dst, self.grad.node, tile.nodes))
        one_pass = len(tile.blocks) == 1
        grad_sent, grad_received = (
            {name: torch.zeros_like(t) if t.requires_grad and not one_pass else None for name, t in fields.items()}
            for fields in (sent, received)
        )
        edge_order = self.call.tiles.edge_order[tile.edges]
        for block, edge in zip(tile.blocks, rows.edge, strict=True):
            in_block = leaves if one_pass else new_leaves()
            dst = {name: t[block.nodes] for name, t in received.items()}
            mean = self.call.engine.mean(
                block.graph,
                layer,
                in_block.rows(sent, grad_sent, slice(None), local=True),
                in_block.rows(dst, grad_received, block.nodes, local=True),
                in_block.rows(edge, self.grad.edge, edge_order[block.edges]),
                known={name: t[block.nodes] for name, t in means.items()},
            )
            in_block.backward((t, grad_mean[name][block.nodes]) for name, t in mean.items() if name in grad_mean)
            del mean, in_block  # free the block's arrays before the next block
        pairs = ((sent, grad_sent), (received, grad_received))
        leaves.backward((fields[name], grad) for fields, grads in pairs for name, grad in grads.items())

    def _add_to_src(self, tile: Tile, name: str, grad: Tensor) -> None:
        """Add the gradients of a tile's sources to those of own and of halo nodes."""
        self.grad.node[name].index_add_(0, tile.src, grad[: len(tile.src)])
        if len(tile.halo_src):
            self.halo_grad[name].index_add_(0, tile.halo_src, grad[len(tile.src) :])


class _TiledLayer(torch.autograd.Function):
    """A layer over many tiles; saves its inputs and the means."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, layer, n = call.unpack(tensors), call.layer, len(call.tiles.order)
        sources = {name: inputs.node[name] for name in layer.source_fields}
        receive = call.exchange.start(sources) if call.exchange else dict
        save_means = call.grad_enabled and any(ctx.needs_input_grad)
        halo_rows, means, results, sums = Fields(), Fields(), Fields(), Fields()

        def write(fields: Fields, tile: Tile, name: str, value: Tensor) -> None:
            if name not in fields:
                fields.setdefault(name, value.new_empty(n, *value.shape[1:]))  # of several threads, one succeeds
            fields[name][tile.nodes] = value

        @torch.no_grad()
        @products_by(call.library)
        def compute(tile: Tile) -> Callable[[], None]:
            rows = call.rows(tile, inputs, halo_rows)
            sent, received = layer.send(rows.src), layer.receive(rows.dst)
            parts = [call.mean(block, sent, received, e) for block, e in zip(tile.blocks, rows.edge, strict=True)]
            mean = parts[0] if len(parts) == 1 else {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
            out = call.update(tile, rows, mean)
            for name, value in mean.items() if save_means else ():
                write(means, tile, name, value)
            for name in layer.outputs:
                write(results, tile, name, out[name])
            return partial(add_sums, tile, out)

        def add_sums(tile: Tile, out: Fields) -> None:
            for name in layer.sums:
                if name not in sums:
                    sums[name] = out[name].new_zeros(call.tiles.batch, *out[name].shape[1:])
                sums[name][tile.graphs] += out[name]

        _for_each_tile(call.tiles.interior, compute)
        halo_rows = receive()
        _for_each_tile(call.tiles.boundary, compute)
        results |= sums
        ctx.call, ctx.halo_rows, ctx.files = call, tuple(halo_rows), activation_offload.write_rows(means)
        in_memory = {name: t for name, t in means.items() if name not in ctx.files}
        ctx.means = tuple(in_memory)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *halo_rows.values(), *in_memory.values())
        return tuple(results[name] for name in (*layer.outputs, *layer.sums))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        needed = ctx.needs_input_grad[1:]
        saved = iter(ctx.saved_tensors)  # accessed once: activation_offload.py may read them from disk
        tensors = [next(saved) for _ in needed]
        halo_rows = {name: next(saved) for name in ctx.halo_rows}
        means = {**ctx.files, **dict(zip(ctx.means, saved, strict=True))}
        named_grads = dict(zip((*call.layer.outputs, *call.layer.sums), grads, strict=True))
        tiles = _TileBackward(call, tensors, needed, halo_rows)

        @products_by(call.library)
        def compute(tile: Tile) -> Callable[[], None]:
            return partial(add_gradients, tiles.run(tile, means, named_grads))

        def add_gradients(additions: Additions) -> None:
            for add in additions:
                add()

        _for_each_tile(call.tiles.boundary, compute)
        add = call.exchange.start_backward(tiles.halo_grad) if call.exchange and tiles.halo_grad else None
        _for_each_tile(call.tiles.interior, compute)
        if add:
            add({name: total for name, total in tiles.grad.node.items() if total is not None})
        return None, *(None if g is None else g.to(t.dtype) for t, g in zip(tensors, tiles.totals, strict=True))
