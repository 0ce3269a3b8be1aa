"""The fields of a sample: names, shapes, units and transformations.

A sample is a DGLGraph; edges run j→i from source to destination. Legend: N nodes, E edges, F input features,
K node attributes, A edge attributes. A *point* moves with rotations and translations, a *vector* with rotations only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import Failure

if TYPE_CHECKING:
    from dgl import DGLGraph


@dataclass(frozen=True)
class Field:
    """One field of a sample: its name in ``ndata`` or ``edata``, its shape after the first axis, and its meaning."""

    name: str
    on: Literal["node", "edge"]
    width: int | None  # None: any width; 0: a scalar per row
    kind: Literal["point", "vector", "invariant", "index"]
    required: bool
    unit: str
    meaning: str


TABLE = (
    Field("x", "node", 3, "point", True, "length", "position"),
    Field("v", "node", 3, "vector", True, "length/time", "velocity, constant over the layers"),
    Field("past", "node", None, "vector", False, "length/step", "velocities before v, newest first (simulator)"),
    Field("f", "node", None, "invariant", True, "-", "input features (F)"),
    Field("a", "node", None, "invariant", False, "-", "node attributes (K), read by every layer"),
    Field("y", "node", 3, "point", False, "length", "target: position after the horizon"),
    Field("gid", "node", 0, "index", False, "-", "row of the node in the whole snapshot"),
    Field("moving_id", "node", 0, "index", False, "-", "row among the nodes that move; −1: fixed (data.fixed)"),
    Field("moving", "node", 0, "index", False, "-", "nodes of the whole graph that move, the same on all its nodes"),
    Field("total", "node", 0, "index", False, "-", "N of the whole graph, the same on all its nodes"),
    Field("centroid", "node", 3, "point", False, "length", "mean x of the whole graph, the same on all its nodes"),
    Field("e", "edge", None, "invariant", False, "-", "edge attributes (A)"),
    Field("shift", "edge", 3, "vector", False, "length", "lattice vector: x_i − x_j − shift is the nearest image's"),
)


def validate(graph: DGLGraph, where: str, *, target: bool = False) -> None:
    """Raise Failure, naming ``where`` and the field, if a field is missing, has a wrong shape or a non-finite value."""
    for field in TABLE:
        data, rows = (graph.ndata, graph.num_nodes()) if field.on == "node" else (graph.edata, graph.num_edges())
        name = f"{where}: {field.on} field '{field.name}'"
        if field.name not in data:
            if field.required or (target and field.name == "y"):
                raise Failure(f"{name} ({field.meaning}) is missing; add it to the sample")
            continue
        value = data[field.name]
        expected = () if field.width == 0 else (field.width,)
        if value.dim() - 1 != len(expected) or (field.width and value.shape[1] != field.width):
            shape = ", ".join([str(rows), *("any" if width is None else str(width) for width in expected)])
            raise Failure(f"{name} has shape {tuple(value.shape)}, expected ({shape})")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            row = int((~value.isfinite()).reshape(rows, -1).any(1).nonzero()[0])
            raise Failure(f"{name} is NaN or infinite (first at row {row} of {rows}); correct the source data")
