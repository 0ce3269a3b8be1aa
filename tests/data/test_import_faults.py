"""distegnn import on faulty files of each family: one line that names the file, or the right repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from test_import import convert

from dist_egnn import Failure

N, T, BOX = 60, 8, 10.0
DRAW = np.random.default_rng(1)
START, SPEED = DRAW.uniform(0, BOX, (N, 3)), 0.1 * DRAW.normal(size=(N, 3))
X = START + SPEED * np.arange(T)[:, None, None]  # leaves the box
Frames = Any  # T arrays (N, 2) or (N, 3)


def write_arrays(folder: Path, frames: Frames) -> list[Path]:
    equal = len({len(frame) for frame in frames}) == 1
    np.save(folder / "a.npy", np.stack(frames) if equal else np.array(frames, object), allow_pickle=True)
    return [folder / "a.npy"]


def write_lagrangebench(folder: Path, frames: Frames) -> list[Path]:
    dim = frames[0].shape[1]
    meta = {"dim": dim, "dt": 1, "bounds": [[0, BOX]] * dim, "periodic_boundary_conditions": [True] * dim}
    (folder / "metadata.json").write_text(json.dumps(meta))
    with h5py.File(folder / "train.h5", "w") as file:
        n = min(map(len, frames))
        file["00000/position"] = np.stack([frame[:n] for frame in frames]).astype(np.float32)
        file["00000/particle_type"] = np.zeros(len(frames[0]))
    return [folder / "train.h5"]


def write_vtk(folder: Path, frames: Frames) -> list[Path]:
    pyvista = pytest.importorskip("pyvista")
    for k, frame in enumerate(frames):
        pyvista.PolyData(three(frame)).save(folder / f"a{k}.vtp")
    return sorted(folder.glob("a*.vtp"))


def write_lammps(folder: Path, frames: Frames) -> list[Path]:
    with (folder / "a.dump").open("w") as file:
        for k, frame in enumerate(frames):
            file.write(f"ITEM: TIMESTEP\n{k}\nITEM: NUMBER OF ATOMS\n{len(frame)}\nITEM: BOX BOUNDS pp pp pp\n")
            file.write(f"0 {BOX}\n" * 3 + "ITEM: ATOMS x y z\n")
            np.savetxt(file, three(frame), "%.17g")
    return [folder / "a.dump"]


def write_ase(folder: Path, frames: Frames) -> list[Path]:
    ase, io = pytest.importorskip("ase"), pytest.importorskip("ase.io")
    images = [ase.Atoms(f"H{len(x)}", positions=three(x), cell=[BOX] * 3, pbc=True) for x in frames]
    io.write(folder / "a.extxyz", images, columns=["symbols", "positions"])
    return [folder / "a.extxyz"]


def write_mdanalysis(folder: Path, frames: Frames) -> list[Path]:
    mda = pytest.importorskip("MDAnalysis")
    n = [len(frame) for frame in frames]
    with mda.coordinates.DCD.DCDWriter(str(folder / "a.dcd"), min(n)) as out:
        for frame in frames:
            whole = mda.Universe.empty(min(n), trajectory=True)
            whole.load_new(three(frame)[: min(n)].astype(np.float32), dimensions=[BOX] * 3 + [90] * 3)
            out.write(whole.atoms)
    rows = (f"    1A    C{i + 1:8d}" + "   0.000" * 3 for i in range(max(n)))
    (folder / "a.gro").write_text("a\n{}\n{}\n1 1 1\n".format(max(n), "\n".join(rows)))
    return [folder / "a.gro", folder / "a.dcd"]


def write_table(folder: Path, frames: Frames) -> list[Path]:
    tables = [pd.DataFrame(x, columns=list("xyz")[: x.shape[1]]).assign(frame=k) for k, x in enumerate(frames)]
    pd.concat(tables).to_csv(folder / "a.csv", index=False)
    return [folder / "a.csv"]


WRITE = {name.removeprefix("write_"): value for name, value in globals().items() if name.startswith("write_")}
BOXED = ("lagrangebench", "lammps", "ase", "mdanalysis")  # files with a periodic box
SINGLE = ("lagrangebench", "mdanalysis")  # float32


def three(x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, 3 - x.shape[1])))


@pytest.fixture(params=WRITE)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def imported(family: str, folder: Path, frames: Frames) -> tuple[np.ndarray, list[str], dict[str, object]]:
    """Positions (T, N, 3), warnings and `meta` of the imported file."""
    (folder / "in").mkdir()
    data = convert(WRITE[family](folder / "in", frames), folder / "o.h5", split="1,0,0", dt=1.0)
    return np.stack([data.position(0, t) for t in range(data[0].frames)]), data.meta["warnings"], data.meta


def failure(family: str, folder: Path, frames: Frames) -> str:
    with pytest.raises(Failure) as error:
        imported(family, folder, frames)
    assert "\n" not in str(error.value)
    assert not (folder / "o.h5").exists()
    return str(error.value)


def test_shuffled_rows(family: str, tmp_path: Path) -> None:
    frames = [np.random.default_rng(k).permutation(x) for k, x in enumerate(X)]
    assert "--ids" in failure(family, tmp_path, frames)


def test_wrapped_positions(family: str, tmp_path: Path) -> None:
    """Unwrapped where the file has a periodic box; else the option that helps."""
    x, warnings, _ = imported(family, tmp_path, X % BOX)
    if family in BOXED:
        np.testing.assert_allclose(x - x[0], X - X[0], atol=1e-5)
    else:
        assert any("--periodic and --box" in warning for warning in warnings)


def test_offset(family: str, tmp_path: Path) -> None:
    """Shifted where the file has the digits, else refused."""
    if family in SINGLE:
        assert "float32" in failure(family, tmp_path, X + 5e6)
        return
    x, warnings, _ = imported(family, tmp_path, X + 5e6)
    np.testing.assert_allclose(x - x[0], X - X[0], atol=1e-5)
    assert any("shifted" in warning for warning in warnings)


def test_two_dimensions(family: str, tmp_path: Path) -> None:
    x, _, meta = imported(family, tmp_path, X[..., :2])
    np.testing.assert_allclose(x - x[0], np.pad(X - X[0], 0)[..., :3] * [1, 1, 0], atol=1e-5)
    assert meta["dim"] == 2


def test_particles_that_disappear(family: str, tmp_path: Path) -> None:
    words = {"arrays": "shape", "lagrangebench": "'type'", "mdanalysis": "number of atoms"}.get(family, "frame 5")
    assert words in failure(family, tmp_path, [x[: N - (t >= 5)] for t, x in enumerate(X)])


def test_nan(family: str, tmp_path: Path) -> None:
    frames = X.copy()
    frames[3, 7, 1] = np.nan
    words = failure(family, tmp_path, frames)
    assert "frame 3" in words or "a3.vtp" in words
    assert "particle 7" in words


@pytest.mark.parametrize("share", [0, 0.4, 0.97])
def test_truncated_and_empty(share: float, family: str, tmp_path: Path) -> None:
    """Refused, or a warning where the complete frames can be read (DCD)."""
    (tmp_path / "in").mkdir()
    paths = WRITE[family](tmp_path / "in", X)
    content = paths[-1].read_bytes()
    paths[-1].write_bytes(content[: int(len(content) * share)])
    if family == "mdanalysis" and share:
        data = convert(paths, tmp_path / "o.h5", split="1,0,0", dt=1.0)
        assert "announces 8 frames" in data.meta["warnings"][0]
        return
    with pytest.raises(Failure) as error:
        convert(paths, tmp_path / "o.h5", split="1,0,0", dt=1.0)
    assert paths[-1].name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["lammps", "ase", "table"])
def test_last_number_cut_short(family: str, tmp_path: Path) -> None:
    """A text that ends within its last number has the right number of numbers."""
    paths = WRITE[family](tmp_path, X)
    paths[0].write_bytes(
        paths[0].read_bytes()[: -1 if family == "table" else -4]
    )  # the table's last column has one digit
    assert "last line" in convert(paths, tmp_path / "o.h5", split="1,0,0", dt=1.0).meta["warnings"][-1]
