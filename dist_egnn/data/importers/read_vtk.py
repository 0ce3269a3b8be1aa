"""VTK files through PyVista: a series of .vtk, .vtu, .vtp files, a .pvd collection, or a temporal .vtkhdf file."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import Failure
from .series import Frame, ImportOptions, Series, natural_order, reading, split_fields

NAME, TEXT, PACKAGES = "vtk", ".vtk, .vtu, .vtp, .pvd, .vtkhdf", ("pyvista",)


def detect(paths: Sequence[Path], head: bytes) -> bool:
    return head.startswith(b"# vtk DataFile") or b"<VTKFile" in head or paths[0].suffix == ".vtkhdf"


class _CellEdges:
    """The edges (E, 2) of a mesh's cells; those of the mesh before if it has the same cells."""

    cells: tuple[np.ndarray, ...] = ()
    edges: np.ndarray = np.zeros((0, 2), np.int64)

    def __call__(self, mesh: Any) -> np.ndarray:
        import pyvista
        from vtkmodules.vtkFiltersCore import vtkExtractEdges

        names = ("cells", "celltypes", "faces", "lines", "strips", "dimensions")
        cells = tuple(np.array(getattr(mesh, name)) for name in names if hasattr(mesh, name))
        if len(cells) != len(self.cells) or not all(map(np.array_equal, cells, self.cells)):
            extract = vtkExtractEdges()
            extract.UseAllPointsOn()  # their numbers do not change
            extract.SetInputData(mesh)
            extract.Update()
            self.cells, self.edges = cells, pyvista.wrap(extract.GetOutput()).lines.reshape(-1, 3)[:, 1:]
        return self.edges


def _frame(mesh: Any, time: float | None, options: ImportOptions, where: str, edges: _CellEdges) -> Frame:
    if mesh is None or not hasattr(mesh, "points") or not mesh.n_points:
        raise Failure(f"{where}: holds no points")
    fields = {
        name: np.array(mesh.point_data[name])
        for name in mesh.point_data
        if np.asarray(mesh.point_data[name]).dtype.kind in "biuf"
    }
    if time is None and "TimeValue" in mesh.field_data:
        time = float(np.ravel(mesh.field_data["TimeValue"])[0])
    frame = split_fields(fields, options, where, 3)
    frame.position, frame.time = np.array(mesh.points), time
    frame.edges = functools.partial(edges, mesh)
    return frame


def _one_of(mesh: Any) -> Any:
    """The data of a collection's only block, or the mesh itself."""
    return mesh[0] if type(mesh).__name__ == "MultiBlock" and len(mesh) == 1 else mesh


def open_series(paths: list[Path], options: ImportOptions) -> list[Series]:
    """Files as the frames of one trajectory, in the order of the numbers in their names; a .pvd or .vtkhdf each as one."""
    import pyvista

    pyvista.vtk_verbosity("off")  # errors are raised as exceptions
    alone = [path for path in paths if path.suffix in (".pvd", ".vtkhdf")]
    files = sorted((path for path in paths if path not in alone), key=natural_order)

    def read_files() -> Iterator[Frame]:
        edges = _CellEdges()
        for path in files:
            with reading(path):
                mesh = _one_of(pyvista.read(path))
            yield _frame(mesh, None, options, str(path), edges)

    def read_times(path: Path) -> Iterator[Frame]:
        with reading(path):
            reader: Any = pyvista.get_reader(str(path))
            times = list(reader.time_values)
        edges = _CellEdges()
        for k, time in enumerate(times):
            with reading(f"{path}: frame {k}"):
                reader.set_active_time_value(time)
                mesh = _one_of(reader.read())
            yield _frame(mesh, float(time), options, f"{path}: frame {k}", edges)

    result = [Series(f"{files[0].name} … {files[-1].name}", read_files, len(files))] if files else []
    for path in alone:
        result.append(Series(path.name, lambda path=path: read_times(path)))  # type: ignore[misc]
    return result
