"""The file of a rollout: VTKHDF, which ParaView opens, written and read a frame at a time. See docs/formats.md.

What VTK reads stands under /VTKHDF: one UnstructuredGrid of N vertices whose points and point data go on in time. What VTK has no
place for stands under /dist_egnn, which VTK leaves alone. While it grows the file is called PATH.partial. Its arrays have
their final size from the start, so that a frame only fills in rows, and the count of whole frames goes up last: whenever the
writer is killed, all frames up to that count can be read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import Failure

FORMAT, VERSION = "dist_egnn.rollout", 1
VTK, VTK_VERTEX = (2, 0), 1
VECTORS = ("velocity", "error")


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@dataclass(frozen=True)
class Frame:
    """A frame. error: position minus the true one, None where the data have no such frame; virtual: of the model's last layer."""

    step: int
    frame: int  # of the trajectory
    time: float  # in the source's unit
    position: np.ndarray  # (N, 3)
    velocity: np.ndarray  # (N, 3), in the unit of the data
    error: np.ndarray | None  # (N, 3)
    part: np.ndarray  # (N,) the process that computed the node
    virtual: np.ndarray | None  # (C, 3), None in the first frame and for models without


class Writer:
    """Writes PATH.partial; `finish` makes PATH of it.

    meta: what made it, kept as JSON, with ``start`` and ``horizon`` in frames, ``dt`` per frame, and ``true_frames``, the number
    of frames that the data have. attributes: name → (N,). Raises Failure where the disk is full.
    """

    def __init__(
        self,
        path: Path,
        frames: int,
        nodes: int,
        meta: Mapping[str, Any],
        attributes: Mapping[str, np.ndarray],
        box: np.ndarray | None,
        virtual: int,
        dtype: np.dtype,
    ) -> None:
        self.path, self.nodes, self.known = partial_of(path), nodes, int(meta["true_frames"])
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = h5py.File(self.path, "w")
        self.ours = self.file.create_group("dist_egnn")
        self.ours.attrs.update(format=FORMAT, version=VERSION, meta=json.dumps(dict(meta), sort_keys=True))
        if box is not None:
            self.ours["box"] = box
        self.ours["frames"] = np.int64(0)
        if virtual:
            self.ours.create_dataset("virtual", (frames, virtual, 3), dtype)
        self.root = self.file.create_group("VTKHDF")
        kind = b"UnstructuredGrid"
        self.root.attrs.create("Version", np.array(VTK, np.int64))
        self.root.attrs.create("Type", kind, dtype=h5py.string_dtype("ascii", len(kind)))
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
                raise Failure(f"{path}: the data's attribute '{name}' has the name of a rollout's own array; rename it")
            data[name] = value
        times = (int(meta["start"]) + int(meta["horizon"]) * np.arange(frames)) * float(meta["dt"])
        self._steps(times, [*VECTORS, "part"], list(attributes))
        self.done = 0
        self.file.flush()

    def _steps(self, times: np.ndarray, moving: list[str], fixed: list[str]) -> None:
        """Where VTK finds a step: points and moving arrays N rows further each time, cells and fixed arrays where they were."""
        steps = self.root.create_group("Steps")
        steps.attrs["NSteps"] = np.int64(len(times))
        steps["Values"] = times
        starts, none = self.nodes * np.arange(len(times), dtype=np.int64), np.zeros(len(times), np.int64)
        steps["PointOffsets"], steps["PartOffsets"], steps["NumberOfParts"] = starts, none, none + 1
        steps["CellOffsets"] = steps["ConnectivityIdOffsets"] = none[:, None]
        offsets = steps.create_group("PointDataOffsets")
        for name in moving:
            offsets[name] = starts
        for name in fixed:
            offsets[name] = none

    def add(
        self,
        position: np.ndarray,
        velocity: np.ndarray,
        part: np.ndarray,
        error: np.ndarray | None,
        virtual: np.ndarray | None,
    ) -> None:
        """Append a frame; it counts once all of it is written."""
        rows = slice(self.done * self.nodes, (self.done + 1) * self.nodes)
        try:
            self.root["Points"][rows] = position
            data = self.root["PointData"]
            data["velocity"][rows], data["part"][rows] = velocity, part
            data["error"][rows] = np.nan if error is None else error
            if "virtual" in self.ours:
                self.ours["virtual"][self.done] = np.nan if virtual is None else virtual
            self.file.flush()
            self.ours["frames"][()] = self.done + 1
            self.file.flush()
        except OSError as problem:
            raise Failure(f"{self.path}: cannot write frame {self.done} ({problem}); is the disk full?") from problem
        self.done += 1

    def close(self) -> None:
        self.file.close()


class Rollout:
    """A rollout's file, read a frame at a time: ``for frame in Rollout(path)``; PATH.partial of a killed one too.

    meta: what made it; box: (2, 3) or None. Raises Failure for a file that is missing, damaged or not ours.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            left = partial_of(self.path)
            hint = f"; {left} was left by one that was killed" if left.is_file() else ""
            raise Failure(f"{path}: no such file{hint}; `distegnn rollout` makes one")
        try:
            self.file = h5py.File(self.path, "r")
        except OSError as error:
            raise Failure(f"{path}: not a readable HDF5 file ({error}); roll out again") from error
        ours = self.file.get("dist_egnn")
        found = (ours.attrs.get("format"), ours.attrs.get("version")) if ours is not None else (None, None)
        if found != (FORMAT, VERSION):
            raise Failure(
                f"{path}: {found[0]} version {found[1]}, this program reads {FORMAT} {VERSION}; roll out again"
            )
        try:
            self.meta: dict[str, Any] = json.loads(ours.attrs["meta"])
            self.box: np.ndarray | None = ours["box"][()] if "box" in ours else None
            self._count = int(ours["frames"][()])
            self._root = self.file["VTKHDF"]
            self.nodes = int(self._root["NumberOfPoints"][0])
            self._virtual = ours.get("virtual")
            data = self._root["PointData"]
            self.attributes: dict[str, np.ndarray] = {
                name: data[name][()] for name in data if name not in (*VECTORS, "part")
            }
        except (KeyError, ValueError, OSError) as error:
            raise Failure(f"{path}: damaged ({error}); roll out again") from error

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, step: int) -> Frame:
        if not 0 <= step < self._count:
            raise IndexError(f"{self.path}: step {step} of {self._count}")
        rows = slice(step * self.nodes, (step + 1) * self.nodes)
        data, frame = self._root["PointData"], self.meta["start"] + step * self.meta["horizon"]
        try:
            return Frame(
                step,
                frame,
                frame * self.meta["dt"],
                self._root["Points"][rows],
                data["velocity"][rows],
                data["error"][rows] if frame < self.meta["true_frames"] else None,
                data["part"][rows],
                self._virtual[step] if self._virtual is not None and step else None,
            )
        except (KeyError, OSError) as error:
            raise Failure(f"{self.path}: step {step}: cannot be read ({error}); roll out again") from error

    def __iter__(self) -> Iterator[Frame]:
        return (self[step] for step in range(self._count))

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def finish(path: Path) -> int:
    """Make PATH of PATH.partial, with the frames that are whole; returns how many. None at all: nothing is left."""
    partial = partial_of(path)
    with Rollout(partial) as source:
        done, planned = len(source), len(source.file["VTKHDF/Steps/Values"])
        if 0 < done < planned:
            # VTK reads all of Steps, and the rows that are missing would take up their space: copy what is there
            short = path.with_name(path.name + ".short")
            virtual = 0 if source._virtual is None else source._virtual.shape[1]
            like = source.file["VTKHDF/Points"].dtype
            out = Writer(short, done, source.nodes, source.meta, source.attributes, source.box, virtual, like)
            for frame in source:
                out.add(frame.position, frame.velocity, frame.part, frame.error, frame.virtual)
            out.close()
            os.replace(out.path, partial)
    if done:
        os.replace(partial, path)
    else:
        partial.unlink()
    return done
