"""The EGNN layer (Satorras et al. 2021); with virtual nodes, the FastEGNN layer (arXiv 2506.19482)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..ops.linear import linear
from ..ops.message_passing import Fields, add_endpoints
from .base import Layer, direction, displacement
from .fused_mlp import message_mlp
from .mlp import coordinate_mlp, mlp, split_first_layer


class EGNNLayer(Layer):
    """The messages of an EGNN; base.py has the node update.

        m_ij = φ_e([h_i, h_j, ‖x_i − x_j‖², e_ij]) (H),  dx_ij = (x_i − x_j) φ_x(m_ij) (3)

    The first layer of φ_e is linear in h_i and h_j: ``receive`` and ``send`` compute p_i = W_i h_i + b and
    q_j = W_j h_j once per node, and edges add them. normalize: divide x_i − x_j by its length; attention: multiply m_ij
    by sigmoid(Linear(m_ij)); tanh: bound φ_x; bf16: messages in bfloat16.
    """

    options: ClassVar[tuple[str, ...]] = ("normalize", "attention", "tanh", "bf16")

    def build(
        self,
        hidden: int,
        edge_attributes: int,
        *,
        normalize: bool = False,
        attention: bool = False,
        tanh: bool = False,
        bf16: bool = False,
    ) -> None:
        self.widths = (hidden, hidden, 1 + edge_attributes)
        self.normalize, self.tanh, self.bf16 = normalize, tanh, bf16
        self.phi_e = mlp(sum(self.widths), hidden, activate=True)
        self.phi_x = coordinate_mlp(hidden)
        self.bias: nn.Parameter | None = None  # of φ_x's last layer, in PublishedEGNNLayer
        self.attention = nn.Linear(hidden, 1) if attention else None

    def native_obstacle(self) -> str:
        for option, value in (("attention", self.attention is not None), ("tanh", self.tanh)):
            if value:
                return f"model.{option} has no native kernel"
        return ""

    def message_weights(self) -> tuple[Any, ...]:
        """The weights of a message after p and q, for the native engine: φ_e's columns for the scalars of an edge (H, 1 + A), its
        second layer, φ_x's first layer, φ_x's last weight (1, H)."""
        second, first, last = self.phi_e[2], self.phi_x[0], self.phi_x[2]
        w_edge = split_first_layer(self.phi_e, *self.widths)[2]
        return w_edge, second.weight, second.bias, first.weight, first.bias, last.weight

    def send(self, src: Fields) -> Fields:
        """x (n_src, 3) and q (n_src, H)."""
        return {"x": src["x"], "q": linear(src["h"], split_first_layer(self.phi_e, *self.widths)[1])}

    def receive(self, dst: Fields) -> Fields:
        """x (n, 3) and p (n, H)."""
        w_i, _, _, bias = split_first_layer(self.phi_e, *self.widths)
        return {"x": dst["x"], "p": linear(dst["h"], w_i, bias)}

    def message(self, edges: Any) -> Fields:
        """Message UDF: m (E, H), dx (E, 3)."""
        r = displacement(edges)
        squared = (r * r).sum(1, keepdim=True)
        w_edge = split_first_layer(self.phi_e, *self.widths)[2]
        e = edges.data.get("e")
        pre = add_endpoints(edges, src="q", dst="p")
        if self.attention is None:
            m, scale = message_mlp(pre, squared, e, w_edge, self.phi_e, [self.phi_x], self.bf16)
        else:
            scalars = squared if e is None else torch.cat([squared, e], 1)
            m = self.phi_e[1:](torch.addmm(pre, scalars, w_edge.t()))
            m = m * torch.sigmoid(self.attention(m))
            scale = self.phi_x(m)
        if self.bias is not None:
            scale = scale + self.bias
        if self.tanh:
            scale = torch.tanh(scale)
        if self.normalize:
            r = direction(r, squared.detach().sqrt())
        return {"m": m, "dx": r * scale} if "h" in self.outputs else {"dx": r * scale}
