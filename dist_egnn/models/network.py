"""The models by name. A model maps a (batched) DGLGraph with the fields of fields.py to (x^L (N, 3), z^L (B, C, 3)).

Legend: N nodes, B graphs, C virtual nodes, H width, F input features, K node attributes, A edge attributes.
"""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from dgl import DGLGraph
from torch import Tensor, nn

from ..data import halo
from ..distributed.comm import Comm, SingleProcess
from ..errors import Failure
from ..ops import message_passing as engines
from ..ops import tiling
from . import published_weights
from .base import Layer
from .egnn import EGNNLayer
from .rf import RFLayer
from .schnet import SchNetLayer
from .tfn import TFNLayer

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
        self.comm: Comm = SingleProcess()

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


def edge_field(graph: DGLGraph, name: str, width: int) -> Tensor:
    """An edge field of the given width; Failure if it is missing or misshapen."""
    value = graph.edata.get(name)
    if value is None or value.shape[1:] != (width,):
        shape = "missing" if value is None else tuple(value.shape)
        raise Failure(f"edge field '{name}' is {shape}, the model was made for (E, {width})")
    return value


class Network(nn.Module):
    """L layers of a kind after an embedding of the features, with C virtual nodes if the model has some (arXiv 2506.19482).

    On partitions (``comm`` of a group) every partition holds a replica of the virtual nodes. Initially z_c is the centroid
    of the whole graph and s_c a learnable vector (C, H), standard normal.

    options: those of the layer's ``build``. Raises Failure for others, naming the config key.
    """

    layer: ClassVar[type[Layer]]
    virtual_nodes: ClassVar[int] = 0  # C unless told otherwise

    def __init__(
        self,
        features: int,
        node_attributes: int = 0,
        edge_attributes: int = 2,
        *,
        hidden: int = 64,
        layers: int = 4,
        virtual_nodes: int | None = None,
        gravity: Sequence[float] | None = None,
        precision: str = "float32",
        engine: str = "auto",
        tile: int = tiling.SIZE,
        **options: Any,
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise Failure(f"model.precision={precision}: unknown; use {' or '.join(PRECISIONS)}")
        low = precision != "float32"
        name = type(self).__name__
        for key in options:
            if key not in self.layer.options:
                raise Failure(f"model.{key}: {name} has no such option; leave it out")
        if low and "low" not in self.layer.options:
            raise Failure(f"model.precision={precision}: not with {name}; use float32")
        if low and options.get("attention"):
            raise Failure("model.precision=bf16-messages: not with model.attention; turn one of them off")
        count = self.virtual_nodes if virtual_nodes is None else virtual_nodes
        self.widths = {"f": features, "a": node_attributes, "e": edge_attributes}
        self.hidden, self.count, self.tile, self.engine = hidden, count, tile, engine
        if self.layer.features:
            self.embedding = nn.Linear(features, hidden)
            if count:
                self.s = nn.Parameter(torch.randn(count, hidden))
        given = {"virtual_nodes": count, "gravity": gravity, "low": low, **options}
        self.layers = nn.ModuleList(
            self.layer(hidden, edge_attributes, node_attributes, last=k == layers - 1, **given) for k in range(layers)
        )
        self.comm: Comm = SingleProcess()
        self.exchange = False  # whether every graph must have its halo

    @classmethod
    def takes(cls, key: str) -> bool:
        """Whether the key of the config's model section means something to this model."""
        if key == "virtual_nodes":
            return bool(cls.virtual_nodes)
        common = ("hidden", "layers", "gravity", "precision", "engine", "tile")
        return key in (*common, *cls.layer.options)

    def _inputs(self, graph: DGLGraph, cut: tiling.Tiles) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Node fields in the tiles' order and edge fields, in the model's precision."""
        like = next(self.parameters())
        widths = {"x": 3, "v": 3}
        if self.layer.features:
            widths |= {name: self.widths[name] for name in ("f", "a") if name == "f" or self.widths[name]}
        node = {name: field(graph, name, width).to(like).index_select(0, cut.order) for name, width in widths.items()}
        if self.layer.features:
            node["h"] = self.embedding(node.pop("f"))
        edge = {}
        if self.widths["e"]:
            edge["e"] = edge_field(graph, "e", self.widths["e"])
        if "shift" in graph.edata:
            edge["shift"] = edge_field(graph, "shift", 3)
        if halos := halo.get(graph):
            edge = {name: torch.cat([value, halos.edge(name)]) for name, value in edge.items()}
        return node, {name: value.to(like) for name, value in edge.items()}

    def prepare(self, graph: DGLGraph) -> DGLGraph:
        """Cut the graph into tiles, which stay with it, so that a step need not."""
        self.cut(graph)
        return graph

    def cut(self, graph: DGLGraph) -> tuple[engines.Engine, tiling.Tiles]:
        """The engine that runs the messages, and the graph's tiles for it."""
        field(graph, "x", 3)
        # the graph stays where it is: DGL may have no build for the model's device
        device = next(self.parameters()).device
        engine = engines.choose(self.engine, device)
        return engine, tiling.of(graph, engine, self.tile, device, self.hidden)

    def forward(self, graph: DGLGraph) -> tuple[Tensor, Tensor]:
        engine, cut = self.cut(graph)
        wire = None
        if halos := halo.get(graph):
            halos.link(graph.ndata["x"], self.comm)
            wire = halos.exchange(cut.inverse, self.comm)
        elif self.exchange:
            raise Failure(
                "partition.halo=exchange: the graph has lost its halo; join samples by halo.batch, not dgl.batch"
            )
        node, edge = self._inputs(graph, cut)
        z, s = node["x"].new_zeros(cut.batch, 0, 3), None
        if self.count:
            total, centroid = whole_graph(graph, graph.ndata["x"].to(node["x"]), self.comm)
            z = centroid.unsqueeze(1).expand(-1, self.count, -1)
            s = self.s.expand(cut.batch, -1, -1) if self.layer.features else None
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            if k == 0:
                node |= layer.begin(node)
            shared = layer.virtual.shared(z, s, centroid) if layer.virtual else {}
            out = tiling.run(layer, engine, cut, node, edge, shared, wire)
            if layer.virtual:
                z, s, centroid = layer.virtual.update(z, s, out, total, self.comm)
            node.update({name: out[name] for name in layer.outputs})
        return node["x"].index_select(0, cut.inverse), z


class EGNN(Network):
    """EGNN (Satorras et al. 2021)."""

    layer = EGNNLayer


class FastEGNN(EGNN):
    """EGNN with virtual nodes; on partitions, DistEGNN."""

    virtual_nodes = 3

    @classmethod
    def from_published(
        cls, state_dict: Mapping[str, Tensor], *, normalize: bool = False, gravity: Sequence[float] | None = None
    ) -> FastEGNN:
        """The model that a state dict of the authors' code means, sizes and options as its shapes and keys say.

        normalize, gravity: as it was trained; weights do not tell. The result has their dtype, float32 at least. Raises Failure
        that names the key for one that is unknown, missing or misshapen.
        """
        state = published_weights.plain(state_dict)
        published_weights.check_gravity(state, gravity)
        model = cls(**published_weights.sizes(state), normalize=normalize, gravity=gravity)
        weights = published_weights.renamed(state, model.state_dict())
        model.to(torch.promote_types(weights["s"].dtype, torch.float32)).load_state_dict(weights)
        for layer in model.layers if gravity is not None else ():
            layer.g = torch.as_tensor(gravity, dtype=model.s.dtype)  # it was rounded to float32 before
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


MODELS: tuple[type[nn.Module], ...] = (Linear, EGNN, FastEGNN, RF, FastRF, SchNet, FastSchNet, TFN, FastTFN)
NAMES = {model.__name__: model for model in MODELS}


def named(name: str) -> type[nn.Module]:
    """The model class called ``name``: one of ours, or PACKAGE.MODULE:CLASS, imported (docs/extend.md).

    Raises Failure for a name that is none, with the nearest, and for what cannot be imported.
    """
    if ":" in name:
        return _imported(name)
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise Failure(f"model.name={name}: unknown; {hint}known: {', '.join(NAMES)}, or MODULE:CLASS of your own")
    return NAMES[name]


def _imported(name: str) -> type[nn.Module]:
    """The class that MODULE:CLASS means, from the working directory or installed."""
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        raise Failure(f"model.name={name}: '{module}' is no module's name; write PACKAGE.MODULE:CLASS, without .py")
    if os.getcwd() not in sys.path:  # Python puts there the folder of the console script instead
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise Failure(
            f"model.name={name}: cannot import {module} ({error}); run this where {module.split('.')[0]} is, or install it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise Failure(f"model.name={name}: {module} has no torch.nn.Module of that name; docs/extend.md shows one")
    return found


def choose(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], radius: float
) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class and the options that the config's model section means; radius: of the data's edges.

    Raises Failure for a key that is not at its default and means nothing to the model, except virtual_nodes, so that a backbone and
    its twin can share a file.
    """
    kind = named(settings["name"])
    if not issubclass(kind, Network):
        return kind, {}
    options = {}
    for key, value in settings.items():
        if key != "name" and kind.takes(key):
            options[key] = value
        elif key not in ("name", "virtual_nodes") and value != defaults[key]:
            raise Failure(f"model.{key}={value}: {kind.__name__} has no such option; leave it at {defaults[key]}")
    if "cutoff" in options and options["cutoff"] is None:
        options["cutoff"] = radius if math.isfinite(radius) else 10.0
    return kind, options
