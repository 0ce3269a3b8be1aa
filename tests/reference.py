"""The models' mathematics in plain torch on whole graphs: the reference that the models are compared with.

Gather, concatenate, perceptron, scatter; no tiles, no split weights. Reads the parameters of the model by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dgl
import torch
from dgl import DGLGraph
from torch import Tensor

Outputs = tuple[Tensor, Tensor]
# (layer, h_i, h_j, x_i − x_j, e_ij) of each edge → m_ij (None without features) and the factor of x_i − x_j
Message = Callable[[Any, Any, Any, Tensor, Tensor], tuple[Any, Tensor]]
# (layer, h, t, x_i − x_j, e_ij, source, destination, n) → dx (n, 3), mean m_ij (n, H) or None, t' or None
Real = Callable[..., tuple[Tensor, Any, Any]]


def mean(value: Tensor, dst: Tensor, n: int) -> Tensor:
    """The mean over in-edges: (E, …) → (n, …)."""
    degree = torch.bincount(dst, minlength=n).clamp(min=1).to(value)
    total = value.new_zeros(n, *value.shape[1:]).index_add(0, dst, value)
    return total / degree.view(-1, *[1] * (value.ndim - 1))


def norm(r: Tensor) -> Tensor:
    return torch.linalg.vector_norm(r, dim=1, keepdim=True)


def along_edges(message: Message) -> Real:
    """Messages that push nodes along their edges."""

    def real(layer: Any, h: Any, t: Any, r: Tensor, e: Tensor, src: Tensor, dst: Tensor, n: int) -> Any:
        m, scale = message(layer, *((None, None) if h is None else (h[dst], h[src])), r, e)
        unit = r / (norm(r).detach() + 1e-8) if layer.normalize else r
        return mean(unit * scale, dst, n), None if m is None else mean(m, dst, n), t

    return real


def egnn(model: Any, graph: DGLGraph) -> Outputs:
    """EGNN or FastEGNN: (x^L, z^L)."""

    def message(layer: Any, h_i: Tensor, h_j: Tensor, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        m = layer.phi_e(torch.cat([h_i, h_j, (r**2).sum(1, keepdim=True), e], 1))
        if layer.attention is not None:
            m = m * layer.attention(m).sigmoid()
        scale = layer.phi_x(m)
        return m, scale.tanh() if layer.tanh else scale

    return run(model, graph, along_edges(message))


def rf(model: Any, graph: DGLGraph) -> Outputs:
    """RF or FastRF."""
    real = along_edges(lambda layer, _i, _j, r, e: (None, layer.phi_x(torch.cat([norm(r), e], 1))))
    return run(model, graph, real)


def schnet(model: Any, graph: DGLGraph) -> Outputs:
    """SchNet or FastSchNet, with Gaussians, cosine and filter written out."""

    def message(layer: Any, h_i: Tensor, h_j: Tensor, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        d, (first, _, second) = norm(r), layer.filter
        centres = torch.linspace(0, layer.cutoff, layer.basis, dtype=r.dtype)
        width = layer.cutoff / (layer.basis - 1)
        inputs = torch.cat([torch.exp(-((d - centres) ** 2) / (2 * width**2)), e], 1)
        inner = inputs @ first.weight.T + first.bias
        w = (inner * inner.sigmoid()) @ second.weight.T + second.bias
        cosine = torch.where(d < layer.cutoff, (torch.cos(math.pi * d / layer.cutoff) + 1) / 2, 0.0)
        m = (h_j @ layer.sender.weight.T) * w * cosine
        return m, layer.phi_x(m)

    return run(model, graph, along_edges(message))


def run(
    model: Any, graph: DGLGraph, real: Real, initial: Callable[[Any, Tensor], Any] = lambda layer, v: None
) -> Outputs:
    """(x^L, z^L) of a batch, one graph at a time; initial: t of the first layer, given v."""
    xs, zs = zip(*(_one(model, g, real, initial) for g in dgl.unbatch(graph)), strict=True)
    return torch.cat(xs), torch.stack(zs)


def _one(model: Any, graph: DGLGraph, real: Real, initial: Callable[[Any, Tensor], Any]) -> Outputs:
    like = next(model.parameters())
    src, dst = graph.edges()
    n, features = graph.num_nodes(), hasattr(model, "embedding")
    x, v, f = (graph.ndata[k].to(like) for k in ("x", "v", "f"))
    a = graph.ndata["a"].to(like) if model.widths["a"] else x[:, :0]
    e = graph.edata["e"].to(like) if model.widths["e"] else x.new_zeros(len(src), 0)
    h, z = model.embedding(f) if features else None, x.mean(0).expand(model.count, 3)
    s, t = model.s if model.count and features else None, initial(model.layers[0], v)
    for layer in model.layers:
        dx, m, t = real(layer, h, t, x[dst] - x[src], e, src, dst, n)
        invariant = h if features else norm(v)
        x_next, h_inputs = x + dx + layer.phi_v(invariant) * v, [h, m]
        if layer.phi_g is not None:
            x_next = x_next + layer.phi_g(invariant) * layer.g.to(x)
        if model.count:
            dx, m_virtual, z, s = _virtual(layer.virtual, h, x, z, s)
            x_next, h_inputs = x_next + dx, [h, m, m_virtual]
        if features:
            h = h + layer.phi_h(torch.cat([*h_inputs, a], 1))
        x = x_next
    return x, z


def _virtual(virtual: Any, h: Any, x: Tensor, z: Tensor, s: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Δx, what φ_h reads of m_ic, z' and s', one virtual node at a time."""
    n, gram = len(x), (z - x.mean(0)) @ (z - x.mean(0)).T
    messages, z_next, dx = [], [], 0
    for c in range(len(z)):
        r = x - z[c]
        inputs = [norm(r), gram[:, c].expand(n, -1)]
        if h is not None:
            m = virtual.phi_ev(torch.cat([h, s[c].expand(n, -1), *inputs], 1))
        else:  # a first bias for each c
            m = virtual.phi_ev[1:](virtual.phi_ev[0](torch.cat(inputs, 1)) + virtual.bias[c])
        if virtual.attention_v is not None:
            m = m * virtual.attention_v(m).sigmoid()
        messages.append(m)
        bound = torch.tanh if virtual.tanh else torch.nn.Identity()
        dx = dx + r * bound(virtual.phi_xv(m)) / len(z)
        z_next.append(z[c] + (-r * bound(virtual.phi_z(m))).mean(0))
    if s is not None:
        s = s + virtual.phi_s(torch.cat([s, torch.stack([m.mean(0) for m in messages])], 1))
    return dx, torch.cat(messages, 1) if virtual.concatenate else torch.stack(messages).mean(0), torch.stack(z_next), s
