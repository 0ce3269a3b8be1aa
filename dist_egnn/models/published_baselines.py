"""The baselines EGNN, RF and SchNet as the authors' experiments ran them (model.as_published; docs/models.md).

Legend: E edges, n nodes of a tile, G Gaussians, W filters, H width.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from dgl import DGLGraph
from torch import Tensor, nn
from torch.nn import functional

from ..data import halo
from ..ops.message_passing import Fields
from ..ops.tiling import Tiles
from . import network
from .base import Layer, displacement
from .egnn import EGNNLayer
from .rf import RFLayer
from .schnet import gaussians


class PublishedEGNNLayer(EGNNLayer):
    """EGNN without residual: h_i' = φ_h([h_i, mean_j m_ij]), and dx_i clamped to ±100 by component.

    The last layer of φ_x has a bias and torch's default initialisation. The clamp breaks equivariance beyond 100.
    """

    options: ClassVar = ()
    residual: ClassVar = False

    def build(self, hidden: int, edge_attributes: int) -> None:  # type: ignore[override]
        super().build(hidden, edge_attributes)
        last = nn.Linear(hidden, 1)
        self.phi_x[2].weight, self.bias = last.weight, last.bias

    def aggregate(self, data: Fields) -> Fields:
        """dx (n, 3), clamped, and m (n, H)."""
        return {**data, "dx": data["dx"].clamp(-100, 100)}


class PublishedRFLayer(RFLayer):
    """A radial field whose φ_x ends in tanh."""

    options: ClassVar = ()

    def build(self, hidden: int, edge_attributes: int) -> None:  # type: ignore[override]
        super().build(hidden, edge_attributes, tanh=True)


class PublishedSchNetLayer(Layer):
    """The interaction of SchNet with an update of positions, without velocities.

        x_i' = x_i + mean_j (x_i − x_j) (w · [g_ij, h_i, h_j] + b)
        h_i' = h_i + W₃ ssp(W₂ Σ_j (W₁ h_j) ∘ f(g_ij) ½ (1 + cos(π d_ij / cutoff)))

    d_ij is the distance at the input positions in all layers (the first edge attribute), g_ij its Gaussians, ssp(a) =
    softplus(a) − ln 2, and f is Linear(G→W), ssp, Linear(W→W). The cosine goes on beyond the cutoff.
    """

    options: ClassVar = ("cutoff",)
    gaussians: ClassVar = 50
    filters: ClassVar = 128

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        del self.phi_v, self.phi_h  # of the other backbones

    def build(self, hidden: int, edge_attributes: int, *, cutoff: float = 1.0) -> None:
        self.cutoff = cutoff
        self.filter_in, self.filter_out = nn.Linear(self.gaussians, self.filters), nn.Linear(self.filters, self.filters)
        self.sender = nn.Linear(hidden, self.filters, bias=False)  # W₁
        self.receiver, self.out = nn.Linear(self.filters, hidden), nn.Linear(hidden, hidden)  # W₂, W₃
        for linear in (self.filter_in, self.filter_out, self.sender, self.receiver, self.out):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.phi_x = nn.Linear(self.gaussians + 2 * hidden, 1)  # w, b

    def _ends(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The terms of w in h_i and in h_j (n, 1)."""
        width = h.shape[1]
        _, w_i, w_j = self.phi_x.weight.split([self.gaussians, width, width], 1)
        return functional.linear(h, w_i), functional.linear(h, w_j)

    def send(self, src: Fields) -> Fields:
        """x (n_src, 3), W₁ h_j (n_src, W) and w's term in h_j (n_src, 1)."""
        return {"x": src["x"], "q": self.sender(src["h"]), "scale": self._ends(src["h"])[1]}

    def receive(self, dst: Fields) -> Fields:
        """x (n, 3) and w's term in h_i (n, 1)."""
        return {"x": dst["x"], "scale": self._ends(dst["h"])[0]}

    def message(self, edges: Any) -> Fields:
        """Message UDF: m (E, W), the summands of h_i', and dx (E, 3)."""
        distance = edges.data["e"][:, :1]
        g = gaussians(distance, self.gaussians, self.cutoff)
        w_g = self.phi_x.weight[:, : self.gaussians]
        dx = displacement(edges) * (
            functional.linear(g, w_g, self.phi_x.bias) + edges.src["scale"] + edges.dst["scale"]
        )
        if "h" not in self.outputs:
            return {"dx": dx}
        cosine = 0.5 + 0.5 * torch.cos(distance * (math.pi / self.cutoff))
        return {"m": edges.src["q"] * self.filter_out(_ssp(self.filter_in(g))) * cosine, "dx": dx}

    def update(self, nodes: Any) -> Fields:
        """Node UDF: x', h'."""
        data = nodes.data
        out = {"x": data["x"] + self.unit * data["dx"]}
        if "h" in self.outputs:
            total = data["m"] * data["in_degree"]
            out["h"] = data["h"] + self.out(_ssp(self.receiver(total)))
        return out


def _ssp(a: Tensor) -> Tensor:
    """Shifted softplus."""
    return functional.softplus(a) - math.log(2)


class PublishedEGNN(network.Network):
    """EGNN as the authors' experiments ran it."""

    layer = PublishedEGNNLayer
    fixed = ("normalize",)


class PublishedRF(network.Network):
    """Radial field as the authors' experiments ran it."""

    layer = PublishedRFLayer
    fixed = ("normalize",)


class PublishedSchNet(network.Network):
    """SchNet as the authors' experiments ran it, with six layers."""

    layer = PublishedSchNetLayer
    fixed = ("normalize", "layers", "basis")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"layers": 6, **options})

    def forward(
        self, graph: DGLGraph, nodes: Fields | None = None, edges: Fields | None = None
    ) -> tuple[Tensor, Tensor]:
        degree = graph.in_degrees()
        if halos := halo.get(graph):
            degree = degree + torch.bincount(halos.dst.to(degree.device), minlength=len(degree))
        return super().forward(graph, {**(nodes or {}), "in_degree": degree.unsqueeze(1)}, edges)

    def _inputs(self, tiles: Tiles, nodes: Fields, edges: Fields) -> tuple[Fields, Fields]:
        node, edge = super()._inputs(tiles, nodes, edges)
        return node | {"in_degree": nodes["in_degree"].to(node["x"]).index_select(0, tiles.order)}, edge


# the models in place of which model.as_published takes others
PUBLISHED: dict[type[nn.Module], type[network.Network]] = {
    network.EGNN: PublishedEGNN,
    network.RF: PublishedRF,
    network.SchNet: PublishedSchNet,
}
