"""Run a message UDF on a bipartite block of edges, by DGL's kernels or by plain torch (any device).

UDFs follow DGL's conventions. A message UDF takes ``edges`` (``edges.src``, ``edges.dst``, ``edges.data``) and returns
fields per edge; a node UDF takes ``nodes`` (``nodes.data``) and returns fields per node.

Legend: E edges of a block, n_src source rows, n_dst destination rows.
"""

from __future__ import annotations

import os
import warnings
from collections import UserDict
from collections.abc import Callable
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
from .native.engine import NativeEngine
from .native.library import Library, library

keep_freed_memory()  # every module that computes with tensors imports this one

# a part of a graph, or FastEGNN with all edges dropped, may have no edge
warnings.filterwarnings("ignore", message="The input graph for the user-defined edge function")

Fields = dict[str, Tensor]
UDF = Callable[[Any], Fields]

# OpenMP's threads do not survive a fork, and a child that waited for them would hang: it computes with one
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


class Nodes:
    """The argument of a node UDF.

    data: fields (n, …); shared: fields (b, …) of the graphs; graph (n,): graph of each node, None if it is one for all; library:
    the native kernels, if the layer's engine is the native one; gradients_only: whether the results' values are known.
    """

    def __init__(
        self,
        data: Fields,
        shared: Fields,
        graph: Tensor | None,
        library: Library | None = None,
        gradients_only: bool = False,
    ) -> None:
        self.data, self.shared, self.graph, self.library = data, shared, graph, library
        self.gradients_only = gradients_only

    def spread(self, name: str) -> Tensor:
        """A shared field for every node (n, …)."""
        value = self.shared[name]
        if self.graph is None:
            return value.expand(len(self.data["x"]), *value.shape[1:])
        return value.index_select(0, self.graph)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of (n, …) over the nodes of each graph: (b, …)."""
        if self.graph is None:
            return value.sum(0, keepdim=True)
        graphs = len(next(iter(self.shared.values())))
        return value.new_zeros(graphs, *value.shape[1:]).index_add(0, self.graph, value)


class Engine(Protocol):
    """Runs message UDFs on blocks of edges."""

    name: str

    def block(self, src: Tensor, dst: Tensor, n_src: int, n_dst: int) -> Any:
        """A block of the edges src[k] → dst[k], both (E,) int32, sorted by dst; the type is the engine's own."""

    def mean(
        self, block: Any, layer: Any, src: Fields, dst: Fields, edge: Fields, known: Fields | None = None
    ) -> Fields:
        """The mean over in-edges (n_dst, …) of every field that ``layer.message`` returns; zero for rows without in-edges.

        src: (n_src, …), dst: (n_dst, …), edge: (E, …). known: the result, if only its autograd graph is needed.
        """


class DGLEngine:
    """Message passing by DGL: ``apply_edges`` with the UDF, then the ``copy_e``/``mean`` kernel."""

    name = "dgl"

    def block(self, src: Tensor, dst: Tensor, n_src: int, n_dst: int) -> Any:
        return dgl.create_block((src, dst), num_src_nodes=n_src, num_dst_nodes=n_dst)

    def mean(
        self, block: Any, layer: Any, src: Fields, dst: Fields, edge: Fields, known: Fields | None = None
    ) -> Fields:
        with block.local_scope():
            block.srcdata.update(src)
            block.dstdata.update(dst)
            block.edata.update(edge)
            block.apply_edges(lambda edges: {f"message_{name}": value for name, value in layer.message(edges).items()})
            names = [name for name in block.edata if name.startswith("message_")]
            for name in names:
                block.update_all(fn.copy_e(name, "m"), fn.mean("m", f"mean_{name}"))
            return {name.removeprefix("message_"): block.dstdata[f"mean_{name}"] for name in names}


def _sum_rows(value: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """Row k of the result is the sum of value[rows[offsets[k]:offsets[k + 1]]]."""
    if not len(rows):
        return value.new_zeros(len(offsets) - 1, *value.shape[1:])
    # on a CPU several times as fast as index_add, without a gathered (E, H) array (docs/performance.md)
    return torch.embedding_bag(value, rows.int(), offsets.int(), False, 0, False, None, True)[0]


@dataclass
class _TorchBlock:
    """Indices are int16 where possible: on large graphs they need as much memory as the fields."""

    endpoints: Tensor  # (2E,) for each edge its source row, then n_src + its destination row
    by_source: Tensor  # (E,) the edges sorted by source
    src_offsets: Tensor  # (n_src + 1,) where the edges of each source begin in by_source
    dst_offsets: Tensor  # (n_dst + 1,) where the in-edges of each destination begin

    @property
    def src(self) -> Tensor:
        return self.endpoints[0::2].int().contiguous()

    @property
    def dst(self) -> Tensor:
        return self.endpoints[1::2].int() - (len(self.src_offsets) - 1)

    def _multiples(self, step: int) -> Tensor:  # 0, step, …, E·step
        end = len(self.by_source) * step + 1
        return torch.arange(0, end, step, dtype=torch.int32, device=self.endpoints.device)

    def add_endpoints(self, src: Tensor, dst: Tensor) -> Tensor:
        return _sum_rows(torch.cat([src, dst]), self.endpoints, self._multiples(2))

    def sum_to_src(self, value: Tensor) -> Tensor:
        return _sum_rows(value.contiguous(), self.by_source, self.src_offsets)

    def sum_to_dst(self, value: Tensor) -> Tensor:
        return _sum_rows(value.contiguous(), self._multiples(1)[:-1], self.dst_offsets)


class _AddEndpoints(torch.autograd.Function):
    """src[j] + dst[i] of each edge j→i."""

    @staticmethod
    def forward(ctx: Any, block: _TorchBlock, src: Tensor, dst: Tensor) -> Tensor:
        ctx.block = block
        return block.add_endpoints(src, dst)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, src, dst = ctx.needs_input_grad
        return None, ctx.block.sum_to_src(grad) if src else None, ctx.block.sum_to_dst(grad) if dst else None


class _Gather(torch.autograd.Function):
    """The rows of one endpoint ("src" or "dst") of each edge."""

    @staticmethod
    def forward(ctx: Any, block: _TorchBlock, value: Tensor, endpoint: str) -> Tensor:
        ctx.sum_back = getattr(block, f"sum_to_{endpoint}")
        return value.index_select(0, getattr(block, endpoint))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.sum_back(grad), None


class _Mean(torch.autograd.Function):
    """The mean over the in-edges of each destination."""

    @staticmethod
    def forward(ctx: Any, block: _TorchBlock, value: Tensor) -> Tensor:
        ctx.block, ctx.degree = block, block.dst_offsets.diff().clamp_(min=1).unsqueeze(1)
        return block.sum_to_dst(value).div_(ctx.degree)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, (grad / ctx.degree).index_select(0, ctx.block.dst)


class _EndpointFields(UserDict[str, Tensor]):
    """Fields of one endpoint of the edges, gathered on access; ``data`` holds the rows of nodes."""

    def __init__(self, fields: Fields, block: _TorchBlock, endpoint: str) -> None:
        super().__init__(fields)
        self.block, self.endpoint = block, endpoint

    def __getitem__(self, name: str) -> Tensor:
        return _Gather.apply(self.block, self.data[name], self.endpoint)


class _Edges:
    """The argument of a message UDF."""

    def __init__(self, block: _TorchBlock, src: Fields, dst: Fields, data: Fields) -> None:
        self.block, self.data = block, data
        self.src, self.dst = _EndpointFields(src, block, "src"), _EndpointFields(dst, block, "dst")


def add_endpoints(edges: Any, src: str, dst: str) -> Tensor:
    """Source field + destination field of each edge, for a message UDF: (E, …), which the caller may overwrite.

    TorchEngine makes one pass over the result, four times as fast as two gathers and a sum.
    """
    if isinstance(edges, _Edges):
        return _AddEndpoints.apply(edges.block, edges.src.data[src], edges.dst.data[dst])
    return edges.src[src] + edges.dst[dst]


def difference(edges: Any, name: str) -> Tensor:
    """The field at the destination minus the field at the source of each edge, for a message UDF: (E, …)."""
    if isinstance(edges, _Edges):
        return _AddEndpoints.apply(edges.block, -edges.src.data[name], edges.dst.data[name])
    return edges.dst[name] - edges.src[name]


class TorchEngine:
    """Message passing by plain torch operations, on any device."""

    name = "torch"

    def block(self, src: Tensor, dst: Tensor, n_src: int, n_dst: int) -> Any:
        def offsets(rows: Tensor, count: int) -> Tensor:
            return functional.pad(torch.bincount(rows, minlength=count).cumsum(0), (1, 0))

        dtype = torch.int16 if max(n_src + n_dst, len(src)) < 2**15 else torch.int32
        endpoints = torch.stack([src, dst + n_src], 1).flatten()
        indices = endpoints, src.argsort(stable=True), offsets(src, n_src), offsets(dst, n_dst)
        return _TorchBlock(*(index.to(dtype) for index in indices))

    def mean(
        self, block: Any, layer: Any, src: Fields, dst: Fields, edge: Fields, known: Fields | None = None
    ) -> Fields:
        message = layer.message(_Edges(block, src, dst, edge))
        return {name: _Mean.apply(block, value) for name, value in message.items()}


def resolve_engine(name: str, device: torch.device | str = "cpu", obstacle: str | None = "no layer is given") -> Engine:
    """The engine for ``model.engine``: native, torch, dgl, or auto: native where it can run the layer, else torch.

    obstacle: why the native engine cannot run the layer, "" if it can (`native.engine.obstacle`). Raises Failure for an
    unknown name, for native with an obstacle, and for dgl where DGL does not support the device.
    """
    if name not in ("auto", "native", "torch", "dgl"):
        raise Failure(f"model.engine={name}: unknown; use auto, native, torch or dgl")
    if name == "native" and obstacle:
        raise Failure(f"model.engine=native: {obstacle}; use model.engine=auto")
    if name in ("auto", "native") and not obstacle and (kernels := library()):
        return NativeEngine(kernels)
    if name == "dgl" and not dgl_supports(device):
        raise Failure(f"model.engine=dgl: this DGL has no build for {device}; use model.engine=torch")
    return DGLEngine() if name == "dgl" else TorchEngine()


def dgl_supports(device: torch.device | str) -> bool:
    """Whether DGL has kernels for the device (builds on PyPI: the CPU only)."""
    try:
        dgl.graph(([0], [0])).to(device)
    except dgl.DGLError:
        return False
    return True
