"""Molecular dynamics through MDAnalysis: a topology (PSF, PDB, GRO, TPR, PRMTOP, …) and its trajectory files.

Lengths are in Å, times in ps, velocities in Å/ps, as MDAnalysis converts them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import Failure
from .series import Frame, ImportOptions, Series, cell_box, reading, suffix

NAME, TEXT, PACKAGES = "mdanalysis", "a topology and trajectories of GROMACS, CHARMM, NAMD, AMBER, …", ("MDAnalysis",)
ATTRIBUTES = {"charge": "charges", "mass": "masses"}


def detect(paths: Sequence[Path], head: bytes) -> bool:
    try:
        import MDAnalysis
    except ImportError:
        return suffix(paths[0]) in (".psf", ".gro", ".pdb", ".tpr", ".prmtop", ".dcd", ".xtc", ".trr")
    known = {*MDAnalysis._PARSERS, *MDAnalysis._READERS} - {"TXYZ", "XYZ", "DATA", "MEMORY", "CHAIN"}
    return suffix(paths[0])[1:].upper() in known


def _box(step: Any, options: ImportOptions) -> np.ndarray | None:
    """The box of a timestep, None without one or with --no-periodic."""
    if step.dimensions is None or not np.all(step.dimensions[:3] > 0) or options.periodic is False:
        return None
    return cell_box(np.zeros(3), step.triclinic_dimensions.astype(float))


def read_universe(name: str, arguments: Sequence[str], options: ImportOptions, **kwargs: Any) -> list[Series]:
    """The trajectory of an MDAnalysis universe."""
    import MDAnalysis

    with reading(name):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            universe = MDAnalysis.Universe(*arguments, **kwargs)
            trajectory, count = universe.trajectory, universe.trajectory.n_frames
            dt = float(trajectory.dt)  # 1 ps for a file that does not contain it
        timed = not any("no dt information" in str(warning.message) for warning in caught)
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

    row = np.full(len(universe.atoms), -1)
    row[atoms.indices] = np.arange(len(atoms))
    bonds = row[universe.bonds.indices] if hasattr(universe, "bonds") else np.zeros((0, 2), int)
    bonds = bonds[(bonds >= 0).all(1)]

    def read() -> Iterator[Frame]:
        for k in range(count):
            with reading(f"{name}: frame {k}"):
                step = trajectory[k]
                position = np.array(atoms.positions)
                velocity = np.array(atoms.velocities) if step.has_velocities else None
                box = _box(step, options)
                time = float(step.time) if timed or "time" in step.data else None
            yield Frame(position, velocity, constant, time=time, box=box, edges=lambda: bonds)

    with reading(f"{name}: frame 0"):
        periodic = _box(trajectory[0], options) is not None
    announced = sum(map(_frames_announced, map(Path, arguments)))
    notes = [f"its header announces {announced} frames; is the file complete?"] if announced > count else []
    return [Series(name, read, count, dt=dt if timed and count > 1 else None, periodic=periodic, notes=notes)]


def _frames_announced(path: Path) -> int:
    """The number of frames in the header of a DCD file, of which MDAnalysis reads those that are there; 0 for others."""
    with path.open("rb") as file:
        head = file.read(12)
    return int.from_bytes(head[8:12], "little" if head[0] else "big") if head[4:8] == b"CORD" else 0


def open_series(paths: list[Path], options: ImportOptions) -> list[Series]:
    """One trajectory: the first file is the topology."""
    return read_universe(", ".join(path.name for path in paths), [str(path) for path in paths], options)
