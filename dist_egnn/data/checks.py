"""What arrays from outside must be: one list of checks for the writer, the reader, predictions and rollouts.

Each error is one line that begins with ``where``: file and trajectory, or the argument of a call.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import KDTree

from ..errors import Failure

if TYPE_CHECKING:
    from .trajectories import Trajectories

RESERVED = ("speed",)  # a feature that is computed
DIGITS = 0.01  # of the spacing of nodes, that rounding to float32 may change
QUERIES, PASSES = 200, 8  # nodes whose neighbour is sought; places in a trajectory whose motion is checked
SHUFFLED, WRAPPED = "shuffled rows", "jumps of half a box"


def numbers(value: Any, where: str, shape: tuple[int | None, ...], axes: str = "k") -> np.ndarray:
    """The value as a new float32 array. Raises Failure unless it is real, finite, not masked, and float32 can hold it.

    shape: None stands for any length, which errors call ``axes``.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise Failure(f"{where}: has masked values; fill them, or leave these nodes or frames out")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise Failure(f"{where}: not an array of numbers ({error}); pass rows of equal length") from error
    if array.dtype.kind not in "fiub":
        raise Failure(f"{where}: not an array of numbers (type {array.dtype}); pass real numbers")
    if array.ndim != len(shape) or any(s not in (None, n) for s, n in zip(shape, array.shape, strict=True)):
        raise Failure(f"{where} has shape {array.shape}, expected {str(shape).replace('None', axes)}")
    with np.errstate(over="ignore"):
        result = np.array(array, dtype=np.float32)
    for bad, what in (
        (lambda: ~np.isfinite(array), "is NaN or infinite; correct the source data"),
        (lambda: ~np.isfinite(result), "is too large for float32; choose another unit"),
        (lambda: (result != array) & (array.dtype.kind in "iu"), "is an integer that float32 rounds; number from 0"),
    ):
        if (wrong := bad()).any():
            place = ", ".join(map(str, np.argwhere(wrong)[0]))
            raise Failure(f"{where}: [{place}] {what}")
    return result


def edge_pairs(value: Any, where: str, nodes: int) -> np.ndarray:
    """The undirected edges in an array of pairs of nodes (E, 2), each once, as int64 (E', 2), sorted, the lower node first.

    Raises Failure unless the pairs are whole numbers in 0 … nodes − 1, and for an edge from a node to itself.
    """
    array = np.asarray(value)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise Failure(
            f"{where} has shape {array.shape} and type {array.dtype}; pass whole numbers (E, 2), two nodes a row"
        )
    for bad, what in (
        ((array < 0) | (array >= nodes), f"there are nodes 0 to {nodes - 1}; number them from 0"),
        (array[:, :1] == array[:, 1:], "joins a node with itself; leave it out"),
    ):
        if (wrong := bad.any(1)).any():
            row = int(wrong.argmax())
            raise Failure(f"{where}: edge {row}, {array[row].tolist()}: {what}")
    return np.unique(np.sort(array.astype(np.int64), 1), axis=0)


def check_name(name: Any, where: str) -> None:
    """Raise Failure for a name that no attribute can have: 'speed', which is computed, or one with / = or control codes."""
    usable = isinstance(name, str) and name.strip(". ") and name.isprintable() and not set("/=[],") & set(name)
    if not usable or name in RESERVED:
        why = "is the name of a feature that is computed, |v|" if name in RESERVED else "is no name of an attribute"
        raise Failure(f"{where}: attribute {name!r} {why}; rename it (without / = , and brackets)")


def time_step(dt: Any, where: str) -> float:
    """dt as a float. Raises Failure unless it is finite and positive."""
    try:
        value = float(dt)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 < value < float("inf"):
        raise Failure(f"{where}: dt={dt} must be positive and finite; pass the time between frames")
    return value


def check_box(box: np.ndarray, where: str) -> None:
    """Raise Failure unless the high corner of a box (2, 3) is above the low one on every axis."""
    if not (box[1] > box[0]).all():
        raise Failure(f"{where}: box {box.tolist()} must have its low corner first and positive sides")


def neighbour_distances(x: np.ndarray) -> np.ndarray:
    """The distance to the nearest other node, of up to QUERIES of the positions x (N, 3)."""
    rows = np.unique(np.linspace(0, len(x) - 1, QUERIES).round().astype(int))
    return KDTree(x).query(x[rows], 2)[0][:, 1]


def check_digits(position: np.ndarray, where: str) -> None:
    """Raise Failure if float32 blurs positions (N, 3), see `lost_digits`."""
    if text := lost_digits(position):
        raise Failure(f"{where}: {text}; subtract a constant, such as the mean position, from all positions")


def lost_digits(position: np.ndarray) -> str:
    """How float32 blurs positions (N, 3) by more than DIGITS of their median distance to a neighbour; empty if it does not."""
    if len(position) < 2:
        return ""
    x = np.asarray(position, np.float64)
    rounding = float(np.finfo(np.float32).eps * np.abs(x).max())
    if rounding <= DIGITS * np.ptp(x, 0).max() / len(x):  # sufficient, and cheap
        return ""
    spacing = float(np.median(neighbour_distances(x)))
    if rounding <= DIGITS * spacing or np.abs(x.mean(0)).max() <= np.ptp(x, 0).max():
        return ""
    return f"nodes are {spacing:.2g} apart and {np.abs(x).max():.2g} from zero, where float32 resolves {rounding:.2g}"


def _motion(data: Trajectories, k: int, passes: int) -> Iterator[tuple[str, str]]:
    """Kind and text of what looks wrong in the motion of a trajectory, in up to ``passes`` places of three frames."""
    trajectory, box = data[k], data.box(k)
    starts = np.unique(np.linspace(0, max(trajectory.frames - 3, 0), passes).round().astype(int))
    shuffled, wrapped = list[int](), list[tuple[int, int]]()
    for t in starts if trajectory.frames >= 3 and trajectory.nodes >= 16 else ():
        x = [data.position(k, int(t) + n).astype(np.float64) for n in range(3)]
        first, second = x[1] - x[0], x[2] - x[1]
        side = np.ptp(x[0], 0) if box is None else np.asarray(box[1] - box[0], np.float64)
        for n, move in enumerate((first, second)):
            jumps = (np.abs(move) > side / 2) & (side > 0) & ~np.array(trajectory.axes)
            if jumps.any():
                wrapped.append((int(t) + n, int(jumps.any(1).argmax())))
        spacing = float(np.median(neighbour_distances(x[0])))
        # nodes in a new order each time: long moves, of which the next takes half back on average
        turns = float((first * second).sum()) < -0.3 * float((first * first).sum())
        if turns and np.median(np.linalg.norm(first, axis=1)) > max(spacing, np.ptp(x[0], 0).max() / 5):
            shuffled.append(int(t))
    where = f"{data.path}: trajectory {k}, frame"
    if shuffled and len(shuffled) == len(starts):
        yield (
            SHUFFLED,
            f"{where} {shuffled[0]}: position: nodes are in another order in each frame; sort them by their ids",
        )
    elif wrapped:
        remedy = "unwrap positions (dist_egnn.unwrap) and pass periodic=True"
        yield (
            WRAPPED,
            f"{where} {wrapped[0][0]}: position: node {wrapped[0][1]} jumps by half the box; wrapped? {remedy}",
        )


def _units(data: Trajectories, numbers: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Kind and text of time steps and stored velocities whose units differ from one another or from the positions."""
    steps = [trajectory.dt for trajectory in data]
    if max(steps) > 1.5 * min(steps):
        k = int(np.argmax(np.abs(np.log(np.array(steps) / steps[0]))))
        text = f"dt={steps[k]:g}, in trajectory 0 {steps[0]:g}: a horizon of frames is then another time"
        yield "other dt", f"{data.path}: trajectory {k}, frame 0: {text}; write files of one dt"
    for k in numbers:
        trajectory = data[k]
        if trajectory.velocity and trajectory.frames > 1:
            moved, v = data.position(k, 1).astype(float) - data.position(k, 0), data.velocity(k, 0).astype(float)
            size, own = np.linalg.norm(moved), np.linalg.norm(v) * trajectory.dt
            if size > 0 < own and (moved * v).sum() > 0.9 * size * np.linalg.norm(v) and not 1 / 3 < own / size < 3:
                what = f"velocity · dt is {own / size:.2g} times the displacement; store length per time, in the unit of dt"
                yield "unit of velocity", f"{data.path}: trajectory {k}, frame 0: {what}"


def check_content(
    data: Trajectories, numbers: Sequence[int] | None = None, passes: int = PASSES
) -> tuple[dict[str, int], list[str]]:
    """How often each kind of doubt occurs in a file, and one line for the first of each kind.

    numbers: the trajectories to read (None: all), passes: places in each, of three frames.

    Raises Failure for trajectories whose nodes are in another order in each frame, or too far from zero for float32.
    """
    numbers = range(len(data)) if numbers is None else numbers
    for k in numbers:
        check_digits(data.position(k, 0), f"{data.path}: trajectory {k}, frame 0: position")
    found = [*_units(data, numbers), *(item for k in numbers for item in _motion(data, k, passes))]
    counts, lines = Counter(kind for kind, _ in found), dict(reversed(found))
    if SHUFFLED in lines:
        raise Failure(lines[SHUFFLED])
    return dict(counts), [f"{text} ({counts[kind]} of {len(numbers)} trajectories)" for kind, text in lines.items()]


def warn_of_content(data: Trajectories) -> dict[str, int]:
    """Print the lines of `check_content` as warnings; returns its counts."""
    counts, lines = check_content(data)
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    return counts
