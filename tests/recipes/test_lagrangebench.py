"""recipes/lagrangebench: the flow of the stand-in against closed forms, its layout, the keys of a dataset, run.py."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import recipe_modules

from dist_egnn.commands import recipe
from dist_egnn.data.trajectories import Trajectories

RECIPE = Path(__file__).parents[2] / "recipes" / "lagrangebench"
K, RATE = 2 * np.pi, 8 * np.pi**2 * 0.01  # wave number; u decays with exp(−RATE t)


@pytest.fixture(scope="module")
def prepare() -> Any:
    """recipes/lagrangebench/prepare.py as a module."""
    return recipe_modules.load("lagrangebench", "prepare", "lagrangebench_prepare")


@pytest.fixture(scope="module")
def vortex(prepare: Any) -> Any:
    return sys.modules["vortex"]


@pytest.fixture(scope="module")
def data(prepare: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller stand-in."""
    path = tmp_path_factory.mktemp("lagrangebench") / "tgv.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prepare.COUNTS, "tiny", (2, 1, 1))
        patch.setitem(prepare.SIZES["tgv"], "tiny", (10, 16))
        prepare.run(["--scale", "tiny", "--seed", "3", "--out", str(path)])
    return path


def test_velocity_has_the_vortices_and_their_decay(vortex: Any) -> None:
    x = np.array([[0, 0.25], [0.25, 0], [0.25, 0.25], [0.125, 0.125]])
    expected = np.array([[-1, 0], [0, 1], [0, 0], [-0.5, 0.5]])
    for time in (0.0, 1.7):
        np.testing.assert_allclose(vortex.velocity(x, time), expected * np.exp(-RATE * time), atol=1e-15)


def test_velocity_solves_the_navier_stokes_equations(vortex: Any) -> None:
    """No divergence, and vorticity that is carried along and diffuses, by central differences at random points."""
    x, h, t = np.random.default_rng(0).uniform(size=(20, 2)), 1e-3, 0.5
    ex, ey = np.eye(2) * h

    def vorticity(y: np.ndarray, time: float = t) -> np.ndarray:
        across, along = (vortex.velocity(y + e, time) - vortex.velocity(y - e, time) for e in (ex, ey))
        assert np.abs(across[:, 0] + along[:, 1]).max() < 1e-12
        return (across[:, 1] - along[:, 0]) / (2 * h)

    slope = np.stack([vorticity(x + e) - vorticity(x - e) for e in (ex, ey)], axis=1) / (2 * h)
    change = (vorticity(x, t + h) - vorticity(x, t - h)) / (2 * h) + (vortex.velocity(x, t) * slope).sum(1)
    laplacian = (sum(vorticity(x + e) + vorticity(x - e) for e in (ex, ey)) - 4 * vorticity(x)) / h**2
    np.testing.assert_allclose(change, 0.01 * laplacian, atol=1e-3 * np.abs(change).max())


def test_particles_follow_the_exact_paths(vortex: Any) -> None:
    """They stay on their streamline; on y = 1/4 sin kx = −tanh(k ∫ decay dt) from x = 0."""
    path = vortex.advect(np.vstack([[0, 0.25], np.random.default_rng(1).uniform(size=(30, 2))]), 126)
    stream = np.cos(K * path).prod(2)
    assert np.abs(stream - stream[0]).max() < 1e-6
    distance = (1 - np.exp(-RATE * 0.04 * np.arange(126))) / RATE
    np.testing.assert_allclose(
        path[:, 0], np.stack([-np.arcsin(np.tanh(K * distance)) / K, np.full(126, 0.25)], 1), atol=1e-6
    )


def test_the_layout_is_read_back_equal(vortex: Any, data: Path) -> None:
    """Positions unwrapped, in the published units of time; nothing is a wall."""
    file, folder = Trajectories(data), data.with_name("tgv-stand-in")
    assert "stand-in" in json.loads((folder / "metadata.json").read_text())["solver"]
    assert [(t.split, t.frames, t.nodes, t.periodic) for t in file] == [
        (split, 16, 100, True) for split in ("train", "train", "valid", "test")
    ]
    for k, trajectory in enumerate(file):
        assert trajectory.dt == pytest.approx(0.04)
        expected = np.pad(vortex.trajectory(3, k, 10, 16)[0], ((0, 0), (0, 0), (0, 1)))
        actual = np.stack([file.position(k, t) for t in range(16)])
        np.testing.assert_allclose(actual, expected, atol=1e-6)
        assert not file.attribute(k, "fixed").any()
        assert np.ptp(actual, axis=(0, 1))[0] > 1  # some particle has crossed the boundary


@pytest.mark.parametrize("walls", [True, False])
def test_keys_of_a_dam_break(prepare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], walls: bool) -> None:
    """Walls are particles, or the box of a file that is periodic along no axis."""
    metadata = {"case": "DB", "dim": 2, "dx": 0.02, "dt": 3e-4, "write_every": 100, "g_ext_magnitude": 1.0}
    metadata |= {"bounds": [[0, 5.486], [0, 2.12]], "periodic_boundary_conditions": [walls] * 2}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    for split in ("train", "valid", "test"):
        with h5py.File(tmp_path / f"{split}.h5", "w") as file:
            file["00000/position"] = np.random.default_rng(0).uniform(0.1, 2, (1, 4, 2)).astype("f4").repeat(3, axis=0)
            file["00000/particle_type"] = [0, 0, walls, 2 * walls]
    prepare.run(["--source", str(tmp_path), "--out", str(tmp_path / "dam.h5")])
    keys = capsys.readouterr().out.splitlines()[-1].partition(": ")[2].split()
    expected = [
        "data.radius=0.029",
        "data.gravity=[0,-1.0,0]",
        *["data.periodic=false", "data.walls=box"] * (not walls),
    ]
    assert keys == expected[:1] + ["data.fixed=fixed", "data.features=[type/max]"] * walls + expected[1:]
    np.testing.assert_array_equal(Trajectories(tmp_path / "dam.h5").attribute(0, "fixed"), [0, 0, walls, walls])


def test_run_py_trains_and_rolls_out(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(RECIPE / "run.py"))
    small = [
        "--epochs",
        "1",
        f"data.path={data}",
        "data.radius=0.145",
        "data.frames=4",
        "model.hidden=8",
        "model.layers=1",
    ]
    settings = script["SETTINGS"] | {"rollout": 5}
    recipe.run_recipe(RECIPE, script["SCALES"], ["--out", str(tmp_path), *small], **settings)
    errors = pd.read_csv(tmp_path / "results.csv").set_index("prediction")["test MSE"]
    assert list(errors.index) == ["static", "linear", "EGNN"]
    steps = pd.read_csv(tmp_path / "EGNN" / "evaluate-rollout.csv")
    assert steps["step"].max() == 5
    assert np.isfinite(steps[["mse", "static_mse", "linear_mse", "energy_error"]]).all(axis=None)
    assert (steps["trajectory"] == 3).all()
    assert "rollouts of 5 steps" in capsys.readouterr().out


@pytest.mark.skipif(
    importlib.util.find_spec("pysplishsplash") is None, reason="pysplishsplash is not installed (extra fluid)"
)
def test_a_dam_breaks_and_loses_energy(prepare: Any) -> None:
    """Water stays in the basin, runs along the floor, and gains no energy but the engine's first expansion (1%)."""
    dam = sys.modules["dam"]
    position, kind = dam.trajectory(0, 1, 12.5, 50)
    wall, x = position[:, kind == 1], position[:, kind == 0] - 3 / 12.5
    assert (wall == wall[0]).all()
    assert x.shape[1] == np.prod(np.rint(dam.column(0, 1, 12.5) * 12.5) - 1)
    assert (x >= 0).all()
    assert (x <= dam.BASIN).all()
    velocity, height = np.diff(x, axis=0) / 0.03, (x[1:, :, 1] + x[:-1, :, 1]) / 2
    energy = ((velocity**2).sum(2) / 2 + height).mean(1)
    assert energy.max() < 1.01 * energy[0]
    assert x[-1, :, 0].max() > x[0, :, 0].max() + 1
