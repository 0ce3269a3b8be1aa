"""Two engines that run a message UDF on a block: DGL's own kernels, and plain torch for devices DGL has no build for.

A *message UDF* takes edges (``edges.src``, ``edges.dst``, ``edges.data``) and returns fields per edge; a *node UDF* takes
nodes (``nodes.data``) and returns fields per node: DGL's vocabulary, the same for both engines.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import dgl
import dgl.function as fn
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import Failure

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


def _segment_sum(value: Tensor, order: Tensor, start: Tensor) -> Tensor:
    """Sums over runs of rows: row k of the result is the sum of value[order[start[k]:start[k+1]]]."""
    # on a CPU, several times the speed of index_add (docs/performance.md)
    return torch.embedding_bag(value, order, start, False, 0, False, None, True)[0]


class _Gather(torch.autograd.Function):
    """Rows for edges; the backward pass sums over the edges of each row."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, index: Tensor, order: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(order, start)
        return value.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _segment_sum(grad.contiguous(), *ctx.saved_tensors), None, None, None


class _Mean(torch.autograd.Function):
    """Means over in-edges, which stand sorted by destination; the backward pass is a gather."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, index: Tensor, order: Tensor, start: Tensor, degree: Tensor) -> Tensor:
        ctx.save_for_backward(index, degree)
        return _segment_sum(value.contiguous(), order, start).div_(degree)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, degree = ctx.saved_tensors
        return (grad / degree).index_select(0, index), None, None, None, None


class _Rows(Mapping[str, Tensor]):
    """Fields of the edges' ends, gathered when asked for."""

    def __init__(self, fields: Fields, *index: Tensor) -> None:
        self.fields, self.index = fields, index

    def __getitem__(self, name: str) -> Tensor:
        return _Gather.apply(self.fields[name], *self.index)

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


class _Edges:
    def __init__(self, src: Mapping[str, Tensor], dst: Mapping[str, Tensor], data: Fields) -> None:
        self.src, self.dst, self.data = src, dst, data


class TorchEngine:
    """The same in plain torch, on any device."""

    name = "torch"

    def block(self, src: Tensor, dst: Tensor, n_src: int, n_dst: int) -> Any:
        def runs(index: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
            start = index.new_zeros(rows + 1)
            start[1:] = torch.bincount(index, minlength=rows).cumsum(0)
            return index, index.argsort(stable=True).to(index.dtype), start

        degree = torch.bincount(dst, minlength=n_dst).clamp(min=1).unsqueeze(1)
        return runs(src, n_src), runs(dst, n_dst), degree

    def mean(self, block: Any, message: UDF, src: Fields, dst: Fields, edge: Fields) -> Fields:
        to_src, to_dst, degree = block
        sent = message(_Edges(_Rows(src, *to_src), _Rows(dst, *to_dst), edge))
        return {name: _Mean.apply(value, *to_dst, degree) for name, value in sent.items()}


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
