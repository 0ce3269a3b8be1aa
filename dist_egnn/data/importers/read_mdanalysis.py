"""Molecular dynamics through MDAnalysis: a topology (PSF, PDB, GRO, TPR, PRMTOP, …) and its trajectory files.

Lengths are in Å, times in ps, velocities in Å/ps, as MDAnalysis converts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import Failure
from .series import Frame, ImportOptions, Series, reading

NAME, TEXT, PACKAGES = "mdanalysis", "a topology and trajectories of GROMACS, CHARMM, NAMD, AMBER, …", ("MDAnalysis",)
ATTRIBUTES = {"charge": "charges", "mass": "masses"}


def detect(paths: Sequence[Path], head: bytes) -> bool:
    try:
        import MDAnalysis
    except ImportError:
        return paths[0].suffix.lower() in (".psf", ".gro", ".pdb", ".tpr", ".prmtop", ".dcd", ".xtc", ".trr")
    known = {*MDAnalysis._PARSERS, *MDAnalysis._READERS} - {"TXYZ", "XYZ", "DATA", "MEMORY", "CHAIN"}
    return paths[0].suffix.lstrip(".").upper() in known


def orthorhombic_box(dimensions: np.ndarray | None, where: str, options: ImportOptions) -> np.ndarray | None:
    """The box (2, 3) of lengths and angles (6,). Raises Failure for one with other angles than 90°, unless --no-periodic."""
    if dimensions is None or not np.all(dimensions[:3] > 0) or options.periodic is False:
        return None
    if np.abs(dimensions[3:] - 90).max() > 1e-3:
        angles = ", ".join(f"{angle:g}" for angle in dimensions[3:])
        raise Failure(
            f"{where}: the box has angles {angles}, only orthorhombic boxes are supported; --no-periodic omits it"
        )
    return np.stack([np.zeros(3), dimensions[:3].astype(float)])


def read_universe(name: str, arguments: Sequence[str], options: ImportOptions, **kwargs: Any) -> list[Series]:
    """The trajectory of an MDAnalysis universe."""
    import MDAnalysis

    with reading(name):
        universe = MDAnalysis.Universe(*arguments, **kwargs)
        trajectory, count = universe.trajectory, universe.trajectory.n_frames
    if not count:
        raise Failure(f"{name}: holds no frame")
    try:
        atoms = universe.select_atoms(options.select or "all")
    except Exception as error:
        raise Failure(f"--select {options.select!r}: {name}: {str(error).splitlines()[0]}") from error
    if not len(atoms):
        raise Failure(f"--select {options.select!r}: no atom of {name}; leave it out to take every atom")
    constant = {
        ours: np.asarray(getattr(atoms, theirs)) for ours, theirs in ATTRIBUTES.items() if hasattr(atoms, theirs)
    }
    if hasattr(atoms, "types") and all(str(kind).isdigit() for kind in set(atoms.types)):
        constant["type"] = np.array([float(kind) for kind in atoms.types])

    def read() -> Iterator[Frame]:
        for k in range(count):
            with reading(f"{name}: frame {k}"):
                step = trajectory[k]
                position = np.array(atoms.positions)
                velocity = np.array(atoms.velocities) if step.has_velocities else None
                box = orthorhombic_box(step.dimensions, f"{name}: frame {k}", options)
            yield Frame(position, velocity, constant, time=float(step.time), box=box)

    with reading(f"{name}: frame 0"):
        periodic = orthorhombic_box(trajectory[0].dimensions, f"{name}: frame 0", options) is not None
    return [Series(name, read, count, dt=float(trajectory.dt) if count > 1 else None, periodic=periodic)]


def open_series(paths: list[Path], options: ImportOptions) -> list[Series]:
    """One trajectory: the first file is the topology."""
    return read_universe(", ".join(path.name for path in paths), [str(path) for path in paths], options)
