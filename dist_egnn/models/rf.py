"""The radial field layer (Köhler et al. 2020); with virtual nodes, the FastRF layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..ops.message_passing import Fields
from .base import Layer, direction, displacement
from .mlp import coordinate_mlp


class RFLayer(Layer):
    """The messages of a radial field; base.py has the node update, with φ_v(‖v_i‖) for the paper's g.

        dx_ij = (x_i − x_j) φ_x([‖x_i − x_j‖, e_ij]) (3)

    φ_x: Linear(1+A→H), SiLU, Linear(H→1, no bias). Nodes have no features h: fields f and a of a sample are not read.
    tanh: bound φ_x.
    """

    options: ClassVar[tuple[str, ...]] = ("normalize", "tanh")
    features: ClassVar = False

    def build(self, hidden: int, edge_attributes: int, *, normalize: bool = False, tanh: bool = False) -> None:
        self.normalize, self.tanh = normalize, tanh
        self.phi_x = coordinate_mlp(hidden, 1 + edge_attributes)

    def message(self, edges: Any) -> Fields:
        """Message UDF: dx (E, 3)."""
        r = displacement(edges)
        distance = torch.linalg.vector_norm(r, dim=1, keepdim=True)  # its gradient at zero is zero, not NaN
        e = edges.data.get("e")
        scale = self.phi_x(distance if e is None else torch.cat([distance, e], 1))
        scale = torch.tanh(scale) if self.tanh else scale
        return {"dx": (direction(r, distance) if self.normalize else r) * scale}
