"""Read and write trajectories.h5, the one format of every source; turn its frames into samples. See docs/formats.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from ..errors import Failure
from ..utils.disk import Sink, check_room

if TYPE_CHECKING:
    pass

FORMAT, VERSION = "dist_egnn.trajectories", 1
SPLITS = ("train", "valid", "test")


class Writer:
    """Write a trajectories file completely or not at all: into PATH.partial, renamed when the block ends without error.

    Raises Failure where the file cannot be written, saying of a full disk how much it would take.

    >>> with Writer("out.h5", {"command": "prepare.py --seed 1", "seed": 1}) as out:
    ...     out.add(position, split="train", dt=0.02, source="SPlisHSPlasH 2.19.0", attributes={"mass": mass})
    """

    def __init__(self, path: str | Path, meta: Mapping[str, Any]) -> None:
        """meta: what made the file (command, seed, versions, …), stored as JSON in the file's attributes."""
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.meta = dict(meta)

    def __enter__(self) -> Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.sink = Sink(self.partial, self.path)
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
        periodic: bool = False,
    ) -> None:
        """Append a trajectory.

        position, velocity: (T, N, 3); attributes: name → (N,); box: (2, 3) low and high corner; periodic: whether nodes that
        leave the box come in on the other side, rather than meet walls; positions must then be those of ``unwrap``. dt: time
        from frame to frame. Raises Failure for a wrong shape, an unknown split, a value that is not finite, a periodic
        trajectory without a box or with a node that jumps across it, or a full disk.
        """
        name = f"{len(self.group):06d}"
        if split not in SPLITS:
            raise Failure(f"{self.path}: trajectory {name}: split '{split}' is none of {', '.join(SPLITS)}")
        if position.ndim != 3 or position.shape[2] != 3:
            raise Failure(f"{self.path}: trajectory {name}: position has shape {position.shape}, expected (T, N, 3)")
        arrays: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {"position": (position, position.shape)}
        if velocity is not None:
            arrays["velocity"] = (velocity, position.shape)
        for key, value in (attributes or {}).items():
            arrays[f"attributes/{key}"] = (value, position.shape[1:2])
        if box is not None:
            arrays["box"] = (box, (2, 3))
        if periodic and box is None:
            raise Failure(f"{self.path}: trajectory {name}: periodic, but there is no box; give it with box=")
        group = self.group.create_group(name)
        group.attrs.update(split=split, dt=float(dt), source=source, periodic=bool(periodic))
        for key, (value, shape) in arrays.items():
            value = np.asarray(value, dtype=np.float32)
            if value.shape != shape:
                raise Failure(f"{self.path}: trajectory {name}: {key} has shape {value.shape}, expected {shape}")
            if not np.isfinite(value).all():
                raise Failure(f"{self.path}: trajectory {name}: {key} holds NaN or infinite values")
            # chunks of one axis and four frames: like values compress better together (a third smaller than whole
            # frames), and a frame costs little more to read, since its neighbour is wanted too for forward differences
            chunks = (min(4, shape[0]), shape[1], 1) if len(shape) == 3 and shape[0] and shape[1] else None
            group.create_dataset(
                key, data=value, chunks=chunks, shuffle=bool(chunks), compression="gzip" if chunks else None
            )
        if periodic and box is not None:
            side = box_sides(box)
            for t in range(len(position) - 1):
                check_displacement(position[t], position[t + 1], side, f"{self.path}: trajectory {name}, frame {t}")
        self.sink.check()

    def copy(self, piece: Path) -> None:
        """Append the trajectories of another file as they are, not compressed anew."""
        with h5py.File(piece, "r") as file:
            for name in sorted(file["trajectories"]):
                file.copy(f"trajectories/{name}", self.group, name=f"{len(self.group):06d}")
                self.sink.check()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.file.close()
            if kind is None:
                self.sink.check()
                self.sink.close()
                os.replace(self.partial, self.path)
        finally:
            self.sink.close()
            self.partial.unlink(missing_ok=True)


def box_sides(box: np.ndarray) -> np.ndarray:
    """The sides (3,) float64 of a box given by its low and high corner (2, 3)."""
    low, high = np.asarray(box, dtype=np.float64)
    return high - low


def unwrap(position: np.ndarray, side: np.ndarray) -> None:
    """Let nodes that left a periodic box go on where they left it, instead of coming in on the other side; in place.

    position: (T, N, 3); side: (3,) sides of the box. From frame to frame each node goes to its nearest image, so nodes must not
    travel half a side in a frame. Images in the first frame stay as they are.
    """
    turns, before = np.zeros(position.shape[1:]), None
    for frame in position:
        now = frame.astype(np.float64)
        if before is not None:
            turns += np.rint((now - before) / side)
        frame[:], before = now - turns * side, now


def check_displacement(before: np.ndarray, after: np.ndarray, side: np.ndarray, where: str) -> None:
    """Raise Failure if a node of a periodic box moves by more than half a side (3,) between two frames (N, 3): a node that
    left the box came in on the other side, and no difference of positions would be a displacement."""
    far = (np.abs(np.asarray(after, np.float64) - before) > side / 2).any(1)
    if far.any():
        raise Failure(
            f"{where}: node {int(far.argmax())} moves by more than half of its periodic box until the next frame; positions "
            "must go on across the boundary: unwrap them (dist_egnn.data.trajectories.unwrap), or keep more frames"
        )


def join(
    pieces: Sequence[Path], path: str | Path, meta: Mapping[str, Any], tick: Callable[[], object] = lambda: None
) -> None:
    """Write the trajectories of several files, in their order, as one file; tick() after each of them.

    Raises Failure where the disk has no room for as many bytes as the pieces have.
    """
    check_room(Path(path), sum(piece.stat().st_size for piece in pieces))
    with Writer(path, meta) as out:
        for piece in pieces:
            out.copy(piece)
            tick()


@dataclass(frozen=True)
class Trajectory:
    """What is known of one trajectory without reading its frames."""

    name: str
    split: str
    frames: int
    nodes: int
    dt: float
    source: str
    velocity: bool
    attributes: tuple[str, ...]
    periodic: bool


class Trajectories(Sequence[Trajectory]):
    """A trajectories file, read lazily: one frame at a time. Raises Failure for a file that is not whole or not ours."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise Failure(f"{path}: no such file; make one with a recipe's prepare.py")
        try:
            self.file = h5py.File(self.path, "r")
        except OSError as error:
            raise Failure(f"{path}: not a readable HDF5 file ({error}); fetch or prepare it again") from error
        if self.file.attrs.get("format") != FORMAT:
            raise Failure(f"{path}: not a trajectories file (attribute format is not '{FORMAT}'); see docs/formats.md")
        if (version := self.file.attrs.get("version")) != VERSION:
            raise Failure(f"{path}: format version {version}, this program reads {VERSION}; prepare it again")
        try:
            self.meta: dict[str, Any] = json.loads(self.file.attrs["meta"])
        except (KeyError, TypeError, ValueError) as error:
            raise Failure(f"{path}: attribute 'meta' is missing or no JSON; prepare it again") from error
        self._all = [self._describe(name) for name in sorted(self.file.get("trajectories", {}))]
        if not self._all:
            raise Failure(f"{path}: holds no trajectory; prepare it again")

    def _describe(self, name: str) -> Trajectory:
        group = self.file["trajectories"][name]
        if "position" not in group or group["position"].ndim != 3 or group["position"].shape[2] != 3:
            raise Failure(f"{self.path}: trajectory {name}: dataset 'position' (T, N, 3) is missing or misshapen")
        missing = {"split", "dt", "source", "periodic"} - set(group.attrs)
        if missing or group.attrs["split"] not in SPLITS:
            raise Failure(f"{self.path}: trajectory {name}: attribute {sorted(missing) or 'split'} is missing or wrong")
        frames, nodes, _ = group["position"].shape
        shapes = {f"attributes/{key}": (nodes,) for key in group.get("attributes", {})}
        for key, shape in {"velocity": (frames, nodes, 3), "box": (2, 3), **shapes}.items():
            if key in group and (found := getattr(group[key], "shape", None)) != shape:
                raise Failure(f"{self.path}: trajectory {name}: dataset '{key}' has shape {found}, expected {shape}")
        return Trajectory(
            name,
            str(group.attrs["split"]),
            frames,
            nodes,
            float(group.attrs["dt"]),
            str(group.attrs["source"]),
            "velocity" in group,
            tuple(sorted(group.get("attributes", {}))),
            bool(group.attrs["periodic"]),
        )

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, k):
        return self._all[k]

    def _read(self, k: int, key: str, frame: int | None = None) -> np.ndarray:
        try:
            dataset = self.file["trajectories"][self._all[k].name][key]
            return dataset[()] if frame is None else dataset[frame]
        except (OSError, KeyError) as error:
            raise Failure(
                f"{self.path}: trajectory {k}: cannot read '{key}' ({error}); the file is damaged, prepare it again"
            ) from error

    def position(self, k: int, t: int) -> np.ndarray:
        """Positions (N, 3) float32 at frame t."""
        return self._read(k, "position", t)

    def velocity(self, k: int, t: int) -> np.ndarray:
        """Velocities (N, 3): as stored, else the forward difference x(t+1) − x(t), in length per frame."""
        return self._read(k, "velocity", t) if self._all[k].velocity else self.position(k, t + 1) - self.position(k, t)

    def attribute(self, k: int, name: str) -> np.ndarray:
        """A node attribute (N,)."""
        if name not in self._all[k].attributes:
            have = ", ".join(self._all[k].attributes) or "none"
            raise Failure(f"{self.path}: trajectory {k} has no node attribute '{name}' (it has: {have})")
        return self._read(k, f"attributes/{name}")

    def box(self, k: int) -> np.ndarray | None:
        """Low and high corner (2, 3) of the container, if the source has one."""
        return self._read(k, "box") if "box" in self.file["trajectories"][self._all[k].name] else None

    def sides(self, k: int, radius: float) -> np.ndarray:
        """The sides (3,) float64 of a periodic box. Raises Failure where there is none, or where the radius of edges is too
        large for it."""
        from . import graphs

        box, where = self.box(k), f"{self.path}: trajectory {k}"
        if box is None or not self._all[k].periodic:
            found = "has no box" if box is None else "has a box with walls"
            raise Failure(f"{where} {found}, and data.periodic needs a periodic one; set data.periodic=false")
        side = box_sides(box)
        try:
            graphs.check_side(radius, side)
        except Failure as failure:
            raise Failure(f"{where}: {failure}") from failure
        return side

    def close(self) -> None:
        self.file.close()
