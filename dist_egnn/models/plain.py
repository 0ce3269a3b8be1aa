"""A trained network as a function of tensors that `torch.export` accepts: a whole graph, no DGL, no tiles, no kernels.

Legend: N nodes, E edges, F features, K node attributes, C virtual nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.message_passing import Fields, Nodes
from .base import Layer
from .network import Network


@dataclass
class _Edges:
    """The argument of a message function: fields (E, …) of the sources, the destinations and the edges."""

    src: Fields
    dst: Fields
    data: Fields


class PlainNetwork(nn.Module):
    """The network of one graph and one process, with the layers' own messages and updates.

    velocity_scale: factor of v; feature_scale: (F,) factors of f, 1 except for a column ``speed``.
    """

    def __init__(self, network: Network, velocity_scale: float, feature_scale: Tensor) -> None:
        super().__init__()
        self.network, self.velocity_scale = network, velocity_scale
        self.register_buffer("feature_scale", feature_scale)
        self.feature_scale: Tensor

    def forward(
        self, x: Tensor, v: Tensor, f: Tensor, a: Tensor, edge_index: Tensor, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Positions after the run's horizon (N, 3) and of the virtual nodes (C, 3).

        x, v: (N, 3) in the units of the run's data; f: (N, F), a: (N, K); edge_index: (2, E) sources and destinations;
        shift: (E, 3) in a periodic box, the lattice vector round((x_i − x_j) / side) · side.
        """
        network, layers = self.network, self.network.layers
        src, dst = edge_index[0], edge_index[1]
        node = {"x": x, "v": v * self.velocity_scale, "a": a}
        if network.layer.features:
            node["h"] = network.embedding(f * self.feature_scale)
        r = x[dst] - x[src]
        edge = {} if shift is None else {"shift": shift}
        length = torch.linalg.vector_norm(r if shift is None else r - shift, dim=1, keepdim=True)
        edge["e"] = length.expand(-1, network.widths["e"])
        degree = x.new_zeros(x.shape[0], 1).index_add(0, dst, x.new_ones(src.shape[0], 1)).clamp(min=1)
        centroid = x.mean(0, keepdim=True)
        z, s = centroid.unsqueeze(1).expand(-1, network.count, -1), None
        if network.count and network.layer.features:
            s = network.s.unsqueeze(0)
        for k, layer in enumerate(layers):
            assert isinstance(layer, Layer)
            if k == 0:
                node |= layer.initial_state(node)
            shared = layer.virtual.shared(z, s, centroid) if layer.virtual else {}
            sources = layer.send({name: node[name] for name in layer.source_fields})
            ends: list[Fields] = [
                {name: value[rows] for name, value in fields.items()}
                for fields, rows in ((sources, src), (layer.receive(node), dst))
            ]
            messages = layer.message(_Edges(ends[0], ends[1], edge))
            means = {
                name: value.new_zeros(x.shape[0], *value.shape[1:]).index_add(0, dst, value) / degree
                for name, value in messages.items()
            }
            out = layer.update(Nodes(node | means, shared, None))
            if layer.virtual:
                total = x.new_full((1, 1), 1.0) * x.shape[0]
                z, s, centroid = layer.virtual.update(z, s, out, total, network.comm)
            node |= {name: out[name] for name in layer.outputs}
        return node["x"], z[0]
