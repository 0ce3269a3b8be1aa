"""NumPy files: .npy with positions, .npz with named arrays, and the .npz files of GNS (geoelements/gns).

GNS stores pickled pairs of positions (T, N, d) and types. They are read by an unpickler that knows only numpy's arrays,
so that no code in the file is executed.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from ...errors import Failure
from .series import Frame, ImportOptions, Series, reading, split_fields, take

NAME, TEXT, PACKAGES = "arrays", ".npy, .npz", ()
POSITIONS = ("position", "positions", "pos", "x", "coordinates", "coords", "r")
BOXES, TIMES = ("box", "bounds"), ("dt", "time_step")
SAFE = {
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"), ("numpy", "dtype")}


def detect(paths: Sequence[Path], head: bytes) -> bool:
    return head.startswith(b"\x93NUMPY") or (head.startswith(b"PK\x03\x04") and paths[0].suffix == ".npz")


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE:
            raise Failure(f"the pickled object {module}.{name} is no array; it is not executed")
        return super().find_class(module, name)


def _read_array(file: IO[bytes]) -> Any:
    """An array of a .npy stream; one of objects through the unpickler that builds only arrays."""
    version = npy.read_magic(file)
    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        return _ArraysOnly(file).load()
    values = np.frombuffer(file.read(), dtype)
    if len(values) != np.prod(shape, dtype=int):
        raise ValueError(f"truncated: {len(values)} of {np.prod(shape, dtype=int)} numbers")
    return values.reshape(shape, order="F" if fortran else "C")


def _arrays(path: Path) -> dict[str, Any]:
    with reading(path):
        if path.open("rb").read(6) == b"\x93NUMPY":
            try:
                return {"position": np.load(path, mmap_mode="r", allow_pickle=False)}
            except ValueError as error:
                if "object" not in str(error).lower():
                    raise
                with path.open("rb") as file:
                    return {"position": _read_array(file)}
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name.removesuffix(".npy"): _read_array(archive.open(name)) for name in names}


def _is_pair(value: Any) -> bool:
    value = value.tolist() if isinstance(value, np.ndarray) and value.dtype == object else value
    return isinstance(value, (tuple, list)) and len(value) >= 2 and np.ndim(value[0]) == 3


def _gns_items(arrays: dict[str, Any]) -> list[Any]:
    """The trajectories of a GNS file: pairs of positions and types."""
    items = list(arrays["gns_data"]) if "gns_data" in arrays else list(arrays.values())
    return items if items and all(map(_is_pair, items)) else []


def _one_series(path: Path, name: str, arrays: dict[str, Any], options: ImportOptions) -> Series:
    where, rest = f"{path}{name and f': {name}'}", dict(arrays)
    position = take(rest, POSITIONS)
    if position is None or position.ndim != 3 or position.shape[2] not in (2, 3):
        actual = f"shape {position.shape}" if position is not None else f"arrays {', '.join(arrays) or 'none'}"
        raise Failure(f"{where}: needs 'position' of shape (T, N, 3) or (T, N, 2), has {actual}")
    frames, nodes, dim = position.shape
    dt, box, pairs = take(rest, TIMES), take(rest, BOXES), take(rest, ("edges",))
    if box is not None:
        box = np.asarray(box, float).reshape(2, -1) if box.shape[0] == 2 else np.asarray(box, float).T
    for key, value in rest.items():
        if value.dtype.kind not in "biuf" or nodes not in value.shape[:2]:
            raise Failure(
                f"{where}: array '{key}' {value.dtype} {value.shape} is no field of {nodes} nodes; leave it out"
            )

    def read() -> Iterator[Frame]:
        for t in range(frames):
            fields = {}
            for key, value in rest.items():
                varies = value.ndim >= 2 and value.shape[:2] == (frames, nodes)
                fields[key] = np.asarray(value[t] if varies else value)
            frame = split_fields(fields, options, where, dim)
            frame.position, frame.box = np.asarray(position[t]), box
            frame.edges = None if pairs is None else lambda: pairs
            yield frame

    return Series(f"{path.name}{name and f' {name}'}", read, frames, dt=None if dt is None else float(dt))


def open_series(paths: list[Path], options: ImportOptions) -> list[Series]:
    """One trajectory per file; the files of GNS contain several."""
    result = []
    for path in paths:
        arrays = _arrays(path)
        if items := _gns_items(arrays):
            for k, item in enumerate(items):
                pair = {"position": np.asarray(item[0]), "type": np.asarray(item[1])}
                pair["type"] = pair["type"] if pair["type"].ndim else np.full(pair["position"].shape[1], pair["type"])
                pair |= {"material": np.asarray(item[2])} if len(item) > 2 and np.ndim(item[2]) else {}
                result.append(_one_series(path, str(k), pair, options))
        else:
            result.append(_one_series(path, "", arrays, options))
    return result
