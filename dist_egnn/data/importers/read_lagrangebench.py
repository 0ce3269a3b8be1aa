"""The datasets of LagrangeBench and GNS: metadata.json and train, valid, test as .h5 or .tfrecord, in 2 or 3 dimensions.

Each group of an .h5 file (https://github.com/tumaer/lagrangebench), or record of a .tfrecord file, has ``position``
(T, N, d) and ``particle_type`` (N,): 0 fluid, 1 solid wall, 2 moving wall, 3 rigid body, 5 water of GNS. LagrangeBench's
frames are ``write_every`` solver steps of ``dt`` apart.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ...errors import Failure
from ...utils import hdf5
from ..trajectories import SPLITS
from . import tfrecord
from .series import Frame, ImportOptions, Series

NAME, TEXT, PACKAGES = "lagrangebench", "a folder, .h5 or .tfrecord files with metadata.json", ()
SUFFIXES = (".h5", ".tfrecord")
KEYS = {"bounds": "low and high corner of the box by axis", "dt": "time from frame to frame"}
PERIODIC, EVERY, LENGTH = "periodic_boundary_conditions", "write_every", "sequence_length"


def detect(paths: Sequence[Path], head: bytes) -> bool:
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    known = paths[0].is_dir() or head.startswith(b"\x89HDF") or paths[0].suffix == ".tfrecord"
    return known and (folder / "metadata.json").is_file()


def read_metadata(path: Path, records: bool) -> dict[str, Any]:
    """The keys of metadata.json that are used. Raises Failure for the first that is missing or invalid."""
    if not path.is_file():
        raise Failure(f"{path}: no such file; fetch it together with the trajectories")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failure(f"{path}: not JSON ({error}); fetch it again") from None
    needed = KEYS | ({LENGTH: "number of frames − 1"} if records else {})
    for key, meaning in needed.items():
        if not isinstance(content, dict) or key not in content:
            raise Failure(f"{path}: key '{key}' ({meaning}) is missing; fetch the file again")
    if np.shape(content["bounds"]) not in ((2, 2), (3, 2)):
        raise Failure(f"{path}: key 'bounds' has shape {np.shape(content['bounds'])}, expected (2, 2) or (3, 2)")
    return {key: content[key] for key in (*needed, PERIODIC, EVERY) if key in content}


@contextmanager
def open_group(path: Path, name: str) -> Iterator[tuple[np.ndarray, h5py.Dataset]]:
    """Particle types (N,) and the dataset of positions (T, N, d). Raises Failure if they are missing or damaged."""
    where = f"{path}: group {name}"
    with opened(path) as file:
        group = file[name]
        for key in ("particle_type", "position"):
            if not isinstance(group, h5py.Group) or key not in group:
                raise Failure(f"{where}: dataset '{key}' is missing; is it a file of LagrangeBench?")
        try:
            yield group["particle_type"][()], group["position"]
        except OSError as error:
            raise Failure(f"{where}: cannot be read ({error}); the file is damaged, fetch it again") from None


def opened(path: Path) -> Any:
    try:
        return hdf5.open_file(path)
    except OSError as error:
        raise Failure(f"{path}: not a readable HDF5 file ({error}); fetch it again") from None


def open_series(paths: list[Path], options: ImportOptions) -> list[Series]:
    """Every trajectory of the given files, or of a folder's files; the names of the files are the splits."""
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    if paths[0].is_dir():
        paths = [folder / f"{split}{suffix}" for suffix in SUFFIXES for split in SPLITS]
        paths = [path for path in paths if path.is_file()]
    if not paths:
        raise Failure(f"{folder}: has no train, valid or test as .h5 or .tfrecord")
    records = any(path.suffix == ".tfrecord" for path in paths)
    metadata = read_metadata(folder / "metadata.json", records)
    return [one for path in paths for one in _series(path, metadata)]


def _series(path: Path, metadata: dict[str, Any]) -> Iterator[Series]:
    box, dt = np.array(metadata["bounds"], float).T, float(metadata["dt"]) * float(metadata.get(EVERY, 1))
    about: dict[str, Any] = {"split": path.stem if path.stem in SPLITS else None, "dt": dt}
    about["periodic"] = (*metadata.get(PERIODIC, (False,) * 3), False)[:3]
    if path.suffix == ".tfrecord":
        found, end = tfrecord.scan(path, 2**62)
        if end < path.stat().st_size:
            raise Failure(f"{path}: truncated within record {len(found)}; fetch it again")
        for record in found:
            read = functools.partial(_record_frames, record, metadata[LENGTH] + 1, box)
            yield Series(f"{path.name} {record.number}", read, metadata[LENGTH] + 1, **about)
        return
    with opened(path) as file:
        names = sorted(file)
    for name in names:
        with open_group(path, name) as (_, position):
            shape = position.shape
        if len(shape) != 3 or shape[2] != box.shape[1]:
            text = f"position has shape {shape}, metadata.json has bounds of {box.shape[1]} axes"
            raise Failure(f"{path}: group {name}: {text}; is it their metadata.json?")
        yield Series(f"{path.name} {name}", functools.partial(_group_frames, path, name, box), shape[0], **about)


def _record_frames(record: tfrecord.Record, frames: int, box: np.ndarray) -> Iterator[Frame]:
    kind, position = tfrecord.read_record(record, frames, box.shape[1])
    for x in position:
        yield Frame(x, attributes={"type": kind}, box=box)


def _group_frames(path: Path, name: str, box: np.ndarray) -> Iterator[Frame]:
    with open_group(path, name) as (kind, position):
        for t in range(len(position)):
            yield Frame(position[t], attributes={"type": kind}, box=box)
