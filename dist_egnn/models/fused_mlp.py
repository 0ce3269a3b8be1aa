"""The part of a message that costs: the MLP after its first layer's products on nodes, then the coordinate MLPs.

Autograd would do the same products. By hand, the forward pass overwrites what nobody needs again, the gradient of SiLU is
written over what it is the gradient of, products go by the fastest route, and they may be made in bfloat16 (`low`): the
message is an invariant, so that positions and their differences stay as exact as they are. Edges and pairs of a node and
a virtual node (virtual.py) send messages of the same form.

Legend: E messages, H width, S = 1 + A scalars of a message (a distance or its square, e_ij), K coordinate MLPs.
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

ROWS = 2048  # oneDNN compiles a product anew for every number of rows: it gets multiples of this, the default the rest


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's float32 product is worth its detour: on AMD's Zen 5 (family 26) and later.

    A rule rather than a measurement: two runs on one machine must not differ in their last bits. docs/performance.md.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    family = re.search(r"^cpu family\s*: (\d+)", text, re.MULTILINE)
    return "AuthenticAMD" in text and family is not None and int(family[1]) >= 26


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = len(x) // ROWS * ROWS
    out = x.new_empty(len(x), len(weight))
    out[:rows] = torch.ops.mkldnn._linear_pointwise(x[:rows], weight, bias, "none", [], "")
    out[rows:] = functional.linear(x[rows:], weight, bias)
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ bias) for x (E, I), weight (O, I), without autograd, by torch's fastest route."""
    large = x.dtype == torch.float32 and x.device.type == "cpu" and len(x) >= ROWS
    return (_onednn if large and onednn_is_faster() else functional.linear)(x, weight, bias)


PAD = 512


def _bf16(rows: Tensor) -> Tensor:
    """In bfloat16, with rows of zeros up to a multiple of PAD: oneDNN compiles anew for every number of rows."""
    low = rows.new_zeros(-(-len(rows) // PAD) * PAD, rows.shape[1], dtype=torch.bfloat16)
    low[: len(rows)] = rows
    return low


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of SiLU at x, written over ``grad``."""
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


def _scalars(distance: Tensor, e: Tensor | None) -> Tensor:
    return distance if e is None else torch.cat([distance, e], 1)


def _scales(s_3: Tensor, w: Tensor) -> list[Tensor]:
    """w_k · s_3 (E, K, H) of each coordinate MLP: K times (E, 1)."""
    return [(s_3[:, k] @ w[k]).unsqueeze(1) for k in range(len(w))]


def _infer(
    low: bool, pre: Tensor, distance: Tensor, e: Tensor | None, w_s: Tensor, *weights: Tensor
) -> tuple[Tensor, ...]:
    """The forward pass alone, each array written over the one before."""
    a = pre.addmm_(_scalars(distance, e), w_s.t())
    if low:
        a, *weights = _bf16(a), *(t.bfloat16() for t in weights)  # type: ignore[assignment]
    w_2, b_2, w_x, b_x, w = weights
    m = functional.silu(product(functional.silu(a, inplace=True), w_2, b_2), inplace=True)
    s_3 = functional.silu(product(m, w_x, b_x), inplace=True)
    return tuple(t[: len(pre)].to(pre.dtype) for t in (m, *_scales(s_3.view(len(m), *w.shape), w)))


class _MessageMLP(torch.autograd.Function):
    """a₁ = pre + W_s scalars, m = SiLU(W₂ SiLU(a₁) + b₂), scale_k = w_k·SiLU(W_k m + b_k); W_x, b_x: all W_k, b_k."""

    @staticmethod
    def forward(
        ctx: Any, low: bool, pre: Tensor, distance: Tensor, e: Tensor | None, w_s: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        scalars = _scalars(distance, e)
        a_1 = pre.addmm_(scalars, w_s.t())
        ctx.low = low
        ctx.set_materialize_grads(False)
        if low:
            a_1, *weights = _bf16(a_1), *(t.bfloat16() for t in weights)  # type: ignore[assignment]
        w_2, b_2, w_x, b_x, w = weights
        s_1 = functional.silu(a_1)
        a_2 = product(s_1, w_2, b_2)
        m = functional.silu(a_2)
        a_3 = product(m, w_x, b_x)
        s_3 = functional.silu(a_3)
        ctx.save_for_backward(scalars, w_s, a_1, s_1, a_2, m, a_3, s_3, w_2, w_x, w)
        return tuple(t[: len(pre)].to(pre.dtype) for t in (m, *_scales(s_3.view(len(m), *w.shape), w)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scalars, w_s, a_1, s_1, a_2, m, a_3, s_3, w_2, w_x, w = ctx.saved_tensors
        grad_scales = [scalars.new_zeros(len(scalars), 1) if g is None else g for g in grads[1:]]
        grad_m = grads[0]  # None in a last layer
        if ctx.low:
            grad_m, *grad_scales = (None if g is None else _bf16(g) for g in (grad_m, *grad_scales))
        per_mlp = s_3.view(len(m), *w.shape)
        d_w = torch.stack([torch.mv(per_mlp[:, k].t(), g.squeeze(1)) for k, g in enumerate(grad_scales)])
        g_3 = torch.empty_like(a_3)
        for g, w_k, part in zip(grad_scales, w, g_3.split(w.shape[1], dim=1), strict=True):
            torch.mul(g, w_k, out=part)
        _silu_backward(g_3, a_3)
        of_x = g_3.t() @ m, g_3.sum(0)
        g_2 = product(g_3, w_x.t())
        g_2 = _silu_backward(g_2 if grad_m is None else g_2.add_(grad_m), a_2)
        of_2 = g_2.t() @ s_1, g_2.sum(0)
        g_1 = _silu_backward(product(g_2, w_2.t()), a_1)[: len(scalars)].to(scalars.dtype)
        of_weights = (g.to(scalars.dtype) for g in (*of_2, *of_x, d_w))
        # narrow products are slow the usual way round: S rows of E are ten times faster than E rows of S, and edge
        # attributes are data: the gradient of the distance alone is wanted as a rule
        of_e = None
        if ctx.needs_input_grad[3]:
            of_distance, of_e = (g_1 @ w_s).split([1, w_s.shape[1] - 1], dim=1)
        else:
            of_distance = torch.mv(g_1, w_s[:, 0]).unsqueeze(1)
        return None, g_1, of_distance, of_e, (scalars.t() @ g_1).t(), *of_weights


def message_mlp(
    pre: Tensor,
    distance: Tensor,
    e: Tensor | None,
    w_s: Tensor,
    phi: Any,
    coordinate: Sequence[Any],
    low: bool = False,
) -> tuple[Tensor, ...]:
    """m (E, H) = φ(…), then φ_k(m) (E, 1) of each coordinate MLP.

    pre (E, H), the nodes' share of φ's first layer, is overwritten; distance (E, 1) and e (E, A) enter φ by the columns
    w_s (H, 1 + A) of that layer.
    """
    second = phi[2]
    w_x, b_x = (torch.cat([getattr(c[0], name) for c in coordinate]) for name in ("weight", "bias"))
    w = torch.cat([c[2].weight for c in coordinate])
    run = _MessageMLP.apply if torch.is_grad_enabled() else _infer
    return run(low, pre, distance, e, w_s, second.weight, second.bias, w_x, b_x, w)
