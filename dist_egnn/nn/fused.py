"""The part of a message that costs: φ_e after its first layer's products on nodes, then φ_x; backward in closed form.

Autograd would do the same products. By hand, the forward pass overwrites what nobody needs again, the gradient of SiLU is
written over what it is the gradient of, products go by the fastest route, and they may be made in bfloat16 (`low`): the
message is an invariant, so that positions and their differences stay as exact as they are.

Legend: E edges, H width, S = 1 + A scalars of an edge (‖x_i − x_j‖², e_ij).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

ROWS = 2048  # below this the routes differ little


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def _fastest() -> Callable[..., Tensor]:
    """oneDNN's float32 product where it beats torch's default by half (as on some processors), else the default.

    Measured once a process, in 10 ms. The margin keeps noise from deciding, lest two runs differ in their last bits.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return functional.linear
    x, weight = torch.ones(4 * ROWS, 64), torch.ones(64, 64)

    def seconds(route: Callable[..., Tensor]) -> float:
        found = []
        for _ in range(7):
            started = time.perf_counter()
            route(x, weight)
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    return _onednn if seconds(functional.linear) > 1.5 * seconds(_onednn) else functional.linear


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ bias) for x (E, I), weight (O, I), without autograd."""
    large = x.dtype == torch.float32 and x.device.type == "cpu" and len(x) >= ROWS
    return (_fastest() if large else functional.linear)(x, weight, bias)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of SiLU at x, written over ``grad``."""
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


def _infer(low: bool, pre: Tensor, squared: Tensor, e: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """The forward pass alone, each array written over the one before."""
    w_s, w_2, b_2, w_x, b_x, w = weights
    a = torch.addmm(pre, torch.cat([squared, e], 1), w_s.t())
    if low:
        a, w_2, b_2, w_x, b_x, w = (t.bfloat16() for t in (a, w_2, b_2, w_x, b_x, w))
    m = functional.silu(product(functional.silu(a, inplace=True), w_2, b_2), inplace=True)
    scale = functional.silu(product(m, w_x, b_x), inplace=True) @ w.t()
    return m.to(pre.dtype), scale.to(pre.dtype)


class _EdgeMLP(torch.autograd.Function):
    """a₁ = pre + W_s scalars, m = SiLU(W₂ SiLU(a₁) + b₂), scale = w·SiLU(W_x m + b_x)."""

    @staticmethod
    def forward(
        ctx: Any, low: bool, pre: Tensor, squared: Tensor, e: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        scalars = torch.cat([squared, e], 1)
        w_s, *others = weights
        a_1 = torch.addmm(pre, scalars, w_s.t())
        if low:
            a_1, *others = (t.bfloat16() for t in (a_1, *others))
        w_2, b_2, w_x, b_x, w = others
        s_1 = functional.silu(a_1)
        a_2 = product(s_1, w_2, b_2)
        m = functional.silu(a_2)
        a_3 = product(m, w_x, b_x)
        s_3 = functional.silu(a_3)
        ctx.save_for_backward(scalars, w_s, a_1, s_1, a_2, m, a_3, s_3, w_2, w_x, w)
        return m.to(pre.dtype), (s_3 @ w.t()).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scalars, w_s, a_1, s_1, a_2, m, a_3, s_3, w_2, w_x, w = ctx.saved_tensors
        grad_m, grad_scale = (g.to(m.dtype) for g in grads)
        g_3 = _silu_backward(grad_scale * w, a_3)
        of_x = grad_scale.t() @ s_3, g_3.t() @ m, g_3.sum(0)
        g_2 = _silu_backward(product(g_3, w_x.t()).add_(grad_m), a_2)
        of_2 = g_2.t() @ s_1, g_2.sum(0)
        g_1 = _silu_backward(product(g_2, w_2.t()), a_1).to(scalars.dtype)
        d_w, d_w_x, d_b_x, d_w_2, d_b_2 = (g.to(scalars.dtype) for g in (*of_x, *of_2))
        # narrow products are slow the usual way round: S rows of E are ten times faster than E rows of S, and edge
        # attributes are data: the gradient of ‖x_i − x_j‖² alone is wanted as a rule
        of_scalars = g_1 @ w_s if ctx.needs_input_grad[3] else torch.mv(g_1, w_s[:, 0]).unsqueeze(1)
        of_e = of_scalars[:, 1:] if ctx.needs_input_grad[3] else None
        d_w_s = (scalars.t() @ g_1).t()
        return None, g_1, of_scalars[:, :1], of_e, d_w_s, d_w_2, d_b_2, d_w_x, d_b_x, d_w


def edge_mlp(
    pre: Tensor, squared: Tensor, e: Tensor, w_s: Tensor, phi_e: nn.Sequential, phi_x: nn.Sequential, low: bool = False
) -> tuple[Tensor, Tensor]:
    """m (E, H) and φ_x(m) (E, 1), given pre (E, H), the nodes' share of φ_e's first layer; ‖x_i − x_j‖² (E, 1); e (E, A)."""
    second, first_x, last_x = phi_e[2], phi_x[0], phi_x[2]
    weights: tuple[Any, ...] = (w_s, second.weight, second.bias, first_x.weight, first_x.bias, last_x.weight)
    return (_EdgeMLP.apply if torch.is_grad_enabled() else _infer)(low, pre, squared, e, *weights)
