"""What a trajectories file holds, measured on a sample: motion, neighbours, gravity, and the errors of simple predictions.

Legend: N nodes, H horizons, P places (a trajectory and a frame).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.spatial import KDTree

from ..data import checks, graphs
from ..data.fixed_nodes import TOLERANCE
from ..data.importers.convert import Summary, measure_spacing, warn
from ..data.trajectories import Trajectories, box_sides
from ..errors import Failure
from ..utils.progress import progress_bar

TRAJECTORIES, STARTS, POSITIONS = 12, 12, 20_000_000  # sampled at most: trajectories, frames of each, positions read
GRAPHS, QUERIES = 12, 1000  # graphs whose neighbours are counted, and nodes of each
HORIZONS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
NEIGHBOURS = (8, 15, 30)  # mean numbers, whose radii are sought
SAME = 0.05  # relative difference of two mean accelerations that count as one


@dataclass
class Place:
    """Sums over all nodes from frame t on. r = x(t+h) − x(t) − h (x(t) − x(t−1)); NaN beyond the last frame."""

    trajectory: int
    frame: int
    moved: np.ndarray  # (H,) Σ ‖x(t+h) − x(t)‖²
    linear: np.ndarray  # (H,) Σ ‖x(t+h) − x(t) − h dt v‖², v as the models see it
    squares: np.ndarray  # (H,) Σ ‖r‖²
    sums: np.ndarray  # (H, 3) Σ r
    moving: int = 0  # nodes that move in this trajectory


@dataclass
class Gravity:
    """A mean acceleration that most of the sampled trajectories share in some frames."""

    vector: list[float]  # (3,), length/time²
    places: int  # that have it
    of: int  # places with a known acceleration; 0: the file names gravity


@dataclass
class Inspection:
    """The sample: trajectories ``numbers`` of the file and places in them; the properties follow from these."""

    file: Trajectories
    numbers: list[int]
    horizons: list[int]
    summaries: list[Summary] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    fixed: list[np.ndarray] = field(default_factory=list)  # (N,) bool of each: nodes at rest in all frames read
    inside: bool = True  # whether moving nodes stay inside a box with walls, which each trajectory has
    degrees: list[tuple[float, np.ndarray]] = field(default_factory=list)  # radius, neighbours of the nodes asked
    limit: float = np.inf  # of a radius, by periodic boxes

    @property
    def spacing(self) -> float:
        """The median distance to the nearest node."""
        known = [summary.spacing for summary in self.summaries if np.isfinite(summary.spacing)]
        return float(np.median(known)) if known else float("nan")

    @cached_property
    def given_degree(self) -> float:
        """The mean number of neighbours by the edges of the file; 0 unless all trajectories have edges."""
        if not all(trajectory.edges for trajectory in self.file):
            return 0.0
        return float(np.mean([2 * summary.edges / summary.nodes for summary in self.summaries]))

    def _mean(self, name: str) -> np.ndarray:
        """(H,) squares per moving node and component; NaN without a place."""
        values = np.array([getattr(place, name) for place in self.places]).reshape(-1, len(self.horizons))
        nodes = np.reshape([place.moving for place in self.places], (-1, 1)) * np.isfinite(values)
        with np.errstate(invalid="ignore"):
            return np.nansum(values, 0) / (3 * nodes.sum(0))

    @cached_property
    def errors(self) -> dict[str, np.ndarray]:
        """The MSE (H,) of each prediction: static x, linear x + h dt v, ballistic x + h d + g h (h+1)/2 with the last step d."""
        result = {"static": self._mean("moved"), "linear": self._mean("linear")}
        if self.gravity:
            ballistic = np.zeros((2, len(self.horizons)))
            for place in self.places:
                h, step = np.array(self.horizons), self.file[place.trajectory].dt
                fall = np.outer(h * (h + 1) / 2 * step**2, self.gravity.vector)  # (H, 3)
                squares = place.squares - 2 * (fall * place.sums).sum(1) + place.moving * np.square(fall).sum(1)
                ballistic += np.nan_to_num([squares.clip(0), 3.0 * place.moving + 0 * squares])
            with np.errstate(invalid="ignore"):
                result["ballistic"] = ballistic[0] / ballistic[1]
        return result

    @cached_property
    def unexplained(self) -> np.ndarray:
        """(H,) the error of the last step's velocity over that of the static prediction: small where frames resolve motion."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._mean("squares") / self._mean("moved")

    @cached_property
    def gravity(self) -> Gravity | None:
        """The file's gravity, or the mean acceleration of the moving nodes where that is the same in a quarter of the places
        and half of the trajectories: forces between nodes cancel in the mean. None if there is none."""
        stored = [trajectory.gravity for trajectory in self.file]
        if any(stored):
            return Gravity(list(stored[0]), 0, 0) if stored[0] and all(g == stored[0] for g in stored) else None
        known = [place for place in self.places if place.moving and np.isfinite(place.squares[0])]
        if len(known) < 2:
            return None
        step = np.array([self.file[place.trajectory].dt ** 2 for place in known])
        nodes = np.array([place.moving for place in known])
        a = np.stack([place.sums[0] for place in known]) / (nodes * step)[:, None]
        size = np.linalg.norm(a, axis=1)
        spread = np.sqrt((np.array([place.squares[0] for place in known]) / nodes / step**2 - size**2).clip(0) / nodes)
        same = np.linalg.norm(a[:, None] - a, axis=2) <= SAME * size[:, None]  # (P, P)
        farthest = max(float(np.abs([summary.low, summary.high]).max()) for summary in self.summaries)
        same[(size <= 10 * spread) | (size <= np.finfo(np.float32).eps * farthest / step)] = False  # as good as zero
        best = same[same.sum(1).argmax()]
        trajectories = {place.trajectory for place, is_same in zip(known, best, strict=True) if is_same}
        if best.sum() < max(2, len(known) / 4) or len(trajectories) < len(self.numbers) / 2:
            return None
        g = a[best].mean(0)
        g[np.abs(g) < 0.02 * np.abs(g).max()] = 0
        digits = 2 - int(np.floor(np.log10(np.abs(g).max())))
        return Gravity([round(value, digits) + 0.0 for value in g.tolist()], int(best.sum()), len(known))

    @property
    def radius(self) -> tuple[float, float]:
        """The radius for about 15 neighbours, infinite for graphs of hardly more nodes, and their mean number."""
        radius, counts = self.degrees[min(1, len(self.degrees) - 1)]
        return radius, float(counts.mean())

    @property
    def limited(self) -> bool:
        """Whether a periodic box limits that radius."""
        return bool(not self.thin and self.limit <= self.radius[0] < np.inf)

    @property
    def thin(self) -> bool:
        """Whether a periodic box is so thin that no radius below half its side finds neighbours, as around 2-D data."""
        return bool(self.limit < 1.5 * self.spacing)


def inspect(file: Trajectories) -> Inspection:
    """Measure a sample of a file: up to TRAJECTORIES and STARTS, less of large ones. Holds a few frames in memory."""
    nodes, frames = max(t.nodes for t in file), max(t.frames for t in file)
    horizons = [h for h in HORIZONS if h <= max(frames - 2, 1)]
    reads = 2 + len(horizons)
    count = int(np.clip(POSITIONS // (4 * nodes * reads), 1, min(TRAJECTORIES, len(file))))
    starts = int(np.clip(POSITIONS // (count * nodes * reads), 2, STARTS))
    numbers = np.unique(np.linspace(0, len(file) - 1, count).round().astype(int)).tolist()
    result = Inspection(file, numbers, horizons)
    with progress_bar("inspecting", count * starts + 1) as tick:
        for k in numbers:
            _measure(result, k, starts, tick)
        result.limit = 0.499 * min((file.sides(k, None).min() for k in numbers if file[k].periodic), default=np.inf)
        result.degrees = _degrees(file, numbers, np.inf if result.thin else result.limit)
        tick()
    return result


def _measure(result: Inspection, k: int, starts: int, tick: Callable[[], None]) -> None:
    """Add what a trajectory holds to the result, from up to ``starts`` places: the first frames and others spread over all."""
    file, trajectory = result.file, result.file[k]
    first = file.position(k, 0).astype(np.float64)
    summary = Summary(trajectory.frames, trajectory.nodes, 3, trajectory.dt, trajectory.velocity)
    summary.widths, summary.varying = trajectory.widths, set(trajectory.varying)
    summary.box, summary.axes = file.box(k), trajectory.axes
    summary.spacing, summary.duplicates = measure_spacing(first)
    summary.edges = len(file.edges(k)[0]) // 2 if trajectory.edges else 0
    low, high = first.astype(np.float32), first.astype(np.float32)  # of each node (N, 3)
    last, chosen = trajectory.frames - 2, list[Place]()
    early = min(starts // 4, last)
    frames = {*range(1, early + 1), *np.linspace(1, max(last, 1), starts - early).round().astype(int).tolist()}
    for t in sorted(frames) if last >= 1 else ():
        place, seen = _measure_place(file, k, t, result.horizons)
        chosen.append(place)
        for x in seen:
            np.minimum(low, x, out=low)
            np.maximum(high, x, out=high)
        for before, after in itertools.pairwise(seen[:3]):
            move = float(np.linalg.norm(after.astype(np.float64) - before, axis=1).max())
            summary.largest_move = max(summary.largest_move, move)
        tick()
    summary.low, summary.high = low.min(0).astype(float), high.max(0).astype(float)
    summary.dim = 2 if summary.low[2] == summary.high[2] else 3
    fixed = (high - low).max(1) <= TOLERANCE * np.ptp(first, 0).max()
    for place in chosen:
        place.moving = int((~fixed).sum())
    walls = summary.box is not None and not summary.periodic
    if walls and not fixed.all():
        assert summary.box is not None
        margin = 1e-4 * box_sides(summary.box)
        walls = bool(((low[~fixed] >= summary.box[0] - margin) & (high[~fixed] <= summary.box[1] + margin)).all())
    result.inside &= walls
    warn(summary)
    result.summaries.append(summary)
    result.places += chosen
    result.fixed.append(fixed)


def _measure_place(file: Trajectories, k: int, t: int, horizons: Sequence[int]) -> tuple[Place, list[np.ndarray]]:
    """The sums of frame t, and the positions (N, 3) that were read, frames t − 1 and t first."""
    seen = [file.position(k, t - 1), file.position(k, t)]
    x, dt = seen[1].astype(np.float64), file[k].dt
    step = x - seen[0]
    v = file.velocity(k, t).astype(np.float64) * dt if file[k].velocity else step
    moved, linear, squares = np.full((3, len(horizons)), np.nan)
    place = Place(k, t, moved, linear, squares, np.full((len(horizons), 3), np.nan))
    for n, h in enumerate(horizons):
        if t + h < file[k].frames:
            seen.append(file.position(k, t + h))
            way = seen[-1] - x
            place.moved[n], place.linear[n] = np.square(way).sum(), np.square(way - h * v).sum()
            residual = way - h * step
            place.squares[n], place.sums[n] = np.square(residual).sum(), residual.sum(0)
    return place, seen


def _degrees(file: Trajectories, numbers: Sequence[int], limit: float) -> list[tuple[float, np.ndarray]]:
    """The neighbours of sampled nodes within a radius for each of NEIGHBOURS, or the other nodes of graphs that have few."""
    nodes = max(t.nodes for t in file)
    if nodes <= NEIGHBOURS[1] + 1:
        return [(float("inf"), np.concatenate([np.full(file[k].nodes, file[k].nodes - 1) for k in numbers]))]
    count = int(np.clip(2_000_000 // nodes, 1, GRAPHS))
    places = [(k, t) for k in numbers for t in sorted({0, file[k].frames // 2, file[k].frames - 1})]
    places = [places[n] for n in np.unique(np.linspace(0, len(places) - 1, count).round().astype(int))]
    asked = list[tuple[KDTree, np.ndarray]]()
    for k, t in places:
        side = file.sides(k, None) if file[k].periodic and limit < np.inf else None
        x = file.position(k, t).astype(np.float64) if side is None else graphs.wrap(file.position(k, t), side)
        rows = np.random.default_rng(0).permutation(len(x))[:QUERIES]
        asked.append((KDTree(x, boxsize=graphs.boxsize(side), balanced_tree=False, compact_nodes=False), x[rows]))
    most = min(2 * NEIGHBOURS[-1], nodes - 1)
    distances = np.sort(np.concatenate([tree.query(x, most + 1)[0][:, 1:].ravel() for tree, x in asked]))
    queries, result = sum(len(x) for _, x in asked), []
    for mean in NEIGHBOURS:
        radius = min(_pick_radius(distances, mean * queries), limit)
        counts = [tree.query_ball_point(x, radius, return_length=True) - 1 for tree, x in asked]
        result.append((radius, np.concatenate(counts)))
    return result


def _pick_radius(distances: np.ndarray, count: int) -> float:
    """A radius of three digits within which about ``count`` of the sorted distances lie, away from steps as of a lattice."""
    grid = np.linspace(0.7, 1.4, 71) * max(distances[min(count, len(distances) - 1)], 1e-30)
    below, at, above = (np.searchsorted(distances, factor * grid, "right") for factor in (0.99, 1.0, 1.01))
    return float(f"{grid[(np.abs(at - count) + (above - below) / 4).argmin()]:.3g}")


def warnings(result: Inspection) -> list[str]:
    """What looks wrong in the sampled trajectories, a line each."""
    file = result.file
    notes = [
        f"trajectory {k}: {note}" for k, s in zip(result.numbers, result.summaries, strict=True) for note in s.notes
    ]
    passes = checks.PASSES if max(t.nodes for t in file) <= 1_000_000 else 1
    try:
        return [*notes, *checks.check_content(file, result.numbers, passes)[1]]
    except Failure as failure:  # what a training refuses
        return [*notes, str(failure)]
