"""The fields of a sample: one table of names, shapes, units and how each transforms.

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
    """One field of a sample: its name in ``ndata`` or ``edata``, its shape after the first axis, and what it means."""

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
    Field("f", "node", None, "invariant", True, "-", "input features (F)"),
    Field("a", "node", None, "invariant", False, "-", "node attributes (K), read by every layer"),
    Field("y", "node", 3, "point", False, "length", "target: position after the horizon"),
    Field("gid", "node", 0, "index", False, "-", "row of the node in the whole snapshot"),
    Field("total", "node", 0, "index", False, "-", "N of the whole graph, the same on all its nodes"),
    Field("centroid", "node", 3, "point", False, "length", "mean x of the whole graph, the same on all its nodes"),
    Field("e", "edge", None, "invariant", False, "-", "edge attributes (A)"),
    Field("shift", "edge", 3, "vector", False, "length", "lattice vector: x_i − x_j − shift is the nearest image's"),
)


def validate(graph: DGLGraph, where: str, *, target: bool = False) -> None:
    """Raise Failure, naming ``where`` and the field, if a field is missing, has the wrong shape, or is not finite."""
    for field in TABLE:
        data, rows = (graph.ndata, graph.num_nodes()) if field.on == "node" else (graph.edata, graph.num_edges())
        if field.name not in data:
            if field.required or (target and field.name == "y"):
                raise Failure(
                    f"{where}: {field.on} field '{field.name}' ({field.meaning}) is missing; add it to the sample"
                )
            continue
        value = data[field.name]
        tail = tuple(value.shape[1:])
        wanted = () if field.width == 0 else (field.width,)
        if len(tail) != len(wanted) or (field.width is not None and tail != wanted):
            shape = ", ".join([str(rows), *("any" if w is None else str(w) for w in wanted)])
            raise Failure(
                f"{where}: {field.on} field '{field.name}' has shape {tuple(value.shape)}, expected ({shape})"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            row = int((~value.isfinite()).reshape(rows, -1).any(1).nonzero()[0])
            raise Failure(
                f"{where}: {field.on} field '{field.name}' is NaN or infinite (first at row {row} of {rows}); mend the source data"
            )
