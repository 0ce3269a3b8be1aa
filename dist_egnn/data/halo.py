"""Halo mode: what a part must know of the nodes of other parts whose edges end in it, and how it comes to know it.

In bridge mode the edges between parts are left out. In halo mode (``partition.halo: exchange``) a part keeps them, as *cross
edges*: each runs from a *halo node*, which another rank owns, to an own node. Before every layer each rank sends the rows of the
fields that messages read from their sources to whoever needs them, and in the backward pass the gradients of these rows come
back to their owners and are added there: one all-to-all each way. P ranks then compute what one process does on the full graph.

A sample stays the graph of the own nodes and the edges among them, so that the virtual nodes, the loss and all sums see it as
in bridge mode; the halo is attached to it. Halo nodes stand in order of owner, then of row there. Legend: n own nodes, m halo
nodes, E cross edges.
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
from . import graphs

Fields = dict[str, Tensor]
ATTACHED = "_dist_egnn_halo"


@dataclass
class Halo:
    """The halo of a part of one snapshot.

    It is read without a word to the other ranks; ``link`` then asks them, once, for what it is to send them and for the positions.
    """

    src: Tensor  # (E,) halo node of each cross edge
    dst: Tensor  # (E,) own node
    recv_rows: list[Tensor]  # of each rank: which of its rows the halo nodes are, ascending
    nodes: list[int]  # own nodes of each rank
    number: int  # of the snapshot
    where: str  # for errors
    radius: float = float("inf")  # no edge is longer
    side: np.ndarray | None = None  # (3,) of the periodic box
    send_rows: list[Tensor] = field(
        default_factory=list
    )  # of each rank: which own rows it needs, ascending; once linked
    edge: Fields = field(default_factory=dict)  # the fields of the cross edges; once linked

    def link(self, x: Tensor, comm: Comm) -> None:
        """Learn what each rank needs, and the fields of the cross edges; every rank of the group takes part. x: (n, 3).

        Raises Failure where ranks mean different data.
        """
        if self.send_rows:
            return
        told = torch.tensor([[self.number, n, len(rows)] for n, rows in zip(self.nodes, self.recv_rows, strict=True)])
        ones = [1] * comm.size
        heard = comm.exchange(told, ones, ones)().tolist()
        for rank, (number, nodes, _) in enumerate(heard):
            if (number, nodes) != (self.number, len(x)):
                raise Failure(
                    f"{self.where}: process {rank} is at snapshot {number} and counts {nodes} nodes here, which has {len(x)}: "
                    "the processes read different stores; give all the same"
                )
        take, give = [len(rows) for rows in self.recv_rows], [count for *_, count in heard]
        given = comm.exchange(torch.cat(self.recv_rows), take, give)().split(give)
        for rank, rows in enumerate(given):
            if len(rows) and (rows[0] < 0 or rows[-1] >= len(x) or bool((rows.diff() <= 0).any())):
                raise Failure(
                    f"{self.where}: process {rank} asks for nodes that are none of its {len(x)}; partition again"
                )
        self.complete(x, given, comm.exchange(x.index_select(0, torch.cat(given)), give, take)())

    def complete(self, x: Tensor, given: Sequence[Tensor], far: Tensor) -> None:
        """Take in what the others told: which rows of x (n, 3) each of them needs, and the positions (m, 3) of the halo nodes.

        Raises Failure for an edge that is longer than the radius.
        """
        source, destination = far.index_select(0, self.src), x.index_select(0, self.dst)
        both = torch.cat([far, x]).numpy()
        squared = graphs.squared_lengths(both, self.src.numpy(), self.dst.numpy() + len(far), self.side)
        if len(squared) and not squared.max() <= self.radius**2 * (1 + 1e-6):
            raise Failure(
                f"{self.where}: an edge from another part is {squared.max() ** 0.5:.3g} long, beyond the radius "
                f"{self.radius:g}: its halo nodes are wrong; partition again"
            )
        self.edge = graphs.edge_fields(source, destination, self.side)
        self.send_rows = list(given)


class Halos:
    """The halos of a batch: snapshots side by side, as dgl.batch numbers nodes; halo nodes in order of owner, snapshot, row."""

    def __init__(self, parts: Sequence[Halo], nodes: Sequence[int]) -> None:
        self.parts, self.first = list(parts), [0, *accumulate(nodes)]
        counts = torch.tensor([[len(rows) for rows in part.recv_rows] for part in parts])  # (B, P)
        begin = (counts.t().flatten().cumsum(0) - counts.t().flatten()).view(counts.t().shape).t()
        src = []
        for part, count, start in zip(self.parts, counts, begin, strict=True):
            moved = (start - (count.cumsum(0) - count)).repeat_interleave(count)
            src.append(part.src + moved.index_select(0, part.src))
        self.src = torch.cat(src)
        self.dst = torch.cat([part.dst + first for part, first in zip(self.parts, self.first, strict=False)])
        self.recv_counts = counts.sum(0).tolist()

    @property
    def size(self) -> int:
        """m."""
        return sum(self.recv_counts)

    def link(self, x: Tensor, comm: Comm) -> None:
        """Link what is not yet linked; x: (n, 3) of the batch."""
        for part, lo, hi in zip(self.parts, self.first, self.first[1:], strict=False):
            part.link(x[lo:hi], comm)

    def edge(self, name: str) -> Tensor:
        """A field of the cross edges."""
        return torch.cat([part.edge[name] for part in self.parts])

    def exchange(self, place: Tensor, comm: Comm) -> HaloExchange:
        """What a layer's rows travel by. place: (n,) where each own node's row stands."""
        given = [
            torch.cat([part.send_rows[rank] + first for part, first in zip(self.parts, self.first, strict=False)])
            for rank in range(len(self.recv_counts))
        ]
        return HaloExchange(comm, [place.index_select(0, rows.to(place.device)) for rows in given], self.recv_counts)


@dataclass
class HaloExchange:
    """Rows of own nodes to other ranks and of halo nodes from them, and gradients the other way."""

    comm: Comm
    send_rows: list[Tensor]  # of each rank: rows to send it
    recv_counts: list[int]

    def start(self, fields: Fields) -> Callable[[], Fields]:
        """Start to send the fields (n, …) of own nodes; returns what waits for those of the halo nodes (m, …)."""
        rows = torch.cat(self.send_rows)
        packed = torch.cat([t.detach().index_select(0, rows) for t in fields.values()], 1)
        wait = self.comm.exchange(packed, [len(r) for r in self.send_rows], self.recv_counts)
        widths = [t.shape[1] for t in fields.values()]
        return lambda: dict(zip(fields, wait().split(widths, 1), strict=True))

    def start_backward(self, grads: Fields) -> Callable[[Fields], None]:
        """Start to send the gradients (m, …) of halo nodes; returns what adds those that come to fields (n, …)."""
        give = [len(r) for r in self.send_rows]
        wait = self.comm.exchange(torch.cat(list(grads.values()), 1), self.recv_counts, give)

        def add(into: Fields) -> None:
            # rank by rank: within one, no row comes twice, so that every sum has one order
            for rows, got in zip(self.send_rows, wait().split(give), strict=True):
                for name, part in zip(grads, got.split([t.shape[1] for t in grads.values()], 1), strict=True):
                    into[name].index_add_(0, rows, part)

        return add

    def refresh(self, fields: Fields) -> Fields:
        """The fields (m, …) of the halo nodes given those (n, …) of own nodes; differentiable."""
        return dict(zip(fields, _Refresh.apply(self, tuple(fields), *fields.values()), strict=True))


class _Refresh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HaloExchange, names: tuple[str, ...], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.names, ctx.rows = exchange, names, len(values[0])
        # no views of what came, which autograd would tie together
        return tuple(t.contiguous() for t in exchange.start(dict(zip(names, values, strict=True)))().values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = {name: g for name, g, need in zip(ctx.names, grads, ctx.needs_input_grad[2:], strict=True) if need}
        add = ctx.exchange.start_backward(needed)
        into = {name: g.new_zeros(ctx.rows, *g.shape[1:]) for name, g in needed.items()}
        add(into)
        return None, None, *(into.get(name) for name in ctx.names)


def attach(graph: DGLGraph, halos: Halos) -> DGLGraph:
    """The graph, with its halo."""
    graph.__dict__[ATTACHED] = halos
    return graph


def get(graph: DGLGraph) -> Halos | None:
    """The halo of a graph; None in bridge mode."""
    return graph.__dict__.get(ATTACHED)


def batch(samples: Sequence[DGLGraph]) -> DGLGraph:
    """dgl.batch of samples, their halos with them."""
    if len(samples) == 1:
        return samples[0]
    halos = [get(graph) for graph in samples]
    joined = dgl.batch(list(samples))
    parts = [part for each in halos if each for part in each.parts]
    if not parts:
        return joined
    return attach(joined, Halos(parts, [graph.num_nodes() for graph in samples]))


def extract_part(
    src: np.ndarray, dst: np.ndarray, part: np.ndarray, rank: int, parts: int, **about: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Halo]:
    """A part of a graph whose edges are src→dst, and its nodes' parts known: part (N,).

    Returns the part's nodes, ascending; source and destination of the edges among them, by row; and its halo.
    """
    counts = np.bincount(part, minlength=parts)
    order = np.argsort(part, kind="stable")
    row = np.empty_like(order)
    row[order] = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)
    mine, same = part[dst] == rank, part[src] == part[dst]
    own, cross = mine & same, mine & ~same
    made = from_edges(part[src[cross]], row[src[cross]], row[dst[cross]], counts.tolist(), **about)
    return np.flatnonzero(part == rank), row[src[own]], row[dst[own]], made


def from_edges(owner: np.ndarray, row: np.ndarray, dst: np.ndarray, nodes: Sequence[int], **about: Any) -> Halo:
    """The halo of a part, given its cross edges: rank and row there of each source, own node of each destination.

    nodes: own nodes of each rank; about: the other fields of Halo.
    """
    most = max(nodes, default=0) + 1
    keys, src = np.unique(owner * most + row, return_inverse=True)
    ends = np.searchsorted(keys, np.arange(1, len(nodes)) * most)
    wanted = [torch.from_numpy(rows % most) for rows in np.split(keys, ends)]
    return Halo(torch.from_numpy(src.reshape(-1)), torch.from_numpy(dst), wanted, list(nodes), **about)
