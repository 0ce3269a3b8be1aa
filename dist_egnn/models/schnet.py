"""SchNet's layer (Schütt et al. 2017) with an update of positions; with virtual nodes, FastSchNet.

Legend: E edges, G Gaussians, H width, A edge attributes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.message_passing import Fields
from .base import Layer, direction, displacement
from .mlp import coordinate_mlp, mlp


def gaussians(distance: Tensor, basis: int, cutoff: float) -> Tensor:
    """exp(−(d − μ_k)² / 2δ²) (E, G) of distances d (E, 1), with μ_k = 0, δ, … cutoff."""
    steps = distance * (max(basis - 1, 1) / cutoff) - torch.arange(basis, device=distance.device)  # (d − μ_k)/δ
    return torch.exp(-0.5 * steps.square())


def cosine(distance: Tensor, cutoff: float) -> Tensor:
    """½ (1 + cos(π d / cutoff)) (E, 1) up to the cutoff, where it ends smoothly, zero beyond."""
    return 0.5 + 0.5 * torch.cos(distance.clamp(max=cutoff) * (math.pi / cutoff))


class SchNetLayer(Layer):
    """Continuous-filter convolution; what nodes do with its mean stands in layer.py.

        m_ij = W h_j ∘ w(‖x_i − x_j‖, e_ij) · cosine(‖x_i − x_j‖),  dx_ij = (x_i − x_j) φ_x(m_ij)

    w is ``filter``: Linear(G+A→H), SiLU, Linear(H→H) of the distance in Gaussians and of e_ij; W is made once a node. An edge
    costs GH + 2H² products, against 2H² in EGNN.

    basis: G; cutoff: the distance beyond which messages are zero, and the last Gaussian's centre.
    """

    options: ClassVar = ("normalize", "basis", "cutoff")

    def build(
        self,
        hidden: int,
        edge_attributes: int,
        *,
        normalize: bool = False,
        basis: int = 20,
        cutoff: float = 10.0,
    ) -> None:
        self.normalize, self.basis, self.cutoff = normalize, basis, cutoff
        self.filter = mlp(basis + edge_attributes, hidden)
        self.sender = nn.Linear(hidden, hidden, bias=False)
        self.phi_x = coordinate_mlp(hidden)

    def send(self, src: Fields) -> Fields:
        """What a source carries to its edges: x, and q = W h."""
        return {"x": src["x"], "q": self.sender(src["h"])}

    def message(self, edges: Any) -> Fields:
        """Message UDF: m (E, H) and the position update of the edge dx (E, 3)."""
        r = displacement(edges)
        distance = torch.linalg.vector_norm(r, dim=1, keepdim=True)  # its gradient at zero is zero, not NaN
        seen = gaussians(distance, self.basis, self.cutoff)
        if "e" in edges.data:
            seen = torch.cat([seen, edges.data["e"]], 1)
        m = self.filter(seen) * cosine(distance, self.cutoff) * edges.src["q"]
        dx = (direction(r, distance) if self.normalize else r) * self.phi_x(m)
        return {"m": m, "dx": dx} if "h" in self.outputs else {"dx": dx}
