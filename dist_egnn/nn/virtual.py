"""Virtual nodes: the part of a FastEGNN layer that every backbone shares. See docs/paper-map.md.

Legend: n nodes of a tile, B graphs, C virtual nodes, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..comm import Comm
from ..engine import Fields
from .fused import message_mlp
from .mlp import after_first, coordinate_mlp, first_blocks, mlp


class VirtualNodes(nn.Module):
    """C virtual nodes per graph, with positions z_c and features s_c, which every real node talks to (arXiv 2506.19482).

        m_ic = φ_ev([h_i, s_c, ‖z_c − x_i‖, M_{:,c}]),  M = (Z − x̄)ᵀ(Z − x̄)
        x_i' += mean_c (x_i − z_c) φ_xv(m_ic)
        z_c' = z_c + mean_i (z_c − x_i) φ_z(m_ic)
        s_c' = s_c + φ_s([s_c, mean_i m_ic])

    Means over i run over every real node of the graph, on every partition.
    """

    sums = ("sum_x", "to_z", "to_s")

    def __init__(self, hidden: int, count: int, attention: bool = False, low: bool = False) -> None:
        super().__init__()
        self.hidden, self.count, self.low = hidden, count, low
        self.phi_ev = mlp(2 * hidden + 1 + count, hidden, activate=True)
        self.phi_xv = coordinate_mlp(hidden)
        self.phi_z = coordinate_mlp(hidden)
        self.phi_s = mlp(2 * hidden, hidden)
        self.attention_v = nn.Linear(hidden, 1) if attention else None

    def shared(self, z: Tensor, s: Tensor, centroid: Tensor) -> Fields:
        """Per graph: z (B, C, 3), and u (B, C, H), all of φ_ev's first layer that does not depend on the node."""
        _, w_s, _, w_gram, bias = first_blocks(self.phi_ev, self.hidden, self.hidden, 1, self.count)
        centred = z - centroid.unsqueeze(1)
        gram = centred @ centred.transpose(1, 2)  # (B, C, C), symmetric: row c is M_{:,c}
        return {"z": z, "u": functional.linear(s, w_s, bias) + functional.linear(gram, w_gram)}

    def forward(self, h: Tensor, x: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Fields]:
        """What the virtual nodes give to nodes h (n, H), x (n, 3) given z (n, C, 3), u (n, C, H), and what they get.

        Returns Δx (n, 3), mean_c m_ic (n, H) and the summands of the virtual nodes' update.
        """
        w_h, _, w_d, _, _ = first_blocks(self.phi_ev, self.hidden, self.hidden, 1, self.count)
        r = x.unsqueeze(1) - z  # (n, C, 3)
        distance = torch.linalg.vector_norm(r, dim=2, keepdim=True)  # its gradient at zero is zero, not NaN
        pre = functional.linear(h, w_h).unsqueeze(1) + u
        if self.attention_v is None:
            rows = (pre.flatten(0, 1), distance.flatten(0, 1), None)
            found = message_mlp(*rows, w_d, self.phi_ev, [self.phi_xv, self.phi_z], self.low)
            m, to_x, to_z = (t.view(len(h), self.count, -1) for t in found)
        else:
            m = after_first(self.phi_ev, pre + distance * w_d.view(-1))
            m = m * torch.sigmoid(self.attention_v(m))
            to_x, to_z = self.phi_xv(m), self.phi_z(m)
        return (r * to_x).mean(1), m.mean(1), {"to_z": -r * to_z, "to_s": m}

    def update(self, z: Tensor, s: Tensor, sums: Fields, total: Tensor, comm: Comm) -> tuple[Tensor, Tensor, Tensor]:
        """The virtual nodes' own step, alike on every partition: one sum of 3 + 3C + HC numbers a graph.

        sums: sum_x (B, 3) of x', to_z (B, C, 3), to_s (B, C, H) over this partition; total: (B, 1) nodes of the whole graph.
        Returns z', s' and the mean of x', which is the next layer's x̄.
        """
        packed = torch.cat([sums[name].flatten(1) for name in self.sums], dim=1)
        x_mean, z_mean, s_mean = (comm.sum(packed) / total).split([3, 3 * self.count, self.hidden * self.count], dim=1)
        s_next = s + self.phi_s(torch.cat([s, s_mean.view_as(s)], dim=2))
        return z + z_mean.view_as(z), s_next, x_mean
