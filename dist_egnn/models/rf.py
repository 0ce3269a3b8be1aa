"""The radial field (Köhler et al. 2020): forces along edges by their length alone; with virtual nodes, FastRF."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..ops.message_passing import Fields
from .base import Layer, direction, displacement
from .mlp import coordinate_mlp


class RFLayer(Layer):
    """Messages of a radial field; what nodes do with their mean stands in layer.py, with φ_v(‖v_i‖) for its g.

        dx_ij = (x_i − x_j) f(‖x_i − x_j‖, e_ij)

    f is ``phi_x``: Linear(1+A→H), SiLU, Linear(H→1, no bias). There are no features h, so neither f nor a of the sample is read.
    """

    options: ClassVar = ("normalize",)
    features: ClassVar = False

    def build(self, hidden: int, edge_attributes: int, *, normalize: bool = False) -> None:
        self.normalize = normalize
        self.phi_x = coordinate_mlp(hidden, 1 + edge_attributes)

    def message(self, edges: Any) -> Fields:
        """Message UDF: the position update of the edge dx (E, 3)."""
        r = displacement(edges)
        distance = torch.linalg.vector_norm(r, dim=1, keepdim=True)  # its gradient at zero is zero, not NaN
        e = edges.data.get("e")
        scale = self.phi_x(distance if e is None else torch.cat([distance, e], 1))
        return {"dx": (direction(r, distance) if self.normalize else r) * scale}
