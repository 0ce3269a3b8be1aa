"""Warnings about inputs whose size is far from what a network learns from: features and v near 1, lengths not far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dgl import DGLGraph
from torch import Tensor

FACTOR, LENGTH_FACTOR = 30.0, 100.0  # published data have edges of 0.02 to 10
EXACT = 1e-10  # of the squared displacement


def _rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt()) if len(value) else 0.0


def _far(rms: float, *scales: float, factor: float = FACTOR) -> bool:
    """Whether a size is not zero, and more than ``factor`` from all scales."""
    return rms > 0 and not any(scale / factor <= rms <= scale * factor for scale in scales)


def scale_warnings(
    graph: DGLGraph, features: Sequence[str], attributes: Sequence[str], where: str, simulator: bool = False
) -> Iterator[str]:
    """One line for each input of a training sample that is off by more than FACTOR, and if its v gives the target.

    simulator: the model scales v itself.
    """
    length, v, d = _rms(graph.edata["e"]), graph.ndata["v"].double(), (graph.ndata["y"] - graph.ndata["x"]).double()
    if _far(length, 1.0, factor=LENGTH_FACTOR):
        yield f"{where}: edges have rms length {length:.2g}, far from 1; choose another unit of length"
    if not simulator and _far(_rms(v), 1.0, length):
        yield f"{where}: v has rms {_rms(v):.2g}, far from 1 and from edges' {length:.2g}; set data.velocity_scale=null"
    for key, listed, columns in (
        ("features", features, graph.ndata["f"]),
        ("node_attributes", attributes, graph.ndata["a"]),
    ):
        width = columns.shape[1]  # more than names, if an attribute has several columns
        names = listed if len(listed) == width else [f"column {k}" for k in range(width)]
        for name, column in zip(names, columns.double().T, strict=True):
            rms = _rms(column)
            constant = float(column.std(correction=0)) <= 1e-6 * rms  # a small constant does no harm
            scales = (1.0, length) if name.startswith("speed") else (1.0,)
            if _far(rms, *scales) and not (constant and rms < 1):
                yield f"{where}: data.{key}: '{name}' has rms {rms:.2g}, far from 1; use {name.split('/')[0]}/max, or rescale it"
    t = (v * d).sum() / v.square().sum().clamp(min=1e-300)
    if 0 < float((d - t * v).square().sum()) <= EXACT * float(d.square().sum()) or (
        len(d) and bool((d == t * v).all())
    ):
        yield f"{where}: x + t·v is the target, exactly: nothing is left to learn; is v a difference that contains it?"
