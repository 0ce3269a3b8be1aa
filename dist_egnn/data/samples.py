"""Turn frames of a trajectories file into samples: choose the frames, compute the features, build the graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from dgl import DGLGraph

from ..errors import Failure
from . import graphs
from .fixed_nodes import fixed_nodes, moving_fields
from .trajectories import Trajectories, check_displacement


@dataclass(frozen=True)
class SampleSpec:
    """How a frame becomes a sample. Features: a node attribute, 'speed' for ‖v‖, 'name/max' for name / max |name|.

    An attribute of k columns gives k columns; its largest magnitude is that of all of them.
    """

    radius: float
    horizon: int
    features: tuple[str, ...]
    node_attributes: tuple[str, ...] = ()
    edge_drop: float = 0.0
    periodic: bool = False
    fixed: str = ""  # nodes that do not move, see ``fixed_nodes``


@dataclass(frozen=True)
class Snapshot:
    """A pair of frames of a trajectory: input at ``frame``, target at ``frame + horizon``."""

    split: str
    trajectory: int
    frame: int


def select_snapshots(data: Trajectories, horizon: int, count: int, first: int, last: int, seed: int) -> list[Snapshot]:
    """Up to ``count`` (0: all) frames of each trajectory in first…last (−1: the last with a target), in order of time.

    The draw depends on the seed and the trajectory's number only. Raises Failure if a trajectory has no such frame.
    """
    if horizon < 1:
        raise Failure(f"data.horizon={horizon}: must be at least 1 frame")
    result: list[Snapshot] = []
    for k, trajectory in enumerate(data):
        end = trajectory.frames - 1 - horizon
        frames = np.arange(max(first, 0), 1 + (end if last < 0 else min(last, end)))
        if not len(frames):
            none = f"has {trajectory.frames} frames, none in {first}…{last} with a target {horizon} frames ahead"
            raise Failure(f"{data.path}: trajectory {k} {none}; lower data.horizon or data.first_frame")
        if 0 < count < len(frames):
            frames = np.sort(np.random.default_rng([seed, k]).choice(frames, count, replace=False))
        result += (Snapshot(trajectory.split, k, int(frame)) for frame in frames)
    return result


def feature_columns(names: Sequence[str], v: np.ndarray, attribute: Callable[[str], np.ndarray]) -> np.ndarray:
    """SampleSpec's features (N, F) in the dtype of v (N, 3), from attribute(name) (N,) or (N, k).

    Raises Failure for an unknown scaling.
    """

    def column(name: str) -> np.ndarray:
        base, _, scale = name.partition("/")
        value = np.linalg.norm(v, axis=1) if base == "speed" else attribute(base)
        if scale not in ("", "max"):
            raise Failure(f"feature '{name}': the only scaling is '/max'")
        return (value / max(float(np.abs(value).max()), 1e-30) if scale else value).reshape(len(v), -1)

    return np.concatenate([np.zeros((len(v), 0), v.dtype), *map(column, names)], 1).astype(v.dtype)


def count_columns(data: Trajectories, names: Sequence[str]) -> int:
    """The columns of these features. Raises Failure for an attribute that a trajectory lacks or has in another width."""
    total = 0
    for base in (name.partition("/")[0] for name in names):
        widths = [1 if base == "speed" else data.width(k, base) for k in range(len(data))]
        if k := next((k for k, width in enumerate(widths) if width != widths[0]), 0):
            text = f"has {widths[k]} columns, in trajectory 0 it has {widths[0]}; prepare the file again"
            raise Failure(f"{data.path}: trajectory {k}: attribute '{base}' {text}")
        total += widths[0]
    return total


def node_fields(data: Trajectories, snapshot: Snapshot, spec: SampleSpec) -> dict[str, np.ndarray]:
    """The node fields of a snapshot: x, v, f, a, y (float32), gid, and with data.fixed moving_id and moving.

    Raises Failure for non-finite values and for fixed nodes that move.
    """
    k, t = snapshot.trajectory, snapshot.frame
    where = f"{data.path}: trajectory {k}, frame {t}"
    fields = {"x": data.position(k, t), "v": data.velocity(k, t), "y": data.position(k, t + spec.horizon)}
    for field, names in (("f", spec.features), ("a", spec.node_attributes)):
        fields[field] = feature_columns(names, fields["v"], lambda name: data.attribute(k, name, t))
    fields["gid"] = np.arange(len(fields["x"]))
    if spec.fixed:
        fixed = fixed_nodes(spec.fixed, lambda name: data.attribute(k, name))
        fields |= moving_fields(fixed, fields["x"], fields["y"], where)
    for name, value in fields.items():
        if not np.isfinite(value).all():
            row = int(np.argwhere(~np.isfinite(value))[0][0])
            raise Failure(f"{where}: field '{name}' is NaN or infinite at node {row}; correct the source data")
    if spec.periodic:
        check_displacement(fields["x"], data.position(k, t + 1), data.sides(k, spec.radius), where)
    return fields


def build_sample(fields: Mapping[str, np.ndarray], spec: SampleSpec, side: np.ndarray | None = None) -> DGLGraph:
    """The graph of these node fields. Raises Failure unless side (3,) is given exactly if spec.periodic."""
    if spec.periodic != (side is not None):
        raise Failure("data.periodic=true needs a box" if side is None else "data.periodic=false: leave the box out")
    return graphs.build_graph(*graphs.sample_edges(fields["x"], spec.radius, spec.edge_drop, side), fields, side)


def read_sample(data: Trajectories, snapshot: Snapshot, spec: SampleSpec) -> DGLGraph:
    """The snapshot as a DGLGraph with the fields of ``fields.TABLE``."""
    side = data.sides(snapshot.trajectory, spec.radius) if spec.periodic else None
    return build_sample(node_fields(data, snapshot, spec), spec, side)
