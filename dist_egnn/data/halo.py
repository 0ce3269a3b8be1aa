"""Halo mode: ranks exchange features and gradients of nodes at the borders of parts, so P ranks equal one process.

Halo mode keeps the edges between parts as *cross edges*, from *halo nodes*, which other ranks own, to own nodes. Before
a layer, an all-to-all sends the source fields of own nodes; in the backward pass, another returns their gradients. The
halo is attached to bridge mode's sample, its nodes sorted by owner and row. n own nodes, m halo nodes, E cross edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import dgl
import numpy as np
import torch
from dgl import DGLGraph
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..distributed.comm import Comm
from ..errors import Failure
from . import domain, graphs

Fields = dict[str, Tensor]


@dataclass
class Halo:
    """The halo of a part of one snapshot. Reading needs no communication; ``link`` exchanges rows and positions."""

    src: Tensor  # (E,) halo node of each cross edge
    dst: Tensor  # (E,) own node
    recv_rows: list[Tensor]  # for each rank: the halo nodes as its rows, ascending
    nodes: list[int]  # number of own nodes of each rank
    number: int  # of the snapshot
    where: str  # for errors
    remedy: str = "roll out from an earlier frame (--start)"  # of a store: the commands that make it again
    longest: float | None = None  # length that an edge may have; None: any
    side: np.ndarray | None = None  # (3,) of the periodic box
    send_rows: list[Tensor] = field(default_factory=list)  # for each rank: own rows it needs, ascending; set by link
    edge: Fields = field(default_factory=dict)  # fields of the cross edges; set by link

    def link(self, x: Tensor, comm: Comm) -> None:
        """Exchange which rows each rank needs and their positions, x: (n, 3); all ranks must call it.

        Raises Failure if they read different data.
        """
        if self.send_rows:
            return
        recv_counts, ones = [len(rows) for rows in self.recv_rows], [1] * comm.size
        sent = torch.tensor([[self.number, *sizes] for sizes in zip(self.nodes, recv_counts, strict=True)])
        received = comm.all_to_all(sent, ones, ones)().tolist()
        for rank, (number, nodes, _) in enumerate(received):
            if (number, nodes) != (self.number, len(x)):
                reads = f"process {rank} reads snapshot {number} and expects {nodes} nodes here instead of {len(x)}"
                raise Failure(f"{self.where}: {reads}; set data.path to the same store on all hosts")
        send_counts = [count for *_, count in received]
        send_rows = comm.all_to_all(torch.cat(self.recv_rows), recv_counts, send_counts)().split(send_counts)
        for rank, rows in enumerate(send_rows):
            if len(rows) and (rows[0] < 0 or rows[-1] >= len(x) or bool((rows.diff() <= 0).any())):
                raise Failure(f"{self.where}: process {rank} requests nodes beyond the {len(x)} here; {self.remedy}")
        remote_x = comm.all_to_all(x.index_select(0, torch.cat(send_rows)), send_counts, recv_counts)()
        self.complete(x, send_rows, remote_x)

    def complete(self, x: Tensor, send_rows: Sequence[Tensor], remote_x: Tensor) -> None:
        """Set the rows of x (n, 3) that each rank needs, and the positions (m, 3) of halo nodes.

        Raises Failure for an edge that is longer than the radius.
        """
        positions = torch.cat([remote_x, x]).numpy()
        squared = graphs.squared_lengths(positions, self.src.numpy(), self.dst.numpy() + len(remote_x), self.side)
        if self.longest is not None and len(squared) and not squared.max() <= self.longest**2 * (1 + 1e-6):
            length = f"{squared.max() ** 0.5:.3g}, beyond the radius {self.longest:g}"
            raise Failure(f"{self.where}: an edge from another part has length {length}; {self.remedy}")
        self.edge = graphs.edge_fields(remote_x[self.src], x[self.dst], self.side)
        self.send_rows = list(send_rows)


class Halos:
    """The halos of a batch of snapshots with these numbers of own nodes; halo nodes are sorted by owner, snapshot, row."""

    def __init__(self, parts: Sequence[Halo], nodes: Sequence[int]) -> None:
        self.parts, self.first = list(parts), [0, *accumulate(nodes)]
        counts = torch.tensor([[len(rows) for rows in part.recv_rows] for part in parts])  # (B, P)
        begin = (counts.t().flatten().cumsum(0) - counts.t().flatten()).view(counts.t().shape).t()
        src = []
        for part, count, start in zip(self.parts, counts, begin, strict=True):
            offset = (start - (count.cumsum(0) - count)).repeat_interleave(count)
            src.append(part.src + offset.index_select(0, part.src))
        self.src = torch.cat(src)
        self.dst = torch.cat([part.dst + first for part, first in zip(self.parts, self.first, strict=False)])
        self.recv_counts: list[int] = counts.sum(0).tolist()
        self.size = sum(self.recv_counts)  # m

    def link(self, x: Tensor, comm: Comm) -> None:
        """Link the halos that are not yet linked; x: (n, 3) of the batch."""
        for part, lo, hi in zip(self.parts, self.first, self.first[1:], strict=False):
            part.link(x[lo:hi], comm)

    def edge(self, name: str) -> Tensor:
        """A field of the cross edges."""
        return torch.cat([part.edge[name] for part in self.parts])

    def exchange(self, position: Tensor, comm: Comm) -> HaloExchange:
        """The exchange of a layer's rows. position: (n,) index of each own node's row in the layer's fields."""
        send_rows = []
        for rank in range(len(self.recv_counts)):
            own = [part.send_rows[rank] + first for part, first in zip(self.parts, self.first, strict=False)]
            send_rows.append(position.index_select(0, torch.cat(own).to(position.device)))
        return HaloExchange(comm, send_rows, self.recv_counts)


@dataclass
class HaloExchange:
    """Sends rows of own nodes to other ranks and receives those of halo nodes; gradients travel back."""

    comm: Comm
    send_rows: list[Tensor]  # for each rank: the rows to send
    recv_counts: list[int]

    def start(self, fields: Fields) -> Callable[[], Fields]:
        """Start to send fields (n, …) of own nodes; the returned function waits for those of the halo nodes (m, …)."""
        rows, widths = torch.cat(self.send_rows), [t.shape[1] for t in fields.values()]
        packed = torch.cat([t.detach().index_select(0, rows) for t in fields.values()], 1)
        wait = self.comm.all_to_all(packed, [len(r) for r in self.send_rows], self.recv_counts)
        return lambda: dict(zip(fields, wait().split(widths, 1), strict=True))

    def start_backward(self, grads: Fields) -> Callable[[Fields], None]:
        """Start to send gradients (m, …) of halo nodes; the returned function adds those received to fields (n, …)."""
        counts, widths = [len(r) for r in self.send_rows], [t.shape[1] for t in grads.values()]
        wait = self.comm.all_to_all(torch.cat(list(grads.values()), 1), self.recv_counts, counts)

        def add(totals: Fields) -> None:
            # rank by rank, within which rows are unique: this fixes the order of summation
            for rows, received in zip(self.send_rows, wait().split(counts), strict=True):
                for name, grad in zip(grads, received.split(widths, 1), strict=True):
                    totals[name].index_add_(0, rows, grad)

        return add

    def refresh(self, fields: Fields) -> Fields:
        """The fields (m, …) of the halo nodes for these fields (n, …) of own nodes; differentiable."""
        return dict(zip(fields, _Refresh.apply(self, tuple(fields), *fields.values()), strict=True))


class _Refresh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HaloExchange, names: tuple[str, ...], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.names, ctx.rows = exchange, names, len(values[0])
        # copies, since autograd would track views of one buffer together
        return tuple(t.contiguous() for t in exchange.start(dict(zip(names, values, strict=True)))().values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = {name: g for name, g, need in zip(ctx.names, grads, ctx.needs_input_grad[2:], strict=True) if need}
        totals = {name: g.new_zeros(ctx.rows, *g.shape[1:]) for name, g in needed.items()}
        ctx.exchange.start_backward(needed)(totals)
        return None, None, *(totals.get(name) for name in ctx.names)


def attach(graph: DGLGraph, halos: Halos) -> DGLGraph:
    """Attach a halo to a graph; returns the graph."""
    graph.__dict__["halos"] = halos
    return graph


def get(graph: DGLGraph) -> Halos | None:
    """The halo of a graph; None in bridge mode."""
    return graph.__dict__.get("halos")


def batch(samples: Sequence[DGLGraph]) -> DGLGraph:
    """dgl.batch of samples, of their halos and of their domains."""
    if len(samples) == 1:
        return samples[0]
    joined = dgl.batch(list(samples))
    if domains := domain.batch(samples):
        domain.attach(joined, domains)
    parts = [part for halos in map(get, samples) if halos for part in halos.parts]
    return attach(joined, Halos(parts, [graph.num_nodes() for graph in samples])) if parts else joined


def extract_part(
    src: np.ndarray,
    dst: np.ndarray,
    part: np.ndarray,
    rank: int,
    parts: int,
    row: np.ndarray | None = None,
    **about: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Halo]:
    """A rank's part of a graph with edges src→dst (E,), for the part (N,) of each node; about: as in ``from_edges``.

    row: (N,) of each node in its part; None: ascending. Returns the part's nodes, ascending; source and destination of
    the edges among them, by row; and its halo.
    """
    counts = np.bincount(part, minlength=parts)
    if row is None:
        order = np.argsort(part, kind="stable")
        row = np.empty_like(order)
        row[order] = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)
    to_own, same = part[dst] == rank, part[src] == part[dst]
    inner, cross = to_own & same, to_own & ~same
    halo = from_edges(part[src[cross]], row[src[cross]], row[dst[cross]], counts.tolist(), **about)
    return np.flatnonzero(part == rank), row[src[inner]], row[dst[inner]], halo


def from_edges(owner: np.ndarray, row: np.ndarray, dst: np.ndarray, nodes: Sequence[int], **about: Any) -> Halo:
    """A part's halo from its cross edges (E,): owner and row of each source, own node of each destination.

    nodes: number of own nodes of each rank; about: the other fields of Halo.
    """
    stride = max(nodes, default=0) + 1
    keys, src = np.unique(owner * stride + row, return_inverse=True)
    ends = np.searchsorted(keys, np.arange(1, len(nodes)) * stride)
    recv_rows = [torch.from_numpy(rows % stride) for rows in np.split(keys, ends)]
    return Halo(torch.from_numpy(src.reshape(-1)), torch.from_numpy(dst), recv_rows, list(nodes), **about)
