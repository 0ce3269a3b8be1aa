"""The file of a rollout: VTKHDF, which ParaView opens, written and read frame by frame. See docs/outputs.md.

/VTKHDF: one UnstructuredGrid of N vertices whose points and point data change over time; /dist_egnn: what VTK does not
read. Until it is complete the file is called PATH.partial. Arrays have their final size from the start and the number
of complete frames is written last, so these can be read whenever the writer is killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.fixed_nodes import fixed_nodes
from ..errors import Failure
from ..utils import hdf5

FORMAT, VERSION = "dist_egnn.rollout", 1
AGAIN = "make it again with `distegnn rollout`"
VTK, VTK_VERTEX = (2, 0), 1
VECTORS = ("velocity", "error")
Array = np.ndarray
Arrays = Mapping[str, Array]
Size = tuple[int, int, int]


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@dataclass(frozen=True)
class Frame:
    step: int
    frame: int  # of the trajectory
    time: float  # in the unit of the source
    position: Array  # (N, 3)
    velocity: Array  # (N, 3), in the unit of the data
    error: Array | None  # (N, 3) position minus the true one; None after the end of the data
    part: Array  # (N,) the process that computed the node
    virtual: Array | None  # (C, 3) after the last layer; None in the first frame and for models without


def file_bytes(frames: int, nodes: int) -> int:
    """Of the points, their vectors and parts, in float32."""
    return frames * nodes * 4 * (3 + 3 * len(VECTORS) + 1)


class RolloutWriter(ExitStack):
    """Writes PATH.partial; `finish` renames it to PATH.

    size: frames, nodes, virtual nodes. meta: JSON values, among them ``start`` and ``horizon`` in frames, ``dt`` per
    frame, and ``true_frames``, the frames in the data. attributes: (N,) by name. Raises Failure on a full disk.
    """

    def __init__(
        self, path: Path, size: Size, meta: dict[str, Any], attributes: Arrays, box: Array | None, dtype: np.dtype
    ) -> None:
        super().__init__()
        frames, nodes, virtual = size
        self.path, self.nodes, self.count = partial_path(path), nodes, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.enter_context(hdf5.open_file(self.path, "w"))
        self.ours = self.file.create_group("dist_egnn")
        self.ours.attrs.update(format=FORMAT, version=VERSION, meta=json.dumps(meta, sort_keys=True))
        if box is not None:
            self.ours["box"] = box
        self.ours["frames"] = np.int64(0)
        if virtual:
            self.ours.create_dataset("virtual", (frames, virtual, 3), dtype)
        self.root = self.file.create_group("VTKHDF")
        self.root.attrs["Version"] = np.array(VTK, np.int64)
        self.root.attrs["Type"] = np.bytes_("UnstructuredGrid")  # of fixed length, as VTK requires
        for name in ("NumberOfPoints", "NumberOfCells", "NumberOfConnectivityIds"):
            self.root[name] = np.array([nodes], np.int64)
        self.root["Connectivity"] = np.arange(nodes, dtype=np.int64)
        self.root["Offsets"] = np.arange(nodes + 1, dtype=np.int64)
        self.root["Types"] = np.full(nodes, VTK_VERTEX, np.uint8)
        self.root.create_dataset("Points", (frames * nodes, 3), dtype)
        data = self.root.create_group("PointData")
        for name in VECTORS:
            data.create_dataset(name, (frames * nodes, 3), dtype)
        data.create_dataset("part", (frames * nodes,), np.int32)
        for name, value in attributes.items():
            if name in data:
                raise Failure(f"{path}: node attribute '{name}' has the name of an array of every rollout; rename it")
            data[name] = value
        steps = self.root.create_group("Steps")
        steps.attrs["NSteps"] = np.int64(frames)
        steps["Values"] = (int(meta["start"]) + int(meta["horizon"]) * np.arange(frames)) * float(meta["dt"])
        # the rows of points and arrays over time advance by N each step, cells and attributes stay
        starts, zeros = nodes * np.arange(frames, dtype=np.int64), np.zeros(frames, np.int64)
        steps["PointOffsets"], steps["PartOffsets"], steps["NumberOfParts"] = starts, zeros, zeros + 1
        steps["CellOffsets"] = steps["ConnectivityIdOffsets"] = zeros[:, None]
        offsets = steps.create_group("PointDataOffsets")
        for name in (*VECTORS, "part", *attributes):
            offsets[name] = zeros if name in attributes else starts
        self.file.flush()

    def add(self, position: Array, velocity: Array, part: Array, error: Array | None, virtual: Array | None) -> None:
        """Append a frame."""
        rows = slice(self.count * self.nodes, (self.count + 1) * self.nodes)
        try:
            data = self.root["PointData"]
            self.root["Points"][rows], data["velocity"][rows], data["part"][rows] = position, velocity, part
            # h5py writes a single number row by row, which takes seconds for 100,000 nodes
            data["error"][rows] = np.full_like(position, np.nan) if error is None else error
            if "virtual" in self.ours:
                self.ours["virtual"][self.count] = np.nan if virtual is None else virtual
            self.file.flush()
            self.ours["frames"][()] = self.count + 1  # only after the rows are on disk
            self.file.flush()
        except OSError as failure:
            raise Failure(f"{self.path}: cannot write frame {self.count} ({failure}); is the disk full?") from failure
        self.count += 1


class Rollout(ExitStack):
    """Reads the file of a rollout frame by frame: ``for frame in Rollout(path)``; also PATH.partial of a killed one.

    meta: see RolloutWriter; box: (2, 3) or None. Raises Failure for a file that is missing, damaged or foreign.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        if not self.path.is_file():
            partial = partial_path(self.path)
            hint = f"; {partial} was left by a killed rollout" if partial.is_file() else ""
            raise Failure(f"{path}: no such file{hint}; create it with `distegnn rollout`")
        try:
            self.file = self.enter_context(hdf5.open_file(self.path))
            ours = self.file["dist_egnn"]
            version = ours.attrs["format"], ours.attrs["version"]
            if version != (FORMAT, VERSION):
                raise Failure(f"{path}: {version[0]} version {version[1]}, expected {FORMAT} {VERSION}; {AGAIN}")
            self.meta: dict[str, Any] = json.loads(ours.attrs["meta"])
            self.box: Array | None = ours["box"][()] if "box" in ours else None
            self._count = int(ours["frames"][()])
            self._root = self.file["VTKHDF"]
            self.nodes = int(self._root["NumberOfPoints"][0])
            self._virtual = ours.get("virtual")
            data = self._root["PointData"]
            self.attributes: dict[str, Array] = {k: v[()] for k, v in data.items() if k not in (*VECTORS, "part")}
        except (KeyError, ValueError, OSError) as error:
            raise Failure(f"{path}: damaged or not a readable HDF5 file of a rollout ({error}); {AGAIN}") from error

    def __len__(self) -> int:
        return self._count

    @property
    def moving(self) -> Array:
        """The nodes (N,) bool whose errors count: those that data.fixed or --fixed does not name."""
        fixed = self.meta.get("fixed") or ""
        if not isinstance(fixed, str):
            raise Failure(f"{self.path}: written by an older version with --fixed; {AGAIN}")
        return ~fixed_nodes(fixed, self.attributes.__getitem__) if fixed else np.ones(self.nodes, bool)

    def __getitem__(self, step: int) -> Frame:
        if not 0 <= step < self._count:
            raise IndexError(f"{self.path}: step {step} of {self._count}")
        rows = slice(step * self.nodes, (step + 1) * self.nodes)
        data, frame = self._root["PointData"], self.meta["start"] + step * self.meta["horizon"]
        try:
            x = self._root["Points"][rows]
            v, error, part = (data[name][rows] for name in (*VECTORS, "part"))
            z = self._virtual[step] if self._virtual is not None and step else None
        except (KeyError, OSError) as failure:
            raise Failure(f"{self.path}: step {step}: cannot be read ({failure}); {AGAIN}") from failure
        error = error if frame < self.meta["true_frames"] else None
        return Frame(step, frame, frame * self.meta["dt"], x, v, error, part, z)

    def __iter__(self) -> Iterator[Frame]:
        return (self[step] for step in range(self._count))


def finish(path: Path, stopped: str = "") -> int:
    """Rename PATH.partial to PATH, cut to its complete frames; returns their number. Without any, or if it was
    interrupted before the first, remove it.

    stopped: why there are no more, kept as meta["stopped"].
    """
    partial, frames = partial_path(path), 0
    with suppress(Failure), Rollout(partial) as source:
        frames = len(source)
    if not frames:
        partial.unlink()
        return 0
    with Rollout(partial) as source:
        if frames < len(source.file["VTKHDF/Steps/Values"]):
            # copy them: VTK reads all of Steps, and missing rows would take up space
            short = path.with_name(path.name + ".short")
            size = frames, source.nodes, 0 if source._virtual is None else source._virtual.shape[1]
            dtype = source.file["VTKHDF/Points"].dtype
            with RolloutWriter(
                short, size, source.meta | {"stopped": stopped}, source.attributes, source.box, dtype
            ) as out:
                for frame in source:
                    out.add(frame.position, frame.velocity, frame.part, frame.error, frame.virtual)
            os.replace(out.path, partial)
    os.replace(partial, path)
    return frames
