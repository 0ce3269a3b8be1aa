"""The published files of Fluid113K: sim_NNNN_KK.msgpack.zst, 16 consecutive files for each trajectory.

A file is a zstd frame around a msgpack list of frames (maps), arrays encoded by msgpack-numpy:

    pos, vel        float32 (N, 3)   m, m/s
    m, viscosity    float32 (N,)     kg; –
    frame_id        int64            from 0, counted through all 16 files
    scene_id        text             sim_NNNN
    box             float32 (M, 3)   points on the walls; in a file's first frame only
    box_normals     float32 (M, 3)   into the box; in a file's first frame only
    dt              float            our addition, with box, only if frames are not 0.02 s apart (a scaled scene)
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import zstandard

from dist_egnn.errors import Failure

FILES, DT = 16, 0.02
NAME = re.compile(r"sim_(\d{4,})_\d\d\.msgpack\.zst")
SHAPES: dict[str, tuple[Any, ...]] = {"pos": ("N", 3), "vel": ("N", 3), "m": ("N",), "viscosity": ("N",)}
SHAPES |= {"frame_id": (), "scene_id": ()}
WALLS: dict[str, tuple[Any, ...]] = {"box": ("M", 3), "box_normals": ("M", 3)}  # in a file's first frame


@dataclass(frozen=True)
class Record:
    """A trajectory: position, velocity (T, N, 3), mass, viscosity (N,), box (2, 3); dt: seconds from frame to frame."""

    position: np.ndarray
    velocity: np.ndarray
    mass: np.ndarray
    viscosity: np.ndarray
    box: np.ndarray
    dt: float


def paths(folder: Path, number: int) -> list[Path]:
    """The 16 files of trajectory ``number``."""
    return [folder / f"sim_{number:04d}_{k:02d}.msgpack.zst" for k in range(FILES)]


def numbers(folder: Path) -> list[int]:
    """Numbers of the trajectories in the folder, ascending. Raises Failure if there is none."""
    result = {int(match[1]) for path in folder.glob("*.zst") if (match := NAME.fullmatch(path.name))}
    if not result:
        raise Failure(f"{folder}: no file named like sim_0001_00.msgpack.zst; give the folder of the records")
    return sorted(result)


def walls(box: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Points on the walls of a box (2, 3) and inward normals, (M, 3) float32; 1.9 points per particle disk area."""
    step = np.sqrt(np.pi / 1.9) * radius
    points, normals = [], []
    for axis in range(3):
        lines = [np.linspace(low, high, int(np.ceil((high - low) / step)) + 1) for low, high in box.T]
        for side, sign in ((0, 1.0), (1, -1.0)):
            lines[axis] = box[side, axis : axis + 1]
            face = np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 3)
            points.append(face)
            normals.append(np.broadcast_to(sign * np.eye(3)[axis], face.shape))
    return np.concatenate(points).astype(np.float32), np.concatenate(normals).astype(np.float32)


def write(folder: Path, number: int, record: Record, radius: float) -> None:
    """Write the 16 files of a trajectory of at least 16 frames, each completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    points, normals = walls(record.box, radius)
    first = {"box": points, "box_normals": normals} | ({} if record.dt == DT else {"dt": record.dt})
    for path, part in zip(paths(folder, number), np.array_split(np.arange(len(record.position)), FILES), strict=True):
        frames = [
            {
                **(first if t == part[0] else {}),
                "frame_id": t,
                "scene_id": f"sim_{number:04d}",
                "pos": record.position[t],
                "vel": record.velocity[t],
                "m": record.mass,
                "viscosity": record.viscosity,
            }
            for t in part
        ]
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_bytes(zstandard.compress(msgpack.packb(frames, default=msgpack_numpy.encode)))
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name the file


def read(folder: Path, number: int, max_frames: int | None = None) -> Record:
    """Read a trajectory from its 16 files. Raises Failure that names a missing or damaged file."""
    files = paths(folder, number)
    for path in files:
        if not path.is_file():
            raise Failure(f"{path}: no such file; a trajectory has {FILES} files, fetch this one too")
    frames: list[dict[str, Any]] = []
    for path in files:
        for k, frame in enumerate(_content(path)):
            _check(frame, f"{path}: frame {k}", k == 0, len(frames), len(frames[0]["pos"]) if frames else None)
            frames.append(frame)
        if max_frames is not None and len(frames) >= max_frames:
            break
    frames = frames[:max_frames]
    box = frames[0]["box"]
    return Record(
        np.stack([frame["pos"] for frame in frames]),
        np.stack([frame["vel"] for frame in frames]),
        frames[0]["m"],
        frames[0]["viscosity"],
        np.stack([box.min(0), box.max(0)]),
        float(frames[0].get("dt", DT)),
    )


def _decode(value: dict[Any, Any]) -> Any:
    """Decode an array of msgpack-numpy. Object arrays are rejected, because they are pickles, which can run code."""
    if value.get(b"kind") == b"O":
        raise ValueError("an array of Python objects")
    return msgpack_numpy.decode(value)


def _content(path: Path) -> list[Any]:
    stream = zstandard.ZstdDecompressor().decompressobj()
    try:
        data = stream.decompress(path.read_bytes())
    except zstandard.ZstdError as error:
        raise Failure(f"{path}: no readable zstd file ({error}); fetch it again") from error
    if not stream.eof:
        raise Failure(f"{path}: the file ends too early; fetch it again")
    try:
        content = msgpack.unpackb(data, object_hook=_decode)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise Failure(f"{path}: no readable msgpack inside ({error}); fetch it again") from error
    if not isinstance(content, list) or not content:
        raise Failure(f"{path}: holds no list of frames; fetch it again")
    return content


def _check(frame: Any, where: str, first: bool, expected: int, nodes: int | None) -> None:
    """Raise Failure unless a frame has its keys, their shapes and the expected frame_id."""
    if not isinstance(frame, dict):
        raise Failure(f"{where}: is not a map; fetch the file again")
    rows: dict[str, int | None] = {"N": nodes, "M": None}
    for key, shape in (SHAPES | (WALLS if first else {})).items():
        if key not in frame:
            raise Failure(f"{where}: key '{key}' is missing; fetch the file again")
        actual = np.shape(frame[key])
        if shape and actual and rows[shape[0]] is None:
            rows[shape[0]] = actual[0] or None  # from the first array; none may be empty
        expected_shape = (rows[shape[0]] or shape[0], *shape[1:]) if shape else ()
        if actual != expected_shape or (shape and frame[key].dtype.kind != "f"):
            text = f"floats ({', '.join(map(str, expected_shape))})" if shape else "one value"
            raise Failure(f"{where}: key '{key}' has shape {actual}, expected {text}; fetch the file again")
    if frame["frame_id"] != expected:
        raise Failure(f"{where}: key 'frame_id' is {frame['frame_id']}, expected {expected}; fetch the file again")
