"""The models by name. They map a (batched) DGLGraph (docs/conventions.md) to positions x^L (N, 3) and z^L (B, C, 3).

Legend: N nodes, B graphs, C virtual nodes, H width, F input features, K node attributes, A edge attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from dgl import DGLGraph
from torch import Tensor, nn

from ..data import halo
from ..distributed.comm import Comm, SingleProcess
from ..errors import Failure
from ..ops import message_passing, tiled_layer, tiling
from ..ops.message_passing import Fields
from ..ops.native import engine as native_engine
from ..utils.imports import import_named
from . import published_weights
from .base import Layer
from .egnn import EGNNLayer
from .rf import RFLayer
from .schnet import SchNetLayer
from .tfn import TFNLayer


def graph_size_and_centroid(graph: DGLGraph, x: Tensor, comm: Comm) -> tuple[Tensor, Tensor]:
    """N (B, 1) and centroid (B, 3) of each graph over all partitions; x: positions (n, 3) of this partition.

    Stored partitions carry both as node fields; other graphs take one all-reduce.
    """
    counts = graph.batch_num_nodes()
    if "total" in graph.ndata and "centroid" in graph.ndata:
        first = counts.cumsum(0) - counts
        return graph.ndata["total"][first].to(x).unsqueeze(1), graph.ndata["centroid"][first].to(x)
    group = torch.arange(len(counts), device=x.device).repeat_interleave(counts.to(x.device))
    local = x.new_zeros(len(counts), 4).index_add(0, group, torch.cat([x, torch.ones_like(x[:, :1])], 1))
    sums = comm.sum(local)
    return sums[:, 3:], sums[:, :3] / sums[:, 3:].clamp(min=1)


def read_field(fields: Mapping[str, Tensor], name: str, width: int) -> Tensor:
    """A field (…, width) of ``graph.ndata`` or ``graph.edata``. Raises Failure if it is missing or misshapen."""
    value = fields.get(name)
    if value is None or value.shape[1:] != (width,):
        shape = "is missing" if value is None else f"has shape {tuple(value.shape)}"
        raise Failure(f"graph: field '{name}' {shape}, the model expects (rows, {width}); see docs/conventions.md")
    return value


class Linear(nn.Module):
    """Linear dynamics x + t·v with a learnable time t, at first 1; no virtual nodes."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.ones(()))
        self.comm: Comm = SingleProcess()

    def forward(self, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        x, v = (read_field(graph.ndata, name, 3).to(self.t) for name in ("x", "v"))
        return x + self.t * v, x.new_zeros(graph.batch_size, 0, 3)


class Network(nn.Module):
    """An embedding of the features, then L layers of one kind, with C virtual nodes (arXiv 2506.19482).

        h⁰ = Linear(F→H)(f),  z⁰_c = centroid of the whole graph,  s⁰_c learnable (C, H), standard normal

    If ``comm`` spans several processes, each holds one partition and a replica of the virtual nodes (DistEGNN).

    vectors: vector inputs of a node, the width of its field v over 3. options: those of the layer's ``build``. Raises
    Failure for an unknown option, naming the config key.
    """

    layer: ClassVar[type[Layer]]
    virtual_nodes: ClassVar[int] = 0  # default of C
    fixed: ClassVar[tuple[str, ...]] = ()  # keys of the config's model section that have no effect

    def __init__(
        self,
        features: int,
        node_attributes: int = 0,
        edge_attributes: int = 2,
        *,
        hidden: int = 64,
        layers: int = 4,
        virtual_nodes: int | None = None,
        virtual_messages: str = "mean",
        vectors: int = 1,
        gravity: Sequence[float] | None = None,
        precision: str = "float32",
        engine: str = "auto",
        tile: int = tiling.BLOCK_EDGES,
        **options: Any,
    ) -> None:
        super().__init__()
        name, bf16 = type(self).__name__, precision == "bf16-messages"
        if precision not in ("float32", "bf16-messages"):
            raise Failure(f"model.precision={precision}: unknown; use float32 or bf16-messages")
        for key in options:
            if key not in self.layer.options:
                raise Failure(f"model.{key}: {name} has no such option; leave it out")
        if bf16 and "bf16" not in self.layer.options:
            raise Failure(f"model.precision={precision}: not supported by {name}; use float32")
        if bf16 and options.get("attention"):
            raise Failure(f"model.precision={precision}: cannot be combined with model.attention; turn one of them off")
        count = self.virtual_nodes if virtual_nodes is None else virtual_nodes
        self.widths = {"v": 3 * vectors, "f": features, "a": node_attributes, "e": edge_attributes}
        self.hidden, self.count, self.tile, self.engine = hidden, count, tile, engine
        if self.layer.features:
            self.embedding = nn.Linear(features, hidden)
            if count:
                self.s = nn.Parameter(torch.randn(count, hidden))
        options |= {"virtual_nodes": count, "vectors": vectors, "gravity": gravity, "bf16": bf16}
        options["concatenate"] = virtual_messages == "concat"
        self.virtual_messages = virtual_messages
        self.layers = nn.ModuleList(
            self.layer(hidden, edge_attributes, node_attributes, last=k == layers - 1, **options) for k in range(layers)
        )
        self.comm: Comm = SingleProcess()
        self.requires_halo = False  # in halo mode: a graph without a halo is an error

    def _inputs(self, tiles: tiling.Tiles, nodes: Fields, edges: Fields) -> tuple[Fields, Fields]:
        """Node fields in the tiles' order and edge fields, in the model's precision and on its device."""
        like = next(self.parameters())
        widths = {"x": 3, "v": self.widths["v"]}
        if "degree" in nodes:
            widths["degree"] = 1
        if self.layer.features:
            widths["f"] = self.widths["f"]
            if self.widths["a"]:
                widths["a"] = self.widths["a"]
        given = {name: read_field(nodes, name, width).to(like) for name, width in widths.items()}
        node = {name: value.index_select(0, tiles.order) for name, value in given.items()}
        if self.layer.features:
            node["h"] = self.embedding(node.pop("f"))
        widths = ({"e": self.widths["e"]} if self.widths["e"] else {}) | ({"shift": 3} if "shift" in edges else {})
        return node, {name: read_field(edges, name, width).to(like) for name, width in widths.items()}

    def prepare(self, graph: DGLGraph) -> DGLGraph:
        """The graph, with its tiles cached on it for ``forward``."""
        self.engine_and_tiles(graph)
        return graph

    def engine_and_tiles(self, graph: DGLGraph) -> tuple[message_passing.Engine, tiling.Tiles]:
        """The engine that runs the messages, and the graph's tiles for it."""
        read_field(graph.ndata, "x", 3)
        # the graph itself stays on its device: DGL may have no build for the model's
        like = next(self.parameters())
        device, first = like.device, self.layers[0] if len(self.layers) else None
        obstacle = first.native_obstacle() if isinstance(first, Layer) else ""
        obstacle = obstacle or native_engine.obstacle(self.hidden, like.dtype, device, getattr(first, "bf16", False))
        engine = message_passing.resolve_engine(self.engine, device, obstacle)
        return engine, tiling.tiles_of(graph, engine, self.tile, device, self.hidden)

    def forward(
        self, graph: DGLGraph, nodes: Fields | None = None, edges: Fields | None = None
    ) -> tuple[Tensor, Tensor]:
        """x^L and z^L. nodes: fields in place of the graph's; edges: all edge fields, cross edges last; on any device."""
        engine, tiles = self.engine_and_tiles(graph)
        exchange, halos = None, halo.get(graph)
        if halos:
            halos.link(graph.ndata["x"], self.comm)
            exchange = halos.exchange(tiles.inverse, self.comm)
        elif self.requires_halo:
            raise Failure("partition.halo=exchange: the graph has no halo; batch samples by halo.batch, not dgl.batch")
        if edges is None:
            edges = {name: graph.edata[name] for name in ("e", "shift") if name in graph.edata}
            if halos:
                edges = {name: torch.cat([value, halos.edge(name)]) for name, value in edges.items()}
        nodes = {**graph.ndata, **(nodes or {})}
        node, edge = self._inputs(tiles, nodes, edges)
        z, s = node["x"].new_zeros(tiles.batch, 0, 3), None
        if self.count:
            total, centroid = graph_size_and_centroid(graph, nodes["x"].to(node["x"]), self.comm)
            z = centroid.unsqueeze(1).expand(-1, self.count, -1)
            s = self.s.expand(tiles.batch, -1, -1) if self.layer.features else None
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            if k == 0:
                node |= layer.initial_state(node)
            shared = layer.virtual.shared(z, s, centroid) if layer.virtual else {}
            out = tiled_layer.run_layer(layer, engine, tiles, node, edge, shared, exchange)
            if layer.virtual:
                z, s, centroid = layer.virtual.update(z, s, out, total, self.comm)
            node.update({name: out[name] for name in layer.outputs})
        return node["x"].index_select(0, tiles.inverse), z


class EGNN(Network):
    """EGNN (Satorras et al. 2021)."""

    layer = EGNNLayer


class FastEGNN(EGNN):
    """EGNN with virtual nodes (arXiv 2506.19482); on partitions, DistEGNN."""

    virtual_nodes = 3

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        normalize: bool = False,
        tanh: bool = False,
        gravity: Sequence[float] | None = None,
    ) -> FastEGNN:
        """The model of a state dict of the authors' code; shapes and keys give its sizes and options.

        normalize, tanh, gravity: as in training, since the weights do not show them. The model has the weights' dtype, at
        least float32. Raises Failure for a key that is unknown, missing or has another shape.
        """
        state = published_weights.normalize_keys(state_dict)
        published_weights.check_gravity(state, gravity)
        options = published_weights.model_options(state)
        model = cls(**options, normalize=normalize, tanh=tanh, gravity=gravity)
        concatenated = model.count if model.virtual_messages == "concat" else 0
        weights = published_weights.rename_keys(state, model.state_dict(), concatenated)
        model.to(torch.promote_types(weights["s"].dtype, torch.float32)).load_state_dict(weights)
        for layer in model.layers if gravity is not None else ():
            layer.g = torch.as_tensor(gravity, dtype=model.s.dtype)  # model.to rounded it to float32
        return model


class RF(Network):
    """Radial field (Köhler et al. 2020)."""

    layer = RFLayer


class FastRF(RF):
    """Radial field with virtual nodes."""

    virtual_nodes = 3


class SchNet(Network):
    """SchNet (Schütt et al. 2017) with an equivariant update of positions."""

    layer = SchNetLayer


class FastSchNet(SchNet):
    """SchNet with virtual nodes."""

    virtual_nodes = 3


class TFN(Network):
    """Tensor field network (Thomas et al. 2018) of degrees 0 and 1; needs e3nn."""

    layer = TFNLayer


class FastTFN(TFN):
    """TFN with virtual nodes."""

    virtual_nodes = 3


MODELS: dict[str, type[nn.Module]] = {
    model.__name__: model for model in (Linear, EGNN, FastEGNN, RF, FastRF, SchNet, FastSchNet, TFN, FastTFN)
}


def model_class(name: str) -> type[nn.Module]:
    """The class for ``model.name``: one of MODELS, or PACKAGE.MODULE:CLASS (docs/extend.md).

    Raises Failure for an unknown name, and for a class that cannot be imported or is no torch.nn.Module.
    """
    if ":" in name:
        return _import_class(name)
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise Failure(f"model.name={name}: unknown; {hint}known: {', '.join(MODELS)}, or MODULE:CLASS of your own")
    return MODELS[name]


def _import_class(name: str) -> type[nn.Module]:
    """The class PACKAGE.MODULE:CLASS, from the working directory or installed."""
    result = import_named("model.name", name)
    if not (isinstance(result, type) and issubclass(result, nn.Module)):
        raise Failure(
            f"model.name={name}: {name.partition(':')[0]} has no torch.nn.Module of that name; see docs/extend.md"
        )
    return result
