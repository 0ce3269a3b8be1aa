"""distegnn import on files that other people's programs wrote: the example data of MDAnalysisTests, ASE and PyVista.

The expected numbers were read off the table that the import prints, after it was compared with the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_import import convert

from dist_egnn import Failure, Trajectories

FOLDERS = {"mda": ("MDAnalysisTests", "data"), "ase": ("ase", "test/testdata"), "pyvista": ("pyvista", "examples")}


def example(library: str, names: str) -> list[Path]:
    """The files of a library's example data; skips the test where the library is not installed."""
    package, folder = FOLDERS[library]
    module = pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[dev,protein]'")
    return [Path(module.__file__ or "").parent / folder / name for name in names.split()]


#     library, files, options, (frames, nodes, dt, sides of the periodic box, largest extent), words of the warnings
READ: dict[str, tuple[str, str, dict[str, Any], tuple[int, int, float, Any, float], list[str]]] = {
    "CHARMM": (
        "mda",
        "adk.psf adk_dims.dcd",
        {"stride": 10},
        (10, 3341, 10, None, 60.3),
        ["announces 500 frames", "11.0 spacings"],
    ),
    "NAMD": ("mda", "adk_closed_NAMD.psf adk_gbis_tmd-fast1_NAMD.dcd", {}, (100, 3341, 0.01, None, 54.5), []),
    "cubic box": ("mda", "watdyn.psf watdyn.dcd", {}, (10, 15, 0.02, [50, 50, 50], 50.0), []),
    "dodecahedron": (
        "mda",
        "adk_oplsaa.gro adk_oplsaa.xtc",
        {"select": "name CA", "rescale": True},
        (10, 428, 100, [80.017, 80.017, 113.161], 126.6),
        ["repeated 2 times", "by up to 0.15%"],
    ),
    "constant pressure": (
        "mda",
        "cobrotoxin.tpr cobrotoxin.xtc",
        {"select": "protein", "rescale": True},
        (3, 918, 50, [52.763] * 3, 37.6),
        ["by up to 0.15%", "6.9 spacings"],
    ),
    "TRZ": ("mda", "trz_psf.psf trzfile.trz", {}, (6, 8184, 0.01, [55.4228] * 3, 356), []),
    "XTC": ("mda", "RANDOM_WALK_TOPO.pdb xyz_random_walk.xtc", {}, (100, 100, 1, None, 82.5), ["11.2 spacings"]),
    "PDB": ("mda", "nmr_neopetrosiamide.pdb", {"dt": 2}, (24, 392, 2, None, 26.3), ["11.6 spacings"]),
    "AMBER": ("mda", "Amber/ache.prmtop Amber/ache.mdcrd", {"dt": 0.5}, (11, 252, 0.5, None, 32.4), []),
    "NetCDF": ("mda", "Amber/posfor.top Amber/posfor.ncdf", {}, (2, 442, 0.02, None, 26.5), []),
    "gromos": (
        "mda",
        "gromos11/gromos11_traj_vac.pdb.gz gromos11/gromos11_traj_vac_1.trc.gz",
        {},
        (3, 73, 20, None, 42.7),
        ["44.2 spacings"],
    ),
    "LAMMPS": ("mda", "lammps/chain_dump_1.lammpstrj", {"dt": 1}, (6, 22, 1, [10, 10, 10], 9.54), []),
    "npy": ("mda", "legacy_DCD_adk_coords.npy", {"dt": 1}, (2, 3341, 1, None, 54.7), ["9.1 spacings"]),
    "XYZ": ("mda", "2r9r-1b.xyz", {"dt": 1}, (10, 1284, 1, None, 51.6), []),
    "CASTEP": ("ase", "castep/md.castep", {"dt": 1, "format": "ase"}, (3, 8, 1, [5.43] * 3, 4.08), []),
    "NOMAD": (
        "ase",
        "nomad-images.nomad-json",
        {"dt": 1, "format": "ase"},
        (3, 56, 1, [12.8908, 12.2389, 11.0307], 12.03),
        [],
    ),
    "EON": ("ase", "io/eon/multi.con", {"dt": 1, "format": "ase"}, (10, 14, 1, None, 5.66), []),
    "VTK": ("pyvista", "hexbeam.vtk hexbeam.vtk", {"dt": 1}, (2, 99, 1, None, 5.0), []),
    "image": ("pyvista", "uniform.vtk uniform.vtk", {"dt": 1}, (2, 1000, 1, None, 9.0), []),
    "sphere": ("pyvista", "globe.vtk globe.vtk", {"dt": 1}, (2, 540, 1, None, 1.274e10), []),
}
REFUSED = {
    "triclinic": ("mda", "SiN_tric_namd.psf SiN_tric_namd.dcd", {}, "frame 0: the box is triclinic.*--no-periodic"),
    "box that changes": ("mda", "cobrotoxin.tpr cobrotoxin.xtc", {}, "frame 1: the periodic box changes.*--rescale"),
    "no times": ("mda", "nmr_neopetrosiamide.pdb", {}, "--dt"),
    "moves by several boxes": ("mda", "lammps/image_vf.lammpstrj", {"dt": 1}, "frame 1: node 2 moves by 3.06 sides"),
    "beads": ("mda", "mini.xyz", {"dt": 1}, "KeyError 'A'.*--format"),
    "one frame": ("mda", "lammps/mass_q_elem.lammpstrj", {"dt": 1}, "1 frame"),
    "no trajectory": ("mda", "adk_oplsaa_dihedral_list.npy", {"dt": 1}, r"shape \(10, 2\)"),
}


@pytest.mark.parametrize("name", READ)
def test_table_of_an_example(name: str, tmp_path: Path) -> None:
    library, files, given, (frames, nodes, dt, sides, extent), words = READ[name]
    data = convert(example(library, files), tmp_path / "o.h5", split="1,0,0", **given)
    assert (data[0].frames, data[0].nodes, data[0].dt) == (frames, nodes, pytest.approx(dt, rel=5e-5))
    assert data[0].periodic == (sides is not None)
    if sides is not None:
        box = data.box(0)
        assert box is not None
        assert (box[1] - box[0]).tolist() == pytest.approx(sides, rel=1e-5)
    edges = {"CHARMM": 3365, "cubic box": 15, "VTK": 222, "image": 2700}  # bonds, edges of cells
    assert len(data.edges(0)[0]) // 2 == edges[name] if name in edges else True
    assert largest_extent(data) == pytest.approx(extent, rel=2e-3)
    warnings = data.meta["warnings"]
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))


def largest_extent(data: Trajectories) -> float:
    """Of all frames along an axis, as in the table."""
    x = np.concatenate([data.position(0, t) for t in range(data[0].frames)])
    return float(np.ptp(x, 0).max())


@pytest.mark.parametrize("name", REFUSED)
def test_example_that_is_refused(name: str, tmp_path: Path) -> None:
    library, files, given, words = REFUSED[name]
    with pytest.raises(Failure, match=words) as failure:
        convert(example(library, files), tmp_path / "o.h5", **given)
    assert "\n" not in str(failure.value)
