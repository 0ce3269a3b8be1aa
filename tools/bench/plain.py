"""FastEGNN as a page of PyTorch: gather, concatenate, perceptron, scatter, all nodes and edges at once.

Written from the equations of docs/paper-map.md, independently of dist_egnn's layers: `python tools/bench step --peers`
times it, and tests/tools/test_bench.py compares it with dist_egnn.models.network. One graph, one process, no options.

Legend: N nodes, E edges, C virtual nodes, H width, F input features, K node attributes, A edge attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from dgl import DGLGraph
from torch import Tensor, nn


def _perceptron(inputs: int, hidden: int, outputs: int, *, bias: bool = True, activate: bool = False) -> nn.Sequential:
    """Linear(inputs→hidden), SiLU, Linear(hidden→outputs)[, SiLU]."""
    layers = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs, bias=bias)]
    return nn.Sequential(*layers, nn.SiLU()) if activate else nn.Sequential(*layers)


def _mean(value: Tensor, dst: Tensor, n: int) -> Tensor:
    """Mean over in-edges, zero where there are none: (E, …) → (N, …)."""
    total = value.new_zeros(n, value.shape[1]).index_add(0, dst, value)
    degree = value.new_zeros(n).index_add(0, dst, value.new_ones(len(dst)))
    return total / degree.clamp(min=1).unsqueeze(1)


class PlainLayer(nn.Module):
    """One FastEGNN layer (EGNN's if C = 0); all right-hand sides are inputs of the layer.

    m_ij = φ_e([h_i, h_j, ‖x_i − x_j‖², e_ij]),  m_ic = φ_ev([h_i, s_c, ‖z_c − x_i‖, M_{:,c}])
    """

    def __init__(self, hidden: int, count: int, edge_attributes: int, node_attributes: int) -> None:
        super().__init__()
        self.count = count
        self.phi_e = _perceptron(2 * hidden + 1 + edge_attributes, hidden, hidden, activate=True)
        self.phi_x = _perceptron(hidden, hidden, 1, bias=False)
        self.phi_v = _perceptron(hidden, hidden, 1)
        self.phi_h = _perceptron((3 if count else 2) * hidden + node_attributes, hidden, hidden)
        if count:
            self.phi_ev = _perceptron(2 * hidden + 1 + count, hidden, hidden, activate=True)
            self.phi_xv = _perceptron(hidden, hidden, 1, bias=False)
            self.phi_z = _perceptron(hidden, hidden, 1, bias=False)
            self.phi_s = _perceptron(2 * hidden, hidden, hidden)

    def forward(
        self, h: Tensor, x: Tensor, s: Tensor, z: Tensor, v: Tensor, a: Tensor, src: Tensor, dst: Tensor, e: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h (N, H), x (N, 3), s (C, H), z (C, 3), v (N, 3), a (N, K), edges src→dst (E,), e (E, A) → h', x', s', z'."""
        n = len(x)
        r_ij = x[dst] - x[src]
        m_ij = self.phi_e(torch.cat([h[dst], h[src], (r_ij**2).sum(1, keepdim=True), e], 1))
        x_next = x + _mean(r_ij * self.phi_x(m_ij), dst, n) + self.phi_v(h) * v
        inputs = [h, _mean(m_ij, dst, n)]
        if self.count:
            c = self.count
            r_ic = x.unsqueeze(1) - z  # (N, C, 3)
            centred = z - x.mean(0)
            gram = (centred @ centred.t()).expand(n, c, c)
            distance = r_ic.norm(dim=2, keepdim=True)
            row = torch.cat([h.unsqueeze(1).expand(n, c, -1), s.expand(n, c, -1), distance, gram], 2)
            m_ic = self.phi_ev(row)  # (N, C, H)
            x_next = x_next + (r_ic * self.phi_xv(m_ic)).mean(1)
            inputs.append(m_ic.mean(1))
            z = z + (-r_ic * self.phi_z(m_ic)).mean(0)
            s = s + self.phi_s(torch.cat([s, m_ic.mean(0)], 1))
        return h + self.phi_h(torch.cat([*inputs, a], 1)), x_next, s, z


class Plain(nn.Module):
    """An embedding of the features, then L plain layers."""

    def __init__(self, features: int, node_attributes: int, edge_attributes: int, hidden: int, layers: int, count: int):
        super().__init__()
        self.embedding = nn.Linear(features, hidden)
        self.s = nn.Parameter(torch.randn(count, hidden))
        self.layers = nn.ModuleList(PlainLayer(hidden, count, edge_attributes, node_attributes) for _ in range(layers))

    def forward(
        self, x: Tensor, v: Tensor, f: Tensor, a: Tensor, src: Tensor, dst: Tensor, e: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(x^L (N, 3), z^L (C, 3))."""
        h, s, z = self.embedding(f), self.s, x.mean(0).expand(len(self.s), 3)
        for layer in self.layers:
            h, x, s, z = layer(h, x, s, z, v, a, src, dst, e)
        return x, z


def load_weights(model: Plain, state: Mapping[str, Tensor]) -> None:
    """Load the state_dict of a dist_egnn model; only the prefix of the virtual nodes' modules differs."""
    renamed = {name.replace(".virtual.", "."): value for name, value in state.items()}
    model.load_state_dict({"s": model.s.detach(), **renamed})


def peer(ours: nn.Module, graph: DGLGraph, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The plain model with our model's weights, and a function that predicts for the graph."""
    state = ours.state_dict()
    hidden, features = state["embedding.weight"].shape
    count = len(state["s"]) if "s" in state else 0
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    x, v, f, a = (graph.ndata[name].to(device) for name in ("x", "v", "f", "a"))
    e = graph.edata["e"].to(device)
    src, dst = (t.to(device) for t in graph.edges())
    model = Plain(features, a.shape[1], e.shape[1], hidden, layers, count).to(state["embedding.weight"].dtype)
    load_weights(model, state)
    model.to(device)
    return model, lambda: model(x, v, f, a, src, dst, e)[0]
