"""The costly part of a message: the MLP after its first layer's products on nodes, then the coordinate MLPs.

The gradient is written by hand. The forward pass overwrites what is not needed again, the backward pass writes the
gradient of SiLU in place, products take the fastest route, and may be in bfloat16: messages are invariants, so
positions and their differences stay exact. Messages of edges and of virtual nodes (virtual_nodes.py) have this form.

Legend: E messages, H width, S = 1 + A scalars of a message (a distance or its square, and e_ij), K coordinate MLPs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# oneDNN compiles a product anew for every number of rows
ONEDNN_ROWS = 2048  # it gets a multiple of this; the default product gets the rest
BF16_ROWS = 512  # arrays in bfloat16 are padded to a multiple of this


@cache
def onednn_is_faster() -> bool:
    """Whether to use oneDNN's float32 product: on AMD Zen 5 (family 26) and later (docs/performance.md).

    A rule instead of a measurement: two runs on one machine must not differ in their last bits.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    family = re.search(r"^cpu family\s*: (\d+)", text, re.MULTILINE)
    return "AuthenticAMD" in text and family is not None and int(family[1]) >= 26


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ bias) for x (E, I), weight (O, I), without autograd, by the fastest route."""
    if torch.compiler.is_compiling():  # `distegnn export`: for any number of rows
        return functional.linear(x, weight, bias)
    rows = len(x) // ONEDNN_ROWS * ONEDNN_ROWS
    if not rows or x.dtype != torch.float32 or x.device.type != "cpu" or not onednn_is_faster():
        return functional.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    out[:rows] = torch.ops.mkldnn._linear_pointwise(x[:rows], weight, bias, "none", [], "")
    out[rows:] = functional.linear(x[rows:], weight, bias)
    return out


def _to_bf16(x: Tensor) -> Tensor:
    """x in bfloat16, padded with rows of zeros to a multiple of BF16_ROWS."""
    padded = x.new_zeros(-(-len(x) // BF16_ROWS) * BF16_ROWS, x.shape[1], dtype=torch.bfloat16)
    padded[: len(x)] = x
    return padded


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of SiLU at x, written over ``grad``."""
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


def _forward(
    inplace: bool, bf16: bool, pre: Tensor, distance: Tensor, e: Tensor | None, w_s: Tensor, *weights: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The outputs of ``message_mlp``, and what its gradient needs. inplace: write each array over the one before."""
    scalars = distance if e is None else torch.cat([distance, e], 1)
    a_1 = pre.addmm_(scalars, w_s.t())
    if bf16:
        a_1, weights = _to_bf16(a_1), tuple(t.bfloat16() for t in weights)
    w_2, b_2, w_x, b_x, w = weights
    s_1 = functional.silu(a_1, inplace)
    a_2 = fast_linear(s_1, w_2, b_2)
    m = functional.silu(a_2, inplace)
    a_3 = fast_linear(m, w_x, b_x)
    s_3 = functional.silu(a_3, inplace)
    per_mlp = s_3.view(len(m), *w.shape)
    scales = ((per_mlp[:, k] @ w[k]).unsqueeze(1) for k in range(len(w)))
    outputs = tuple(t[: len(pre)].to(pre.dtype) for t in (m, *scales))
    return outputs, (scalars, w_s, a_1, s_1, a_2, m, a_3, s_3, w_2, w_x, w)


class _MessageMLP(torch.autograd.Function):
    """a₁ = pre + W_s scalars, m = SiLU(W₂ SiLU(a₁) + b₂), scale_k = w_k·SiLU(W_k m + b_k); W_x, b_x: all W_k, b_k."""

    @staticmethod
    def forward(ctx: Any, bf16: bool, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.bf16 = bf16
        ctx.set_materialize_grads(False)
        outputs, saved = _forward(False, bf16, *tensors)
        ctx.save_for_backward(*saved)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scalars, w_s, a_1, s_1, a_2, m, a_3, s_3, w_2, w_x, w = ctx.saved_tensors
        grad_scales = [scalars.new_zeros(len(scalars), 1) if g is None else g for g in grads[1:]]
        grad_m = grads[0]  # None in a last layer
        if ctx.bf16:
            grad_m, *grad_scales = (None if g is None else _to_bf16(g) for g in (grad_m, *grad_scales))
        per_mlp = s_3.view(len(m), *w.shape)
        grad_w = torch.stack([torch.mv(per_mlp[:, k].t(), g.squeeze(1)) for k, g in enumerate(grad_scales)])
        g_3 = torch.empty_like(a_3)
        for g, w_k, part in zip(grad_scales, w, g_3.split(w.shape[1], dim=1), strict=True):
            torch.mul(g, w_k, out=part)
        _silu_backward(g_3, a_3)
        grad_x = g_3.t() @ m, g_3.sum(0)
        g_2 = fast_linear(g_3, w_x.t())
        g_2 = _silu_backward(g_2 if grad_m is None else g_2.add_(grad_m), a_2)
        grad_2 = g_2.t() @ s_1, g_2.sum(0)
        g_1 = _silu_backward(fast_linear(g_2, w_2.t()), a_1)[: len(scalars)].to(scalars.dtype)
        grad_weights = (g.to(scalars.dtype) for g in (*grad_2, *grad_x, grad_w))
        # narrow products: S rows of E are ten times faster than E rows of S; e is usually data and needs no gradient
        grad_e = None
        if ctx.needs_input_grad[3]:
            grad_distance, grad_e = (g_1 @ w_s).split([1, w_s.shape[1] - 1], dim=1)
        else:
            grad_distance = torch.mv(g_1, w_s[:, 0]).unsqueeze(1)
        return None, g_1, grad_distance, grad_e, (scalars.t() @ g_1).t(), *grad_weights


def message_mlp(
    pre: Tensor,
    distance: Tensor,
    e: Tensor | None,
    w_s: Tensor,
    phi: Any,
    coordinate: Sequence[Any],
    bf16: bool = False,
) -> tuple[Tensor, ...]:
    """m (E, H) = φ(…), then φ_k(m) (E, 1) of each coordinate MLP.

    pre: (E, H), the terms of φ's first layer in the node features and its bias; is overwritten. distance: (E, 1) and e:
    (E, A), the other inputs of that layer, with its columns w_s (H, 1 + A). bf16: compute in bfloat16.
    """
    second = phi[2]
    w_x, b_x = (torch.cat([getattr(c[0], name) for c in coordinate]) for name in ("weight", "bias"))
    w = torch.cat([c[2].weight for c in coordinate])
    inputs = (bf16, pre, distance, e, w_s, second.weight, second.bias, w_x, b_x, w)
    return _MessageMLP.apply(*inputs) if torch.is_grad_enabled() else _forward(True, *inputs)[0]
