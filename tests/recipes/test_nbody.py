"""recipes/nbody: the physics against numpy and scipy, the random draw, the file, and the steps of its run.py."""

from __future__ import annotations

import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import recipe_modules
from processes import kill, wait_until
from scipy.integrate import solve_ivp

from dist_egnn import config
from dist_egnn.commands import recipe
from dist_egnn.data.samples import select_snapshots
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure

RECIPE = Path(__file__).parents[2] / "recipes" / "nbody"
FEW = ("--scale", "tiny", "--particles", "10", "--workers", "1")
BENCHMARK = {"frames": 50, "every": 100, "dt": 0.001, "limit": 100.0}


@pytest.fixture(scope="session")
def nbody():
    """recipes/nbody/prepare.py as a module, which imports coulomb.py."""
    pytest.importorskip("numba", reason="the extra nbody is not installed")
    return recipe_modules.load("nbody", "prepare", "nbody_prepare")


@pytest.fixture(scope="session")
def coulomb(nbody):
    return sys.modules["coulomb"]


@pytest.fixture(scope="session")
def data(nbody, tmp_path_factory) -> Path:
    """The tiny scale with 10 particles a system."""
    path = tmp_path_factory.mktemp("nbody") / "nbody.h5"
    nbody.run(["--out", str(path), *FEW])
    return path


def forces(x: np.ndarray, q: np.ndarray, limit: float) -> np.ndarray:
    """Clipped Coulomb forces (N, 3) from the definition."""
    total = np.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(x)):
            if i != j:
                total[i] += q[i] * q[j] * (x[i] - x[j]) / np.linalg.norm(x[i] - x[j]) ** 3
    return np.clip(total, -limit, limit)


def crowd(nodes: int, seed: int, size: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return size * rng.normal(size=(nodes, 3)), rng.normal(size=(nodes, 3)), rng.choice([-1.0, 1.0], nodes)


@pytest.mark.parametrize("nodes", [6, 7, 33])
def test_forces_are_clipped_component_by_component(coulomb, nodes):
    x, _, q = crowd(nodes, nodes, 0.05)
    expected = forces(x, q, 100.0)
    share = (np.abs(expected) == 100.0).mean()
    assert 0 < share < 1
    result = np.empty((3, nodes))
    coulomb.clipped_forces(np.ascontiguousarray(x.T), q, 100.0, result)
    np.testing.assert_allclose(result.T, expected, rtol=1e-12)


def test_without_a_writable_folder_for_the_cache(coulomb, monkeypatch):
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert coulomb.compiled(lambda x: x + 1)(1) == 2


def test_step_by_step_with_clipping(coulomb):
    x, v, q = crowd(6, 1, 0.03)
    result_x, result_v = coulomb.simulate(x, v, q, **BENCHMARK | {"frames": 4, "every": 5})
    clipped = 0
    for step in range(16):
        force = forces(x, q, 100.0)
        v = v + 0.001 * force
        x = x + 0.001 * v
        clipped += (np.abs(force) == 100.0).sum()
        if step % 5 == 0:
            np.testing.assert_allclose(result_x[step // 5], x, atol=1e-12)
            np.testing.assert_allclose(result_v[step // 5], v, atol=1e-11)
    assert clipped


def test_error_against_dop853_falls_with_the_step(coulomb):
    x, v, _ = crowd(6, 2, 2.0)
    q, time_ = np.array([1.0, -1, 1, 1, -1, 1]), 1.0

    def rate(_t: float, state: np.ndarray) -> np.ndarray:
        current = state.reshape(2, 6, 3)
        return np.stack([current[1], forces(current[0], q, np.inf)]).ravel()

    exact = solve_ivp(rate, (0, time_), np.stack([x, v]).ravel(), "DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    errors = []
    for steps in (100, 200, 400, 1000):  # the first frame is after one step
        xs, vs = coulomb.simulate(x, v, q, frames=2, every=steps - 1, dt=time_ / steps, limit=np.inf)
        errors.append(np.abs(np.stack([xs[1], vs[1]]).ravel() - exact).max())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)
    assert errors[3] < 2e-3


@pytest.mark.parametrize("clusters", [1, 3, 10])
def test_draw_has_the_published_distribution(nbody, clusters):
    """The mean squared distance of two particles of a system is 6 σ² + 6 (1 − 1/C) 30²/3."""
    drawn = [nbody.draw(0, k, 20, clusters) for k in range(2000)]
    positions, velocities, charges = (np.stack(part) for part in zip(*drawn, strict=True))
    assert set(charges.ravel()) == {-1.0, 1.0}
    assert abs(charges.mean()) < 0.02
    np.testing.assert_allclose(np.linalg.norm(velocities, axis=2), 0.5, rtol=1e-12)
    assert np.abs(velocities.mean((0, 1))).max() < 0.01  # isotropic
    distance = ((positions[:, 0] - positions[:, 1]) ** 2).sum(1).mean()
    sigma = (20 / 5) ** (1 / 3) + 0.1
    assert distance == pytest.approx(6 * (sigma**2 + (1 - 1 / clusters) * 300), rel=0.05)
    assert np.abs(positions.mean((0, 1))).max() < (0.05 if clusters == 1 else 1.0)
    assert positions.std() == pytest.approx(np.sqrt(sigma**2 + 300 * (clusters > 1)), rel=0.02)


def test_a_system_depends_on_seed_and_index_alone(nbody):
    small_systems = {"particles": 5, "clusters": 1}
    tiny = list(nbody.systems(1, seed=7, counts=(30, 10, 10), **small_systems))
    small = list(nbody.systems(1, seed=7, counts=(500, 200, 200), **small_systems))
    for one, other in zip(tiny, small, strict=True):
        np.testing.assert_array_equal(one["position"], other["position"])
    other = next(nbody.systems(1, seed=8, counts=(30, 10, 10), **small_systems))
    assert np.abs(tiny[0]["position"] - other["position"]).max() > 0.1
    assert np.abs(tiny[0]["position"] - tiny[1]["position"]).max() > 0.1


def test_file_and_config_select_frame_30_to_40(nbody, data):
    file, settings = Trajectories(data), config.load(RECIPE / "config.yaml").data
    assert [t.split for t in file] == ["train"] * 30 + ["valid"] * 10 + ["test"] * 10
    assert {(t.frames, t.nodes, t.velocity, t.attributes) for t in file} == {(50, 10, True, ("charge",))}
    assert file[0].dt == pytest.approx(0.1)
    chosen = select_snapshots(file, settings.horizon, settings.frames, settings.first_frame, settings.last_frame, 0)
    assert [(s.trajectory, s.frame) for s in chosen] == [(k, 30) for k in range(50)]
    assert (settings.horizon, settings.radius) == (10, np.inf)
    position, velocity, charge = nbody.draw(0, 3, 10, 1)
    np.testing.assert_array_equal(file.attribute(3, "charge"), charge)
    xs, vs = nbody.simulate(position, velocity, charge, **BENCHMARK)
    np.testing.assert_allclose(file.position(3, 0), position, atol=0.001)  # after one step
    np.testing.assert_array_equal(file.position(3, 40), xs[40].astype(np.float32))
    np.testing.assert_array_equal(file.velocity(3, 30), vs[30].astype(np.float32))


def test_the_number_of_workers_does_not_matter(nbody, data, tmp_path):
    nbody.run(["--out", str(tmp_path / "again.h5"), *FEW[:-1], "2"])
    assert (tmp_path / "again.h5").read_bytes() == data.read_bytes()
    nbody.run(["--out", str(tmp_path / "other.h5"), *FEW, "--seed", "1"])
    assert (tmp_path / "other.h5").read_bytes() != data.read_bytes()


def test_killed_and_resumed_gives_the_same_bytes(nbody, tmp_path, monkeypatch):
    """A finished part is not made again; parts of other settings are rejected."""
    out, arguments = tmp_path / "killed.h5", ["--scale", "tiny", "--particles", "60", "--workers", "1"]
    process = recipe_modules.start_first_part("nbody", "--out", out, *arguments)
    wait_until((tmp_path / "killed.h5.parts" / "000000.h5").exists, "the first part", process)
    assert kill(process) == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(Failure, match="other settings"):
        nbody.run(["--out", str(out), *arguments, "--seed", "1"])
    calls = []
    simulate = nbody.simulate
    monkeypatch.setattr(nbody, "simulate", lambda *start, **options: calls.append(1) or simulate(*start, **options))
    nbody.run(["--out", str(out), *arguments])
    assert len(calls) == 25
    nbody.run(["--out", str(tmp_path / "whole.h5"), *arguments])
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert len(calls) == 75


@pytest.mark.parametrize("wrong", [["--particles", "1"], ["--clusters", "2"], ["--scale", "huge"], ["--seed", "-1"]])
def test_invalid_options_give_one_line(nbody, tmp_path, capsys, wrong):
    assert nbody.preparation.main(nbody.run, ["--out", str(tmp_path / "x.h5"), *wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert wrong[0] in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


TINY = ["train.batch_size=10", "train.epochs=1", "model.hidden=8", "model.layers=1"]
SCALES = {"tiny": TINY, "small": [], "full": []}


def table(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "results.csv").set_index("prediction")


def test_run_py_from_source_to_table(nbody, tmp_path, check_run_py):
    """The command prepares the tiny scale, 100 particles per system."""
    check_run_py(RECIPE)
    assert (tmp_path / "run" / "nbody-tiny.h5.manifest.json").exists()


def test_every_recipe_has_valid_scales():
    """Each scale overrides only existing config keys."""
    recipes = sorted((RECIPE.parent).glob("*/run.py"))
    assert {file.parent.name for file in recipes} == {"fluid113k", "lagrangebench", "nbody", "protein", "water3d"}
    for file in recipes:
        script = runpy.run_path(str(file))
        assert set(script["SCALES"]) == {"tiny", "small", "full"}
        for keys in script["SCALES"].values():
            config.load(file.with_name(script.get("SETTINGS", {}).get("config", "config.yaml")), keys)


@pytest.mark.parametrize("file", sorted(RECIPE.parent.glob("*/simulator.yaml")), ids=lambda file: file.parent.name)
def test_simulators_of_recipes(file):
    """They predict one frame ahead, and know a box: as walls, or as periodic."""
    settings = config.load(file)
    assert (settings.data.horizon, settings.data.history, settings.model.predicts) == (1, 2, "acceleration")
    assert (settings.data.walls == "box") != settings.data.periodic


def test_recipe(data, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(data, out / "nbody-tiny.h5")
    arguments = ["--out", str(out), "--models", "Linear", "EGNN", "train.lr=1e-3"]
    recipe.run_recipe(RECIPE, SCALES, arguments)
    result = table(out)
    assert list(result.index) == ["static", "linear", "Linear (trained)", "EGNN (published)"]
    assert result.loc["static", "of static"] == result.loc["linear", "of linear"] == 1
    np.testing.assert_allclose(result["of static"], result["test MSE"] / result.loc["static", "test MSE"])
    np.testing.assert_allclose(result["of linear"], result["test MSE"] / result.loc["linear", "test MSE"])
    assert config.load(out / "EGNN" / "config.yaml").train.lr == 1e-3
    before = (out / "EGNN" / "best.pt").read_bytes()
    assert "trained already" not in capsys.readouterr().out
    recipe.run_recipe(RECIPE, SCALES, arguments)
    assert capsys.readouterr().out.count("trained already") == 2
    assert (out / "EGNN" / "best.pt").read_bytes() == before
    pd.testing.assert_frame_equal(table(out), result)
    with pytest.raises(Failure, match=r"train\.lr is 0\.001 there and 0\.002 now"):
        recipe.run_recipe(RECIPE, SCALES, [*arguments, "train.lr=2e-3"])
    shutil.copy(data, out / "nbody-small.h5")
    with pytest.raises(Failure, match=r"data\.path is .*nbody-tiny\.h5 there and .*nbody-small\.h5 now"):
        recipe.run_recipe(RECIPE, {**SCALES, "small": TINY}, [*arguments, "--scale", "small"])


def test_recipe_continues_after_an_interruption(data, tmp_path, monkeypatch):
    """Interrupted in the third of four epochs: the same weights as without an interruption."""
    import torch

    from dist_egnn.train import trainer

    arguments = [f"data.path={data}", "--models", "EGNN", "--epochs", "4"]
    recipe.run_recipe(RECIPE, SCALES, ["--out", str(tmp_path / "whole"), *arguments])
    steps = trainer.Trainer.steps

    def stopping(self):
        if self.state.epoch == 2:
            raise KeyboardInterrupt
        return steps(self)

    stopped = ["--out", str(tmp_path / "stopped"), *arguments]
    monkeypatch.setattr(trainer.Trainer, "steps", stopping)
    with pytest.raises(KeyboardInterrupt):
        recipe.run_recipe(RECIPE, SCALES, stopped)
    monkeypatch.setattr(trainer.Trainer, "steps", steps)
    recipe.run_recipe(RECIPE, SCALES, stopped)
    whole, resumed = (torch.load(tmp_path / name / "EGNN" / "last.pt")["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    pd.testing.assert_frame_equal(table(tmp_path / "whole"), table(tmp_path / "stopped"))


def test_recipe_on_two_parts(data, tmp_path):
    """The error of the static prediction does not depend on the partition."""
    recipe.run_recipe(RECIPE, SCALES, ["--out", str(tmp_path), f"data.path={data}", "--models", "EGNN", "--parts", "2"])
    assert (tmp_path / "store-2" / "manifest.yaml").exists()
    assert config.load(tmp_path / "EGNN" / "config.yaml").data.path == str(tmp_path / "store-2")
    file = Trajectories(data)
    moved = [file.position(k, 40) - file.position(k, 30) for k in range(40, 50)]
    assert table(tmp_path).loc["static", "test MSE"] == pytest.approx(np.square(moved).mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "0"], "--parts 0: must be at least 1"),
        (["run.dir=x"], "use --out instead"),
        (["--models", "EGNN", "model.name=x"], "use --models instead"),
        (["--modles", "EGNN"], "unrecognized arguments: --modles"),
        (["--models", "EGNM"], "did you mean EGNN"),
        (["train.epoch=1"], "did you mean train.epochs"),
    ],
)
def test_recipe_rejects_options_before_any_work(tmp_path, options, message):
    with pytest.raises(Failure, match=message):
        recipe.run_recipe(RECIPE, SCALES, ["--out", str(tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()
