"""The models by name. A model maps a (batched) DGLGraph with the fields of fields.py to (x^L (N, 3), z^L (B, C, 3)).

Legend: N nodes, B graphs, C virtual nodes, H width, F input features, K node attributes, A edge attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from dgl import DGLGraph
from torch import Tensor, nn

from . import engine as engines
from . import tiles
from .comm import Alone, Comm
from .errors import Failure
from .nn.egnn import EGNNLayer
from .nn.virtual import VirtualNodes

PRECISIONS = ("float32", "bf16-messages")


def whole_graph(graph: DGLGraph, x: Tensor, comm: Comm) -> tuple[Tensor, Tensor]:
    """N of each whole graph (B, 1) and its centroid (B, 3), all partitions counted.

    A stored partition carries both as node fields, so that no step asks for them; a graph without them is asked once.
    """
    counts = graph.batch_num_nodes()
    if "total" in graph.ndata and "centroid" in graph.ndata:
        first = counts.cumsum(0) - counts
        return graph.ndata["total"][first].to(x).unsqueeze(1), graph.ndata["centroid"][first].to(x)
    group = torch.arange(len(counts), device=x.device).repeat_interleave(counts.to(x.device))
    here = x.new_zeros(len(counts), 4).index_add(0, group, torch.cat([x, torch.ones_like(x[:, :1])], 1))
    sums = comm.sum(here)
    return sums[:, 3:], sums[:, :3] / sums[:, 3:].clamp(min=1)


class Linear(nn.Module):
    """Linear dynamics: x + t v with a learnable time t."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(()))
        self.comm: Comm = Alone()

    def forward(self, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        x, v = (field(graph, name, 3).to(self.t) for name in ("x", "v"))
        return x + self.t * v, x.new_zeros(graph.batch_size, 0, 3)


def field(graph: DGLGraph, name: str, width: int) -> Tensor:
    """A node field of the given width; Failure says which is missing or misshapen."""
    if name not in graph.ndata:
        raise Failure(f"the graph has no node field '{name}'; see docs/conventions.md for the fields of a sample")
    value = graph.ndata[name]
    if value.ndim != 2 or value.shape[1] != width:
        raise Failure(f"node field '{name}' has shape {tuple(value.shape)}, the model was made for (N, {width})")
    return value


class EGNN(nn.Module):
    """EGNN: L layers after an embedding of the features; FastEGNN (arXiv 2506.19482) if it has virtual nodes (C > 0).

    On partitions (``comm`` of a group) FastEGNN is DistEGNN: every partition holds a replica of the virtual nodes.
    Initially z_c is the centroid of the whole graph and s_c a learnable vector (C, H), standard normal.
    """

    def __init__(
        self,
        features: int,
        node_attributes: int = 0,
        edge_attributes: int = 2,
        *,
        hidden: int = 64,
        layers: int = 4,
        virtual_nodes: int = 0,
        normalize: bool = False,
        attention: bool = False,
        tanh: bool = False,
        gravity: Sequence[float] | None = None,
        precision: str = "float32",
        engine: str = "auto",
        tile: int = tiles.SIZE,
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise Failure(f"model.precision={precision}: unknown; use {' or '.join(PRECISIONS)}")
        if precision == "bf16-messages" and attention:
            raise Failure("model.precision=bf16-messages: not with model.attention; turn one of them off")
        self.widths = {"f": features, "a": node_attributes, "e": edge_attributes}
        self.count, self.tile, self.engine = virtual_nodes, tile, engine
        self.embedding = nn.Linear(features, hidden)
        low = precision == "bf16-messages"
        if virtual_nodes:
            self.s = nn.Parameter(torch.randn(virtual_nodes, hidden))
        self.layers = nn.ModuleList(
            EGNNLayer(
                hidden,
                edge_attributes,
                node_attributes,
                virtual=VirtualNodes(hidden, virtual_nodes, attention, low) if virtual_nodes else None,
                normalize=normalize,
                attention=attention,
                tanh=tanh,
                gravity=gravity,
                low=low,
                last=k == layers - 1,
            )
            for k in range(layers)
        )
        self.comm: Comm = Alone()

    def _inputs(self, graph: DGLGraph, cut: tiles.Tiles) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Node and edge fields in the tiles' order and the model's precision."""
        like = self.embedding.weight
        widths = {"x": 3, "v": 3, "f": self.widths["f"], **({"a": self.widths["a"]} if self.widths["a"] else {})}
        node = {name: field(graph, name, width).to(like).index_select(0, cut.order) for name, width in widths.items()}
        node["h"] = self.embedding(node.pop("f"))
        if not self.widths["e"]:
            return node, {}
        e = graph.edata.get("e")
        if e is None or e.shape[1:] != (self.widths["e"],):
            shape = "missing" if e is None else tuple(e.shape)
            raise Failure(f"edge field 'e' is {shape}, the model was made for (E, {self.widths['e']})")
        return node, {"e": e.to(like).index_select(0, cut.edge_order)}

    def prepare(self, graph: DGLGraph) -> DGLGraph:
        """Cut the graph into tiles, which stay with it, so that a step need not."""
        self._cut(graph)
        return graph

    def _cut(self, graph: DGLGraph) -> tuple[engines.Engine, tiles.Tiles]:
        field(graph, "x", 3)
        device = (
            self.embedding.weight.device
        )  # the graph stays where it is: DGL may have no build for the model's device
        engine = engines.choose(self.engine, device)
        return engine, tiles.of(graph, engine, self.tile, device, self.embedding.out_features)

    def forward(self, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        engine, cut = self._cut(graph)
        node, edge = self._inputs(graph, cut)
        z = node["x"].new_zeros(cut.batch, 0, 3)
        if self.count:
            total, centroid = whole_graph(graph, graph.ndata["x"].to(node["x"]), self.comm)
            z = centroid.unsqueeze(1).expand(-1, self.count, -1)
            s = self.s.expand(cut.batch, -1, -1)
        for layer in self.layers:
            assert isinstance(layer, EGNNLayer)
            shared = layer.virtual.shared(z, s, centroid) if layer.virtual else {}
            out = tiles.run(layer, engine, cut, node, edge, shared)
            if layer.virtual:
                z, s, centroid = layer.virtual.update(z, s, out, total, self.comm)
            node.update({name: out[name] for name in layer.outputs})
        return node["x"].index_select(0, cut.inverse), z


class FastEGNN(EGNN):
    """EGNN with C = 3 virtual nodes unless told otherwise."""

    def __init__(self, features: int, node_attributes: int = 0, edge_attributes: int = 2, **options: Any) -> None:
        super().__init__(features, node_attributes, edge_attributes, **{"virtual_nodes": 3, **options})


NAMES: dict[str, type[nn.Module]] = {"Linear": Linear, "EGNN": EGNN, "FastEGNN": FastEGNN}


def named(name: str) -> type[nn.Module]:
    """The model class called ``name``; Failure suggests the nearest name."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise Failure(f"model.name={name}: unknown; {hint}known: {', '.join(NAMES)}")
    return NAMES[name]
