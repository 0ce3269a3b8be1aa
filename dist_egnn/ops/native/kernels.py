"""The native kernels as autograd functions, whose backward passes recompute.

Legend: N destinations, M sources, E edges, B graphs, C virtual nodes, H width, A edge attributes, S = 1 + A.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import Library

MAX_HIDDEN = 256  # of message_mlp.cpp


def _structure(name: str, integers: str, pointers: str) -> Any:
    """The ctypes form of a struct of message_mlp.cpp."""
    fields: list[Any] = [(field, ctypes.c_int64) for field in integers.split()]
    fields += [(field, ctypes.c_void_p) for field in pointers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


EDGES = _structure(
    "Edges",
    "hidden attributes destinations normalize low",
    "start source row p q x_dst x_src e shift w_s w2 b2 wx bx w mean_m mean_dx "
    "d_p d_q d_x_dst d_x_src d_e d_w_s d_w2 d_b2 d_wx d_bx d_w",
)
PAIRS = _structure(
    "Pairs",
    "hidden virtual_nodes nodes graphs low",
    "graph p x z u w_d w2 b2 wx bx w dx m to_z to_s d_p d_x d_z d_u d_w_d d_w2 d_b2 d_wx d_bx d_w",
)
LINEAR = _structure("Linear", "rows inputs outputs add", "x w b y d_x d_w d_b")


def _call(library: Library, kernel: str, structure: Any, dtype: torch.dtype, **fields: Any) -> None:
    """Run a kernel. Every tensor among the fields is contiguous and lives until the call returns."""
    values = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}
    library.call(f"{kernel}_{'f64' if dtype == torch.float64 else 'f32'}", structure(**values))


def _contiguous(tensors: Any) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _doubles(**like: Tensor) -> dict[str, Tensor]:
    """Zeros (…) in float64, in which sums over many messages are gathered."""
    return {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in like.items()}


@dataclass
class EdgeBlock:
    """Edges sorted by destination, int32: start (N + 1,), where each destination's in-edges begin, and source (E,)."""

    start: Tensor
    source: Tensor


@dataclass(frozen=True)
class EdgeKernel:
    """The constants of a call. features: whether the mean of m is computed; known: the results, if only their graph is."""

    library: Library
    block: EdgeBlock
    normalize: bool
    low: bool
    features: bool
    known: tuple[Tensor, ...] | None = None

    def run(self, name: str, tensors: Any, **fields: Any) -> None:
        p, q, x_dst, x_src, e, shift, w_s, w2, b2, wx, bx, w = _contiguous(tensors)
        sizes = {"hidden": p.shape[1], "attributes": 0 if e is None else e.shape[1], "destinations": len(p)}
        options = {"normalize": self.normalize, "low": self.low, "start": self.block.start, "source": self.block.source}
        rows = {"p": p, "q": q, "x_dst": x_dst, "x_src": x_src, "e": e, "shift": shift}
        weights = {"w_s": w_s.t().contiguous(), "w2": w2, "b2": b2, "wx": wx, "bx": bx, "w": w}
        _call(self.library, name, EDGES, p.dtype, **sizes, **options, **rows, **weights, **fields)


class EdgeMeans(torch.autograd.Function):
    """mean_j (x_i − x_j − shift) φ_x(m_ij) (N, 3) and, if the kernel has features, mean_j m_ij (N, H).

    p (N, H), q (M, H): the ends' terms of φ_e's first layer; x_dst (N, 3); x_src (M, 3); e (E, A), shift (E, 3) or None;
    w_s (H, S): that layer's columns for ‖x_i − x_j‖² and e; φ_e's second layer; φ_x's first layer and last weight (1, H).
    """

    @staticmethod
    def forward(ctx: Any, kernel: EdgeKernel, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        if kernel.known is not None:
            return tuple(t.detach() for t in kernel.known)
        p = tensors[0]
        dx, m = p.new_empty(len(p), 3), p.new_empty(p.shape) if kernel.features else None
        kernel.run("edges_forward", tensors, mean_dx=dx, mean_m=m)
        return (dx,) if m is None else (dx, m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_dx: Tensor | None, g_m: Tensor | None = None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        p, q, x_dst, x_src, e, _, w_s, w2, b2, wx, bx, w = tensors
        means = _contiguous([torch.zeros_like(x_dst) if g_dx is None else g_dx, g_m])
        rows = {"d_p": p, "d_q": q, "d_x_dst": x_dst, "d_x_src": x_src, "d_e": e if ctx.needs_input_grad[5] else None}
        rows = {name: None if t is None else t.new_zeros(t.shape) for name, t in rows.items()}
        sums = _doubles(d_w_s=w_s.t(), d_w2=w2, d_b2=b2, d_wx=wx, d_bx=bx, d_w=w)
        ctx.kernel.run("edges_backward", tensors, mean_dx=means[0], mean_m=means[1], **rows, **sums)
        d_w_s, *of_weights = (t.to(p.dtype) for t in sums.values())
        return None, *rows.values(), None, d_w_s.t(), *of_weights


@dataclass(frozen=True)
class PairKernel:
    """The constants of a call. graph (N,): each node's graph, int32, None if it is one for all; features: whether m is
    computed; gradients_only: all results but mean_c m_ic are NaN."""

    library: Library
    graph: Tensor | None
    low: bool
    features: bool
    gradients_only: bool = False

    def run(self, name: str, tensors: Any, **fields: Any) -> None:
        p, x, z, u, w_d, w2, b2, wx, bx, w = _contiguous(tensors)
        sizes = {"hidden": u.shape[2], "virtual_nodes": z.shape[1], "nodes": len(x), "graphs": len(z), "low": self.low}
        rows = {"graph": self.graph, "p": p, "x": x, "z": z, "u": u}
        weights = {"w_d": w_d, "w2": w2, "b2": b2, "wx": wx, "bx": bx, "w": w}
        _call(self.library, name, PAIRS, x.dtype, **sizes, **rows, **weights, **fields)


class PairSums(torch.autograd.Function):
    """mean_c (x_i − z_c) φ_xv(m_ic) (N, 3), sum_i (z_c − x_i) φ_z(m_ic) (B, C, 3) and, if the kernel has features,
    mean_c m_ic (N, H), sum_i m_ic (B, C, H).

    p (N, H) or None: the node's term of φ_ev's first layer; x (N, 3); z (B, C, 3); u (B, C, H): the virtual node's term;
    w_d (H, 1): that layer's column for ‖z_c − x_i‖; φ_ev's second layer; the first layers of φ_xv and φ_z (2H, H), (2H,)
    and their last weights (2, H).
    """

    @staticmethod
    def forward(ctx: Any, kernel: PairKernel, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        _, x, z, u, *_ = tensors
        dx, to_z, to_s = (t.new_full(t.shape, math.nan) for t in (x, z, u))
        m = x.new_empty(len(x), u.shape[2]) if kernel.features else None
        if not kernel.gradients_only:
            kernel.run("pairs_forward", tensors, dx=dx, m=m, to_z=to_z, to_s=to_s if kernel.features else None)
        elif kernel.features:
            kernel.run("pairs_forward", tensors, m=m)
        return (dx, to_z) if m is None else (dx, to_z, m, to_s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        p, x, z, u, w_d, w2, b2, wx, bx, w = tensors
        g_dx, g_z = (t.new_zeros(t.shape) if g is None else g for g, t in zip(grads, (x, z), strict=False))
        outputs = dict(zip(("dx", "to_z", "m", "to_s"), _contiguous([g_dx, g_z, *grads[2:]]), strict=False))
        d_p, d_x = None if p is None else p.new_empty(p.shape), x.new_empty(x.shape)
        sums = _doubles(d_z=z, d_u=u, d_w_d=w_d, d_w2=w2, d_b2=b2, d_wx=wx, d_bx=bx, d_w=w)
        ctx.kernel.run("pairs_backward", tensors, **outputs, d_p=d_p, d_x=d_x, **sums)
        return None, d_p, d_x, *(t.to(x.dtype) for t in sums.values())


class Linear(torch.autograd.Function):
    """Σ_k x_k W_kᵀ + b (n, O) for x_k (n, I_k), W_k (O, I_k), b (O,) or None; O and every I_k are multiples of 16.

    tensors: all x_k, then all W_k.
    """

    @staticmethod
    def forward(ctx: Any, library: Library, b: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.library = library
        ctx.save_for_backward(b, *tensors)
        x, *_, w = tensors
        y = x.new_empty(len(x), len(w))
        for k, part in enumerate(Linear.parts(tensors)):
            Linear.run("linear_forward", library, *part, add=k > 0, b=None if k else b, y=y)
        return y

    @staticmethod
    def parts(tensors: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :], strict=True)

    @staticmethod
    def run(name: str, library: Library, x: Tensor, w: Tensor, **fields: Any) -> None:
        x, w = _contiguous((x, w))
        _call(library, name, LINEAR, x.dtype, rows=len(x), inputs=x.shape[1], outputs=len(w), x=x, w=w, **fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        b, *tensors = ctx.saved_tensors
        d_b, grad = None if b is None else _doubles(b=b)["b"], grad.contiguous()
        d_x, d_w = [], []
        for k, (x, w) in enumerate(Linear.parts(tensors)):
            d_x.append(x.new_empty(x.shape) if ctx.needs_input_grad[2 + k] else None)
            d_w.append(torch.zeros(w.shape, dtype=torch.float64))
            sums = {"d_w": d_w[k], "d_b": None if k else d_b}
            Linear.run("linear_backward", ctx.library, x, w, y=grad, d_x=d_x[k], **sums)
        return None, None if d_b is None else d_b.to(grad.dtype), *d_x, *(t.to(grad.dtype) for t in d_w)
