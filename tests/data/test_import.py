"""distegnn import: files that other programs' libraries wrote, and what is wrong with files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest

from dist_egnn import Trajectories
from dist_egnn.commands.import_data import parse_options, run_import
from dist_egnn.data.graphs import radius_edges
from dist_egnn.errors import Failure

N, T = 60, 12
DRAW = np.random.default_rng(0)
START, SPEED = DRAW.uniform(size=(N, 3)), 0.01 * DRAW.normal(size=(N, 3))
X = START + SPEED * np.arange(T)[:, None, None] + 1e-4 * np.arange(T)[:, None, None] ** 2  # leaves the unit box
WRAPPED = X % 1
KIND = np.arange(N) % 2


def write_npz(folder: Path) -> list[Path]:
    np.savez(folder / "a.npz", position=X, velocities=np.gradient(X, axis=0), particle_type=KIND, dt=0.1)
    return [folder / "a.npz"]


def write_gns(folder: Path) -> list[Path]:
    pairs = np.empty((3, 2), object)
    for k in range(3):
        pairs[k, 0], pairs[k, 1] = X.astype(np.float32), KIND
    np.savez(folder / "gns.npz", gns_data=pairs)
    return [folder / "gns.npz"]


def write_lagrangebench(folder: Path) -> list[Path]:
    meta = {"dim": 3, "dt": 0.01, "write_every": 10, "bounds": [[0, 1]] * 3, "periodic_boundary_conditions": [True] * 3}
    (folder / "metadata.json").write_text(json.dumps(meta))
    for split in ("train", "valid", "test"):
        with h5py.File(folder / f"{split}.h5", "w") as file:
            file["00000/position"], file["00000/particle_type"] = WRAPPED.astype(np.float32), KIND
    return [folder]


def table() -> pd.DataFrame:
    """Rows of every frame in another order."""
    rows = []
    for k in range(T):
        p = np.random.default_rng(k).permutation(N)
        columns = dict(zip("xyz", X[k, p].T, strict=True))
        rows.append(pd.DataFrame({"frame": k, "time": 0.1 * k, "id": p, **columns, "type": KIND[p], "mass": 1.0 + p}))
    return pd.concat(rows)


def write_csv(folder: Path) -> list[Path]:
    table().to_csv(folder / "a.csv", index=False)
    return [folder / "a.csv"]


def write_parquet(folder: Path) -> list[Path]:
    pytest.importorskip("pyarrow")
    table().to_parquet(folder / "a.parquet")
    return [folder / "a.parquet"]


def write_lammps(folder: Path) -> list[Path]:
    with (folder / "a.dump").open("w") as file:
        for k in range(T):
            file.write(f"ITEM: TIMESTEP\n{k}\nITEM: NUMBER OF ATOMS\n{N}\nITEM: BOX BOUNDS pp pp pp\n0 1\n0 1\n0 1\n")
            file.write("ITEM: ATOMS id element type xs ys zs\n")
            for i in np.random.default_rng(k).permutation(N):
                file.write(f"{i + 1} C {KIND[i]} {' '.join(map(repr, WRAPPED[k, i].tolist()))}\n")
    return [folder / "a.dump"]


def write_vtp(folder: Path) -> list[Path]:
    pyvista = pytest.importorskip("pyvista")
    for k in range(T):
        mesh = pyvista.PolyData(X[k])
        mesh["Velocity"], mesh["type"] = SPEED, KIND
        mesh.save(folder / f"v_{k}.vtp")
    return sorted(folder.glob("*.vtp"))


def write_pvd(folder: Path) -> list[Path]:
    write_vtp(folder)
    sets = "".join(f'<DataSet timestep="{0.1 * k}" file="v_{k}.vtp"/>' for k in range(T))
    text = f'<?xml version="1.0"?><VTKFile type="Collection" version="0.1"><Collection>{sets}</Collection></VTKFile>'
    (folder / "v.pvd").write_text(text)
    return [folder / "v.pvd"]


def write_ase(folder: Path, name: str) -> list[Path]:
    ase = pytest.importorskip("ase")
    io = pytest.importorskip("ase.io")
    images = [
        ase.Atoms(f"H{N}", positions=WRAPPED[k], cell=[1] * 3, pbc=True, info={"time": 0.1 * k}) for k in range(T)
    ]
    for image in images:
        image.set_array("type", KIND)
    io.write(folder / name, images)
    return [folder / name]


def write_md(folder: Path, name: str) -> list[Path]:
    mda = pytest.importorskip("MDAnalysis")
    universe = mda.Universe.empty(N, trajectory=True)
    for key, value in {"names": ["C"] * N, "resnames": ["A"], "resids": [1], "types": KIND.astype(str)}.items():
        universe.add_TopologyAttr(key, value)
    universe.load_new(100 * WRAPPED.astype(np.float32), dimensions=[100, 100, 100, 90, 90, 90], dt=0.1)
    universe.atoms.write(folder / "a.gro")
    universe.atoms.write(folder / name, frames="all")
    return [folder / "a.gro", folder / name]


FORMATS: dict[str, tuple[Callable[..., list[Path]], dict[str, Any]]] = {
    "npz": (write_npz, {}),
    "gns": (write_gns, {"dt": 0.1}),
    "lagrangebench": (write_lagrangebench, {}),
    "csv": (write_csv, {}),
    "parquet": (write_parquet, {}),
    "lammps": (write_lammps, {"dt": 0.1}),
    "vtp": (write_vtp, {"dt": 0.1}),
    "pvd": (write_pvd, {}),
    "extxyz": (lambda folder: write_ase(folder, "a.extxyz"), {}),
    "traj": (lambda folder: write_ase(folder, "a.traj"), {"dt": 0.1}),
    "xtc": (lambda folder: write_md(folder, "a.xtc"), {"scale": 0.01}),
    "dcd": (lambda folder: write_md(folder, "a.dcd"), {"scale": 0.01, "dt": 0.1}),
}


def options(**given: Any) -> Any:
    texts = {name: given.pop(name, None) for name in ("split", "attributes", "fixed", "box", "repeat")}
    names = {"format", "stride", "dt", "select", "ids", "type", "periodic"}
    default = dict.fromkeys(names) | {"stride": 1, "scale": 1.0, "center": False, "rescale": False}
    return parse_options(texts | {"split": texts["split"] or "0.5,0.25,0.25"}, **(default | given))


def convert(paths: list[Path], out: Path, **given: Any) -> Trajectories:
    run_import(paths, out, options(**given))
    return Trajectories(out)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, tmp_path: Path) -> None:
    """Every frame of every format is the one that its library wrote, in order and unwrapped."""
    write, given = FORMATS[name]
    (tmp_path / "in").mkdir()
    data = convert(write(tmp_path / "in"), tmp_path / "out.h5", **given)
    assert {trajectory.split for trajectory in data} == {"train", "valid", "test"}
    frames = np.concatenate([[data.position(k, t) for t in range(data[k].frames)] for k in range(len(data))])
    expected = np.concatenate([X] * (len(frames) // T))
    assert np.abs(frames - expected - np.rint(frames[0] - expected[0])).max() < 2e-4 * (name == "xtc") + 2e-6
    assert data[0].dt == pytest.approx(0.1, rel=1e-4)
    if name not in ("xtc", "dcd", "traj"):  # .gro has no types, .traj only the fields that ASE knows
        np.testing.assert_array_equal(data.attribute(0, "type"), KIND)
    assert data[0].periodic == (name in ("lagrangebench", "lammps", "extxyz", "traj", "xtc", "dcd"))
    assert data[0].velocity == (name in ("npz", "vtp", "pvd"))


def test_types_units_and_dimensions(tmp_path: Path) -> None:
    """2-D positions get z = 0; --fixed, --stride, --scale and --attributes do what they say."""
    np.savez(tmp_path / "a.npz", position=X[..., :2], type=KIND, mass=np.arange(N), charge=np.ones(N), dt=0.5)
    data = convert(
        [tmp_path / "a.npz"], tmp_path / "o.h5", fixed="1", stride=2, scale=1e3, attributes="mass", split="1,0,0"
    )
    assert (data[0].frames, data[0].dt, data[0].attributes) == (6, 1.0, ("fixed", "mass", "type"))
    np.testing.assert_allclose(data.position(0, 1), np.pad(X[2, :, :2] * 1e3, ((0, 0), (0, 1))), rtol=1e-6)
    np.testing.assert_array_equal(data.attribute(0, "fixed"), KIND)
    assert data.meta["dim"] == 2


def test_a_flat_box_is_open_along_z(tmp_path: Path) -> None:
    """Nothing has an image along z in two dimensions, so that the radius may exceed half the depth of the box."""
    position = np.random.default_rng(0).uniform(0, 4, (1, 60, 2)) + 0.01 * np.arange(3)[:, None, None]
    np.savez(tmp_path / "a.npz", position=position, box=[[0, 0], [4, 4]], dt=1.0)
    data = convert([tmp_path / "a.npz"], tmp_path / "o.h5", periodic=True, split="1,0,0")
    assert data[0].axes == (True, True, False)
    side = data.sides(0, 1.5)
    src, dst = radius_edges(data.position(0, 0), 1.5, side)
    difference = np.abs(position[0][:, None] - position[0])
    near = np.linalg.norm(np.minimum(difference, 4 - difference), axis=2) < 1.5
    assert {*zip(src.tolist(), dst.tolist(), strict=True)} == {
        *zip(*np.nonzero(near & ~np.eye(60, dtype=bool)), strict=True)
    }


def test_offset_is_shifted(tmp_path: Path) -> None:
    """Positions that float32 cannot tell apart are shifted by a constant, which readers add again."""
    np.save(tmp_path / "far.npy", X + 5e6)
    data = convert([tmp_path / "far.npy"], tmp_path / "o.h5", dt=1.0)
    for k, first in enumerate((0, 6, 9)):  # split in time
        np.testing.assert_allclose(data.source_position(k, 1) - 5e6, X[first + 1], atol=1e-6)
    assert any("shifted" in warning for warning in data.meta["warnings"])


def test_time_that_varies(tmp_path: Path) -> None:
    """Attributes that vary are stored over time, others once."""
    np.savez(tmp_path / "a.npz", position=X, heat=np.arange(T)[:, None] + np.zeros((T, N)), mass=np.ones(N), dt=1.0)
    data = convert([tmp_path / "a.npz"], tmp_path / "o.h5")
    assert data[0].varying == ("heat",)
    assert data.attribute(1, "heat", 1).ravel()[0] == 7  # validation starts at frame 6


def lengths(data: Trajectories, k: int = 0, t: int = 0) -> np.ndarray:
    """Of the edges that the file gives."""
    src, dst = data.edges(k)
    return np.linalg.norm(data.position(k, t)[src] - data.position(k, t)[dst], axis=1)


@pytest.mark.parametrize("changed", [False, True])
def test_edges_of_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: bool) -> None:
    """Those of a plate of 4 x 3 squares and a rod, whose points are numbered in another order in each frame."""
    pyvista = pytest.importorskip("pyvista")
    plate = pyvista.ImageData(dimensions=(5, 4, 1)).cast_to_unstructured_grid()
    rod = pyvista.PolyData([[0, 0, 5.0], [0, 0, 7.0], [0, 0, 9.0]], lines=[3, 0, 1, 2])
    mesh = plate.merge(rod, merge_points=False)
    for k in range(4):
        order = np.random.default_rng(k).permutation(mesh.n_points)
        cells = [(int(kind), mesh.get_cell(c).point_ids) for c, kind in enumerate(mesh.celltypes)]
        cells = cells[: -1 if changed and k == 2 else None]
        flat = np.concatenate([[len(ids), *np.argsort(order)[ids]] for _, ids in cells])
        frame = pyvista.UnstructuredGrid(flat, [kind for kind, _ in cells], mesh.points[order] + [0, 0, 0.1 * k])
        frame["id"] = order
        frame.save(tmp_path / f"m_{k}.vtu")
    data = convert(sorted(tmp_path.glob("*.vtu")), tmp_path / "o.h5", dt=1.0, split="1,1,0")
    if changed:
        assert not data[0].edges
        assert re.search("warning: .*edges .*frame 2: none are imported", capsys.readouterr().out)
        return
    assert "33" in capsys.readouterr().out.split("\n")[3].split()
    for k in range(2):
        assert sorted(lengths(data, k).round(5)) == [1.0] * 2 * (4 * 4 + 5 * 3) + [2.0] * 2 * 2


def test_bonds_of_a_selection(tmp_path: Path) -> None:
    mda = pytest.importorskip("MDAnalysis")
    universe = mda.Universe.empty(N, trajectory=True)
    for key, value in {"names": ["C", "N"] * (N // 2), "resnames": ["A"], "resids": [1]}.items():
        universe.add_TopologyAttr(key, value)
    universe.add_TopologyAttr("bonds", [(i, i + 2) for i in range(N - 2)] + [(0, 1)])
    universe.load_new(100 * X.astype(np.float32))
    universe.atoms.write(tmp_path / "a.pdb", bonds="all")
    universe.atoms.write(tmp_path / "a.dcd", frames="all")
    given = {"dt": 0.1, "scale": 0.01}
    paths = [tmp_path / "a.pdb", tmp_path / "a.dcd"]
    whole, part = (convert(paths, tmp_path / f"{k}.h5", select=k, **given) for k in ("all", "name N"))
    assert len(whole.edges(0)[0]) == 2 * (N - 1)
    assert np.transpose(part.edges(0)).tolist()[:3] == [[1, 0], [0, 1], [2, 1]]
    np.testing.assert_allclose(lengths(part)[::2], np.linalg.norm(X[0, 1:-2:2] - X[0, 3::2], axis=1), atol=1e-6)


def test_edges_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", position=X, edges=np.array([[1, 0], [5, 9]]), dt=1.0)
    data = convert([tmp_path / "a.npz"], tmp_path / "o.h5")
    assert np.transpose(data.edges(2)).tolist() == [[1, 0], [0, 1], [9, 5], [5, 9]]
    np.savez(tmp_path / "b.npz", position=X, edges=np.array([[1, N]]), dt=1.0)
    with pytest.raises(Failure, match=r"b\.npz, frame 0: edges: edge 0, \[1, 60\]"):
        convert([tmp_path / "b.npz"], tmp_path / "p.h5")


def test_names_that_attributes_cannot_have(tmp_path: Path) -> None:
    """A field called velocity that is no vector, or speed, is an attribute and takes no other field's place."""
    fields = {"velocity": np.arange(N), "speed": np.ones(N), "heat [K]": np.full(N, 2.0)}
    np.savez(tmp_path / "a.npz", position=X, dt=1.0, **fields)
    data = convert([tmp_path / "a.npz"], tmp_path / "o.h5")
    assert (data[0].attributes, data[0].velocity) == (("heat _K_", "speed_", "velocity"), False)
    np.testing.assert_array_equal(data.attribute(0, "velocity"), np.arange(N))
    np.testing.assert_allclose(data.position(0, 0), X[0], rtol=1e-6)
    assert len(data.meta["warnings"]) == 2


@pytest.mark.parametrize(
    ("arrays", "given", "words"),
    [
        ({"position": X[:, :, :1]}, {}, ["a.npz", "(12, 60, 1)"]),
        ({"position": X, "odd": np.ones(5)}, {}, ["odd", "(5,)"]),
        ({"position": X[:1]}, {}, ["1 frame"]),
        ({"position": X}, {"dt": None}, ["--dt"]),
        ({"position": X}, {"fixed": "1"}, ["--fixed", "--type"]),
        ({"position": X}, {"attributes": "mass"}, ["--attributes mass"]),
        ({"position": X}, {"periodic": True}, ["--box"]),
        ({"position": X}, {"split": "0.9,0.05,0.05"}, ["--split"]),
        ({"position": X}, {"ids": "number"}, ["--ids number"]),
        ({"position": X}, {"format": "foo"}, ["--format foo", "table"]),
        ({"position": X, "id": np.zeros(N)}, {}, ["particle 0", "twice"]),
    ],
)
def test_one_line_for_what_is_wrong(arrays: Any, given: Any, words: list[str], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(Failure) as failure:
        convert([tmp_path / "a.npz"], tmp_path / "o.h5", **({"dt": 1.0} | given))
    assert all(word in str(failure.value) for word in words)
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "o.h5").exists()


def test_particles_that_come_and_go(tmp_path: Path) -> None:
    """Of particles with ids the missing one is named."""
    rows = table()
    rows[~((rows["frame"] == 4) & (rows["id"] == 9))].to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(Failure, match=r"frame 4.*59 particles.*particle 9"):
        convert([tmp_path / "a.csv"], tmp_path / "o.h5")


def test_a_trajectories_file_needs_no_import(small: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=rf"{small}: is a trajectories\.h5 already; .* data\.path={small}"):
        convert([small], tmp_path / "o.h5")


def test_missing_frame(tmp_path: Path) -> None:
    rows = table()
    rows[rows["frame"] != 5].to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(Failure, match=r"frame 4 to 5.*--dt"):
        convert([tmp_path / "a.csv"], tmp_path / "o.h5")


def test_gns_file_with_code_is_refused(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    objects = np.empty(1, object)
    objects[0] = Command()
    np.savez(tmp_path / "a.npz", gns_data=objects)
    with pytest.raises(Failure, match="not executed"):
        convert([tmp_path / "a.npz"], tmp_path / "o.h5", dt=1.0)
    assert not (tmp_path / "executed").exists()
