"""The native kernels as autograd functions. Legend: N destinations, M sources, E edges, B graphs, C virtual nodes, H width,
A edge attributes, S = 1 + A scalars of an edge, K coordinate MLPs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import Library

INTEGERS, POINTERS = ctypes.c_int64, ctypes.c_void_p
MAX_HIDDEN = 256  # of message_mlp.cpp
WEIGHTS = ("w2", "b2", "wx", "bx", "w")


class Edges(ctypes.Structure):
    """struct Edges of message_mlp.cpp."""

    _fields_ = [(name, INTEGERS) for name in ("hidden", "attributes", "destinations", "normalize", "low")] + [
        (name, POINTERS)
        for name in (
            *("start", "source", "row", "p", "q", "x_dst", "x_src", "e", "shift", "w_s", *WEIGHTS, "mean_m", "mean_dx"),
            *("d_p", "d_q", "d_x_dst", "d_x_src", "d_e", "d_w_s", *(f"d_{name}" for name in WEIGHTS)),
        )
    ]


class Pairs(ctypes.Structure):
    """struct Pairs of message_mlp.cpp."""

    _fields_ = [(name, INTEGERS) for name in ("hidden", "virtual_nodes", "nodes", "graphs", "low")] + [
        (name, POINTERS)
        for name in (
            *("graph", "p", "x", "z", "u", "w_d", *WEIGHTS, "dx", "m", "to_z", "to_s"),
            *("d_p", "d_x", "d_z", "d_u", "d_w_d", *(f"d_{name}" for name in WEIGHTS)),
        )
    ]


class LinearArguments(ctypes.Structure):
    """struct Linear of message_mlp.cpp."""

    _fields_ = [(name, INTEGERS) for name in ("rows", "inputs", "outputs")] + [
        (name, POINTERS) for name in ("x", "w", "b", "y", "d_x", "d_w", "d_b")
    ]


@dataclass
class EdgeBlock:
    """Edges sorted by destination, all int32. start (N + 1,): where the in-edges of each destination begin; source (E,)."""

    start: Tensor
    source: Tensor


def _call(library: Library, kernel: str, dtype: torch.dtype, structure: Any, **fields: Any) -> None:
    """Fill the structure and run the kernel. Every tensor is contiguous and lives until the call returns."""
    arguments = structure()
    for name, value in fields.items():
        setattr(arguments, name, value.data_ptr() if isinstance(value, Tensor) else value)
    library.call(f"{kernel}_{'f64' if dtype == torch.float64 else 'f32'}", arguments)


def _contiguous(tensors: Any) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _doubles(**like: Tensor) -> dict[str, Tensor]:
    """Zeros in float64, in which sums over many messages are gathered."""
    return {
        name: torch.zeros_like(t, dtype=torch.float64, memory_format=torch.contiguous_format)
        for name, t in like.items()
    }


@dataclass(frozen=True)
class EdgeKernel:
    """What stays the same over calls. known: the means, where the caller has them and only wants the graph for a backward pass."""

    library: Library
    block: EdgeBlock
    normalize: bool
    low: bool
    features: bool  # whether the mean of m is needed, too
    known: tuple[Tensor, ...] | None = None


class EdgeMeans(torch.autograd.Function):
    """mean_j (x_i − x_j − shift) φ_x(m_ij) (N, 3), and mean_j m_ij (N, H) if the kernel says so; the backward pass recomputes.

    p (N, H), q (M, H): the ends' shares of φ_e's first layer; e (E, A), shift (E, 3) or None; w_s (H, S): the columns of that
    layer for ‖x_i − x_j‖² and e; then φ_e's second layer, φ_x's first layer, φ_x's last weight (1, H).
    """

    @staticmethod
    def forward(ctx: Any, kernel: EdgeKernel, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        if kernel.known is not None:
            return tuple(t.detach() for t in kernel.known)
        p = tensors[0]
        assert p is not None
        dx, m = p.new_empty(len(p), 3), torch.empty_like(p) if kernel.features else None
        EdgeMeans.run("edges_forward", kernel, tensors, mean_dx=dx, mean_m=m)
        return (dx,) if m is None else (dx, m)

    @staticmethod
    def run(name: str, kernel: EdgeKernel, tensors: Any, **fields: Any) -> None:
        p, q, x_dst, x_src, e, shift, w_s, *weights = _contiguous(tensors)
        sizes = {"hidden": p.shape[1], "attributes": 0 if e is None else e.shape[1], "destinations": len(p)}
        given = {"p": p, "q": q, "x_dst": x_dst, "x_src": x_src, "e": e, "shift": shift, "w_s": w_s.t().contiguous()}
        flags = {
            "normalize": kernel.normalize,
            "low": kernel.low,
            "start": kernel.block.start,
            "source": kernel.block.source,
        }
        given |= dict(zip(WEIGHTS, weights, strict=True))
        _call(kernel.library, name, p.dtype, Edges, **sizes, **flags, **given, **fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kernel: EdgeKernel = ctx.kernel
        tensors = ctx.saved_tensors
        p, q, x_dst, x_src, e, _, w_s, *weights = tensors
        g_dx = torch.zeros_like(x_dst) if grads[0] is None else grads[0].contiguous()
        g_m = grads[1].contiguous() if len(grads) > 1 and grads[1] is not None else None
        rows = {
            name: torch.zeros_like(t) for name, t in (("d_p", p), ("d_q", q), ("d_x_dst", x_dst), ("d_x_src", x_src))
        }
        d_e = torch.zeros_like(e) if ctx.needs_input_grad[5] else None
        sums = _doubles(d_w_s=w_s.t(), **{f"d_{name}": t for name, t in zip(WEIGHTS, weights, strict=True)})
        EdgeMeans.run("edges_backward", kernel, tensors, mean_dx=g_dx, mean_m=g_m, d_e=d_e, **rows, **sums)
        d_w_s, *of_weights = (t.to(p.dtype) for t in sums.values())
        return None, *rows.values(), d_e, None, d_w_s.t(), *of_weights


@dataclass(frozen=True)
class PairKernel:
    """What stays the same over calls. graph (N,): graph of each node, int32; None: all lie in one."""

    library: Library
    graph: Tensor | None
    low: bool
    features: bool  # whether nodes and virtual nodes have features: m and s are needed


class PairSums(torch.autograd.Function):
    """What real and virtual nodes give each other: mean_c (x_i − z_c) φ_xv(m_ic) (N, 3), sum_i (z_c − x_i) φ_z(m_ic) (B, C, 3)
    and, with features, mean_c m_ic (N, H), sum_i m_ic (B, C, H); the backward pass recomputes.

    p (N, H) or None: the node's share of φ_ev's first layer; x (N, 3); z (B, C, 3); u (B, C, H): the virtual node's share; w_d
    (H, 1): the column of that layer for ‖z_c − x_i‖; then φ_ev's second layer, the first layers of φ_xv and φ_z (2H, H), (2H,),
    and their last weights (2, H).
    """

    @staticmethod
    def forward(ctx: Any, kernel: PairKernel, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        _, x, z, u = tensors[:4]
        assert x is not None
        assert z is not None
        assert u is not None
        dx, to_z = x.new_empty(len(x), 3), z.new_empty(z.shape)
        m, to_s = (x.new_empty(len(x), u.shape[2]), u.new_empty(u.shape)) if kernel.features else (None, None)
        PairSums.run("pairs_forward", kernel, tensors, dx=dx, m=m, to_z=to_z, to_s=to_s)
        return (dx, to_z) if m is None or to_s is None else (dx, to_z, m, to_s)

    @staticmethod
    def run(name: str, kernel: PairKernel, tensors: Any, **fields: Any) -> None:
        p, x, z, u, w_d, *weights = _contiguous(tensors)
        sizes = {
            "hidden": u.shape[2],
            "virtual_nodes": z.shape[1],
            "nodes": len(x),
            "graphs": len(z),
            "low": kernel.low,
        }
        given = {"graph": kernel.graph, "p": p, "x": x, "z": z, "u": u, "w_d": w_d}
        given |= dict(zip(WEIGHTS, weights, strict=True))
        _call(kernel.library, name, x.dtype, Pairs, **sizes, **given, **fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kernel: PairKernel = ctx.kernel
        tensors = ctx.saved_tensors
        p, x, z, u, w_d, *weights = tensors
        g_dx = torch.zeros_like(x) if grads[0] is None else grads[0].contiguous()
        g_z = torch.zeros_like(z, memory_format=torch.contiguous_format) if grads[1] is None else grads[1].contiguous()
        g_m, g_s = (None if g is None else g.contiguous() for g in grads[2:]) if kernel.features else (None, None)
        d_p, d_x = None if p is None else torch.empty_like(p), torch.empty_like(x)
        sums = _doubles(d_z=z, d_u=u, d_w_d=w_d, **{f"d_{name}": t for name, t in zip(WEIGHTS, weights, strict=True)})
        PairSums.run("pairs_backward", kernel, tensors, dx=g_dx, m=g_m, to_z=g_z, to_s=g_s, d_p=d_p, d_x=d_x, **sums)
        return None, d_p, d_x, *(t.to(x.dtype) for t in sums.values())


class Linear(torch.autograd.Function):
    """x Wᵀ + b (n, O) for x (n, I), W (O, I), b (O,) or None; I and O are multiples of 16."""

    @staticmethod
    def forward(ctx: Any, library: Library, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.library = library
        ctx.save_for_backward(x, w, b)
        y = x.new_empty(len(x), len(w))
        Linear.run("linear_forward", library, x, w, b, y=y)
        return y

    @staticmethod
    def run(name: str, library: Library, *tensors: Tensor | None, **fields: Any) -> None:
        x, w, b = _contiguous(tensors)
        sizes = {"rows": len(x), "inputs": x.shape[1], "outputs": len(w)}
        _call(library, name, x.dtype, LinearArguments, **sizes, x=x, w=w, b=b, **fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b = ctx.saved_tensors
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        sums = _doubles(d_w=w) if b is None else _doubles(d_w=w, d_b=b)
        Linear.run("linear_backward", ctx.library, x, w, b, y=grad.contiguous(), d_x=d_x, **sums)
        d_w, *d_b = (t.to(x.dtype) for t in sums.values())
        return None, d_x, d_w, d_b[0] if d_b else None
