"""distegnn inspect: known neighbours, errors and gravity; a suggested config trains; stores, runs and other files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_egnn import Trajectories, Writer, config
from dist_egnn.commands.import_data import parse_options, run_import
from dist_egnn.commands.inspect_data import run_inspection
from dist_egnn.commands.train import run_training
from dist_egnn.errors import Failure
from dist_egnn.evaluate import inspection
from dist_egnn.evaluate.inspection import Inspection, inspect
from dist_egnn.planning import suggest

LATTICE = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), -1).reshape(-1, 3)
STEP = np.array([0.03, -0.02, 0.01])


def write(path: Path, position: np.ndarray, splits: Sequence[str] = ("train", "valid"), **more: Any) -> Path:
    with Writer(path, {}) as out:
        for split in splits:
            out.add(position, **{"split": split, "dt": 0.5, "source": "test"} | more)
    return path


def measured(path: Path) -> Inspection:
    return inspect(Trajectories(path))


def falling() -> tuple[np.ndarray, np.ndarray]:
    """A block (20, 216, 3) that falls by 9.81 and shakes, above 36 fixed nodes of type 1; type (252,)."""
    t = 0.01 * np.arange(20)[:, None, None]
    sign = np.tile([1.0, -1.0], 108)[:, None]
    shake = sign * np.random.default_rng(0).normal(size=(1, 3)) * 1e-3 * np.sin(60 * t)
    block = 0.1 * LATTICE + [0.2, 1.0, 0.2] + np.array([0, -4.905, 0]) * t**2 + shake
    floor = np.broadcast_to(0.1 * LATTICE[LATTICE[:, 1] == 0] + [0.2, 0.0, 0.2], (20, 36, 3))
    return np.concatenate([block, floor], 1), np.repeat([0.0, 1.0], [216, 36])


def test_a_moving_lattice_has_known_neighbours_and_errors(tmp_path):
    box = np.array([[0.0] * 3, [6.0] * 3])
    found = measured(write(tmp_path / "a.h5", LATTICE + STEP * np.arange(30)[:, None, None], box=box, periodic=True))
    shells = {1: 6, math.sqrt(2): 18, math.sqrt(3): 26, 2: 32}  # neighbours up to this distance
    for radius, counts in found.degrees:
        assert set(counts) == {max(n for distance, n in shells.items() if distance <= radius)}
    assert found.radius[1] == 18
    assert found.spacing == pytest.approx(1)
    h = np.array(found.horizons)
    np.testing.assert_allclose(found.errors["static"], (STEP @ STEP) * h**2 / 3, rtol=1e-4)
    assert found.errors["linear"].max() < 1e-10
    assert found.gravity is None


def test_a_suggested_config_trains(tmp_path, monkeypatch, capsys):
    """import, inspect --suggest, train; the block falls by 9.81, above nodes that never move."""
    monkeypatch.chdir(tmp_path)
    position, kind = falling()
    np.savez("a.npz", position=position, particle_type=kind, dt=0.01)
    texts = {"split": "0.5,0.25,0.25", "attributes": None, "fixed": "1", "box": "0,0,0,1,2,1", "repeat": None}
    run_import([Path("a.npz")], Path("a.h5"), parse_options(texts, dt=None, scale=1.0))
    run_inspection(Path("a.h5"), Path("a.html"), Path("a.yaml"))
    settings = config.load("a.yaml", ["train.epochs=2", "model.hidden=4", "model.layers=1"])
    d = settings.data
    assert (d.history, d.horizon, d.fixed, d.walls, d.gravity) == (2, 1, "fixed", "box", [0.0, -9.81, 0.0])
    assert (d.features, d.periodic, settings.partition.parts) == (["fixed", "type"], False, 1)
    assert 10 < measured(Path("a.h5")).radius[1] < 20
    page = Path("a.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 3
    assert "http://" not in page
    assert math.isfinite(run_training(settings)["best_valid_mse"])
    capsys.readouterr()
    run_inspection(Path("runs/a"), None, None)
    shown = capsys.readouterr().out
    assert "2 of 2" in shown
    assert "distegnn evaluate runs/a" in shown
    assert str(tmp_path / "a.h5") in shown
    for given, match in (
        ({"out": Path("b.html")}, "distegnn report"),
        ({"suggestion": Path("b.yaml")}, "trajectories.h5"),
    ):
        with pytest.raises(Failure, match=match):
            run_inspection(Path("runs/a"), **{"out": None, "suggestion": None} | given)
    with pytest.raises(Failure, match=r"--suggest a\.yaml"):
        run_inspection(Path("a.h5"), None, Path("a.yaml"))


def test_gravity_is_the_mean_acceleration_only_if_it_is_significant(tmp_path):
    draw, t = np.random.default_rng(1), 0.1 * np.arange(12)[:, None, None]
    charge = draw.choice([-1.0, 1.0], (216, 1))
    apart = measured(write(tmp_path / "a.h5", LATTICE + charge * np.array([0, 0.5, 0]) * t**2, dt=0.1))
    assert apart.gravity is None
    together = measured(write(tmp_path / "b.h5", LATTICE + np.array([0.3, -0.4, 0]) * t**2, dt=0.1))
    assert together.gravity is not None
    assert together.gravity.vector == [0.6, -0.8, 0.0]
    assert together.errors["ballistic"][-1] < 1e-6 * together.errors["linear"][-1]


def test_coarse_frames_give_a_one_shot_model(tmp_path):
    """Uncorrelated frames; attributes: a useful one, a large one, a constant, a number of each node."""
    draw = np.random.default_rng(2)
    attributes = {
        "b": draw.normal(size=216),
        "large": draw.normal(size=216) * 100,
        "one": np.ones(216),
        "id": np.arange(216.0),
    }
    position = LATTICE + 0.1 * draw.normal(size=(20, 216, 3))
    lines = suggest.suggest(measured(write(tmp_path / "a.h5", position, attributes=attributes)))
    given = {key: value for key, value, _ in lines}
    assert given["data.features"] == ["b", "large/max", "speed"]
    assert given["data.horizon"] == 5
    assert "data.history" not in given
    text = suggest.to_yaml(lines, ["a comment"])
    assert config.parse(text, "text").data.horizon == 5
    assert "'id' numbers the nodes; 'one' is constant" in text


@pytest.mark.parametrize(("nodes", "side", "periodic", "neighbours"), [(216, 6, True, 18), (36, 1, False, 12)])
def test_periodic_boxes(tmp_path, nodes, side, periodic, neighbours):
    """A lattice in its box, and one layer of it in a box that is too thin for any radius."""
    order = np.lexsort(LATTICE.T)
    shake = 1e-3 * np.sin(0.3 * np.arange(30))[:, None, None] * np.random.default_rng(0).normal(size=(nodes, 3))
    box = np.array([[0.0] * 3, [6.0, 6.0, side]])
    found = measured(write(tmp_path / "a.h5", LATTICE[order[:nodes]] + shake, box=box, periodic=True))
    assert {k: v for k, v, _ in suggest.suggest(found)}["data.periodic"] is periodic
    assert neighbours - 4 < found.radius[1] < neighbours + 4


def test_nodes_that_the_data_move_stay_fixed_in_a_simulator(tmp_path):
    position, kind = falling()
    position[:, kind == 1, 0] += 0.01 * np.sin(0.3 * np.arange(20))[:, None]
    given = {
        k: v for k, v, _ in suggest.suggest(measured(write(tmp_path / "a.h5", position, attributes={"fixed": kind})))
    }
    assert given["data.fixed"] == "fixed"
    assert given["data.history"] == 2


STILL = np.repeat(LATTICE[None], 8, 0)
LINE = STILL + STEP * np.arange(8)[:, None, None]


@pytest.mark.parametrize(
    ("position", "splits", "match"),
    [
        (LINE[:2], ("train", "valid"), "2 frames"),
        (LINE, ("train",), "'valid'; import it again with --split"),
        (LINE, ("train", "valid"), "straight lines"),
        (STILL, ("train", "valid"), "no node moves"),
        (LINE[:, :1].repeat(50, 1) ** 2, ("train", "valid"), "correct the positions"),
    ],
)
def test_data_that_no_run_can_learn_from(tmp_path, position, splits, match):
    with pytest.raises(Failure, match=match):
        suggest.suggest(measured(write(tmp_path / "a.h5", position, splits)))


def test_large_files_are_sampled_and_edges_of_a_mesh_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "POSITIONS", 3000)
    monkeypatch.setattr(suggest, "NODES", 100)
    monkeypatch.setattr(suggest.resources, "available_cores", lambda: 4.0)
    position = LATTICE + np.sin(0.1 * np.arange(60))[:, None, None] * STEP
    pairs = np.concatenate([np.stack([np.arange(216 - d), np.arange(d, 216)], 1) for d in (1, 6, 36)])
    found = measured(write(tmp_path / "a.h5", position, ["train"] * 20 + ["valid"], edges=pairs))
    assert len(found.numbers) == 1
    assert len(found.places) == 2
    given = {key: value for key, value, _ in suggest.suggest(found)}
    assert given["data.edges"] == "given"
    assert (given["partition.parts"], given["partition.halo"]) == (2, "exchange")


def test_stores(make_store, tmp_path, capsys):
    run_inspection(make_store(2), tmp_path / "a.html", None)
    shown = " ".join(capsys.readouterr().out.split())
    assert "train 6, valid 3, test 3" in shown
    assert "parts 2 by metis" in shown
    assert "edges cut" in shown
    assert (tmp_path / "a.html").read_text().count("<img ") == 2


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", "frame,id,x,y,z\n0,1,0,0,0\n1,1,0,0,1\n", "distegnn import .*a.csv --out mine.h5"),
        ("a.txt", "hello", "no trajectories.h5, store or run"),
        ("b.h5", None, "no such file"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(Failure, match=match):
        run_inspection(tmp_path / name, None, None)
