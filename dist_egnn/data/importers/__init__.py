"""Readers of foreign trajectory files for `distegnn import`; each module reads one family of formats.

An importer is a module with ``NAME``, ``TEXT`` (what it reads), ``PACKAGES`` (what it needs beyond the project's own
dependencies), ``detect(paths, head)`` and ``open_series(paths, options)``. `IMPORTERS` lists them in the order of detection.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ...errors import Failure
from ..trajectories import Trajectories
from .series import ImportOptions, Series, open_bytes, reading

IMPORTERS = ("arrays", "lagrangebench", "vtk", "lammps", "ase", "mdanalysis", "table")
LINES = ("lammps", "ase", "table")  # may be text in lines, where a number that is cut short is a number
HEAD = 4096  # bytes of a file that detection may read


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.read_{name}")


def _is_trajectories(path: Path) -> bool:
    try:
        Trajectories(path).close()
    except Failure:
        return False
    return True


def find_importer(paths: Sequence[Path], name: str | None) -> ModuleType:
    """The importer called ``name``, or the first that recognizes the content of the files. Raises Failure."""
    for path in paths:
        if not path.exists():
            raise Failure(f"{path}: no such file")
        if path.is_file() and not path.stat().st_size:
            raise Failure(f"{path}: the file is empty; write it again")
    if name is not None and name not in IMPORTERS:
        raise Failure(f"--format {name}: unknown; use {', '.join(IMPORTERS)}")
    head = b""
    if paths[0].is_file():
        with reading(paths[0]), open_bytes(paths[0]) as file:
            head = file.read(HEAD)
    modules = [_load(each) for each in ((name,) if name else IMPORTERS)]
    importer = next((module for module in modules if name or module.detect(paths, head)), None)
    if importer is None and _is_trajectories(paths[0]):
        raise Failure(f"{paths[0]}: is a trajectories.h5 already; use it without an import: data.path={paths[0]}")
    if importer is None:
        known = "; ".join(f"{module.NAME}: {module.TEXT}" for module in modules)
        raise Failure(f"{paths[0]}: the format is not recognized; --format names one ({known})")
    for package in importer.PACKAGES:
        if importlib.util.find_spec(package) is None:
            remedy = "pip install 'dist_egnn[import]'"
            raise Failure(f"{paths[0]}: the format {importer.NAME} needs {package}, which is not installed; {remedy}")
    return importer


def open_series(paths: Sequence[Path], options: ImportOptions) -> tuple[str, list[Series]]:
    """The name of the importer and the trajectories in these files. Raises Failure, naming the file and the remedy."""
    importer = find_importer(paths, options.format)
    series = importer.open_series(list(paths), options)
    if not series:
        raise Failure(f"{paths[0]}: contains no trajectory")
    for path in paths if importer.NAME in LINES else ():
        if path.is_file() and not _ends_with_line(path):
            series[0].notes.append(f"{path.name}: its last line has no end; is the file complete?")
    return importer.NAME, series


def _ends_with_line(path: Path) -> bool:
    """Whether a text file ends with a line break; also true for files that are no text."""
    with path.open("rb") as file:
        binary = b"\0" in file.read(HEAD)
        file.seek(-1, 2)
        return binary or file.read(1) == b"\n"
