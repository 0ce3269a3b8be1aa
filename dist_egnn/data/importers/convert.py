"""Convert series of frames into trajectories.h5: a first pass checks and measures, a second one writes.

Both hold one frame at a time. Positions become three-dimensional, in one order of particles, scaled, and unwrapped if the
box is periodic.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from ...errors import Failure
from ..checks import RESERVED, check_digits, edge_pairs, neighbour_distances
from ..graphs import boxsize, wrap
from ..trajectories import box_sides, periodic_axes
from .periodic import PeriodicFrames
from .series import Frame, ImportOptions, Series

SAMPLE = 2000  # nodes that measure the order of rows
ROUNDING = 1e-3  # float32 may round positions by this share of the spacing, else they are shifted
UNCERTAIN = 0.4  # of a side: a longer move may have been one in the other direction
THIN = 0.1  # of the longest side: such a box around nodes of one z is two-dimensional
IRREGULAR = 1e-3  # relative deviation of a time step


@dataclass
class Summary:
    """What the first pass found in one series."""

    frames: int = 0
    nodes: int = 0
    dim: int = 3
    dt: float = 0.0
    velocity: bool = False
    widths: dict[str, int] = field(default_factory=dict)  # columns of each attribute
    varying: set[str] = field(default_factory=set)  # attributes that vary over time
    box: np.ndarray | None = None
    axes: tuple[bool, ...] = (False, False, False)  # which are periodic
    low: np.ndarray = field(default_factory=lambda: np.full(3, np.inf))
    high: np.ndarray = field(default_factory=lambda: np.full(3, -np.inf))
    spacing: float = np.nan  # median distance to the nearest neighbour in the first frame
    largest_move: float = 0.0  # of a node between two frames
    largest_turn: float = 0.0  # the same along an axis, as a share of the periodic box's side
    reordered: int = 0  # frames whose rows were in another order than the first
    unwrapped: int = 0  # crossings of the periodic boundary
    edges: int = 0  # undirected ones that the source gives: bonds, edges of cells
    duplicates: int = 0  # nodes of the first frame at the place of another one
    shift: np.ndarray = field(default_factory=lambda: np.zeros(3))  # subtracted from all positions
    notes: list[str] = field(default_factory=list)  # what was assumed or looks wrong

    @property
    def periodic(self) -> bool:
        return any(self.axes)


def normalized(series: Series, options: ImportOptions, summary: Summary | None = None) -> Iterator[Frame]:
    """Every stride-th frame: sorted by id, three-dimensional, scaled, with the chosen attributes, unwrapped if periodic.

    summary: of the first pass, whose shift is subtracted.
    """
    first_ids: np.ndarray | None = None
    count, edges = 0, _Edges()
    boxes: PeriodicFrames | None = None
    for t, frame in enumerate(itertools.islice(series.frames(), 0, None, options.stride)):
        where = f"{series.name}, frame {t * options.stride}"
        if t == 0:
            series.flat = _is_flat(np.asarray(frame.position), frame.box)
            axes = _axes(series, options)
            boxes = PeriodicFrames(axes, options.repeat, options.rescale) if any(axes) else None
            if np.asarray(frame.position).dtype == np.float32:
                check_digits(frame.position, where)
        position = np.asarray(frame.position, np.float64) * options.scale
        own = {"position": position}
        if frame.velocity is not None:
            own["velocity"] = np.asarray(frame.velocity, np.float64) * options.scale
        values = frame.attributes
        if (order := _order(frame.ids, first_ids, where)) is not None:
            own, values = ({key: value[order] for key, value in fields.items()} for fields in (own, values))
        if frame.ids is not None and first_ids is None:
            first_ids = np.sort(frame.ids)
        ids = first_ids if first_ids is not None else np.arange(len(position))
        count = count or len(position)
        if len(position) != count:
            text = f"has {len(position)} particles, frame 0 has {count}"
            raise Failure(f"{where}: {text}; their number must stay the same: select those that always exist")
        for key, value in (*own.items(), *values.items()):
            if len(value) != len(position):
                raise Failure(
                    f"{where}: '{key}' has {len(value)} values for {len(position)} particles; correct the source"
                )
            if not np.isfinite(value).all():
                row = int(np.argwhere(~np.isfinite(value))[0][0])
                raise Failure(f"{where}: '{key}' of particle {ids[row]:g} is NaN or infinite; correct the source")
        position, velocity = _three(own["position"]), own.get("velocity")
        velocity = None if velocity is None else _three(velocity)
        box = _box(frame.box, boxes is not None, options)
        attributes = _attributes(values, options, where)
        make_edges: Callable[[], np.ndarray] | None = None
        if frame.edges:
            make_edges = functools.partial(edges, frame.edges, order, len(position), where)
        if boxes and box is not None:
            position, velocity, box = boxes(position, velocity, box, frame.unwrapped, where)
            attributes = {name: np.concatenate([value] * len(boxes.offsets)) for name, value in attributes.items()}
            make_edges = make_edges and boxes.repeated(make_edges, where)
        yield Frame(
            position if summary is None else position - summary.shift,
            velocity,
            attributes,
            time=frame.time,
            box=box if box is None or summary is None else box - summary.shift,
            edges=make_edges,
            reordered=order is not None and bool((np.diff(order) < 0).any()),
            crossings=0 if boxes is None else int(np.abs(boxes.turns).sum()),
            turn=0.0 if boxes is None else boxes.largest_turn,
            notes=boxes.notes() if boxes and box is not None else [],
        )


class _Edges:
    """The edges (E, 2) of a frame between rows in the order of ids, each once; those of the frame before if equal."""

    before: Any = None  # pairs of rows, and their order
    edges: np.ndarray

    def __call__(self, make: Callable[[], np.ndarray], order: Any, nodes: int, where: str) -> np.ndarray:
        pairs = make()
        if self.before is None or self.before[0] is not pairs or not np.array_equal(self.before[1], order):
            self.before, checked = (pairs, order), edge_pairs(pairs, f"{where}: edges", nodes)
            self.edges = checked if order is None else edge_pairs(np.argsort(order)[checked], where, nodes)
        return self.edges


def _order(ids: np.ndarray | None, first: np.ndarray | None, where: str) -> np.ndarray | None:
    """The rows by ascending id, None without ids. Raises Failure if the ids repeat or are not those of the first frame."""
    if ids is None:
        return None
    order = np.argsort(ids, kind="stable")
    current = ids[order]
    if (np.diff(current) == 0).any():
        twice = current[np.flatnonzero(np.diff(current) == 0)[0]]
        raise Failure(
            f"{where}: particle {twice:g} is there twice; name the field that identifies particles with --ids"
        )
    if first is not None and not np.array_equal(first, current):
        other = np.setxor1d(first, current)
        text = f"particle {other[0]:g} is there in only one of the two"
        raise Failure(
            f"{where}: has {len(current)} particles, frame 0 has {len(first)} ({text}); they must stay the same"
        )
    return order


def _three(x: np.ndarray) -> np.ndarray:
    """(N, 2) or (N, 3) → (N, 3), z = 0 in two dimensions."""
    return x if x.shape[1] == 3 else np.concatenate([x, np.zeros((len(x), 1))], 1)


def _box(box: np.ndarray | None, periodic: bool, options: ImportOptions) -> np.ndarray | None:
    """The box of --box, or of the frame, scaled; (2, 3), if periodic also (4, 3). The third side of a 2-D box is 1."""
    if options.box is not None:
        return np.reshape(options.box, (2, 3)).astype(float)
    if box is None:
        return None
    box = np.asarray(box, float)
    if box.shape == (4, 3):
        return box * options.scale if periodic else None
    if box.shape == (2, 2):
        box = np.concatenate([box, [[-0.5], [0.5]]], 1)
    return box * options.scale


def _is_flat(x: np.ndarray, box: np.ndarray | None) -> bool:
    """Whether positions have two columns, or the same z in an orthorhombic box that is thin along z."""
    if x.shape[1] == 2 or box is None or np.shape(box) != (2, 3):
        return x.shape[1] == 2
    sides = np.ptp(box, 0)
    return len(x) > 1 and np.ptp(x[:, 2]) == 0 and bool(sides[2] <= THIN * sides[:2].max())


def _axes(series: Series, options: ImportOptions) -> tuple[bool, ...]:
    """Which axes are periodic; never z in two dimensions, where images along z would be neighbours."""
    axes = periodic_axes(series.periodic if options.periodic is None else options.periodic, series.name)
    return (*axes[:2], axes[2] and not series.flat)


def _attributes(values: dict[str, np.ndarray], options: ImportOptions, where: str) -> dict[str, np.ndarray]:
    """The attributes that --attributes and --type keep, and `fixed` where --fixed names types that never move."""
    if options.fixed:
        if "type" not in values:
            raise Failure(f"--fixed: {where} has no types; name their field with --type")
        values = values | {"fixed": np.isin(values["type"], options.fixed).astype(np.float32)}
    if options.attributes is not None:
        for name in options.attributes:
            if name not in values:
                raise Failure(f"--attributes {name}: {where} has no such field (it has: {', '.join(values) or 'none'})")
        values = {name: value for name, value in values.items() if name in (*options.attributes, "type", "fixed")}
    names = [attribute_name(name) for name in values]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Failure(f"{where}: two fields become the attribute '{twice}'; choose one with --attributes")
    return dict(zip(names, values.values(), strict=True))


def attribute_name(name: str) -> str:
    """The name of a field as that of an attribute: / = , and brackets mean something in configs, `speed` is |v|."""
    name = re.sub(r"[/=,\[\]]", "_", name)
    return f"{name}_" if name in RESERVED else name


def measure(series: Series, options: ImportOptions, tick: Callable[[], object] = lambda: None) -> Summary:
    """The first pass over a series. Raises Failure for anything that cannot be imported; the rest is noted.

    tick: called after each frame.
    """
    result, first, previous, before = Summary(notes=[*series.notes]), None, None, None
    edges: Any = None
    about_box: list[str] = []
    times: list[float] = []
    for t, frame in enumerate(normalized(series, options)):
        where, x = f"{series.name}, frame {t * options.stride}", frame.position
        if first is None:
            first = frame
            result.nodes, result.box, result.velocity = len(x), frame.box, frame.velocity is not None
            result.widths = {name: int(np.prod(value.shape[1:])) for name, value in frame.attributes.items()}
            result.spacing, result.duplicates = measure_spacing(x)
            edges = frame.edges and frame.edges()
            result.edges = 0 if edges is None else len(edges)
        elif result.edges and (frame.edges is None or not np.array_equal(frame.edges(), edges)):
            result.edges = 0
            result.notes.append(f"its edges (cells, bonds) are not those of frame 0 in {where}: none are imported")
        _check_same(result, frame, where)
        if result.periodic or frame.box is not None:
            _check_box(result, frame, where)
        result.varying |= {k for k, v in frame.attributes.items() if not np.array_equal(v, first.attributes[k])}
        if previous is not None:
            move = np.linalg.norm(x - previous, axis=1)
            result.largest_move = max(result.largest_move, float(move.max()))
            if before is not None and t == 2:
                axes = _axes(series, options)
                side = None if frame.box is None else box_sides(frame.box, axes)
                _check_rows(x, previous, before, result.spacing, side, where)
        result.low, result.high = np.minimum(result.low, x.min(0)), np.maximum(result.high, x.max(0))
        result.reordered += frame.reordered
        result.unwrapped, result.largest_turn, about_box = frame.crossings, frame.turn, frame.notes
        times += [] if frame.time is None else [frame.time]
        before, previous, result.frames = previous, x, t + 1
        tick()
    if first is None:
        raise Failure(f"{series.name}: holds no frame")
    if result.frames < 2:
        raise Failure(f"{series.name}: has {result.frames} frame; a trajectory needs 2 or more, --stride may be lower")
    result.axes = _axes(series, options)
    if result.periodic and result.box is None:
        raise Failure(f"{series.name}: --periodic needs a box and the source has none; give it with --box")
    result.notes += about_box
    result.dim = 2 if result.high[2] == result.low[2] else 3
    result.dt = _time_step(series, times, options)
    _set_shift(result, first.position, options)
    warn(result)
    return result


def measure_spacing(x: np.ndarray) -> tuple[float, int]:
    """The median distance to the nearest neighbour, and how many of the nodes looked at coincide with another."""
    if len(x) < 2:
        return np.nan, 0
    distance = neighbour_distances(x)
    return float(np.median(distance)), int((distance == 0).sum())


def _check_same(result: Summary, frame: Frame, where: str) -> None:
    widths = {name: int(np.prod(value.shape[1:])) for name, value in frame.attributes.items()}
    if widths != result.widths:
        raise Failure(
            f"{where}: the attributes {widths} differ from {result.widths} in frame 0; choose with --attributes"
        )
    if (frame.velocity is not None) != result.velocity:
        raise Failure(f"{where}: some frames have velocities and others have none; write them for all frames or none")


def _check_box(result: Summary, frame: Frame, where: str) -> None:
    if frame.box is None or result.box is None:
        raise Failure(f"{where}: some frames have a box and others have none; --no-periodic or --box sets one for all")
    sides = box_sides(frame.box)
    if not np.isfinite(sides).all() or (sides <= 0).any():
        raise Failure(f"{where}: the box {frame.box.tolist()} is no box; correct it with --box")


def _check_rows(
    x: np.ndarray, previous: np.ndarray, before: np.ndarray, spacing: float, side: np.ndarray | None, where: str
) -> None:
    """Raise Failure if the rows of the frames are in different orders. side: (3,) of a periodic box.

    Then nodes seem to jump over several spacings and back, while most places of the frame before are taken again.
    """
    move, turn = (np.median(np.linalg.norm(d, axis=1)) for d in (x - previous, x - 2 * previous + before))
    if move > 2 * spacing and turn > move:
        places, taken = (a if side is None else wrap(a, side) for a in (previous, x[:: max(1, len(x) // SAMPLE)]))
        nearest = np.median(cKDTree(places, boxsize=boxsize(side)).query(taken)[0])
        if nearest < 0.25 * spacing:
            text = "particles are in another order in each frame"
            raise Failure(f"{where}: {text}; name the field that identifies them with --ids, or sort the source")


def _time_step(series: Series, times: list[float], options: ImportOptions) -> float:
    """The time between two frames that are kept. Raises Failure if it is unknown, or if frames are missing in time."""
    if options.dt is not None:
        return options.dt * options.stride
    if len(times) > 1:
        steps = np.diff(times)
        usual = float(np.median(steps))
        wrong = np.flatnonzero(np.abs(steps - usual) > IRREGULAR * abs(usual) + 1e-6 * abs(times[-1]))
        if usual <= 0 or len(wrong):
            k = int(wrong[0]) if len(wrong) else 0
            text = f"the time from frame {k} to {k + 1} is {steps[k]:g}, usually {usual:g}"
            raise Failure(f"{series.name}: {text}; frames are missing or not in order, --dt ignores the times")
        return usual
    if series.dt is not None and series.dt > 0:
        return series.dt * options.stride
    raise Failure(f"{series.name}: the source has no times; give the time between its frames with --dt")


def _set_shift(result: Summary, x: np.ndarray, options: ImportOptions) -> None:
    """Shift positions whose distance from the origin costs digits in float32, or if --center asks for it."""
    largest = max(np.abs(result.low).max(), np.abs(result.high).max())
    rounds = result.spacing > 0 and largest * 2.0**-24 > ROUNDING * result.spacing
    if options.center or rounds:
        result.shift = x.mean(0) if options.center else np.rint((result.low + result.high) / 2)
        if rounds:
            reason = f"so far from the origin ({largest:.3g}) float32 rounds by over {ROUNDING:.1%} of the spacing"
            result.notes.append(f"{reason}: shifted by {(-result.shift).tolist()}")


def warn(result: Summary) -> None:
    """Note what looks wrong."""
    for name in (name for name in result.widths if name.endswith("_")):
        result.notes.append(f"the attribute '{name}' had another name in the source, which attributes cannot have")
    if result.duplicates:
        result.notes.append(f"{result.duplicates} of the nodes looked at coincide with another node")
    if result.spacing > 0 and result.largest_move > 5 * result.spacing:
        text = f"a node moves by {result.largest_move / result.spacing:.1f} spacings in one frame"
        remedy = "" if result.periodic else "; if positions were wrapped into a box, give --periodic and --box"
        result.notes.append(text + remedy)
    if result.largest_turn > UNCERTAIN:
        text = f"a node moves by {result.largest_turn:.2f} sides of the periodic box in one frame"
        result.notes.append(f"{text}: which image it moved to is uncertain; keep more frames")
    if result.box is not None and not all(result.axes):
        low, high = result.box
        outside = np.maximum(low - result.low, result.high - high)[~np.array(result.axes)].max()
        if outside > 0:
            result.notes.append(f"nodes are up to {outside:.3g} outside the box")


def frames_between(series: Series, summary: Summary, options: ImportOptions, lo: int, hi: int) -> Iterator[Frame]:
    """The frames [lo, hi) as they are written."""
    return itertools.islice(normalized(series, options, summary), lo, hi)
