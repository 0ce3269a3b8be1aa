"""Virtual nodes: the part of a FastEGNN layer that every backbone shares. See docs/paper-map.md.

Legend: n nodes of a tile, B graphs, C virtual nodes, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distributed.comm import Comm
from ..ops.message_passing import Fields
from .fused_mlp import message_mlp
from .mlp import after_first, coordinate_mlp, first_blocks, mlp


class VirtualNodes(nn.Module):
    """C virtual nodes per graph, with positions z_c and features s_c, which every real node talks to (arXiv 2506.19482).

        m_ic = φ_ev([h_i, s_c, ‖z_c − x_i‖, M_{:,c}]),  M = (Z − x̄)ᵀ(Z − x̄)
        x_i' += mean_c (x_i − z_c) φ_xv(m_ic)
        z_c' = z_c + mean_i (z_c − x_i) φ_z(m_ic)
        s_c' = s_c + φ_s([s_c, mean_i m_ic])

    Means over i run over every real node of the graph, on every partition. For a backbone without features there are no h
    and no s: m_ic = φ_ev([‖z_c − x_i‖, M_{:,c}]), whose first bias is one vector per c, drawn standard normal: all z_c start at
    one point, and with one bias for all they would stay one.
    """

    def __init__(
        self, hidden: int, count: int, attention: bool = False, low: bool = False, features: bool = True
    ) -> None:
        super().__init__()
        self.hidden, self.count, self.low, self.features = hidden, count, low, features
        self.sums = ("sum_x", "to_z", "to_s") if features else ("sum_x", "to_z")
        width = hidden if features else 0
        self.widths = (width, width, 1, count)
        self.phi_ev = mlp(sum(self.widths), hidden, activate=True)
        self.phi_xv = coordinate_mlp(hidden)
        self.phi_z = coordinate_mlp(hidden)
        if features:
            self.phi_s = mlp(2 * hidden, hidden)
        else:
            self.bias = nn.Parameter(torch.randn(count, hidden))
        self.attention_v = nn.Linear(hidden, 1) if attention else None

    def shared(self, z: Tensor, s: Tensor | None, centroid: Tensor) -> Fields:
        """Per graph: z (B, C, 3), and u (B, C, H), all of φ_ev's first layer that does not depend on the node.

        s: (B, C, H), None without features; centroid: (B, 3), x̄.
        """
        _, w_s, _, w_gram, bias = first_blocks(self.phi_ev, *self.widths)
        centred = z - centroid.unsqueeze(1)
        gram = centred @ centred.transpose(1, 2)  # (B, C, C), symmetric: row c is M_{:,c}
        own = bias + self.bias if s is None else functional.linear(s, w_s, bias)
        return {"z": z, "u": own + functional.linear(gram, w_gram)}

    def forward(self, h: Tensor | None, x: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Fields]:
        """What the virtual nodes give to nodes h (n, H), x (n, 3) given z (n, C, 3), u (n, C, H), and what they get.

        Returns Δx (n, 3), mean_c m_ic (n, H) and the summands of the virtual nodes' update.
        """
        w_h, _, w_d, _, _ = first_blocks(self.phi_ev, *self.widths)
        r = x.unsqueeze(1) - z  # (n, C, 3)
        distance = torch.linalg.vector_norm(r, dim=2, keepdim=True)  # its gradient at zero is zero, not NaN
        pre = u.clone() if h is None else functional.linear(h, w_h).unsqueeze(1) + u  # a copy: it is overwritten
        if self.attention_v is None:
            rows = (pre.flatten(0, 1), distance.flatten(0, 1), None)
            found = message_mlp(*rows, w_d, self.phi_ev, [self.phi_xv, self.phi_z], self.low)
            m, to_x, to_z = (t.view(len(x), self.count, -1) for t in found)
        else:
            m = after_first(self.phi_ev, pre + distance * w_d.view(-1))
            m = m * torch.sigmoid(self.attention_v(m))
            to_x, to_z = self.phi_xv(m), self.phi_z(m)
        collected = {"to_z": -r * to_z, "to_s": m}
        return (r * to_x).mean(1), m.mean(1), {name: collected[name] for name in self.sums[1:]}

    def update(
        self, z: Tensor, s: Tensor | None, sums: Fields, total: Tensor, comm: Comm
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The virtual nodes' own step, alike on every partition: one sum of 3 + 3C + HC numbers a graph.

        sums: sum_x (B, 3) of x', to_z (B, C, 3), to_s (B, C, H; if there are features) over this partition; total: (B, 1) nodes of
        the whole graph.
        Returns z', s' and the mean of x', which is the next layer's x̄.
        """
        packed = torch.cat([sums[name].flatten(1) for name in self.sums], dim=1)
        x_mean, z_mean, s_mean = (comm.sum(packed) / total).tensor_split([3, 3 + 3 * self.count], dim=1)
        if s is not None:
            s = s + self.phi_s(torch.cat([s, s_mean.view_as(s)], dim=2))
        return z + z_mean.view_as(z), s, x_mean
