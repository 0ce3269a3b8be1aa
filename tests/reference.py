"""The simplest form of the models' mathematics (spec of the paper), in plain torch on whole graphs, for comparison.

Gather, concatenate, perceptron, scatter; no tiles, no split weights. Reads the parameters of the real model by name.
"""

from __future__ import annotations

from typing import Any

import torch
from dgl import DGLGraph
from torch import Tensor


def _mean(value: Tensor, dst: Tensor, n: int) -> Tensor:
    degree = torch.zeros(n).to(value).index_add(0, dst, torch.ones(len(dst)).to(value))
    return torch.zeros(n, value.shape[1]).to(value).index_add(0, dst, value) / degree.clamp(min=1)[:, None]


def egnn(model: Any, graph: DGLGraph) -> tuple[Tensor, Tensor]:
    """EGNN or FastEGNN on one graph at a time, then put together: (x^L, z^L)."""
    import dgl

    xs, zs = zip(*(_one(model, g) for g in dgl.unbatch(graph)), strict=True)
    return torch.cat(xs), torch.stack(zs)


def _one(model: Any, graph: DGLGraph) -> tuple[Tensor, Tensor]:
    like = model.embedding.weight
    src, dst = graph.edges()
    n, count = graph.num_nodes(), model.count
    x, v, f = (graph.ndata[k].to(like) for k in ("x", "v", "f"))
    a = graph.ndata["a"].to(like) if model.widths["a"] else x[:, :0]
    e = graph.edata["e"].to(like) if model.widths["e"] else x.new_zeros(len(src), 0)
    h = model.embedding(f)
    z = x.mean(0).expand(count, 3)
    s = model.s if count else None
    for layer in model.layers:
        r = x[dst] - x[src]
        d2 = (r**2).sum(1, keepdim=True)
        m = layer.phi_e(torch.cat([h[dst], h[src], d2, e], 1))
        if layer.attention is not None:
            m = m * layer.attention(m).sigmoid()
        scale = layer.phi_x(m)
        scale = scale.tanh() if layer.tanh else scale
        unit = r / (d2.sqrt().detach() + 1e-8) if layer.normalize else r
        x_next = x + _mean(unit * scale, dst, n) + layer.phi_v(h) * v
        if layer.phi_g is not None:
            x_next = x_next + layer.phi_g(h) * layer.g
        said = [h, _mean(m, dst, n)]
        if count:
            virtual = layer.virtual
            centred = z - x.mean(0)
            gram = centred @ centred.T
            messages = []
            z_next, moved = [], 0
            for c in range(count):
                to = x - z[c]
                distance = torch.linalg.vector_norm(to, dim=1, keepdim=True)
                row = torch.cat([h, s[c].expand(n, -1), distance, gram[:, c].expand(n, -1)], 1)
                mc = virtual.phi_ev(row)
                if virtual.attention_v is not None:
                    mc = mc * virtual.attention_v(mc).sigmoid()
                messages.append(mc)
                moved = moved + to * virtual.phi_xv(mc) / count
                z_next.append(z[c] + (-to * virtual.phi_z(mc)).mean(0))
            x_next = x_next + moved
            said.append(torch.stack(messages).mean(0))
            mean_m = torch.stack([mc.mean(0) for mc in messages])
            s = s + virtual.phi_s(torch.cat([s, mean_m], 1))
            z = torch.stack(z_next)
        h = h + layer.phi_h(torch.cat([*said, a], 1))
        x = x_next
    return x, z
