"""The EGNN layer (Satorras et al. 2021), with or without virtual nodes (FastEGNN), as UDFs over tiles.

Legend: E edges, n destinations, H width, A edge attributes, K node attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..engine import Fields, difference, sum_of_ends
from .fused import message_mlp
from .mlp import after_first, coordinate_mlp, first_blocks, mlp
from .virtual import VirtualNodes


class EGNNLayer(nn.Module):
    """One layer; right-hand sides are the layer's inputs throughout, means over no neighbour are zero.

        m_ij = φ_e([h_i, h_j, ‖x_i − x_j‖², e_ij])
        x_i' = x_i + mean_j (x_i − x_j) φ_x(m_ij) [+ mean_c (x_i − z_c) φ_xv(m_ic)] + φ_v(h_i) v_i [+ φ_g(h_i) g]
        h_i' = h_i + φ_h([h_i, mean_j m_ij, [mean_c m_ic,] a_i])

    The brackets with c are the virtual nodes' (virtual.py). φ_e's first layer is linear in h_i and h_j, so these products
    are made once a node (``send``, ``receive``) and only added on edges: the same function.
    """

    source_fields: tuple[str, ...] = ("h", "x")

    def __init__(
        self,
        hidden: int,
        edge_attributes: int,
        node_attributes: int,
        *,
        virtual: VirtualNodes | None = None,
        normalize: bool = False,
        attention: bool = False,
        tanh: bool = False,
        gravity: Sequence[float] | None = None,
        low: bool = False,
        last: bool = False,
    ) -> None:
        super().__init__()
        # nobody asks for the last h: its layer leaves φ_h and the mean message out, and keeps the weights
        self.outputs: tuple[str, ...] = ("x",) if last else ("h", "x")
        self.low = low  # messages in bfloat16
        self.widths = (hidden, hidden, 1 + edge_attributes)
        self.normalize, self.tanh = normalize, tanh
        self.phi_e = mlp(sum(self.widths), hidden, activate=True)
        self.phi_x = coordinate_mlp(hidden)
        self.phi_v = mlp(hidden, hidden, 1)
        self.phi_h = mlp((3 if virtual else 2) * hidden + node_attributes, hidden)
        self.attention = nn.Linear(hidden, 1) if attention else None
        self.phi_g = mlp(hidden, hidden, 1) if gravity else None
        self.register_buffer("g", torch.tensor(gravity or (0.0, 0.0, 0.0)), persistent=False)
        self.virtual = virtual
        self.sums: tuple[str, ...] = virtual.sums if virtual else ()

    def send(self, src: Fields) -> Fields:
        """What a source carries to its edges: x, and its share q of φ_e's first layer."""
        return {"x": src["x"], "q": functional.linear(src["h"], first_blocks(self.phi_e, *self.widths)[1])}

    def receive(self, dst: Fields) -> Fields:
        """What a destination brings to its edges: x, and its share p of φ_e's first layer, bias included."""
        w_i, _, _, bias = first_blocks(self.phi_e, *self.widths)
        return {"x": dst["x"], "p": functional.linear(dst["h"], w_i, bias)}

    def message(self, edges: Any) -> Fields:
        """Message UDF: m (E, H) and the position update of the edge dx (E, 3)."""
        r = difference(edges, "x")
        squared = (r * r).sum(1, keepdim=True)
        w_edge = first_blocks(self.phi_e, *self.widths)[2]
        e = edges.data.get("e")
        pre = sum_of_ends(edges, src="q", dst="p")
        if self.attention is None:
            m, scale = message_mlp(pre, squared, e, w_edge, self.phi_e, [self.phi_x], self.low)
        else:
            scalars = squared if e is None else torch.cat([squared, e], 1)
            m = after_first(self.phi_e, torch.addmm(pre, scalars, w_edge.t()))
            m = m * torch.sigmoid(self.attention(m))
            scale = self.phi_x(m)
        if self.tanh:
            scale = torch.tanh(scale)
        if self.normalize:
            r = r / (squared.sqrt().detach() + 1e-8)
        return {"m": m, "dx": r * scale} if "h" in self.outputs else {"dx": r * scale}

    def update(self, nodes: Any) -> Fields:
        """Node UDF: h', x', and what the virtual nodes collect."""
        data = nodes.data
        h, x = data["h"], data["x"]
        moved = x + data["dx"] + self.phi_v(h) * data["v"]
        collected: Fields = {}
        if self.virtual is not None:
            dx, m_virtual, collected = self.virtual(h, x, data["z"], data["u"])
            moved = moved + dx
        if self.phi_g is not None:
            moved = moved + self.phi_g(h) * self.g
        if self.virtual is not None:
            collected["sum_x"] = moved
        if "h" not in self.outputs:
            return {"x": moved, **collected}
        said = [h, data["m"], *([m_virtual] if self.virtual is not None else []), *([data["a"]] if "a" in data else [])]
        return {"h": h + self.phi_h(torch.cat(said, 1)), "x": moved, **collected}
