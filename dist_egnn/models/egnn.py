"""The EGNN layer (Satorras et al. 2021); with virtual nodes, which it shares with every backbone, it is FastEGNN's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from ..ops.message_passing import Fields, sum_of_ends
from .base import Layer, direction, displacement
from .fused_mlp import message_mlp
from .mlp import after_first, coordinate_mlp, first_blocks, mlp


class EGNNLayer(Layer):
    """Messages of an EGNN; what nodes do with their means stands in layer.py.

        m_ij = φ_e([h_i, h_j, ‖x_i − x_j‖², e_ij]),  dx_ij = (x_i − x_j) φ_x(m_ij)

    φ_e's first layer is linear in h_i and h_j, so these products are made once a node (``send``, ``receive``) and only
    added on edges: the same function.
    """

    options: ClassVar = ("normalize", "attention", "tanh", "low")

    def build(
        self,
        hidden: int,
        edge_attributes: int,
        *,
        normalize: bool = False,
        attention: bool = False,
        tanh: bool = False,
        low: bool = False,  # messages in bfloat16
    ) -> None:
        self.widths = (hidden, hidden, 1 + edge_attributes)
        self.normalize, self.tanh, self.low = normalize, tanh, low
        self.phi_e = mlp(sum(self.widths), hidden, activate=True)
        self.phi_x = coordinate_mlp(hidden)
        self.attention = nn.Linear(hidden, 1) if attention else None

    def send(self, src: Fields) -> Fields:
        """What a source carries to its edges: x, and its share q of φ_e's first layer."""
        return {"x": src["x"], "q": functional.linear(src["h"], first_blocks(self.phi_e, *self.widths)[1])}

    def receive(self, dst: Fields) -> Fields:
        """What a destination brings to its edges: x, and its share p of φ_e's first layer, bias included."""
        w_i, _, _, bias = first_blocks(self.phi_e, *self.widths)
        return {"x": dst["x"], "p": functional.linear(dst["h"], w_i, bias)}

    def message(self, edges: Any) -> Fields:
        """Message UDF: m (E, H) and the position update of the edge dx (E, 3)."""
        r = displacement(edges)
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
            r = direction(r, squared.detach().sqrt())
        return {"m": m, "dx": r * scale} if "h" in self.outputs else {"dx": r * scale}
