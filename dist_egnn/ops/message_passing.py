"""Two engines that run a message UDF on a block: DGL's own kernels, and plain torch for devices DGL has no build for.

A *message UDF* takes edges (``edges.src``, ``edges.dst``, ``edges.data``) and returns fields per edge; a *node UDF* takes
nodes (``nodes.data``) and returns fields per node: DGL's vocabulary, the same for both engines.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import dgl
import dgl.function as fn
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..errors import Failure
from ..utils.memory import keep_freed_memory

keep_freed_memory()  # whatever computes with tensors comes by here

# a part of a graph, or FastEGNN at edge dropping p = 1, may have no edge at all: nothing to warn of
warnings.filterwarnings("ignore", message="The input graph for the user-defined edge function")

Fields = dict[str, Tensor]
UDF = Callable[[Any], Fields]


class Nodes:
    """What a node UDF sees: ``data``. Its work is row by row, so it needs no kernel of either engine."""

    def __init__(self, data: Fields) -> None:
        self.data = data


class Engine(Protocol):
    name: str

    def block(self, src: Tensor, dst: Tensor, n_src: int, n_dst: int) -> Any:
        """Edges src[k]→dst[k] (int32, sorted by dst) between n_src source rows and n_dst destination rows."""

    def mean(self, block: Any, message: UDF, src: Fields, dst: Fields, edge: Fields) -> Fields:
        """The mean over in-edges of every field that ``message`` returns; zero where there are none."""


class DGLEngine:
    """Message passing by DGL: ``apply_edges`` with the UDF, then the ``copy_e``/``mean`` kernel."""

    name = "dgl"

    def block(self, src: Tensor, dst: Tensor, n_src: int, n_dst: int) -> Any:
        return dgl.create_block((src, dst), num_src_nodes=n_src, num_dst_nodes=n_dst)

    def mean(self, block: Any, message: UDF, src: Fields, dst: Fields, edge: Fields) -> Fields:
        with block.local_scope():
            block.srcdata.update(src)
            block.dstdata.update(dst)
            block.edata.update(edge)
            sent: list[str] = []

            def udf(edges: Any) -> Fields:
                out = message(edges)
                sent.extend(out)
                return {f"sent_{name}": value for name, value in out.items()}

            block.apply_edges(udf)
            for name in sent:
                block.update_all(fn.copy_e(f"sent_{name}", "m"), fn.mean("m", f"mean_{name}"))
            return {name: block.dstdata[f"mean_{name}"] for name in sent}


def _sum_rows(value: Tensor, order: Tensor, start: Tensor) -> Tensor:
    """Sums over runs of rows: row k of the result is the sum of value[order[start[k]:start[k+1]]]."""
    if not len(order):
        return value.new_zeros(len(start) - 1, *value.shape[1:])
    # on a CPU, several times the speed of index_add, and no E×H array to gather first (docs/performance.md)
    return torch.embedding_bag(value, order.int(), start.int(), False, 0, False, None, True)[0]


@dataclass
class _Ends:
    """The edges of a block, in int16 where it can count that far: of a large graph these numbers weigh as much as its fields."""

    pairs: Tensor  # (2E,) source row and n_src + destination row of each edge in turn
    by_source: Tensor  # (E,) the edges, sorted by source
    out_start: Tensor  # (n_src + 1,) where a source's edges start in by_source
    in_start: Tensor  # (n_dst + 1,) where a destination's edges start

    @property
    def src(self) -> Tensor:
        return self.pairs[0::2].int().contiguous()

    @property
    def dst(self) -> Tensor:
        return self.pairs[1::2].int() - (len(self.out_start) - 1)

    def count(self, step: int) -> Tensor:
        """0, step, … E·step."""
        edges = len(self.by_source)
        return torch.arange(0, edges * step + 1, step, dtype=torch.int32, device=self.pairs.device)

    def of_ends(self, src: Tensor, dst: Tensor) -> Tensor:
        return _sum_rows(torch.cat([src, dst]), self.pairs, self.count(2))

    def to_src(self, value: Tensor) -> Tensor:
        return _sum_rows(value.contiguous(), self.by_source, self.out_start)

    def to_dst(self, value: Tensor) -> Tensor:
        return _sum_rows(value.contiguous(), self.count(1)[:-1], self.in_start)


class _SumOfEnds(torch.autograd.Function):
    """src[j] + dst[i] of each edge j→i; the backward pass sums over the edges of each row."""

    @staticmethod
    def forward(ctx: Any, ends: _Ends, src: Tensor, dst: Tensor) -> Tensor:
        ctx.ends = ends
        return ends.of_ends(src, dst)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, src, dst = ctx.needs_input_grad
        return None, ctx.ends.to_src(grad) if src else None, ctx.ends.to_dst(grad) if dst else None


class _Gather(torch.autograd.Function):
    """Rows of one end for edges; the backward pass sums over the edges of each row."""

    @staticmethod
    def forward(ctx: Any, ends: _Ends, value: Tensor, end: str) -> Tensor:
        ctx.back = getattr(ends, f"to_{end}")
        return value.index_select(0, getattr(ends, end))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.back(grad), None


class _Mean(torch.autograd.Function):
    """Means over in-edges, which stand sorted by destination; the backward pass is a gather."""

    @staticmethod
    def forward(ctx: Any, ends: _Ends, value: Tensor) -> Tensor:
        ctx.ends, ctx.degree = ends, ends.in_start.diff().clamp_(min=1).unsqueeze(1)
        return ends.to_dst(value).div_(ctx.degree)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, (grad / ctx.degree).index_select(0, ctx.ends.dst)


class _Rows(Mapping[str, Tensor]):
    """Fields of one end of the edges, gathered when asked for."""

    def __init__(self, fields: Fields, ends: _Ends, end: str) -> None:
        self.fields, self.ends, self.end = fields, ends, end

    def __getitem__(self, name: str) -> Tensor:
        return _Gather.apply(self.ends, self.fields[name], self.end)

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


class _Edges:
    def __init__(self, ends: _Ends, src: Fields, dst: Fields, data: Fields) -> None:
        self.src, self.dst, self.data = _Rows(src, ends, "src"), _Rows(dst, ends, "dst"), data

    def sum_of_ends(self, src: Tensor, dst: Tensor) -> Tensor:
        return _SumOfEnds.apply(self.src.ends, src, dst)


def sum_of_ends(edges: Any, src: str, dst: str) -> Tensor:
    """src field at the source + dst field at the destination of each edge, for a message UDF: (E, …), free to overwrite.

    On the plain-torch engine in one pass over the result, four times as fast as two gathers and a sum.
    """
    if isinstance(edges, _Edges):
        return edges.sum_of_ends(edges.src.fields[src], edges.dst.fields[dst])
    return edges.src[src] + edges.dst[dst]


def difference(edges: Any, name: str) -> Tensor:
    """The field at the destination minus the field at the source of each edge, for a message UDF."""
    if isinstance(edges, _Edges):
        return edges.sum_of_ends(-edges.src.fields[name], edges.dst.fields[name])
    return edges.dst[name] - edges.src[name]


class TorchEngine:
    """The same in plain torch, on any device."""

    name = "torch"

    def block(self, src: Tensor, dst: Tensor, n_src: int, n_dst: int) -> Any:
        def start(index: Tensor, rows: int) -> Tensor:
            return functional.pad(torch.bincount(index, minlength=rows).cumsum(0), (1, 0))

        dtype = torch.int16 if max(n_src + n_dst, len(src)) < 2**15 else torch.int32
        pairs = torch.stack([src, dst + n_src], 1).flatten()
        found = pairs, src.argsort(stable=True), start(src, n_src), start(dst, n_dst)
        return _Ends(*(index.to(dtype) for index in found))

    def mean(self, block: Any, message: UDF, src: Fields, dst: Fields, edge: Fields) -> Fields:
        return {name: _Mean.apply(block, value) for name, value in message(_Edges(block, src, dst, edge)).items()}


def choose(name: str, device: torch.device | str = "cpu") -> Engine:
    """The engine called ``name``: dgl, torch, or auto: torch, the faster and the leaner of the two (docs/performance.md)."""
    if name not in ("auto", "dgl", "torch"):
        raise Failure(f"model.engine={name}: unknown; use auto, dgl or torch")
    if name != "dgl":
        return TorchEngine()
    if not runs_dgl(device):
        raise Failure(f"model.engine=dgl: this DGL has no build for {device}; use model.engine=torch")
    return DGLEngine()


def runs_dgl(device: torch.device | str) -> bool:
    """Whether DGL has kernels for the device (PyPI's builds: the CPU only)."""
    try:
        dgl.graph(([0], [0])).to(device)
    except dgl.DGLError:
        return False
    return True
