"""Turn frames of a trajectories file into samples: choose the frames, compute the features, build the graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from dgl import DGLGraph

from ..config import Data
from ..errors import Failure
from . import domain, graphs
from .edges import EdgeRule, edges_of
from .fixed_nodes import fixed_nodes, moving_fields
from .graphs import Edges
from .trajectories import AGAIN, Trajectories, Trajectory, check_displacement

RMS_SNAPSHOTS = 16


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
    velocity: str = "backward"  # difference in place of a velocity that is not stored, see ``Trajectories.velocity``
    velocity_scale: float = 1.0  # factor of v, before the features
    fixed: str = ""  # nodes that no model moves, see ``fixed_nodes``
    history: int = 0  # past velocities of a simulator's input; 0: no simulator
    walls: str = "none"
    gravity: tuple[float, ...] | None = None
    pushforward: int = 0
    edges: str = "radius"
    neighbours: int = 0

    @property
    def rule(self) -> EdgeRule:
        """Which edges a sample has."""
        return EdgeRule.of(self)

    @property
    def past(self) -> int:
        """Velocities that a sample holds."""
        return self.history + self.pushforward


@dataclass(frozen=True)
class Snapshot:
    """A pair of frames of a trajectory: input at ``frame``, target at ``frame + horizon``."""

    split: str
    trajectory: int
    frame: int


def select_snapshots(
    data: Trajectories,
    horizon: int,
    count: int,
    first: int,
    last: int,
    seed: int,
    past: int = 0,
    difference: str = "backward",
) -> list[Snapshot]:
    """Up to ``count`` (0: all) frames of each trajectory in first…last (−1: the last with a target), in order of time.

    past: earlier steps that a simulator's frame needs; difference: as in ``Trajectories.velocity``; with "backward" frame
    0 is no input unless velocities are stored. The draw depends on the seed and the trajectory's number only. Raises
    Failure if a trajectory has no such frame, and where the velocity of an input is its target.
    """
    if horizon < 1:
        raise Failure(f"data.horizon={horizon}: must be at least 1 frame")
    if horizon == 1 and difference == "forward" and not past and not all(trajectory.velocity for trajectory in data):
        contains = f"{data.path} stores no velocity, so the input would contain the target"
        raise Failure(f"data.horizon=1 with data.velocity=forward: {contains}; set data.velocity=backward")
    result: list[Snapshot] = []
    for k, trajectory in enumerate(data):
        end = trajectory.frames - 1 - horizon
        begin = max(first, past * horizon if past else first_input(trajectory, difference))
        frames = np.arange(begin, 1 + (end if last < 0 else min(last, end)))
        if not len(frames):
            none = f"has {trajectory.frames} frames, none in {first}…{last} with a target {horizon} frames ahead"
            history = f" and {past} velocities before" if past else ""
            keys = "data.history, data.horizon or data.first_frame" if past else "data.horizon or data.first_frame"
            raise Failure(f"{data.path}: trajectory {k} {none}{history}; lower {keys}")
        if 0 < count < len(frames):
            frames = np.sort(np.random.default_rng([seed, k]).choice(frames, count, replace=False))
        result += (Snapshot(trajectory.split, k, int(frame)) for frame in frames)
    return result


def first_input(trajectory: Trajectory, difference: str) -> int:
    """The first frame that has a velocity."""
    return int(difference == "backward" and not trajectory.velocity)


def displacement_scale(data: Trajectories, snapshots: Sequence[Snapshot], settings: Data) -> float:
    """data.velocity_scale, or for null rms(y − x) / rms(v) of up to RMS_SNAPSHOTS training snapshots (of any split, if there
    is none): v times this has the size of the displacements, in whatever unit it is. A simulator has its own: 1."""
    if settings.velocity_scale is not None or settings.history:
        return settings.velocity_scale or 1.0
    squares = np.zeros(2)
    for s in _some(snapshots):
        k, t = s.trajectory, s.frame
        moved = data.position(k, t + settings.horizon).astype(float) - data.position(k, t)
        squares += [np.square(moved).mean(), np.square(data.velocity(k, t, settings.velocity), dtype=float).mean()]
    return float(np.sqrt(squares[0] / squares[1])) if squares.all() else 1.0


def _some(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Up to RMS_SNAPSHOTS training snapshots, or of any split if there is none."""
    chosen = [s for s in snapshots if s.split == "train"] or list(snapshots)
    return [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, RMS_SNAPSHOTS).round().astype(int))]


def length_unit(data: Trajectories, snapshots: Sequence[Snapshot], spec: SampleSpec) -> float:
    """data.radius; where a simulator's edges have none, the mean length of those of up to RMS_SNAPSHOTS training snapshots."""
    if not spec.past or spec.edges == "radius" or math.isfinite(spec.radius):
        return spec.radius
    lengths = [read_sample(data, s, spec).edata["e"][:, 0].double() for s in _some(snapshots)]
    return float(torch.cat(lengths).mean()) if sum(map(len, lengths)) else 1.0


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
            text = f"has {widths[k]} columns, in trajectory 0 it has {widths[0]}; {AGAIN}"
            raise Failure(f"{data.path}: trajectory {k}: attribute '{base}' {text}")
        total += widths[0]
    return total


def node_fields(data: Trajectories, snapshot: Snapshot, spec: SampleSpec) -> dict[str, np.ndarray]:
    """The node fields of a snapshot: x, v, f, a, y (float32), gid, and with data.fixed moving_id and moving.

    Raises Failure for non-finite values and, without a simulator, for fixed nodes that move.
    """
    k, t = snapshot.trajectory, snapshot.frame
    where = f"{data.path}: trajectory {k}, frame {t}"
    fields = {"x": data.position(k, t), **past_velocities(data, k, t, spec)}
    fields["v"] = fields["v"] * np.float32(spec.velocity_scale)
    fields["y"] = data.position(k, t + spec.horizon)
    for field, names in (("f", spec.features), ("a", spec.node_attributes)):
        fields[field] = feature_columns(names, fields["v"], lambda name: data.attribute(k, name, t))
    fields["gid"] = np.arange(len(fields["x"]))
    if spec.fixed:
        fixed = fixed_nodes(spec.fixed, lambda name: data.attribute(k, name))
        fields |= moving_fields(fixed, fields["x"], fields["y"], bool(spec.past), where)
    for name, value in fields.items():
        if not np.isfinite(value).all():
            row = int(np.argwhere(~np.isfinite(value))[0][0])
            raise Failure(f"{where}: field '{name}' is NaN or infinite at node {row}; correct the source data")
    if spec.periodic:
        before = t - (first_input(data[k], spec.velocity) and not spec.past)  # of the two frames of a difference
        check_displacement(
            data.position(k, before), data.position(k, before + 1), data.sides(k, spec.rule.longest), where
        )
    return fields


def past_velocities(data: Trajectories, k: int, t: int, spec: SampleSpec) -> dict[str, np.ndarray]:
    """v (N, 3) at frame t and, for a simulator, the field ``past`` of those before it.

    A simulator's velocities are x(t) − x(t − horizon), in length per step: no stored ones, none that read ahead.
    """
    if not spec.past:
        return {"v": data.velocity(k, t, spec.velocity)}
    x = [data.position(k, t - n * spec.horizon) for n in range(spec.past + 1)]
    v, *past = (after - before for after, before in pairwise(x))
    return {"v": v, "past": np.concatenate(past, 1)} if past else {"v": v}


def edge_positions(fields: Mapping[str, np.ndarray], gravity: np.ndarray | None) -> np.ndarray:
    """Where nodes are when edges join them (N, 3): at x, or with a simulator's gravity (3,) at x + v + g."""
    if gravity is None:
        return fields["x"]
    x, v = (torch.from_numpy(fields[name]) for name in ("x", "v"))
    return domain.advance(x, v, torch.from_numpy(gravity)).numpy()


def build_sample(
    fields: Mapping[str, np.ndarray],
    spec: SampleSpec,
    side: np.ndarray | None = None,
    around: tuple[np.ndarray, np.ndarray | None] | None = None,
    given: Edges | None = None,
) -> DGLGraph:
    """The graph of these node fields. around: a simulator's `surroundings`; given: the edges of data.edges=given.

    Raises Failure unless side (3,) is given exactly if spec.periodic.
    """
    if spec.periodic != (side is not None):
        raise Failure("data.periodic=true needs a box" if side is None else "data.periodic=false: leave the box out")
    positions = edge_positions(fields, around and around[0])
    graph = graphs.build_graph(*edges_of(positions, spec.rule, side, given), fields, side)
    return domain.attach(graph, domain.make_domain(*around, side)) if around else graph


def read_sample(data: Trajectories, snapshot: Snapshot, spec: SampleSpec) -> DGLGraph:
    """The snapshot as a DGLGraph with the fields of ``fields.TABLE``."""
    k = snapshot.trajectory
    side = data.sides(k, spec.rule.longest) if spec.periodic else None
    fields, around = node_fields(data, snapshot, spec), surroundings(data, k, spec)
    return build_sample(fields, spec, side, around, given_edges(data, k, spec.rule))


def given_edges(data: Trajectories, k: int, rule: EdgeRule) -> Edges | None:
    """The edges of a trajectory where data.edges=given, else None. Raises Failure if it has none."""
    return data.edges(k) if rule.edges == "given" else None


def surroundings(data: Trajectories, k: int, spec: SampleSpec) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Gravity per step² (3,) and box (2, 3) of a trajectory; None without a simulator."""
    return domain.read_domain(data, k, spec.horizon, spec.walls, spec.gravity, spec.periodic) if spec.past else None


def snapshot_squares(data: Trajectories, snapshot: Snapshot, spec: SampleSpec) -> tuple[float, float, int, float]:
    """The `squares` of a snapshot of a simulator."""
    around = surroundings(data, snapshot.trajectory, spec)
    assert around is not None
    return squares(node_fields(data, snapshot, spec), around[0])


def squares(fields: Mapping[str, np.ndarray], gravity: np.ndarray) -> tuple[float, float, int, float]:
    """Σ‖v‖², Σ‖y − x − v − g‖², the number of terms of each, and the largest ‖y − x‖, over the nodes that move."""
    moving = fields["moving_id"] >= 0 if "moving_id" in fields else slice(None)
    x, v, y = (fields[name][moving].astype(np.float64) for name in ("x", "v", "y"))
    farthest = float(np.linalg.norm(y - x, axis=1).max(initial=0.0))
    return float(np.square(v).sum()), float(np.square(y - x - v - gravity).sum()), v.size, farthest


def motion_statistics(squares: Iterable[Sequence[float]]) -> tuple[float, float, float]:
    """A simulator's statistics from the `squares` of snapshots: σ_v and σ_a, root mean squares over nodes and components,
    and the median over snapshots of the largest ‖y − x‖, which a few nodes cannot raise.
    """
    rows = list(squares)
    v, a, count = np.sum([row[:3] for row in rows], 0).tolist()
    return (v / count) ** 0.5, (a / count) ** 0.5, float(np.median([row[3] for row in rows]))
