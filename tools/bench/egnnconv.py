"""DGL's own layer: dgl.nn.EGNNConv after an embedding (EGNN without virtual nodes or velocities)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from dgl import DGLGraph
from dgl.nn import EGNNConv
from torch import Tensor, nn


class EGNNConvModel(nn.Module):
    """An embedding, then L layers EGNNConv(H, H, H, A)."""

    def __init__(self, features: int, edge_attributes: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(features, hidden)
        self.layers = nn.ModuleList(EGNNConv(hidden, hidden, hidden, edge_attributes) for _ in range(layers))

    def forward(self, graph: DGLGraph, f: Tensor, x: Tensor, e: Tensor) -> Tensor:
        h = self.embedding(f)
        for layer in self.layers:
            h, x = layer(graph, h, x, e)
        return x


def peer(ours: nn.Module, graph: DGLGraph, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """EGNNConv layers of the number and widths of our model, and a function that predicts for the graph."""
    state = ours.state_dict()
    hidden, features = state["embedding.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    graph = graph.to(device)
    f, x, e = graph.ndata["f"], graph.ndata["x"], graph.edata["e"]
    model = EGNNConvModel(features, e.shape[1], hidden, layers).to(device)
    return model, lambda: model(graph, f, x, e)
