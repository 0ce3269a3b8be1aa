"""The simplest form of the models' mathematics (spec of the paper), in plain torch on whole graphs, for comparison.

Gather, concatenate, perceptron, scatter; no tiles, no split weights. Reads the parameters of the real model by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from dgl import DGLGraph
from torch import Tensor

# (layer, h_i, h_j, x_i − x_j, e_ij) of each edge → m_ij (None without features) and the factor of x_i − x_j
Say = Callable[[Any, Any, Any, Tensor, Tensor], tuple[Any, Tensor]]


def _mean(value: Tensor, dst: Tensor, n: int) -> Tensor:
    degree = torch.zeros(n).to(value).index_add(0, dst, torch.ones(len(dst)).to(value))
    return torch.zeros(n, value.shape[1]).to(value).index_add(0, dst, value) / degree.clamp(min=1)[:, None]


def _norm(r: Tensor) -> Tensor:
    return torch.linalg.vector_norm(r, dim=1, keepdim=True)


def egnn(model: Any, graph: DGLGraph) -> tuple[Tensor, Tensor]:
    """EGNN or FastEGNN: (x^L, z^L)."""

    def say(layer: Any, h_i: Tensor, h_j: Tensor, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        m = layer.phi_e(torch.cat([h_i, h_j, (r**2).sum(1, keepdim=True), e], 1))
        if layer.attention is not None:
            m = m * layer.attention(m).sigmoid()
        scale = layer.phi_x(m)
        return m, scale.tanh() if layer.tanh else scale

    return run(model, graph, say)


def rf(model: Any, graph: DGLGraph) -> tuple[Tensor, Tensor]:
    """RF or FastRF."""
    return run(model, graph, lambda layer, _i, _j, r, e: (None, layer.phi_x(torch.cat([_norm(r), e], 1))))


def schnet(model: Any, graph: DGLGraph) -> tuple[Tensor, Tensor]:
    """SchNet or FastSchNet; Gaussians, cosine and filter written out, edge by edge."""

    def say(layer: Any, h_i: Tensor, h_j: Tensor, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        d, (first, _, second) = _norm(r), layer.filter
        centres = torch.linspace(0, layer.cutoff, layer.basis, dtype=r.dtype)
        width = layer.cutoff / (layer.basis - 1)
        seen = torch.cat([torch.exp(-((d - centres) ** 2) / (2 * width**2)), e], 1)
        inner = seen @ first.weight.T + first.bias
        w = (inner * inner.sigmoid()) @ second.weight.T + second.bias
        end = torch.where(d < layer.cutoff, (torch.cos(math.pi * d / layer.cutoff) + 1) / 2, 0.0)
        m = (h_j @ layer.sender.weight.T) * w * end
        return m, layer.phi_x(m)

    return run(model, graph, say)


def run(model: Any, graph: DGLGraph, say: Say) -> tuple[Tensor, Tensor]:
    """A model on one graph at a time, then put together: (x^L, z^L)."""
    import dgl

    xs, zs = zip(*(_one(model, g, say) for g in dgl.unbatch(graph)), strict=True)
    return torch.cat(xs), torch.stack(zs)


def _one(model: Any, graph: DGLGraph, say: Say) -> tuple[Tensor, Tensor]:
    like = next(model.parameters())
    src, dst = graph.edges()
    n, count, features = graph.num_nodes(), model.count, hasattr(model, "embedding")
    x, v, f = (graph.ndata[k].to(like) for k in ("x", "v", "f"))
    a = graph.ndata["a"].to(like) if model.widths["a"] else x[:, :0]
    e = graph.edata["e"].to(like) if model.widths["e"] else x.new_zeros(len(src), 0)
    h = model.embedding(f) if features else None
    z = x.mean(0).expand(count, 3)
    s = model.s if count and features else None
    for layer in model.layers:
        r = x[dst] - x[src]
        m, scale = say(layer, *((h[dst], h[src]) if features else (None, None)), r, e)
        unit = r / (_norm(r).detach() + 1e-8) if layer.normalize else r
        seen = h if features else _norm(v)
        x_next = x + _mean(unit * scale, dst, n) + layer.phi_v(seen) * v
        if layer.phi_g is not None:
            x_next = x_next + layer.phi_g(seen) * layer.g.to(x)
        said = [h, _mean(m, dst, n)] if features else []
        if count:
            virtual = layer.virtual
            centred = z - x.mean(0)
            gram = centred @ centred.T
            messages = []
            z_next, moved = [], 0
            for c in range(count):
                to = x - z[c]
                row = [_norm(to), gram[:, c].expand(n, -1)]
                if features:
                    mc = virtual.phi_ev(torch.cat([h, s[c].expand(n, -1), *row], 1))
                else:  # a first bias for each c
                    mc = virtual.phi_ev[1:](virtual.phi_ev[0](torch.cat(row, 1)) + virtual.bias[c])
                if virtual.attention_v is not None:
                    mc = mc * virtual.attention_v(mc).sigmoid()
                messages.append(mc)
                moved = moved + to * virtual.phi_xv(mc) / count
                z_next.append(z[c] + (-to * virtual.phi_z(mc)).mean(0))
            x_next = x_next + moved
            said.append(torch.stack(messages).mean(0))
            if features:
                s = s + virtual.phi_s(torch.cat([s, torch.stack([mc.mean(0) for mc in messages])], 1))
            z = torch.stack(z_next)
        if features:
            h = h + layer.phi_h(torch.cat([*said, a], 1))
        x = x_next
    return x, z
