"""Virtual nodes: the part of a FastEGNN layer that all backbones share (docs/paper-map.md).

Legend: n nodes of a tile, B graphs, C virtual nodes, H width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distributed.comm import Comm
from ..ops.linear import linear
from ..ops.message_passing import Fields, Nodes
from ..ops.native.kernels import PairKernel, PairSums
from .fused_mlp import message_mlp
from .mlp import coordinate_mlp, mlp, split_first_layer


class VirtualNodes(nn.Module):
    """C virtual nodes per graph with positions z_c and features s_c, linked to every real node (arXiv 2506.19482).

        m_ic = φ_ev([h_i, s_c, ‖z_c − x_i‖, M_{:,c}]),  M = (Z − x̄)ᵀ(Z − x̄)
        x_i' += mean_c (x_i − z_c) φ_xv(m_ic)
        z_c' = z_c + mean_i (z_c − x_i) φ_z(m_ic)
        s_c' = s_c + φ_s([s_c, mean_i m_ic])

    Means over i are over all real nodes of the graph, on all partitions. In a backbone without features there is no h
    and no s, m_ic = φ_ev([‖z_c − x_i‖, M_{:,c}]), and the first bias of φ_ev is one vector per c, standard normal: all
    z_c start at the centroid and with one common bias would stay equal. attention: multiply m_ic by
    sigmoid(Linear(m_ic)); tanh: bound φ_xv and φ_z; concatenate: φ_h reads all m_ic (C·H) in place of their mean over c;
    bf16: messages in bfloat16.
    """

    def __init__(
        self,
        hidden: int,
        count: int,
        attention: bool = False,
        tanh: bool = False,
        concatenate: bool = False,
        bf16: bool = False,
        features: bool = True,
    ) -> None:
        super().__init__()
        self.hidden, self.count, self.bf16, self.features = hidden, count, bf16, features
        self.tanh, self.concatenate = tanh, concatenate
        self.width = hidden * count if concatenate else hidden  # of what φ_h reads
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
        """Per graph: z (B, C, 3), and u (B, C, H), the terms of φ_ev's first layer that do not depend on the real node.

        s: (B, C, H), None without features; centroid: x̄ (B, 3).
        """
        _, w_s, _, w_gram, bias = split_first_layer(self.phi_ev, *self.widths)
        centred = z - centroid.unsqueeze(1)
        gram = centred @ centred.transpose(1, 2)  # (B, C, C), symmetric: row c is M_{:,c}
        u = bias + self.bias if s is None else functional.linear(s, w_s, bias)
        return {"z": z, "u": u + functional.linear(gram, w_gram)}

    def forward(
        self, h: Tensor | None, x: Tensor, nodes: Nodes, gradients_only: bool = False
    ) -> tuple[Tensor, Tensor | None, Fields]:
        """mean_c (x_i − z_c) φ_xv(m_ic) (n, 3), what φ_h reads of m_ic (n, `width`), and the sums over nodes for the virtual
        nodes' update.

        h: (n, H), None without features, and φ_h reads nothing then; x: (n, 3); nodes: with the fields of `shared`.
        gradients_only: all but the second may be NaN, because no gradient depends on their values.
        """
        w_h, _, w_d, _, _ = split_first_layer(self.phi_ev, *self.widths)
        p = None if h is None else linear(h, w_h)
        if nodes.library is not None and not (self.attention_v or self.tanh or self.concatenate):
            return self._native(p, x, w_d, nodes, gradients_only)
        z, u = nodes.spread("z"), nodes.spread("u")
        r = x.unsqueeze(1) - z  # (n, C, 3)
        distance = torch.linalg.vector_norm(r, dim=2, keepdim=True)  # its gradient at zero is zero, not NaN
        pre = u.clone() if p is None else p.unsqueeze(1) + u  # a copy: message_mlp overwrites it
        if self.attention_v is None:
            inputs = (pre.flatten(0, 1), distance.flatten(0, 1), None, w_d)
            outputs = message_mlp(*inputs, self.phi_ev, [self.phi_xv, self.phi_z], self.bf16)
            m, to_x, to_z = (t.view(len(x), self.count, -1) for t in outputs)
        else:
            m = self.phi_ev[1:](pre + distance * w_d.view(-1))
            m = m * torch.sigmoid(self.attention_v(m))
            to_x, to_z = self.phi_xv(m), self.phi_z(m)
        if self.tanh:
            to_x, to_z = torch.tanh(to_x), torch.tanh(to_z)
        sums = {"to_z": nodes.sum(-r * to_z)}
        if self.features:
            sums["to_s"] = nodes.sum(m)
        return (r * to_x).mean(1), m.flatten(1) if self.concatenate else m.mean(1), sums

    def _native(
        self, p: Tensor | None, x: Tensor, w_d: Tensor, nodes: Nodes, gradients_only: bool
    ) -> tuple[Tensor, Tensor | None, Fields]:
        """`forward` by the native kernel, which adds up over nodes as it goes."""
        assert nodes.library is not None
        graph = None if nodes.graph is None else nodes.graph.int()
        kernel = PairKernel(nodes.library, graph, self.bf16, self.features, gradients_only)
        mlps: list[Any] = [self.phi_xv, self.phi_z]
        w_x, b_x = (torch.cat([getattr(mlp[0], name) for mlp in mlps]) for name in ("weight", "bias"))
        second = self.phi_ev[2]
        weights = second.weight, second.bias, w_x, b_x, torch.cat([mlp[2].weight for mlp in mlps])
        dx, to_z, *features = PairSums.apply(kernel, p, x, nodes.shared["z"], nodes.shared["u"], w_d, *weights)
        if not features:
            return dx, None, {"to_z": to_z}
        return dx, features[0], {"to_z": to_z, "to_s": features[1]}

    def update(
        self, z: Tensor, s: Tensor | None, sums: Fields, total: Tensor, comm: Comm
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """z', s' and the mean of x', the next layer's x̄: one all-reduce of 3 + 3C + HC numbers per graph.

        sums over this partition: sum_x (B, 3) of x', to_z (B, C, 3), to_s (B, C, H; with features). total: N (B, 1) of
        the whole graph.
        """
        packed = torch.cat([sums[name].flatten(1) for name in self.sums], dim=1)
        x_mean, z_mean, s_mean = (comm.sum(packed) / total).tensor_split([3, 3 + 3 * self.count], dim=1)
        if s is not None:
            s = s + self.phi_s(torch.cat([s, s_mean.view_as(s)], dim=2))
        return z + z_mean.view_as(z), s, x_mean
