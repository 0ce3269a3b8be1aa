"""The SchNet layer (Schütt et al. 2017) with an update of positions; with virtual nodes, FastSchNet.

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
    """exp(−(d − μ_k)² / 2δ²) (E, G) of distances d (E, 1), with μ_k = 0, δ, …, cutoff."""
    offset = distance * (max(basis - 1, 1) / cutoff) - torch.arange(basis, device=distance.device)  # (d − μ_k)/δ
    return torch.exp(-0.5 * offset.square())


def cosine_cutoff(distance: Tensor, cutoff: float) -> Tensor:
    """½ (1 + cos(π d / cutoff)) (E, 1) of distances d (E, 1) up to the cutoff, zero beyond."""
    return 0.5 + 0.5 * torch.cos(distance.clamp(max=cutoff) * (math.pi / cutoff))


class SchNetLayer(Layer):
    """Continuous-filter convolution; base.py has the node update.

        m_ij = W h_j ∘ w([gaussians(d_ij), e_ij]) · cosine_cutoff(d_ij) (H),  dx_ij = (x_i − x_j) φ_x(m_ij) (3)

    d_ij = ‖x_i − x_j‖; w is ``filter``: Linear(G+A→H), SiLU, Linear(H→H); ``send`` computes q_j = W h_j once per node.
    An edge costs (G + A)H + 2H² multiply-adds, against 2H² in EGNN.

    basis: G; cutoff: the distance beyond which messages are zero, and the centre of the last Gaussian. The paper has no
    update of positions.
    """

    options: ClassVar = ("normalize", "basis", "cutoff")

    def build(
        self, hidden: int, edge_attributes: int, *, normalize: bool = False, basis: int = 20, cutoff: float = 10.0
    ) -> None:
        self.normalize, self.basis, self.cutoff = normalize, basis, cutoff
        self.filter = mlp(basis + edge_attributes, hidden)
        self.sender = nn.Linear(hidden, hidden, bias=False)
        self.phi_x = coordinate_mlp(hidden)

    def send(self, src: Fields) -> Fields:
        """x (n_src, 3) and q (n_src, H)."""
        return {"x": src["x"], "q": self.sender(src["h"])}

    def message(self, edges: Any) -> Fields:
        """Message UDF: m (E, H), dx (E, 3)."""
        r = displacement(edges)
        distance = torch.linalg.vector_norm(r, dim=1, keepdim=True)  # its gradient at zero is zero, not NaN
        inputs = gaussians(distance, self.basis, self.cutoff)
        if "e" in edges.data:
            inputs = torch.cat([inputs, edges.data["e"]], 1)
        m = self.filter(inputs) * cosine_cutoff(distance, self.cutoff) * edges.src["q"]
        dx = (direction(r, distance) if self.normalize else r) * self.phi_x(m)
        return {"m": m, "dx": dx} if "h" in self.outputs else {"dx": dx}
