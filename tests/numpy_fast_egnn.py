"""FastEGNN in numpy, written from the paper's formulas: one node, edge and virtual node at a time, without torch.

It shares nothing with the model but the names of the weights in the state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray as Array

Weights = dict[str, Array]


def silu(a: Array) -> Array:
    return a / (1 + np.exp(-a))


def perceptron(w: Weights, name: str, inputs: list[Any], end: bool = False) -> Array:
    """Linear, SiLU, Linear, and a final SiLU if ``end``."""
    row = np.concatenate([np.atleast_1d(part) for part in inputs])
    inner = silu(w[f"{name}.0.weight"] @ row + w[f"{name}.0.bias"])
    out = w[f"{name}.2.weight"] @ inner + w.get(f"{name}.2.bias", 0.0)
    return silu(out) if end else out


def gated(w: Weights, name: str, m: Array) -> Array:
    """m · sigmoid(Linear(m)) if the model has the gate."""
    return m / (1 + np.exp(-(w[f"{name}.weight"] @ m + w[f"{name}.bias"]))) if f"{name}.weight" in w else m


def mean(values: list[Array], like: Array) -> Array:
    return sum(values, np.zeros_like(like)) / max(len(values), 1)


def layer(
    w: Weights,
    x: Array,
    v: Array,
    h: Array,
    a: Array,
    z: Array,
    s: Array,
    edges: list[tuple[int, int, Array]],
    *,
    normalize: bool,
    tanh: bool,
    g: list[float] | None,
    combine: Callable[[list[Array]], Array] | None = None,
) -> tuple[Array, Array, Array, Array]:
    """x', h', z', s' from x, v (N, 3), h (N, H), a (N, K), z (C, 3), s (C, H) and edges (j, i, e_ij) from j to i.

    combine: what φ_h reads of the C messages m_ic, by default their mean.
    """
    bound = np.tanh if tanh else np.asarray
    n, count, centroid = len(x), len(z), x.mean(0)
    gram = [[float((z[b] - centroid) @ (z[c] - centroid)) for b in range(count)] for c in range(count)]
    x_new, h_new, z_new, s_new = x.copy(), h.copy(), z.copy(), s.copy()
    m_virtual = [[np.zeros(0)] * count for _ in range(n)]
    for i in range(n):
        for c in range(count):
            row = [h[i], s[c], np.linalg.norm(z[c] - x[i]), gram[c]]
            m_virtual[i][c] = gated(w, "virtual.attention_v", perceptron(w, "virtual.phi_ev", row, end=True))
        messages, pushes = [], []
        for j, to, e in edges:
            if to != i:
                continue
            r = x[i] - x[j]
            m = gated(w, "attention", perceptron(w, "phi_e", [h[i], h[j], float(r @ r), e], end=True))
            push = bound(perceptron(w, "phi_x", [m]))
            messages.append(m)
            pushes.append((r / (np.linalg.norm(r) + 1e-8) if normalize else r) * push)
        pulls = [(x[i] - z[c]) * bound(perceptron(w, "virtual.phi_xv", [m_virtual[i][c]])) for c in range(count)]
        x_new[i] += mean(pushes, x[i]) + mean(pulls, x[i]) + perceptron(w, "phi_v", [h[i]]) * v[i]
        if g is not None:
            x_new[i] += perceptron(w, "phi_g", [h[i]]) * np.array(g)
        of_virtual = combine(m_virtual[i]) if combine else mean(m_virtual[i], h[i])
        h_new[i] += perceptron(w, "phi_h", [h[i], mean(messages, h[i]), of_virtual, a[i]])
    for c in range(count):
        steps = [bound(perceptron(w, "virtual.phi_z", [m_virtual[i][c]])) for i in range(n)]
        z_new[c] += mean([(z[c] - x[i]) * steps[i] for i in range(n)], z[c])
        s_new[c] += perceptron(w, "virtual.phi_s", [s[c], mean([m_virtual[i][c] for i in range(n)], s[c])])
    return x_new, h_new, z_new, s_new


def fast_egnn(
    weights: Weights, layers: int, fields: dict[str, Array], edges: list[tuple[int, int, Array]], **options: Any
) -> tuple[Array, Array]:
    """(x^L, z^L) of one graph; fields: x, v, f, a by name."""
    x, v, a = fields["x"], fields["v"], fields["a"]
    h = fields["f"] @ weights["embedding.weight"].T + weights["embedding.bias"]
    s = weights["s"]
    z = np.stack([x.mean(0)] * len(s))
    for k in range(layers):
        own = f"layers.{k}."
        w = {name.removeprefix(own): value for name, value in weights.items() if name.startswith(own)}
        x, h, z, s = layer(w, x, v, h, a, z, s, edges, **options)
    return x, z
