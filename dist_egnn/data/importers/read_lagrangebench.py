"""LagrangeBench's datasets: train.h5, valid.h5, test.h5 and metadata.json, in two or three dimensions.

Each group of a file has ``position`` (T, N, d) and ``particle_type`` (N,): 0 fluid, 1 solid wall, 2 moving wall, 3 rigid
body (https://github.com/tumaer/lagrangebench). Frames are ``write_every`` solver steps of ``dt`` apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from ...errors import Failure
from .series import Frame, ImportOptions, Series, reading

NAME, TEXT, PACKAGES = "lagrangebench", "a folder or .h5 files with metadata.json", ()
FILES = {"train.h5": "train", "valid.h5": "valid", "test.h5": "test"}


def detect(paths: Sequence[Path], head: bytes) -> bool:
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    return (folder / "metadata.json").is_file() and (paths[0].is_dir() or head.startswith(b"\x89HDF"))


def open_series(paths: list[Path], options: ImportOptions) -> list[Series]:
    """Every group of the given files, or of a folder's files; the names of the files are the splits."""
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    files = [folder / name for name in FILES if (folder / name).is_file()] if paths[0].is_dir() else paths
    if not files:
        raise Failure(f"{folder}: has none of {', '.join(FILES)}")
    metadata = folder / "metadata.json"
    with reading(metadata):
        content = json.loads(metadata.read_text(encoding="utf-8"))
    missing = [key for key in ("bounds", "dt", "dim", "periodic_boundary_conditions") if key not in content]
    if missing:
        raise Failure(f"{metadata}: key '{missing[0]}' is missing; fetch the file again")
    dim, directions = int(content["dim"]), list(content["periodic_boundary_conditions"])
    if len(set(directions)) > 1 and options.periodic is None:
        remedy = "--no-periodic imports the positions as they are"
        raise Failure(f"{metadata}: periodic in some directions only ({directions}), which is not supported; {remedy}")
    box = np.array(content["bounds"], float).T
    dt = float(content["dt"]) * float(content.get("write_every", 1))
    result = []
    for path in files:
        with reading(path), h5py.File(path, "r") as file:
            groups = {name: file[name]["position"].shape for name in sorted(file)}
        for name, shape in groups.items():
            if len(shape) != 3 or shape[2] != dim:
                raise Failure(f"{path}: group {name}: position has shape {shape}, metadata.json says dim {dim}")
            series = Series(f"{path.name} {name}", _reader(path, name, box), shape[0], FILES.get(path.name), dt)
            series.periodic = all(directions)
            result.append(series)
    return result


class _reader:
    """Reads the frames of a group."""

    def __init__(self, path: Path, name: str, box: np.ndarray) -> None:
        self.path, self.name, self.box = path, name, box

    def __call__(self) -> Iterator[Frame]:
        with reading(f"{self.path}: group {self.name}"), h5py.File(self.path, "r") as file:
            group = file[self.name]
            kind = np.asarray(group["particle_type"])
            for t in range(len(group["position"])):
                yield Frame(group["position"][t], attributes={"type": kind}, box=self.box)
