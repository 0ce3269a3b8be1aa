"""Read and write trajectories.h5, the file format of every data source; docs/formats.md describes it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import Failure
from ..utils.filesystem import DeferredErrorFile

FORMAT, VERSION = "dist_egnn.trajectories", 1
SPLITS = ("train", "valid", "test")


class Writer:
    """Write a trajectories file completely or not at all. Raises Failure if it cannot be written.

    >>> with Writer("out.h5", {"command": "prepare.py --seed 1", "seed": 1}) as out:
    ...     out.add(position, split="train", dt=0.02, source="SPlisHSPlasH 2.19.0", attributes={"mass": mass})
    """

    def __init__(self, path: str | Path, meta: Mapping[str, Any]) -> None:
        """meta: provenance (command, seed, versions, …), stored as JSON in an attribute of the file."""
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.meta = dict(meta)

    def __enter__(self) -> Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.sink = DeferredErrorFile(self.partial, self.path)
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
        """Append a trajectory. Raises Failure for invalid arrays, an unknown split, or a full disk.

        position, velocity: (T, N, 3); attributes: name → (N,); box: (2, 3) low and high corner; dt: time between frames;
        periodic: nodes that leave the box enter on the other side; their positions must be unwrapped, see ``unwrap``.
        """
        name = f"{len(self.group):06d}"
        where = f"{self.path}: trajectory {name}"
        if split not in SPLITS:
            raise Failure(f"{where}: split '{split}' is none of {', '.join(SPLITS)}")
        if position.ndim != 3 or position.shape[2] != 3:
            raise Failure(f"{where}: position has shape {position.shape}, expected (T, N, 3)")
        if periodic and box is None:
            raise Failure(f"{where}: periodic, but there is no box; pass box=")
        frames, nodes, _ = position.shape
        arrays = {"position": position, "velocity": velocity}
        arrays |= {f"attributes/{key}": value for key, value in (attributes or {}).items()} | {"box": box}
        shapes = {"position": position.shape, "velocity": position.shape, "box": (2, 3)}
        group = self.group.create_group(name)
        group.attrs.update(split=split, dt=float(dt), source=source, periodic=bool(periodic))
        for key, array in ((key, array) for key, array in arrays.items() if array is not None):
            value, shape = np.asarray(array, dtype=np.float32), shapes.get(key, (nodes,))
            if value.shape != shape:
                raise Failure(f"{where}: {key} has shape {value.shape}, expected {shape}")
            if not np.isfinite(value).all():
                raise Failure(f"{where}: {key} holds NaN or infinite values")
            # such chunks compress a third better than whole frames and cost little more to read: differences need two
            large = value.ndim == 3 and value.size
            storage = {"chunks": (min(4, frames), nodes, 1), "shuffle": True, "compression": "gzip"} if large else {}
            group.create_dataset(key, data=value, **storage)
        if periodic and box is not None:
            for t in range(frames - 1):
                check_displacement(position[t], position[t + 1], box_sides(box), f"{where}, frame {t}")
        self.sink.check()

    def copy(self, path: Path) -> None:
        """Append the trajectories of another file without compressing them again."""
        with h5py.File(path, "r") as file:
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
    periodic: bool


class Trajectories(Sequence[Trajectory]):
    """A trajectories file; frames are read on demand. Raises Failure for a damaged file or another format."""

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
            raise Failure(f"{path}: attribute 'meta' is missing or not JSON; prepare it again") from error
        self._all = [self._describe(name) for name in sorted(self.file.get("trajectories", {}))]
        if not self._all:
            raise Failure(f"{path}: holds no trajectory; prepare it again")

    def _describe(self, name: str) -> Trajectory:
        group, where = self.file["trajectories"][name], f"{self.path}: trajectory {name}"
        if "position" not in group or group["position"].ndim != 3 or group["position"].shape[2] != 3:
            raise Failure(f"{where}: dataset 'position' (T, N, 3) is missing or has a wrong shape; prepare it again")
        attrs = group.attrs
        missing = {"split", "dt", "source", "periodic"} - set(attrs)
        if missing or attrs["split"] not in SPLITS:
            raise Failure(f"{where}: attribute {sorted(missing) or 'split'} is missing or wrong; prepare it again")
        frames, nodes, _ = group["position"].shape
        attributes = tuple(sorted(group.get("attributes", {})))
        shapes = {f"attributes/{key}": (nodes,) for key in attributes}
        for key, shape in {"velocity": (frames, nodes, 3), "box": (2, 3), **shapes}.items():
            if key in group and (actual := getattr(group[key], "shape", None)) != shape:
                raise Failure(f"{where}: dataset '{key}' has shape {actual}, expected {shape}; prepare it again")
        properties = float(attrs["dt"]), str(attrs["source"]), "velocity" in group, attributes, bool(attrs["periodic"])
        return Trajectory(name, attrs["split"], frames, nodes, *properties)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, k):
        return self._all[k]

    def _read(self, k: int, key: str, frame: int | None = None) -> np.ndarray:
        try:
            return self.file["trajectories"][self._all[k].name][key][() if frame is None else frame]
        except (OSError, KeyError) as error:
            where = f"{self.path}: trajectory {k}"
            raise Failure(f"{where}: cannot read '{key}' ({error}); the file is damaged, prepare it again") from error

    def position(self, k: int, t: int) -> np.ndarray:
        """Positions (N, 3) float32 at frame t."""
        return self._read(k, "position", t)

    def velocity(self, k: int, t: int) -> np.ndarray:
        """Velocities (N, 3): the stored ones, or else the forward difference x(t+1) − x(t) in length per frame."""
        return self._read(k, "velocity", t) if self._all[k].velocity else self.position(k, t + 1) - self.position(k, t)

    def attribute(self, k: int, name: str) -> np.ndarray:
        """A node attribute (N,)."""
        if name not in self._all[k].attributes:
            known = ", ".join(self._all[k].attributes) or "none"
            raise Failure(f"{self.path}: trajectory {k} has no node attribute '{name}' (it has: {known})")
        return self._read(k, f"attributes/{name}")

    def box(self, k: int) -> np.ndarray | None:
        """Low and high corner (2, 3) of the container, if the source has one."""
        return self._read(k, "box") if "box" in self.file["trajectories"][self._all[k].name] else None

    def sides(self, k: int, radius: float) -> np.ndarray:
        """The sides (3,) float64 of the periodic box. Raises Failure without one, or for a radius too large for it."""
        from . import graphs

        box, where = self.box(k), f"{self.path}: trajectory {k}"
        if box is None or not self._all[k].periodic:
            actual = "has no box" if box is None else "has a box with walls"
            raise Failure(f"{where} {actual}, and data.periodic needs a periodic one; set data.periodic=false")
        graphs.check_side(radius, side := box_sides(box), f"{where}: ")
        return side

    def close(self) -> None:
        self.file.close()
