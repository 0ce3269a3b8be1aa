"""Read and write trajectories.h5, the file format of every data source; docs/formats.md describes it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import Failure
from ..utils import hdf5
from ..utils.filesystem import DeferredErrorFile, lock_output
from . import checks

FORMAT, VERSION = "dist_egnn.trajectories", 1
SPLITS = ("train", "valid", "test")
AGAIN = "make it again (a recipe's prepare.py, `distegnn import` or dist_egnn.Writer)"
OPEN = 2.0**100  # the side of an axis that is not periodic: no difference of positions is half as long
BLOCK = 1 << 22  # numbers that `Trajectories.blocks` reads at once


class Writer:
    """Write a trajectories file completely or not at all.

        with Writer("out.h5", {"command": "prepare.py --seed 1", "seed": 1}) as out:
            out.add(position, split="train", dt=0.02, source="SPlisHSPlasH 2.19.0", attributes={"mass": mass})
            with out.begin(split="test", dt=0.02, source="my simulation") as trajectory:  # may be longer than memory
                for position in simulation:
                    trajectory.add_frame(position)

    Raises Failure if it cannot be written.
    """

    def __init__(self, path: str | Path, meta: Mapping[str, Any]) -> None:
        """meta: provenance (command, seed, versions, …), stored as JSON in an attribute of the file."""
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        try:
            self.meta = json.loads(json.dumps(meta, default=_plain, sort_keys=True))
        except (TypeError, ValueError) as error:
            raise Failure(f"{path}: meta cannot be stored as JSON ({error}); pass text and numbers") from error

    def __enter__(self) -> Writer:
        with ExitStack() as stack:
            stack.enter_context(lock_output(self.path))
            self.sink = DeferredErrorFile(self.partial, self.path)
            self.lock = stack.pop_all()
        self.file = h5py.File(self.sink, "w")
        self.file.attrs.update(format=FORMAT, version=VERSION, meta=json.dumps(self.meta, sort_keys=True))
        self.group = self.file.create_group("trajectories")
        return self

    def add(
        self,
        position: np.ndarray,
        *,
        split: str,
        dt: float,
        source: str,
        velocity: np.ndarray | None = None,
        attributes: Mapping[str, np.ndarray] | None = None,
        box: np.ndarray | None = None,
        periodic: bool | Sequence[bool] = False,
        gravity: Sequence[float] | None = None,
        edges: np.ndarray | None = None,
        shift: Sequence[float] | None = None,
    ) -> None:
        """Append a trajectory. Raises Failure for invalid arrays, an unknown split, or a full disk, and appends nothing.

        position, velocity: (T, N, 3); attributes: name → (N,) or (N, k), over time (T, N) or (T, N, k); box: (2, 3) low and
        high corner; dt: time between frames; periodic: nodes that leave the box enter on the other side (three values: by
        axis); their positions must be unwrapped, see ``unwrap``; gravity: (3,) acceleration, length/time²; edges: (E, 2)
        pairs of nodes that data.edges=given joins, in both directions; shift: (3,), was subtracted from the source's
        positions, and rollouts add it again.
        """
        about: dict[str, Any] = {
            "split": split,
            "dt": dt,
            "source": source,
            "box": box,
            "gravity": gravity,
            "shift": shift,
        }
        with self.begin(**about, periodic=periodic, edges=edges) as trajectory:
            arrays = {"position": stack_frames(position, trajectory.where)}
            if velocity is not None:
                arrays["velocity"] = stack_frames(velocity, trajectory.where)
            frames, nodes = (*arrays["position"].shape, 0, 0)[:2]
            for key, value in (attributes or {}).items():
                shape = np.shape(value)
                if attribute_varies(shape, frames, nodes):
                    arrays[f"attributes/{key}"] = np.reshape(value, (frames, nodes, -1))
                elif shape == (frames, nodes):
                    remedy = (
                        f"pass ({frames}, {nodes}, 1) for values over time, ({frames}, {nodes}, k) for constant ones"
                    )
                    raise Failure(f"{trajectory.where}: attributes/{key} {shape} may be (T, N) or (N, k); {remedy}")
                else:
                    trajectory.constant[f"attributes/{key}"] = value
            trajectory.append(arrays)

    def begin(
        self,
        *,
        split: str,
        dt: float,
        source: str,
        attributes: Mapping[str, np.ndarray] | None = None,
        box: np.ndarray | None = None,
        periodic: bool | Sequence[bool] = False,
        gravity: Sequence[float] | None = None,
        edges: np.ndarray | None = None,
        shift: Sequence[float] | None = None,
    ) -> FrameWriter:
        """Begin a trajectory that is written frame by frame in a ``with`` block; arguments as of ``add``.

        attributes: the constant ones, name → (N,) or (N, k); `FrameWriter.add_frame` takes those that vary over time.
        """
        name = f"{len(self.group):06d}"
        where = f"{self.path}: trajectory {name}"
        if split not in SPLITS:
            raise Failure(f"{where}: split '{split}' is none of {', '.join(SPLITS)}")
        axes = periodic_axes(periodic, where)
        about = {
            "split": str(split),
            "dt": checks.time_step(dt, where),
            "source": str(source),
            "periodic": axes[0] if len({*axes}) == 1 else list(axes),
        }
        if box is not None:
            checks.check_box(box := checks.numbers(box, f"{where}: box", (2, 3)), where)
        if any(axes) and box is None:
            raise Failure(f"{where}: periodic, but there is no box; pass box=")
        group = self.group.create_group(name)
        group.attrs.update(about)
        for key, vector in (("gravity", gravity), ("shift", shift)):
            if vector is not None:
                group.attrs[key] = np.array(vector, np.float64).reshape(3)
        constant = {f"attributes/{key}": value for key, value in (attributes or {}).items()}
        constant |= {key: value for key, value in (("box", box), ("edges", edges)) if value is not None}
        return FrameWriter(group, where, self.sink, constant)

    def copy(self, path: Path) -> None:
        """Append the trajectories of another file without compressing them again."""
        with h5py.File(path, "r") as file:
            for name in sorted(file["trajectories"]):
                number = f"{len(self.group):06d}"
                try:
                    file.copy(f"trajectories/{name}", self.group, name=number)
                except BaseException:
                    self.group.pop(number, None)
                    raise
                self.sink.check()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.file.close()
            if kind is None:
                self.sink.check()
                self.sink.close()
                self._check()
                os.replace(self.partial, self.path)
        finally:
            self.sink.close()
            self.partial.unlink(missing_ok=True)
            self.lock.close()

    def _check(self) -> None:
        """Raise Failure, before an existing file is replaced, if `Trajectories` refuses the new one."""
        try:
            Trajectories(self.partial).close()
        except Failure as failure:
            raise Failure(str(failure).replace(str(self.partial), str(self.path))) from failure


def _plain(value: Any) -> Any:
    """A value of meta that JSON does not know, as one that it knows: NumPy's numbers and arrays, paths."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else os.fspath(value)


def _text(value: Any) -> str:
    """A text attribute, which programs in C write as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


CHUNK = 4  # frames; chunks of one axis compress a third better than whole frames, and differences need two frames


class FrameWriter:
    """Writes one trajectory frame by frame, with CHUNK frames in memory. After an error nothing of it remains."""

    def __init__(self, group: h5py.Group, where: str, sink: DeferredErrorFile, constant: dict[str, Any]) -> None:
        self.group, self.where, self.sink, self.constant = group, where, sink, constant
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the arrays of the first frame
        self.frames, self.buffer = 0, list[dict[str, np.ndarray]]()
        self.last: np.ndarray | None = None  # positions of the last frame written

    def __enter__(self) -> FrameWriter:
        return self

    def add_frame(
        self,
        position: np.ndarray,
        velocity: np.ndarray | None = None,
        attributes: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Append a frame: position, velocity (N, 3); attributes that vary over time, name → (N,) or (N, k).

        Raises Failure if nodes, arrays or their shapes are not those of the first frame.
        """
        arrays = {"position": np.array(position)} | ({} if velocity is None else {"velocity": np.array(velocity)})
        for key, value in (attributes or {}).items():
            arrays[f"attributes/{key}"] = np.array(value).reshape(len(value), -1)
        shapes = {key: value.shape for key, value in arrays.items()}
        self.shapes = self.shapes or shapes
        check_same_frame(self.shapes, shapes, f"{self.where}, frame {self.frames + len(self.buffer)}")
        self.buffer.append(arrays)
        if len(self.buffer) == CHUNK:
            self._flush()

    def _flush(self) -> None:
        if self.buffer:
            self.append({key: np.stack([frame[key] for frame in self.buffer]) for key in self.shapes}, grow=True)
            self.buffer = []

    def append(self, arrays: Mapping[str, np.ndarray], *, grow: bool = False) -> None:
        """Append consecutive frames: position and velocity (T, N, 3), attributes/NAME (T, N, k). grow: more may follow."""
        position, first = arrays["position"], not self.frames
        if position.ndim != 3 or position.shape[2] != 3:
            raise Failure(f"{self.where}: position has shape {position.shape}, expected (T, N, 3)")
        frames, nodes, _ = position.shape
        for key, array in arrays.items():
            value = self._checked(key, array, (frames, nodes, None if "/" in key else 3))
            if first:
                storage = {"chunks": (min(CHUNK, frames), nodes, 1), "shuffle": True, "compression": "gzip"}
                storage |= {"maxshape": (None, *value.shape[1:])} if grow else {}
                self.group.create_dataset(key, data=value, **(storage if value.size else {}))
            else:
                self.group[key].resize(self.frames + frames, 0)
                self.group[key][self.frames :] = value
        if frames:
            checks.check_digits(position[0], f"{self.where}, frame {self.frames}: position")
        for key, array in self.constant.items() if first else ():
            shape = (nodes, None) if np.ndim(array) == 2 else (nodes,)
            if key == "edges":
                value = checks.edge_pairs(array, f"{self.where}: edges", nodes).astype(np.int32)
            else:
                value = self._checked(key, array, (2, 3) if key == "box" else shape)
            self.group.create_dataset(key, data=value)
        if any(axes := periodic_axes(self.group.attrs["periodic"], self.where)):
            for t, current in enumerate(position, self.frames):
                if self.last is not None:
                    where = f"{self.where}, frame {t - 1}"
                    check_displacement(self.last, current, box_sides(self.constant["box"], axes), where)
                self.last = current
        self.frames += frames
        self.sink.check()

    def _checked(self, key: str, array: Any, shape: tuple[int | None, ...]) -> np.ndarray:
        """The array as float32. Raises Failure for another shape (None: any length) and values that are not finite."""
        if key not in ("position", "velocity", "box"):
            checks.check_name(key.removeprefix("attributes/"), self.where)
        return checks.numbers(array, f"{self.where}: {key}", shape)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        complete = False
        try:
            if kind is None:
                self._flush()
                if not self.frames:
                    raise Failure(f"{self.where}: has no frame; add some, or do not begin it")
                attribute_shapes(self.group, self.where)
                complete = True
        finally:
            if not complete:
                del self.group.parent[self.group.name]


def check_same_frame(first: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise Failure unless a frame has the arrays and the shapes of the first one."""
    counts = [shapes["position"][0] if shapes["position"] else 0 for shapes in (first, now)]
    if counts[0] != counts[1]:
        remedy = "keep absent nodes and mark them by an attribute, or begin another trajectory"
        raise Failure(f"{where}: has {counts[1]} nodes, frame 0 has {counts[0]}; {remedy}")
    if first != now:
        raise Failure(f"{where}: has arrays of shapes {now}, frame 0 has {first}; pass the same arrays in all frames")


def stack_frames(frames: Any, where: str) -> np.ndarray:
    """An array, or a sequence of arrays of one frame each, as one array. Raises Failure if their shapes differ."""
    if isinstance(frames, np.ndarray) and frames.dtype != object:
        return frames
    arrays = [np.asarray(frame) for frame in frames]
    for t, array in enumerate(arrays):
        check_same_frame({"position": arrays[0].shape}, {"position": array.shape}, f"{where}, frame {t}")
    return np.stack(arrays)


def attribute_varies(shape: tuple[int, ...], frames: int, nodes: int) -> bool | None:
    """Whether an attribute varies over time: False for (N,) and (N, k), True for (T, N) and (T, N, k).

    None for other shapes, and for (N, N) of N frames, which can be read both ways.
    """
    constant, varying = (
        len(shape) in (1, 2) and shape[0] == nodes,
        len(shape) in (2, 3) and shape[:2] == (frames, nodes),
    )
    return varying if constant != varying and 0 not in shape[1:] else None


def attribute_shapes(group: h5py.Group, where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Of a trajectory's attributes: columns by name, and the names of those that vary. Raises Failure for wrong shapes."""
    widths: dict[str, int] = {}
    varying: list[str] = []
    frames, nodes = group["position"].shape[:2]
    for name, dataset in sorted(group.get("attributes", {}).items()):
        shape: tuple[int, ...] = getattr(dataset, "shape", ())
        if (varies := attribute_varies(shape, frames, nodes)) is None:
            expected = f"({nodes},), ({nodes}, k), ({frames}, {nodes}) or ({frames}, {nodes}, k)"
            what = f"dataset 'attributes/{name}' has shape {shape}, expected {expected}"
            raise Failure(f"{where}: {what}; {AGAIN}")
        widths[name] = shape[-1] if len(shape) == 2 + varies else 1
        varying += [name] * varies
    return widths, tuple(varying)


def both_directions(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source and destination (2E,) of undirected edges (E, 2), sorted by destination, then source."""
    src, dst = np.concatenate([pairs, pairs[:, ::-1]]).T
    order = np.lexsort((src, dst))
    return src[order], dst[order]


def box_sides(box: np.ndarray, axes: Sequence[bool] = (True, True, True)) -> np.ndarray:
    """The sides (3,) float64 of a box given by its low and high corner (2, 3); OPEN on axes that are not periodic."""
    low, high = np.asarray(box, dtype=np.float64)
    return np.where(axes, high - low, OPEN)


def closed(side: np.ndarray) -> np.ndarray:
    """Which axes (3,) of these sides are periodic."""
    return side < OPEN / 2


def periodic_axes(periodic: Any, where: str) -> tuple[bool, ...]:
    """Whether each of the three axes is periodic, from one value or three. Raises Failure for another number of values."""
    if np.shape(periodic) not in ((), (3,)):
        raise Failure(f"{where}: periodic has shape {np.shape(periodic)}, expected one value or three; {AGAIN}")
    return tuple(map(bool, np.broadcast_to(periodic, 3)))


def unwrap(position: np.ndarray, side: np.ndarray) -> None:
    """Unwrap positions (T, N, 3) in a periodic box of sides (3,), in place: nodes move to the image nearest to where they
    were a frame before, and must not travel half a side in one frame."""
    turns, previous = np.zeros(position.shape[1:]), None
    for frame in position:
        current = frame.astype(np.float64)
        if previous is not None:
            turns += np.rint((current - previous) / side)
        frame[:], previous = current - turns * side, current


def check_displacement(before: np.ndarray, after: np.ndarray, side: np.ndarray, where: str) -> None:
    """Raise Failure if a node moves by more than half a side (3,) of its box between frames (N, 3): it was wrapped."""
    jumps = (np.abs(np.asarray(after, np.float64) - before) > side / 2).any(1)
    if jumps.any():
        remedy = "unwrap positions (dist_egnn.unwrap), or keep more frames"
        raise Failure(f"{where}: node {jumps.argmax()} moves by more than half of the periodic box; {remedy}")


@dataclass(frozen=True)
class Trajectory:
    """Everything about one trajectory except its frames."""

    name: str
    split: str
    frames: int
    nodes: int
    dt: float
    source: str
    velocity: bool
    attributes: tuple[str, ...]
    axes: tuple[bool, ...]  # which are periodic
    widths: dict[str, int] = field(default_factory=dict)  # columns of each attribute
    varying: tuple[str, ...] = ()  # attributes that vary over time
    gravity: tuple[float, ...] | None = None  # acceleration, length/time²
    edges: bool = False  # whether the source gives them
    shift: tuple[float, ...] | None = None  # what was subtracted from the source's positions

    @property
    def periodic(self) -> bool:
        """Whether it is periodic in any direction."""
        return any(self.axes)


class Trajectories(Sequence[Trajectory]):
    """A trajectories file; frames are read on demand. Raises Failure for a damaged file or another format."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise Failure(f"{path}: no such file; make one with a recipe's prepare.py")
        try:
            self.file = hdf5.open_file(self.path)
        except OSError as error:
            raise Failure(f"{path}: not a readable HDF5 file ({error}); {AGAIN}") from error
        if _text(self.file.attrs.get("format")) != FORMAT:
            raise Failure(f"{path}: not a trajectories file (attribute format is not '{FORMAT}'); see docs/formats.md")
        if (version := self.file.attrs.get("version")) != VERSION:
            raise Failure(f"{path}: format version {version}, this program reads {VERSION}; {AGAIN}")
        try:
            self.meta: dict[str, Any] = json.loads(_text(self.file.attrs["meta"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Failure(f"{path}: attribute 'meta' is missing or not JSON; {AGAIN}") from error
        self._edges: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of the trajectory read last
        names = sorted(self.file.get("trajectories", {}), key=lambda name: (name.isdecimal() and int(name), name))
        self._all = [self._describe(name) for name in names]
        if not self._all:
            raise Failure(f"{path}: holds no trajectory; {AGAIN}")
        for k, trajectory in enumerate(self._all):
            if trajectory.velocity != self._all[0].velocity:
                stores, lacks = (k, 0) if trajectory.velocity else (0, k)
                which = f"trajectory {stores} stores velocities, trajectory {lacks} does not"
                raise Failure(f"{path}: {which}; store them in all, or in none")

    def _describe(self, name: str) -> Trajectory:
        where = f"{self.path}: trajectory {name}"
        group = self.file["trajectories"].get(name)
        if not isinstance(group, h5py.Group):
            raise Failure(f"{where}: no group, or a link to what does not exist; write it into the file itself")
        for key in ("position", "velocity", "box", *(f"attributes/{key}" for key in group.get("attributes", {}))):
            if key in group and getattr(getattr(group[key], "dtype", None), "kind", "") not in "fiub":
                raise Failure(f"{where}: dataset '{key}' does not hold real numbers; {AGAIN}")
        if "position" not in group or group["position"].ndim != 3 or group["position"].shape[2] != 3:
            raise Failure(f"{where}: dataset 'position' (T, N, 3) is missing or has a wrong shape; {AGAIN}")
        attrs = group.attrs
        missing = {"split", "dt", "source", "periodic"} - set(attrs)
        if missing or _text(attrs["split"]) not in SPLITS:
            raise Failure(f"{where}: attribute {sorted(missing) or 'split'} is missing or wrong; {AGAIN}")
        frames, nodes, _ = group["position"].shape
        if not frames * nodes:
            raise Failure(f"{where}: dataset 'position' holds {frames} frames of {nodes} nodes; {AGAIN}")
        widths, varying = attribute_shapes(group, where)
        for key, shape in {"velocity": (frames, nodes, 3), "box": (2, 3)}.items():
            if key in group and (actual := getattr(group[key], "shape", None)) != shape:
                raise Failure(f"{where}: dataset '{key}' has shape {actual}, expected {shape}; {AGAIN}")
        properties = (
            checks.time_step(attrs["dt"], where),
            _text(attrs["source"]),
            "velocity" in group,
            tuple(widths),
            periodic_axes(attrs["periodic"], where),
        )
        for key in widths:
            checks.check_name(key, where)
        if "box" in group:
            checks.check_box(group["box"][()], where)
        gravity, shift = (tuple(map(float, attrs[key])) if key in attrs else None for key in ("gravity", "shift"))
        joined = "edges" in group
        return Trajectory(
            name, _text(attrs["split"]), frames, nodes, *properties, widths, varying, gravity, joined, shift
        )

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, k):
        return self._all[k]

    def _read(self, k: int, key: str, frame: int | slice | None = None) -> np.ndarray:
        try:
            value = self.file["trajectories"][self._all[k].name][key][() if frame is None else frame]
            return np.asarray(value, dtype=np.float32)  # other programs store other types
        except (OSError, KeyError) as error:
            where = f"{self.path}: trajectory {k}: '{key}'"
            raise hdf5.read_failure(where, error, f"the file is damaged; {AGAIN}") from error

    def blocks(self, k: int, key: str) -> Iterator[np.ndarray]:
        """A dataset such as position or attributes/NAME, as float32 in consecutive blocks of about BLOCK numbers."""
        dataset = self.file["trajectories"][self._all[k].name][key]
        rows = dataset.chunks[0] if dataset.chunks else 1
        rows *= max(1, BLOCK // (rows * math.prod(dataset.shape[1:])))
        for first in range(0, len(dataset), rows):
            yield self._read(k, key, slice(first, first + rows))

    def position(self, k: int, t: int) -> np.ndarray:
        """Positions (N, 3) float32 at frame t."""
        return self._read(k, "position", t)

    def source_position(self, k: int, t: int) -> np.ndarray:
        """Positions (N, 3) float64 at frame t in the source's coordinates: those of ``position`` plus the shift."""
        return self.position(k, t).astype(np.float64) + np.array(self._all[k].shift or 0.0)

    def velocity(self, k: int, t: int, difference: str = "backward") -> np.ndarray:
        """Velocities (N, 3) float32: the stored ones, or else differences of positions.

        "backward": (x(t) − x(t−1)) / dt, length per time, from frame 1 on; "forward": x(t+1) − x(t), per *frame*.
        """
        if self._all[k].velocity:
            return self._read(k, "velocity", t)
        if difference == "forward":
            return self.position(k, t + 1) - self.position(k, t)
        if t < 1:
            raise Failure(
                f"{self.path}: trajectory {k}, frame {t}: no velocity and no frame before it; start at frame 1"
            )
        return ((self.position(k, t) - self.position(k, t - 1)) / self._all[k].dt).astype(np.float32)

    def attribute(self, k: int, name: str, t: int | None = None) -> np.ndarray:
        """A node attribute (N,) or (N, k) at frame t. Without t: one that does not vary, or else all frames (T, N, …)."""
        self.width(k, name)
        return self._read(k, f"attributes/{name}", t if name in self._all[k].varying else None)

    def width(self, k: int, name: str) -> int:
        """The columns of a node attribute. Raises Failure if the trajectory does not have it."""
        if name not in self._all[k].attributes:
            known = ", ".join(self._all[k].attributes) or "none"
            raise Failure(f"{self.path}: trajectory {k} has no node attribute '{name}' (it has: {known})")
        return self._all[k].widths[name]

    def edges(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and destination (E,) of the edges that the source gives, in both directions, sorted by destination, then
        source. Raises Failure if there are none, or invalid ones."""
        name, where = self._all[k].name, f"{self.path}: trajectory {k}"
        if not self._all[k].edges:
            raise Failure(
                f"{where} has no edges, which data.edges=given needs: write them (Writer, edges=), or set data.edges=knn"
            )
        if k not in self._edges:
            pairs = self.file["trajectories"][name]["edges"][()]
            self._edges = {k: both_directions(checks.edge_pairs(pairs, f"{where}: edges", self._all[k].nodes))}
        return self._edges[k]

    def box(self, k: int) -> np.ndarray | None:
        """Low and high corner (2, 3) of the container, if the source has one."""
        return self._read(k, "box") if "box" in self.file["trajectories"][self._all[k].name] else None

    def sides(self, k: int, longest: float | None) -> np.ndarray:
        """The sides (3,) float64 of the periodic box. Raises Failure without one, or if a radius is too large for it.

        longest: the radius, None if edges are not those within a radius.
        """
        from . import graphs

        box, where = self.box(k), f"{self.path}: trajectory {k}"
        if box is None or not self._all[k].periodic:
            actual = "has no box" if box is None else "has a box with walls"
            raise Failure(f"{where} {actual}, and data.periodic needs a periodic one; set data.periodic=false")
        side = box_sides(box, self._all[k].axes)
        if longest is not None:
            graphs.check_side(longest, side, f"{where}: ")
        return side

    def close(self) -> None:
        self.file.close()
