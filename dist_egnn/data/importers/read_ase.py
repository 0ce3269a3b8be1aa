"""Files that ASE reads: extended XYZ, .traj and others. Velocities become Å/fs; charges, masses and numbers attributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...errors import Failure
from .series import Frame, ImportOptions, Series, cell_box, reading, split_fields, suffix

NAME, TEXT, PACKAGES = "ase", "extended XYZ, .traj and what else ASE reads", ("ase",)
SUFFIXES = (".xyz", ".extxyz", ".traj", ".cif", ".vasp", ".db")


def detect(paths: Sequence[Path], head: bytes) -> bool:
    return suffix(paths[0]) in SUFFIXES or paths[0].name in ("XDATCAR", "POSCAR", "CONTCAR")


def open_series(paths: list[Path], options: ImportOptions) -> list[Series]:
    """One trajectory per file."""
    from ase import io, units

    axes: dict[Path, tuple[bool, ...]] = {}  # which are periodic

    def read(path: Path) -> Iterator[Frame]:
        with reading(path):
            images = iter(io.iread(str(path), index=":"))
        for k in range(2**62):
            where = f"{path}: frame {k}"
            with reading(where):
                if (atoms := next(images, None)) is None:
                    return
                arrays = {key: np.asarray(value) for key, value in atoms.arrays.items()}
                position, momenta = arrays.pop("positions"), arrays.pop("momenta", None)
                fields = {key: value for key, value in arrays.items() if value.dtype.kind in "biuf"}
                frame = split_fields(fields, options, where, 3)
                frame.position = position
                if momenta is not None:
                    frame.velocity = atoms.get_velocities() * units.fs
                if "mass" not in frame.attributes and "masses" not in frame.attributes:
                    frame.attributes["mass"] = atoms.get_masses()
                some = [key for key in ("time", "Time") if key in atoms.info]
                frame.time = float(atoms.info[some[0]]) if some else None
                cell, axes[path] = np.asarray(atoms.cell), tuple(atoms.pbc.tolist())
                boxed = options.periodic is not False and atoms.pbc.any() and cell.any()
                frame.box = cell_box(np.zeros(3), cell) if boxed else None
            yield frame

    result = []
    for path in paths:
        first = next(read(path), None)
        if first is None:
            raise Failure(f"{path}: holds no frame")
        result.append(Series(path.name, lambda path=path: read(path), periodic=first.box is not None and axes[path]))  # type: ignore[misc]
    return result
