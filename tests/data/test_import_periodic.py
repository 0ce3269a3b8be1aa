"""distegnn import of periodic boxes that are triclinic, small or change: the neighbours are those among all images."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_import import convert

from dist_egnn import Failure, Trajectories, config
from dist_egnn.data.edges import EdgeRule, edges_of
from dist_egnn.data.samples import SampleSpec, Snapshot, read_sample
from dist_egnn.data.trajectories import box_sides
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.train import trainer

N, T = 12, 4
CELLS = {
    "cubic": np.diag([1.0, 1.2, 1.5]),
    "hexagonal": np.array([[1, 0, 0], [-0.5, 3**0.5 / 2, 0], [0, 0, 1.6]]),
    "dodecahedron": np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0.5**0.5]]),
    "octahedron": np.array([[1, 0, 0], [1 / 3, 8**0.5 / 3, 0], [-1 / 3, 2**0.5 / 3, 6**0.5 / 3]]),
}


def write_dump(path: Path, position: np.ndarray, cells: list[np.ndarray]) -> list[Path]:
    """A LAMMPS dump of positions (T, N, 3) in cells with the corner (0, 0, 0); atoms in another order in each frame."""
    with path.open("w", encoding="utf-8") as file:
        for t, (x, cell) in enumerate(zip(position, cells, strict=True)):
            (a, _, _), (xy, b, _), (xz, yz, c) = cell.tolist()
            low, high = min(0, xy, xz, xy + xz), max(0, xy, xz, xy + xz)
            file.write(f"ITEM: TIMESTEP\n{t}\nITEM: NUMBER OF ATOMS\n{len(x)}\nITEM: BOX BOUNDS xy xz yz pp pp pp\n")
            file.write(f"{low!r} {a + high!r} {xy!r}\n{min(0, yz)!r} {b + max(0, yz)!r} {xz!r}\n0 {c!r} {yz!r}\n")
            file.write("ITEM: ATOMS id mass x y z vx vy vz\n")
            for i in np.random.default_rng(t).permutation(len(x)):
                file.write(f"{i + 1} {i}.5 " + " ".join(map(repr, [*x[i].tolist(), *(x[i] / 2).tolist()])) + "\n")
    return [path]


def trajectory(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (T, N, 3) that leave the cell, and those wrapped into it."""
    draw = np.random.default_rng(2)
    share = draw.uniform(size=(N, 3)) + 0.1 * draw.normal(size=(N, 3)) * np.arange(T)[:, None, None]
    return share @ cell, (share % 1) @ cell


def all_image_lengths(x: np.ndarray, cell: np.ndarray, radius: float) -> list[np.ndarray]:
    """For each node the lengths of the edges from all images of all nodes, sorted; itself excepted, its images included."""
    images = x + (np.array(list(itertools.product(range(-4, 5), repeat=3))) @ cell)[:, None]
    distance = np.linalg.norm(x[:, None, None] - images, axis=3).reshape(len(x), -1)
    return [np.sort(row[(row <= radius) & (row > 0)]) for row in distance]


def lengths(data: Trajectories, t: int, radius: float) -> list[np.ndarray]:
    """The same of the nodes in a file, among nearest images."""
    x, side = data.position(0, t).astype(float), box_sides(data.box(0))  # type: ignore[arg-type]
    src, dst = edges_of(x, EdgeRule(radius=radius), side)
    r = x[dst] - x[src]
    length = np.linalg.norm(r - np.rint(r / side) * side, axis=1)
    return [np.sort(length[dst == i]) for i in range(len(x))]


@pytest.mark.parametrize(("name", "copies", "repeat"), [
    ("cubic", 1, None), ("cubic", 12, "3,2,2"), ("hexagonal", 2, None), ("hexagonal", 4, "2,1,1"),
    ("dodecahedron", 2, None), ("dodecahedron", 16, "2,2,2"), ("octahedron", 6, None),
])  # fmt: skip
def test_every_copy_has_the_neighbours_among_all_images(name: str, copies: int, repeat: str | None, tmp_path: Path):
    cell = CELLS[name]
    unwrapped, wrapped = trajectory(cell)
    given: dict[str, Any] = {"dt": 1, "split": "1,0,0", "repeat": repeat}
    data = convert(write_dump(tmp_path / "a.dump", wrapped, [cell] * T), tmp_path / "o.h5", **given)
    assert (data[0].nodes, data[0].periodic) == (copies * N, True)
    box = data.box(0)
    assert box is not None
    sides = box_sides(box)
    assert np.prod(sides) == pytest.approx(copies * np.linalg.det(cell), rel=1e-6)
    radius = 0.49 * float(sides.min())
    for t in range(T):
        found = lengths(data, t, radius)
        for i, expected in enumerate(all_image_lengths(wrapped[t], cell, radius)):
            for copy in range(copies):
                np.testing.assert_allclose(found[i + copy * N], expected, atol=2e-6)
        moved = data.position(0, t) - data.position(0, 0)
        np.testing.assert_allclose(moved, np.tile(unwrapped[t] - unwrapped[0], (copies, 1)), atol=1e-6)
        np.testing.assert_allclose(data.velocity(0, t), np.tile(wrapped[t] / 2, (copies, 1)), atol=1e-6)
    np.testing.assert_array_equal(data.attribute(0, "mass"), np.tile(np.arange(N) + 0.5, copies))
    assert any("triclinic" in note for note in data.meta["warnings"]) == (name != "cubic")


def test_a_box_that_changes(tmp_path: Path) -> None:
    """Refused, or each frame is scaled to the first box; nodes then move as they do in units of the box."""
    cell = CELLS["dodecahedron"]
    unwrapped, wrapped = trajectory(cell)
    factors = [1, 1.01, 0.98, 1.003]
    frames = np.stack([x * f for x, f in zip(wrapped, factors, strict=True)])
    paths = write_dump(tmp_path / "a.dump", frames, [cell * f for f in factors])
    with pytest.raises(Failure, match=r"frame 1: the periodic box changes by 1\.00%.*--rescale"):
        convert(paths, tmp_path / "o.h5", dt=1)
    data = convert(paths, tmp_path / "o.h5", dt=1, split="1,0,0", rescale=True)
    for t in range(T):
        moved = data.position(0, t) - data.position(0, 0)
        np.testing.assert_allclose(moved, np.tile(unwrapped[t] - unwrapped[0], (2, 1)), atol=1e-6)
    assert any("by up to 2.00%" in note for note in data.meta["warnings"])


def test_bonds_across_the_boundary(tmp_path: Path) -> None:
    """An edge to an image leads to the copy there."""
    x = np.array([[0.1, 0.5, 0.5], [0.9, 0.5, 0.5], [0.5, 0.5, 0.5]])
    arrays = {"position": np.stack([x, x]), "box": [[0, 0, 0], [1, 1, 1]], "edges": [[0, 1], [1, 2]], "dt": 1.0}
    np.savez(tmp_path / "a.npz", **arrays)
    data = convert([tmp_path / "a.npz"], tmp_path / "o.h5", periodic=True, repeat="3,2,1", split="1,0,0")
    src, dst = data.edges(0)
    assert len(src) == 2 * 2 * 6
    y, side = data.position(0, 0).astype(float), np.array([3.0, 2, 1])
    r = y[dst] - y[src]
    length = np.linalg.norm(r - np.rint(r / side) * side, axis=1)
    np.testing.assert_allclose(np.sort(length), [0.2] * 12 + [0.4] * 12, atol=1e-6)


def test_a_box_without_an_orthorhombic_supercell(tmp_path: Path) -> None:
    cell = np.array([[1, 0, 0], [0.17, 1, 0], [0.3, 0.1, 1]])
    _, wrapped = trajectory(cell)
    with pytest.raises(Failure, match=r"frame 0: the box is triclinic.*8 copies.*--no-periodic"):
        convert(write_dump(tmp_path / "a.dump", wrapped, [cell] * T), tmp_path / "o.h5", dt=1)


@pytest.mark.parametrize("kind", ["lammps", "ase"])
def test_a_slab(kind: str, tmp_path: Path) -> None:
    """Unwrapped and repeated along the periodic axes only; the side of the open one may change."""
    unwrapped = trajectory(np.eye(3))[0] + [0, 0, 1]
    slab = unwrapped % [1, 1, 1e9]
    if kind == "lammps":
        (path,) = write_dump(tmp_path / "a.dump", slab, [np.diag([1, 1, 3 + 0.1 * t]) for t in range(T)])
        path.write_text(path.read_text().replace("xy xz yz pp pp pp", "xy xz yz pp pp ff"))
    else:
        ase, io = pytest.importorskip("ase"), pytest.importorskip("ase.io")
        path = tmp_path / "a.extxyz"
        io.write(path, [ase.Atoms(f"H{N}", x, cell=[1, 1, 3 + 0.1 * t], pbc=[1, 1, 0]) for t, x in enumerate(slab)])
    data = convert([path], tmp_path / "o.h5", dt=1, split="1,0,0", repeat="2,1,1")
    assert (data[0].axes, data[0].nodes) == ((True, True, False), 2 * N)
    np.testing.assert_allclose(data.box(0), [[0, 0, 0], [2, 1, 3]], atol=1e-6)
    for t in range(T):
        moved = data.position(0, t) - data.position(0, 0)
        np.testing.assert_allclose(moved, np.tile(unwrapped[t] - unwrapped[0], (2, 1)), atol=1e-6)
    with pytest.raises(Failure, match=r"--repeat.*not periodic along every axis"):
        convert([path], tmp_path / "p.h5", dt=1, repeat="1,1,2")


def test_image_flags_of_lammps(tmp_path: Path) -> None:
    """x y z with ix iy iz are unwrapped by these, not by the shortest way."""
    unwrapped = np.array([[0.5, 0.5, 0.5], [0.9, 0.5, 0.5]]) + np.array([0.4, 0, 0]) * np.arange(T)[:, None, None]
    text = ""
    for t, x in enumerate(unwrapped):
        text += f"ITEM: TIMESTEP\n{t}\nITEM: NUMBER OF ATOMS\n2\nITEM: BOX BOUNDS pp pp pp\n" + "0 1\n" * 3
        text += "ITEM: ATOMS id x y z ix iy iz\n"
        for i, row in enumerate(x):
            text += f"{i} {row[0] % 1:.9f} 0.5 0.5 {int(row[0] // 1) + 7} 0 0\n"
    (tmp_path / "a.dump").write_text(text)
    data = convert([tmp_path / "a.dump"], tmp_path / "o.h5", dt=1, split="1,0,0")
    for t, x in enumerate(unwrapped):
        np.testing.assert_allclose(data.position(0, t) - [7, 0, 0], x, atol=1e-6)


def test_a_model_predicts_the_same_for_all_copies(tmp_path: Path) -> None:
    """Without virtual nodes."""
    _, wrapped = trajectory(CELLS["dodecahedron"])
    paths = write_dump(tmp_path / "a.dump", wrapped, [CELLS["dodecahedron"]] * T)
    data = convert(paths, tmp_path / "o.h5", dt=1, split="1,0,0", repeat="2,2,1")
    spec = SampleSpec(radius=0.7, horizon=1, features=("mass", "speed"), periodic=True)
    sample = read_sample(data, Snapshot("train", 0, 1), spec)
    words = ["data.path=x", "run.dir=x", "data.radius=0.7", "data.horizon=1", "model.name=EGNN", "model.hidden=8"]
    model = trainer.build_model(config.load(None, words), (2, 0), SingleProcess())
    with torch.no_grad():
        moved = model(sample)[0] - sample.ndata["x"]
    copies = moved.view(-1, N, 3)
    assert (len(copies), bool(moved.any())) == (8, True)
    np.testing.assert_allclose(copies, copies[:1].expand_as(copies), atol=1e-6)
